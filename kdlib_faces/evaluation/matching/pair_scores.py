"""Scores of millions of given pairs, and exact operating points from them.

Pairs are given by row numbers and are dense among their rows (IJB-C: 15.7 million pairs of 23 thousand templates), so
matrix products of blocks of rows, from which the entries of the pairs are taken, are faster than single dot products.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kdlib_faces.evaluation._types import BoolArray, FloatArray, IntArray, SingleArray
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, nearest_threshold, operating_point

ROWS = 512
PAIRS = 8192
SPARSE = 100
"""A block with more cells per pair than this is computed pair by pair."""


def pair_cosines(unit: SingleArray, i: IntArray, j: IntArray) -> SingleArray:
    """(p,) float32 products of rows i and j of `unit` (n, d)."""
    out = np.empty(i.size, dtype=np.float32)
    low, high = np.minimum(i, j), np.maximum(i, j)
    used = np.zeros(len(unit), dtype=np.bool_)
    used[low] = True
    rows = np.flatnonzero(used)
    # Blocks of used rows; NumPy sorts 16-bit numbers by radix.
    number = np.zeros(len(unit), dtype=np.int64)
    number[rows] = np.arange(rows.size)
    blocks = -(-rows.size // ROWS)
    block_of = (number // ROWS).astype(np.uint16 if blocks < 2**16 else np.int64)[low]
    order = np.argsort(block_of, kind="stable")
    ends = np.cumsum(np.bincount(block_of))
    for block in range(blocks):
        chosen = order[ends[block - 1] if block else 0 : ends[block]]
        mine = rows[block * ROWS : (block + 1) * ROWS]
        place = number[low[chosen]] - block * ROWS
        theirs = high[chosen]
        start, stop = int(theirs.min()), int(theirs.max()) + 1
        if mine.size * (stop - start) > SPARSE * chosen.size:
            needed, column = np.unique(theirs, return_inverse=True)
            if mine.size * needed.size > SPARSE * chosen.size:
                out[chosen] = _one_by_one(unit, low[chosen], theirs)
                continue
            scores = unit[mine] @ unit[needed].T
        else:
            column = theirs - start
            scores = unit[mine] @ unit[start:stop].T
        out[chosen] = scores.reshape(-1)[place * scores.shape[1] + column]
    return out


def _one_by_one(unit: SingleArray, i: IntArray, j: IntArray) -> SingleArray:
    out = np.empty(i.size, dtype=np.float32)
    for start in range(0, i.size, PAIRS):
        part = slice(start, start + PAIRS)
        np.einsum("pd,pd->p", unit[i[part]], unit[j[part]], out=out[part])
    return out


def operating_points(
    scores: SingleArray,
    same: BoolArray,
    exact: Callable[[IntArray], FloatArray],
    error: float,
    fars: Sequence[float],
    *,
    mode: str,
    level: float,
) -> tuple[dict[float, TarAtFar], dict[float, BoolArray]]:
    """The rule of `tar_at_far` at each FAR from float32 scores (p,), with float64 scores where rounding could decide.

    `exact` maps numbers of pairs to their float64 scores, and `error` bounds the error of a rounded score. The mode
    `"nearest"` uses the rounded scores as they are. Also returns which genuine pairs are accepted at each FAR.
    """
    impostor, genuine = scores[~same], scores[same]
    numbers: dict[bool, IntArray] = {}
    allowed = min(max((allowed_false_accepts(far, impostor.size) for far in fars), default=0), impostor.size - 1)
    tail = -np.sort(-np.partition(impostor, impostor.size - 1 - allowed)[impostor.size - 1 - allowed :])

    def compare(kind: bool, values: SingleArray, limit: float) -> tuple[BoolArray, IntArray, FloatArray]:
        """Which scores are certainly above the limit; numbers and float64 scores of those near it."""
        near = np.flatnonzero((values >= limit - 3 * error) & (values <= limit + 3 * error))
        if near.size and kind not in numbers:
            numbers[kind] = np.flatnonzero(same == kind)
        return values > limit + 3 * error, near, exact(numbers[kind][near]) if near.size else np.empty(0)

    points, accepted = {}, {}
    for far in fars:
        k = allowed_false_accepts(far, impostor.size)
        threshold = float(tail[k]) if k < impostor.size else -np.inf
        if mode == "nearest" or k >= impostor.size:
            threshold = threshold if k >= impostor.size else nearest_threshold(impostor, threshold, far)
            accepted[far], false_accepts = genuine > threshold, int(np.count_nonzero(impostor > threshold))
        else:
            above, _, scored = compare(False, impostor, threshold)
            count = int(np.count_nonzero(above))
            threshold = float(-np.sort(-scored)[k - count])
            false_accepts = count + int((scored > threshold).sum())
            accepted[far], near, scored = compare(True, genuine, float(tail[k]))
            accepted[far][near] = scored > threshold
        points[far] = operating_point(
            far,
            threshold,
            accepted=int(np.count_nonzero(accepted[far])),
            genuine=genuine.size,
            false_accepts=false_accepts,
            impostors=impostor.size,
            mode=mode,
            level=level,
        )
    return points, accepted
