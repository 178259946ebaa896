"""Evaluation room: who is it? Leave-one-image-out identification, the FG-NET protocol. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_ages,
    check_level,
    check_people,
    require,
    unit_rows,
)
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, PROBE_AGE_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.clustered import draws, rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, wilson

__all__ = ["BinRates", "LeaveOneOutResult", "leave_one_out", "leave_one_out_result"]

BLOCK = 512


@dataclass(frozen=True)
class BinRates:
    """Rates of the probes of one bin.

    Args:
        name: of the bin, `"5-10"`.
        probes: how many it holds.
        rates: by rank, with intervals over identities; None in an empty bin.
    """

    name: str
    probes: int
    rates: Mapping[int, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        entry: dict[str, Any] = {"name": self.name, "probes": self.probes}
        return entry | {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}


def _none() -> IntArray:
    return np.empty(0, dtype=np.int64)


def _nothing() -> FloatArray:
    return np.empty(0)


@dataclass(frozen=True)
class LeaveOneOutResult:
    """Rates of identification by rank.

    Args:
        rates: by rank, with Wilson's interval over probes (which takes them as independent: read it as a lower bound on
            the doubt where identities have many images).
        ranks_of_mates: (n,) place of each probe's best mate, from 1; 0 for a probe without a mate.
        probes: how many images there are; each is a probe once.
        mateless: how many have no other image of their identity; they count as misses, as the definition has it.
        by_age: rates by the probe's age; empty without ages.
        by_gap: rates by the years between the probe and its most alike mate; empty without ages.
        mates: (n,) row of each probe's most alike mate, -1 without one.
        mate_scores: (n,) their cosines, NaN without a mate.
        strangers: (n,) row of the most alike image of somebody else: who a missed probe was taken for.
        stranger_scores: (n,) their cosines.
    """

    rates: Mapping[int, Estimate]
    ranks_of_mates: IntArray
    probes: int
    mateless: int
    by_age: tuple[BinRates, ...] = ()
    by_gap: tuple[BinRates, ...] = ()
    mates: IntArray = field(default_factory=_none, repr=False, compare=False)
    mate_scores: FloatArray = field(default_factory=_nothing, repr=False, compare=False)
    strangers: IntArray = field(default_factory=_none, repr=False, compare=False)
    stranger_scores: FloatArray = field(default_factory=_nothing, repr=False, compare=False)

    def cmc(self, most: int) -> FloatArray:
        """(most,) rate at ranks 1, 2, ... `most`: the cumulative match characteristic."""
        check_number("LeaveOneOutResult.cmc", "most", most, min=1, integer=True)
        counts = np.bincount(np.minimum(self.ranks_of_mates, most + 1), minlength=most + 2)
        return np.cumsum(counts[1 : most + 1]) / self.probes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `{"rank1": ..., "probes": n}`, and the breakdowns where there are ages."""
        entry: dict[str, Any] = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry["probes"] = self.probes
        if self.by_age:
            entry["by_age"] = [rates.to_dict() for rates in self.by_age]
            entry["by_gap"] = [rates.to_dict() for rates in self.by_gap]
        return entry


