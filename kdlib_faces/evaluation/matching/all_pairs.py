"""Thresholds on all impostor pairs of a set, found in one pass with little memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdlib_faces.evaluation._checks import require, rows_at_a_time
from kdlib_faces.evaluation._types import AnyArray, FloatArray, IntArray, SingleArray
from kdlib_faces.evaluation.matching.search import dot_rows, product_error
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, points_of_largest
from kdlib_faces.evaluation.statistics.clustered import rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs

ROWS = 512
MAX_FALSE_ACCEPTS = 20_000_000


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of images with their scores.

    Attributes:
        left: (p,) row of one image.
        right: (p,) row of the other image.
        scores: (p,) cosine.
    """

    left: IntArray
    right: IntArray
    scores: FloatArray

    @property
    def arrays(self) -> tuple[IntArray, IntArray, FloatArray]:
        """The three arrays."""
        return self.left, self.right, self.scores


def count_impostors(codes: IntArray) -> int:
    """Number of impostor pairs of a set."""
    sizes = np.bincount(codes)
    return int((codes.size**2 - int((sizes.astype(object) ** 2).sum())) // 2)


def rows_of_scores(embeddings: AnyArray) -> Iterator[tuple[int, SingleArray]]:
    """Each row i of (n, d) embeddings with its float32 cosines with the rows after it, computed in blocks."""
    unit = np.asarray(embeddings, dtype=np.float32)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    step = rows_at_a_time(ROWS, len(unit))
    for start in range(0, len(unit), step):
        scores = unit[start : start + step] @ unit[start:].T
        for i, row in enumerate(scores):
            yield start + i, row[i + 1 :]


def most_similar_pairs(owner: str, unit: FloatArray, codes: IntArray, far: float) -> ScoredPairs:
    """The floor(far N) + 1 impostor pairs of highest score (all N if there are no more), by falling score, then by rows.

    They decide every threshold of a FAR up to `far`; rows are i < j. Products of the unit rows (n, d) are float32; those
    that could be among the largest are computed again in float64.
    """
    total = count_impostors(codes)
    count = min(allowed_false_accepts(far, total) + 1, total)
    message = f"fars must allow at most {MAX_FALSE_ACCEPTS} false accepts, got {count - 1} of {total} impostor pairs"
    require(count <= MAX_FALSE_ACCEPTS, owner, message)
    error = product_error(unit.shape[1])
    single = unit.astype(np.float32)
    first, second = genuine_pairs(codes)
    order = np.argsort(first, kind="stable")
    first, second = first[order], second[order]
    i, j, best = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    step = rows_at_a_time(ROWS, len(unit))
    for start in range(0, len(unit) - 1, step):
        stop = min(start + step, len(unit))
        scores = single[start:stop] @ single[start:].T
        own = slice(*np.searchsorted(first, [start, stop]).tolist())
        scores[first[own] - start, second[own] - start] = -2
        scores[:, : stop - start][np.tril_indices(stop - start)] = -2
        floor = (float(best.min()) - error) if best.size >= count else -1.5
        good = scores > floor
        values = scores[good]
        if values.size > count:
            good &= scores >= float(np.partition(values, -count)[-count]) - 2 * error
        a, b = np.nonzero(good)
        a, b = a + start, b + start
        i, j = np.concatenate([i, a]), np.concatenate([j, b])
        best = np.concatenate([best, dot_rows(unit, a, unit, b)])
        if best.size > count:
            kept = np.argpartition(-best, count - 1)[:count]
            i, j, best = i[kept], j[kept], best[kept]
    by_rows = np.argsort(i * len(unit) + j)  # the order of pairs of equal score, whatever the size of a block
    order = by_rows[np.argsort(-best[by_rows], kind="stable")]
    return ScoredPairs(i[order], j[order], best[order])


def global_points(
    owner: str, unit: FloatArray, codes: IntArray, genuine: FloatArray, fars: Sequence[float], level: float
) -> tuple[dict[float, TarAtFar], ScoredPairs]:
    """Operating points of genuine scores (g,) at thresholds set on all impostor pairs of a set of unit rows (n, d).

    Also returns the impostor pairs of highest score, falling, with every false accept.
    """
    total = count_impostors(codes)
    pairs = most_similar_pairs(owner, unit, codes, max(fars))
    return points_of_largest(pairs.scores, total, genuine, fars, level), pairs


def rejection_rates(
    scores: FloatArray, codes: IntArray, points: Mapping[float, TarAtFar], resamples: IntArray, level: float
) -> dict[float, Estimate]:
    """Target FAR to the part of genuine scores (g,) rejected at its threshold, with intervals over identities."""
    return {
        far: rate_estimate(scores <= point.threshold, codes, resamples, level=level) for far, point in points.items()
    }
