"""Rules that choose the threshold of a fold on the other folds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kdlib_faces.evaluation._types import BoolArray, FloatArray, JsonDict
from kdlib_faces.evaluation.roc import allowed_false_accepts, decimal_rate, kth_largest

Rule = Literal["grid", "exact", "facexzoo"]
GRID = np.arange(0, 4, 0.01)
FINE_GRID = np.arange(0, 4, 0.001)
STEPS = 1000


@dataclass(frozen=True)
class FoldTar:
    """TAR at a FAR over folds: the threshold of each fold comes from the impostor pairs of the other folds.

    Attributes:
        tar: Mean of the folds' TARs.
        std: Their population standard deviation.
        far: Mean of the FARs measured on the held-out folds.
        fold_tars: (f,) TAR of each fold.
        thresholds: (f,) squared distance below which a pair is accepted.
        target: Target false accept rate.
        resolvable: Whether the impostor pairs of the other folds allow one false accept, in every fold.
        rule: `"grid"` (interpolated on the published grid) or `"exact"`.
    """

    tar: float
    std: float
    far: float
    fold_tars: FloatArray
    thresholds: FloatArray
    target: float
    resolvable: bool
    rule: str

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        names = ("tar", "std", "far", "target", "resolvable", "rule")
        return {name: getattr(self, name) for name in names} | {"folds": self.fold_tars.tolist()}


def best_grid(distances: FloatArray, same: BoolArray) -> float:
    """The lowest of 0, 0.01, ... 3.99 with the largest accuracy of `distance < threshold`."""
    return _best(distances, same, GRID)


def best_exact(distances: FloatArray, same: BoolArray) -> float:
    """The lowest midpoint of neighboring distances with the largest accuracy."""
    known = np.unique(distances)
    # A midpoint of two neighboring floats can round to the lower one, which must stay accepted.
    middle = np.maximum((known[:-1] + known[1:]) / 2, np.nextafter(known[:-1], np.inf))
    return _best(distances, same, np.concatenate([known[:1], middle, [np.nextafter(known[-1], np.inf)]]))


def _best(distances: FloatArray, same: BoolArray, candidates: FloatArray) -> float:
    hits = np.searchsorted(np.sort(distances[same]), candidates, side="left")
    false_hits = np.searchsorted(np.sort(distances[~same]), candidates, side="left")
    return float(candidates[np.argmax(hits - false_hits)])


def best_facexzoo(scores: FloatArray, same: BoolArray) -> float:
    """The lowest cosine with the largest TPR - FPR in 1000 steps from the smallest to the largest score."""
    low, high = scores.min(), scores.max()
    candidates = low + (high - low) / STEPS * np.arange(1, STEPS + 1)
    positive, negative = np.sort(scores[same]), np.sort(scores[~same])
    tpr = (positive.size - np.searchsorted(positive, candidates, side="right")) / positive.size
    fpr = (negative.size - np.searchsorted(negative, candidates, side="right")) / negative.size
    return float(candidates[np.argmax(tpr - fpr)])


BEST: dict[Rule, Callable[[FloatArray, BoolArray], float]] = {
    "grid": best_grid,
    "exact": best_exact,
    "facexzoo": best_facexzoo,
}
"""Rule to the function that chooses a threshold."""


def grid_at_far(impostor: FloatArray, far: float) -> float:
    """insightface's threshold for its `val`: linear in the FAR between two points of 0, 0.001, ... 3.999.

    The FAR is a step function, which SciPy's `interp1d` rejects since version 1.9. Before, it interpolated between the
    last grid point of at most this FAR and the next one, as this function does. It returns 0, which accepts nothing, if
    the grid never reaches the FAR.
    """
    far = decimal_rate(far)
    rates = np.searchsorted(np.sort(impostor), FINE_GRID, side="left") / impostor.size
    if rates[-1] < far:
        return 0.0
    after = int(np.searchsorted(rates, far, side="right"))
    if after == rates.size:
        return float(FINE_GRID[-1])
    low, high = rates[after - 1], rates[after]
    return float(FINE_GRID[after - 1] + (far - low) / (high - low) * (FINE_GRID[after] - FINE_GRID[after - 1]))


def exact_at_far(impostor: FloatArray, far: float) -> float:
    """The (k+1)-th smallest impostor distance, k = floor(far N): `distance < threshold` accepts at most k of them."""
    return -kth_largest(-impostor, allowed_false_accepts(far, impostor.size))