def leave_one_out(embeddings: Any, identities: Any, ranks: Sequence[int] = (1,)) -> FloatArray:
    """Leave-one-image-out identification: each image is a probe, all the others are the gallery.

    A probe is identified at rank k when an image of its identity is among the k gallery images of largest cosine; equal
    cosines go by the lower row number. The probe itself is left out by its row number, not by its score, so a duplicate
    image stays in the gallery. A probe without a mate is a miss.

    Args:
        embeddings: (n, d), normalized or not.
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
    embeddings: Any,
    identities: Any,
    ranks: Sequence[int] = (1,),
    *,
    level: float = 0.95,
    ages: Any = None,
    age_bins: Sequence[float] = PROBE_AGE_STARTS,
    gap_bins: Sequence[float] = GAP_STARTS,
    replicates: int = 500,
    seed: int = 0,
) -> LeaveOneOutResult:
    """`leave_one_out` with intervals, the place of each probe's mate and the count of probes without one.

    Args:
        embeddings: (n, d), normalized or not.
        identities: (n,) whole numbers or strings.
        ranks: the k's, from 1 to n - 1.
        level: confidence of the intervals.
        ages: (n,) years; gives the rates by the probe's age and by the gap to its most alike mate.
        age_bins: rising lower ends of the bins of the probe's age, years.
        gap_bins: of the bins of the gap.
        replicates: bootstrap resamples over identities for the bins; 0 for none.
        seed: of the resamples.

    Returns:
        The rates.

    Raises:
        ValueError: as `leave_one_out`.

    Examples:
        >>> leave_one_out_result([[1.0, 0], [1, 0], [0, 1], [0, 1]], [7, 7, 8, 8]).to_dict()["rank1"]["value"]
        1.0
    """
    owner = "leave_one_out"
    codes, labels = check_people(owner, identities)
    unit = unit_rows(owner, "embeddings", embeddings, rows=codes.size)
    require(len(ranks) > 0, owner, "ranks must not be empty, got ()")
    for rank in ranks:
        check_number(owner, "ranks", rank, min=1, max=codes.size - 1, integer=True)
    check_level(owner, level)
    years = None if ages is None else check_ages(owner, ages, codes.size)
    starts = check_starts(owner, "age_bins", age_bins), check_starts(owner, "gap_bins", gap_bins)
    found = [_nearest(unit, codes, start) for start in range(0, codes.size, BLOCK)]
    places, mates, mate_scores, strangers, stranger_scores = (
        np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    rates = {}
    for rank in ranks:
        hits = int(((places >= 1) & (places <= rank)).sum())
        low, high = wilson(hits, codes.size, level=level)
        rates[int(rank)] = Estimate(hits / codes.size, low, high, int(codes.size))
    result = LeaveOneOutResult(
        rates,
        places,
        int(codes.size),
        int((places == 0).sum()),
        mates=mates,
        mate_scores=mate_scores,
        strangers=strangers,
        stranger_scores=stranger_scores,
    )
    if years is None:
        return result
    multiplicities = draws(owner, labels.size, replicates=replicates, seed=seed)

    def broken_down(bins: FloatArray, of: IntArray) -> tuple[BinRates, ...]:
        rows = []
        for number, name in enumerate(bin_names(bins)):
            inside = of == number
            each = {
                rank: rate_estimate(
                    ((places >= 1) & (places <= rank))[inside].astype(np.float64),
                    codes[inside],
                    multiplicities,
                    level=level,
                )
                for rank in rates
            }
            rows.append(BinRates(name, int(inside.sum()), each))
        return tuple(rows)

    gap = np.where(places == 0, -1, place(starts[1], np.abs(years - years[mates])))
    return replace(result, by_age=broken_down(starts[0], place(starts[0], years)), by_gap=broken_down(starts[1], gap))


def _nearest(
    unit: FloatArray, codes: IntArray, start: int
) -> tuple[IntArray, IntArray, FloatArray, IntArray, FloatArray]:
    """Of each probe of one block of rows: place of its best mate (from 1, 0 without one), the mate, the best stranger."""
    rows = np.arange(start, min(start + BLOCK, codes.size))
    scores = unit[rows] @ unit.T
    scores[np.arange(rows.size), rows] = -np.inf
    same = codes[rows, None] == codes
    mate_scores = np.where(same, scores, -np.inf)
    mates = mate_scores.argmax(axis=1)
    best = np.take_along_axis(mate_scores, mates[:, None], axis=1)
    ahead = (scores > best) | ((scores == best) & (np.arange(codes.size) < mates[:, None]))
    mated = np.isfinite(best[:, 0])
    places = np.where(mated, 1 + ahead.sum(axis=1), 0)
    scores[same] = -np.inf
    strangers = scores.argmax(axis=1)
    return (
        places,
        np.where(mated, mates, -1),
        np.where(mated, best[:, 0], np.nan),
        strangers,
        np.take_along_axis(scores, strangers[:, None], axis=1)[:, 0],
    )
