"""Evaluation room: scores of millions of given pairs, and exact operating points from them. NumPy only.

Pairs are given by row numbers and dense among their rows (IJB-C: 15.7 million pairs of 23 thousand templates), so a
matrix product of blocks of rows, of which the pairs' entries are picked, beats going pair by pair.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kdlib_faces.evaluation._checks import BoolArray, FloatArray, IntArray
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, operating_point

__all__ = ["operating_points", "pair_cosines"]

ROWS = 512
PAIRS = 8192
SPARSE = 100
"""A block with more cells than this for each pair goes pair by pair."""


def pair_cosines(unit: npt.NDArray[np.float32], i: IntArray, j: IntArray) -> npt.NDArray[np.float32]:
    """(p,) float32 products of rows i and j of `unit` (n, d)."""
    out = np.empty(i.size, dtype=np.float32)
    low, high = np.minimum(i, j), np.maximum(i, j)
    used = np.zeros(len(unit), dtype=np.bool_)
    used[low] = True
    rows = np.flatnonzero(used)
    # Blocks of used rows: 16 bits sort by radix.
    number = np.zeros(len(unit), dtype=np.int64)
    number[rows] = np.arange(rows.size)
    blocks = -(-rows.size // ROWS)
    block_of = (number // ROWS).astype(np.uint16 if blocks < 2**16 else np.int64)[low]
    order = np.argsort(block_of, kind="stable")
    ends = np.cumsum(np.bincount(block_of, minlength=blocks))
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


def _one_by_one(unit: npt.NDArray[np.float32], i: IntArray, j: IntArray) -> npt.NDArray[np.float32]:
    out = np.empty(i.size, dtype=np.float32)
    for start in range(0, i.size, PAIRS):
        part = slice(start, start + PAIRS)
        np.einsum("pd,pd->p", unit[i[part]], unit[j[part]], out=out[part])
    return out


def operating_points(
    scores: npt.NDArray[np.float32],
    same: BoolArray,
    exact: Callable[[IntArray], FloatArray],
    error: float,
    fars: Sequence[float],
    *,
    mode: str,
    level: float,
) -> dict[float, TarAtFar]:
    """The rule of `tar_at_far` at each FAR, from float32 scores, settled in float64 where rounding could decide.

    Args:
        scores: (p,) rounded scores.
        same: (p,) which are genuine.
        exact: the float64 scores of some pairs, by their number.
        error: a bound on how far a rounded score is off.
        fars: the targets.
        mode: `"exact"`; or `"nearest"`, which takes the rounded scores as they are.
        level: confidence of the intervals.
    """
    impostor, genuine = scores[~same], scores[same]
    numbers: dict[bool, IntArray] = {}
    most = max((allowed_false_accepts(far, impostor.size) for far in fars), default=0)
    most = min(most, impostor.size - 1)
    tail = -np.sort(-np.partition(impostor, impostor.size - 1 - most)[impostor.size - 1 - most :])

    def unsure(kind: bool, values: npt.NDArray[np.float32], limit: float) -> tuple[int, FloatArray]:
        """How many are above the limit for certain, and the float64 scores of those that may be."""
        near = np.flatnonzero((values >= limit - 3 * error) & (values <= limit + 3 * error))
        if near.size and kind not in numbers:
            numbers[kind] = np.flatnonzero(same == kind)
        above = int(np.count_nonzero(values > limit + 3 * error))
        return above, exact(numbers[kind][near]) if near.size else np.empty(0)

    points = {}
    for far in fars:
        k = allowed_false_accepts(far, impostor.size)
        threshold = float(tail[k]) if k < impostor.size else -np.inf
        if mode == "nearest" or k >= impostor.size:
            threshold = threshold if k >= impostor.size else _nearest(impostor, threshold, far)
            accepted, false_accepts = (int(np.count_nonzero(x > threshold)) for x in (genuine, impostor))
        else:
            above, near = unsure(False, impostor, threshold)
            threshold = float(-np.sort(-near)[k - above])
            false_accepts = above + int((near > threshold).sum())
            sure, doubtful = unsure(True, genuine, float(tail[k]))
            accepted = sure + int((doubtful > threshold).sum())
        points[far] = operating_point(
            far,
            threshold,
            accepted=accepted,
            genuine=genuine.size,
            false_accepts=false_accepts,
            impostors=impostor.size,
            mode=mode,
            level=level,
        )
    return points


def _nearest(impostor: npt.NDArray[np.float32], exact: float, far: float) -> float:
    """As `tar_at_far`'s rule of the same name."""
    fewer, more = int(np.count_nonzero(impostor > exact)), int(np.count_nonzero(impostor >= exact))
    if abs(fewer / impostor.size - far) < abs(more / impostor.size - far):
        return exact
    below = impostor[impostor < exact]
    return float(below.max()) if below.size else -np.inf
