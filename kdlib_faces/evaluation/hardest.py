"""Evaluation room: the pairs a model fails on, for people to look at. NumPy only; row numbers, no images."""

from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import FloatArray, IntArray, unit_rows
from kdlib_faces.evaluation.protocols.age_gap import AgeGapProtocol
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs

__all__ = ["hardest_pairs"]

BLOCK = 512


def hardest_pairs(embeddings: Any, protocol: AgeGapProtocol, *, count: int) -> list[tuple[int, int, float, bool]]:
    """The least alike genuine pairs across the largest gap, and the most alike impostor pairs.

    At most one genuine and one impostor pair of an identity is given, so that one odd image does not fill the picture.

    Args:
        embeddings: (n, d), normalized or not, in the order of the protocol's identities.
        protocol: says which pairs are genuine, and which bin has the largest gap (`AgeGapProtocol.large_gap`).
        count: how many of each kind; fewer where there are not so many identities.

    Returns:
        (i, j, cosine, same): row numbers i < j; first the genuine pairs from the lowest score up, then the impostor
        pairs from the highest score down.

    Raises:
        ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.

    Examples:
        >>> protocol = AgeGapProtocol([0, 0, 1, 1], ages=[1, 40, 2, 50])
        >>> pairs = hardest_pairs([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 1.0]], protocol, count=1)
        >>> [(i, j, round(score, 3), same) for i, j, score, same in pairs]
        [(0, 1, 0.6, True), (1, 2, 0.8, False)]
    """
    check_number("hardest_pairs", "count", count, min=1, integer=True)
    unit = unit_rows("hardest_pairs", "embeddings", embeddings, rows=protocol.codes.size)
    return _genuine(unit, protocol, count) + _impostors(unit, protocol.codes, count)


def _genuine(unit: FloatArray, protocol: AgeGapProtocol, count: int) -> list[tuple[int, int, float, bool]]:
    name = protocol.large_gap()
    if name is None:
        return []
    i, j = genuine_pairs(protocol.codes)
    inside = protocol.bin_of(i, j) == protocol.names.index(name)
    i, j = i[inside], j[inside]
    scores = np.einsum("gd,gd->g", unit[i], unit[j])
    order = np.argsort(scores, kind="stable")
    _, first = np.unique(protocol.codes[i[order]], return_index=True)
    return [(int(i[k]), int(j[k]), float(scores[k]), True) for k in order[np.sort(first)[:count]]]


def _impostors(unit: FloatArray, codes: IntArray, count: int) -> list[tuple[int, int, float, bool]]:
    """Greedy from the top: take the most alike pair, leave both its identities out, repeat."""
    free = np.ones(codes.size, dtype=np.bool_)
    partner = np.zeros(codes.size, dtype=np.int64)
    score = np.full(codes.size, -np.inf)
    stale = np.arange(codes.size)
    found: list[tuple[int, int, float, bool]] = []
    while len(found) < count:
        for start in range(0, stale.size, BLOCK):
            rows = stale[start : start + BLOCK]
            scores = np.where((codes[rows, None] != codes) & free, unit[rows] @ unit.T, -np.inf)
            partner[rows] = scores.argmax(axis=1)
            score[rows] = scores.max(axis=1)
        i = int(np.where(free, score, -np.inf).argmax())
        j = int(partner[i])
        if not free[i] or not np.isfinite(score[i]):
            break
        found.append((min(i, j), max(i, j), float(score[i]), False))
        free &= (codes != codes[i]) & (codes != codes[j])
        # Only rows whose best partner has just gone need a new one.
        stale = np.flatnonzero(free & ~free[partner])
    return found
