"""Evaluation room: are two images of one person? Accuracy over folds, as LFW publishes it. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import (
    BoolArray,
    FloatArray,
    IntArray,
    check_flags,
    check_labels,
    require,
    unit_rows,
)
from kdlib_faces.evaluation.roc import TarAtFar, far_name

__all__ = ["VerificationResult", "verify_pairs"]

GRID = np.arange(0, 4, 0.01)
FOLDS = 10


@dataclass(frozen=True)
class VerificationResult:
    """Accuracy over folds.

    Args:
        accuracy: mean of the folds' accuracies.
        std: their population standard deviation (ddof = 0), as published tables give it.
        fold_accuracies: (f,) accuracy of each held-out fold.
        thresholds: (f,) squared distance chosen on the other folds; a pair is accepted below it.
        threshold_rule: `"grid"` or `"exact"`.
        pairs: how many pairs there are.
        tar: operating points by target FAR, over all pairs; empty unless asked for.
    """

    accuracy: float
    std: float
    fold_accuracies: FloatArray
    thresholds: FloatArray
    threshold_rule: str
    pairs: int
    tar: Mapping[float, TarAtFar] = field(default_factory=dict)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean (ddof = 1), the figure of LFW's own results page."""
        return float(np.std(self.fold_accuracies, ddof=1)) / sqrt(self.fold_accuracies.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `tar` only where it was asked for."""
        entry: dict[str, Any] = {
            "accuracy": self.accuracy,
            "std": self.std,
            "folds": self.fold_accuracies.tolist(),
            "threshold_rule": self.threshold_rule,
            "pairs": self.pairs,
        }
        if self.tar:
            entry["tar"] = {far_name(far): point.estimate.to_dict() for far, point in self.tar.items()}
        return entry


def verify_pairs(
    left: Any,
    right: Any,
    same: Any,
    *,
    fold_ids: Any = None,
    threshold: Literal["grid", "exact"] = "grid",
) -> VerificationResult:
    """Verification accuracy over folds: the threshold is chosen on the others and applied to the one held out.

    Rows are made unit, d = sum (left - right)² in [0, 4], and a pair is called the same when d < t. For each fold t is
    the lowest of the best thresholds on the other folds.

    Args:
        left: (n, d) embeddings, normalised or not.
        right: (n, d) embeddings of the pairs' other images.
        same: (n,) whether each pair shows one identity.
        fold_ids: (n,) fold of each pair, whole numbers or strings; None cuts the order given into 10 contiguous folds,
            which is right only for a file that is ordered by folds (the `.bin` sets are; positives-first lists are
            not).
        threshold: `"grid"` tries 0, 0.01, ... 3.99, as insightface does, for figures that can be compared with
            published ones; `"exact"` tries the midpoints of the neighbouring distances of the other folds.

    Returns:
        The accuracies; they use every pair once.

    Raises:
        ValueError: an embedding that is not finite or zero (its row is named), lengths that differ, a fold of one kind.

    Examples:
        >>> left = np.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]]
        >>> right = np.eye(4)[[0, 1, 1, 2, 2, 3, 3, 0]]
        >>> verify_pairs(left, right, [1, 0] * 4, fold_ids=[0, 0, 1, 1, 2, 2, 3, 3]).accuracy
        1.0

    References:
        G. B. Huang et al., "Labeled Faces in the Wild", technical report 07-49, 2007. The figures agree with
        insightface's `verification.py`; FaceX-Zoo picks its threshold and its spread differently.
    """
    owner = "verify_pairs"
    check_choice(owner, "threshold", threshold, ("grid", "exact"))
    first = unit_rows(owner, "left", left)
    second = unit_rows(owner, "right", right, rows=first.shape[0], like="rows of left")
    require(
        first.shape[1] == second.shape[1], owner, f"right must be (n, {first.shape[1]}) like left, got {second.shape}"
    )
    truth = check_flags(owner, "same", same, first.shape[0])
    folds = _folds(owner, truth, fold_ids)
    distances = np.square(first - second).sum(axis=1)
    accuracies, thresholds = [], []
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        limit = _best_threshold(distances[~held], truth[~held], threshold)
        thresholds.append(limit)
        accuracies.append(float(np.mean((distances[held] < limit) == truth[held])))
    scores = np.asarray(accuracies)
    return VerificationResult(
        accuracy=float(scores.mean()),
        std=float(scores.std()),
        fold_accuracies=scores,
        thresholds=np.asarray(thresholds),
        threshold_rule=threshold,
        pairs=int(truth.size),
    )


def _best_threshold(distances: FloatArray, same: BoolArray, rule: str) -> float:
    """The lowest threshold of largest accuracy for `distance < threshold`."""
    if rule == "grid":
        candidates = GRID
    else:
        known = np.unique(distances)
        # A midpoint of two neighbouring floats can round to the lower one, which must stay accepted.
        middle = np.maximum((known[:-1] + known[1:]) / 2, np.nextafter(known[:-1], np.inf))
        candidates = np.concatenate([known[:1], middle, [np.nextafter(known[-1], np.inf)]])
    hits = np.searchsorted(np.sort(distances[same]), candidates, side="left")
    false_hits = np.searchsorted(np.sort(distances[~same]), candidates, side="left")
    return float(candidates[np.argmax(hits - false_hits)])


def _folds(owner: str, same: BoolArray, fold_ids: Any) -> IntArray:
    """Fold of each pair as 0 ... f-1; every fold must hold both kinds of pair."""
    if fold_ids is None:
        require(same.size >= 2 * FOLDS, owner, f"without fold_ids there must be {2 * FOLDS} pairs, got {same.size}")
        # The first n mod 10 folds take one pair more, as scikit-learn's KFold cuts.
        folds = np.repeat(np.arange(FOLDS), [part.size for part in np.array_split(np.arange(same.size), FOLDS)])
        names = np.arange(FOLDS)
        advice = "; is the file ordered by folds? If not, pass fold_ids"
    else:
        folds, names = check_labels(owner, "fold_ids", fold_ids, rows=same.size, like="the pairs")
        advice = ""
    require(len(names) >= 2, owner, f"fold_ids must name at least two folds, got only {names.tolist()[0]!r}")
    genuine, pairs = np.bincount(folds, weights=same), np.bincount(folds)
    for name, positive, count in zip(names.tolist(), genuine, pairs, strict=True):
        kind = "different" if positive == 0 else "same"
        good = 0 < positive < count
        require(
            good, owner, f"every fold must hold both kinds of pair, got fold {name!r} with only {kind} pairs{advice}"
        )
    return folds.astype(np.int64)
