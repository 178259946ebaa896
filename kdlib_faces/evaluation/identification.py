"""Evaluation room: who is it? Leave-one-image-out identification, the FG-NET protocol. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import FloatArray, IntArray, check_labels, require, unit_rows
from kdlib_faces.evaluation.intervals import Estimate, wilson

__all__ = ["LeaveOneOutResult", "leave_one_out", "leave_one_out_result"]

BLOCK = 512


@dataclass(frozen=True)
class LeaveOneOutResult:
    """Rates of identification by rank.

    Args:
        rates: by rank, with Wilson's interval over probes (which takes them as independent: read it as a lower bound on
            the doubt where identities have many images).
        ranks_of_mates: (n,) place of each probe's best mate, from 1; 0 for a probe without a mate.
        probes: how many images there are; each is a probe once.
        mateless: how many have no other image of their identity; they count as misses, as the definition has it.
    """

    rates: Mapping[int, Estimate]
    ranks_of_mates: IntArray
    probes: int
    mateless: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `{"rank1": ..., "probes": n}`."""
        entry: dict[str, Any] = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry["probes"] = self.probes
        return entry


def leave_one_out(embeddings: Any, identities: Any, ranks: Sequence[int] = (1,)) -> FloatArray:
    """Leave-one-image-out identification: each image is a probe, all the others are the gallery.

    A probe is identified at rank k when an image of its identity is among the k gallery images of largest cosine; equal
    cosines go by the lower row number. The probe itself is left out by its row number, not by its score, so a duplicate
    image stays in the gallery. A probe without a mate is a miss.

    Args:
        embeddings: (n, d), normalised or not.
        identities: (n,) whole numbers or strings.
        ranks: the k's, from 1 to n - 1.

    Returns:
        (len(ranks),) the rate at each rank, in the order asked.

    Raises:
        ValueError: an embedding that is not finite or zero (its row is named), fewer than two identities, no identity
            with two images, a rank out of range.

    Examples:
        >>> embeddings = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.3]]
        >>> leave_one_out(embeddings, ["a", "a", "b", "b", "b"], ranks=(1, 3)).tolist()
        [0.8, 1.0]

    References:
        FG-NET's usual protocol in age-invariant face recognition, with a network that is not adapted between rounds.
    """
    result = leave_one_out_result(embeddings, identities, ranks)
    return np.array([result.rates[rank].value for rank in ranks], dtype=np.float64)


def leave_one_out_result(
    embeddings: Any, identities: Any, ranks: Sequence[int] = (1,), *, level: float = 0.95
) -> LeaveOneOutResult:
    """`leave_one_out` with intervals, the place of each probe's mate and the count of probes without one.

    Args:
        embeddings: (n, d), normalised or not.
        identities: (n,) whole numbers or strings.
        ranks: the k's, from 1 to n - 1.
        level: confidence of the intervals.

    Returns:
        The rates.

    Raises:
        ValueError: as `leave_one_out`.

    Examples:
        >>> leave_one_out_result([[1.0, 0], [1, 0], [0, 1], [0, 1]], [7, 7, 8, 8]).to_dict()["rank1"]["value"]
        1.0
    """
    owner = "leave_one_out"
    codes, labels = check_labels(owner, "identities", identities)
    unit = unit_rows(owner, "embeddings", embeddings, rows=codes.size)
    sizes = np.bincount(codes)
    require(labels.size >= 2, owner, f"identities must hold at least two identities, got only {labels.tolist()[0]!r}")
    require(bool((sizes >= 2).any()), owner, "identities must hold one with two images, got one image of each")
    require(len(ranks) > 0, owner, "ranks must not be empty, got ()")
    for rank in ranks:
        check_number(owner, "ranks", rank, least=1, most=codes.size - 1, integer=True)
    places = np.concatenate([_mate_places(unit, codes, start) for start in range(0, codes.size, BLOCK)])
    rates = {}
    for rank in ranks:
        found = int(((places >= 1) & (places <= rank)).sum())
        low, high = wilson(found, codes.size, level=level)
        rates[int(rank)] = Estimate(found / codes.size, low, high, int(codes.size))
    return LeaveOneOutResult(rates, places, int(codes.size), int((places == 0).sum()))


def _mate_places(unit: FloatArray, codes: IntArray, start: int) -> IntArray:
    """Place (from 1) of the best mate of each probe of one block of rows, 0 without a mate."""
    rows = np.arange(start, min(start + BLOCK, codes.size))
    scores = unit[rows] @ unit.T
    scores[np.arange(rows.size), rows] = -np.inf
    mates = np.where(codes[rows, None] == codes, scores, -np.inf)
    first = mates.argmax(axis=1)
    best = np.take_along_axis(mates, first[:, None], axis=1)
    ahead = (scores > best) | ((scores == best) & (np.arange(codes.size) < first[:, None]))
    return np.where(np.isfinite(best[:, 0]), 1 + ahead.sum(axis=1), 0)
