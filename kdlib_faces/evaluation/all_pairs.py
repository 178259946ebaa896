"""Evaluation room: the most alike strangers among all pairs of a set, found in one pass in little memory. NumPy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdlib_faces.evaluation._checks import FloatArray, IntArray, require
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, operating_point
from kdlib_faces.evaluation.search import dot_rows, product_error
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs

__all__ = ["ScoredPairs", "count_impostors", "global_points", "hardest_impostors", "threshold_at"]

ROWS = 512
MOST = 20_000_000


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of images with their scores.

    Args:
        left: (p,) row of one image.
        right: (p,) row of the other.
        scores: (p,) cosine.
    """

    left: IntArray
    right: IntArray
    scores: FloatArray


def count_impostors(codes: IntArray) -> int:
    """How many pairs of images are of two identities."""
    sizes = np.bincount(codes)
    return int((codes.size**2 - int((sizes.astype(object) ** 2).sum())) // 2)


def hardest_impostors(
    owner: str, unit: FloatArray, codes: IntArray, far: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """The impostor pairs that decide every threshold of a FAR up to `far`.

    Products are float32; what could be among the largest is taken again in float64.

    Args:
        owner: for errors.
        unit: (n, d) unit rows.
        codes: (n,) identities.
        far: the largest target.

    Returns:
        Rows i < j and the scores of the floor(far N) + 1 most alike pairs (all N where there are not more), falling.
    """
    total = count_impostors(codes)
    count = min(allowed_false_accepts(far, total) + 1, total)
    require(
        count <= MOST, owner, f"fars must allow at most {MOST} false accepts, got {count - 1} of {total} impostor pairs"
    )
    error = product_error(unit.shape[1])
    single = unit.astype(np.float32)
    first, second = genuine_pairs(codes)
    order = np.argsort(first, kind="stable")
    first, second = first[order], second[order]
    i, j, best = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    for start in range(0, len(unit) - 1, ROWS):
        stop = min(start + ROWS, len(unit))
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
    order = np.argsort(-best, kind="stable")
    return i[order], j[order], best[order]


def threshold_at(far: float, falling: FloatArray, total: int) -> float:
    """The exact rule's threshold from the largest scores of `total`, falling."""
    k = allowed_false_accepts(far, total)
    return float(falling[k]) if k < total else -np.inf


def global_points(
    owner: str, unit: FloatArray, codes: IntArray, genuine: FloatArray, fars: Sequence[float], level: float
) -> tuple[dict[float, TarAtFar], ScoredPairs]:
    """Thresholds set on all impostor pairs of a set, and the impostor pairs that decide them.

    Args:
        owner: for errors.
        unit: (n, d) unit rows.
        codes: (n,) identities.
        genuine: (g,) scores that are judged at the thresholds.
        fars: target false accept rates, at least one.
        level: confidence of Wilson's intervals.

    Returns:
        By target the operating point, and the most alike impostor pairs, falling, every false accept among them.
    """
    total = count_impostors(codes)
    hardest = ScoredPairs(*hardest_impostors(owner, unit, codes, max(fars)))
    points = {}
    for far in fars:
        threshold = threshold_at(far, hardest.scores, total)
        points[far] = operating_point(
            far,
            threshold,
            accepted=int((genuine > threshold).sum()),
            genuine=genuine.size,
            false_accepts=int((hardest.scores > threshold).sum()),
            impostors=total,
            level=level,
        )
    return points, hardest
