"""Evaluation room: are two images of one person? Accuracy over folds, as LFW publishes it. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

import numpy as np

from kdlib._checks import check_choice, check_number
from kdlib_faces.evaluation._checks import (
    CELLS,
    BoolArray,
    FloatArray,
    IntArray,
    check_fars,
    check_flags,
    check_labels,
    check_rows,
    gather,
    require,
    unit_block,
    unit_rows,
)
from kdlib_faces.evaluation.fold_thresholds import (
    RULES,
    FoldTar,
    best_exact,
    best_facexzoo,
    best_grid,
    exact_at_far,
    grid_at_far,
)
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, far_name

__all__ = [
    "Rule",
    "VerificationResult",
    "check_folds",
    "contiguous_folds",
    "judge",
    "pair_distances",
    "verify_pairs",
]

FOLDS = 10
Rule = Literal["grid", "exact", "facexzoo"]


@dataclass(frozen=True)
class VerificationResult:
    """Accuracy over folds.

    Args:
        accuracy: mean of the folds' accuracies.
        std: their population standard deviation (ddof = 0), as published tables give it.
        fold_accuracies: (f,) accuracy of each held-out fold.
        thresholds: (f,) squared distance chosen on the other folds; a pair is accepted below it. A cosine, accepted
            above it, where the rule is `"facexzoo"`.
        threshold_rule: `"grid"`, `"exact"` or `"facexzoo"`.
        pairs: how many pairs there are.
        tar: operating points by target FAR, over all pairs; empty unless asked for.
        val: TAR over folds by target FAR; empty unless asked for.
        pca: to how many dimensions the embeddings of each fold were reduced; None for not at all.
        correct: (n,) whether each pair was judged right when its fold was held out: what `paired_test` compares.
        notes: what a reader of the number should know, such as identities in more than one fold.
    """

    accuracy: float
    std: float
    fold_accuracies: FloatArray
    thresholds: FloatArray
    threshold_rule: str
    pairs: int
    tar: Mapping[float, TarAtFar] = field(default_factory=dict)
    val: Mapping[float, FoldTar] = field(default_factory=dict)
    pca: int | None = None
    correct: BoolArray = field(default_factory=lambda: np.empty(0, dtype=np.bool_), repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def convention(self) -> str:
        """How accuracy and spread are defined, in words."""
        rule = {
            "grid": "threshold on the other folds' best of 0, 0.01, ... 3.99 in squared distance, as insightface",
            "exact": "threshold on the other folds' best midpoint of squared distances",
            "facexzoo": "cosine threshold of largest TPR - FPR in 1000 steps, a tie is wrong, as FaceX-Zoo",
        }[self.threshold_rule]
        reduced = "" if self.pca is None else f"; PCA to {self.pca} dimensions on the other folds"
        return f"{rule}{reduced}; std is over folds (ddof 0), standard_error is std (ddof 1) / sqrt(folds) as LFW"

    @property
    def standard_error(self) -> float:
        """Standard error of the mean (ddof = 1), the figure of LFW's own results page."""
        return float(np.std(self.fold_accuracies, ddof=1)) / sqrt(self.fold_accuracies.size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `tar`, `val` and `pca` only where asked for, and then the conventions in words."""
        entry: dict[str, Any] = {
            "accuracy": self.accuracy,
            "std": self.std,
            "folds": self.fold_accuracies.tolist(),
            "threshold_rule": self.threshold_rule,
            "pairs": self.pairs,
        }
        if self.tar:
            entry["tar"] = {far_name(far): point.estimate.to_dict() for far, point in self.tar.items()}
            entry["tar_rule"] = next(iter(self.tar.values())).mode
            entry["tar_unresolvable"] = [far_name(far) for far, point in self.tar.items() if not point.resolvable]
        if self.val:
            entry["val"] = {far_name(far): point.to_dict() for far, point in self.val.items()}
        if self.pca is not None:
            entry["pca"] = self.pca
        if self.notes:
            entry["notes"] = list(self.notes)
        if len(entry) > 5 or self.threshold_rule == "facexzoo":
            entry["standard_error"] = self.standard_error
            entry["convention"] = self.convention
        return entry


def verify_pairs(
    left: Any,
    right: Any,
    same: Any,
    *,
    fold_ids: Any = None,
    threshold: Rule = "grid",
    val_fars: Sequence[float] = (),
    pca: int | None = None,
) -> VerificationResult:
    """Verification accuracy over folds: the threshold is chosen on the others and applied to the one held out.

    Rows are made unit, d = sum (left - right)² in [0, 4], and a pair is called the same when d < t. For each fold t is
    the lowest of the best thresholds on the other folds.

    Args:
        left: (n, d) embeddings, normalized or not; one array or shards.
        right: (n, d) embeddings of the pairs' other images.
        same: (n,) whether each pair shows one identity.
        fold_ids: (n,) fold of each pair, whole numbers or strings; None cuts the order given into 10 contiguous folds,
            which is right only for a file that is ordered by folds (the `.bin` sets are; positives-first lists are
            not, see `positives_first_folds`).
        threshold: `"grid"` tries 0, 0.01, ... 3.99, as insightface does, for figures that can be compared with
            published ones; `"exact"` tries the midpoints of the neighboring distances of the other folds;
            `"facexzoo"` takes the cosine of largest TPR - FPR in 1000 steps, and a score on it is wrong either way.
        val_fars: false accept rates at which TAR is told over folds too, the threshold of each fold set on the impostor
            pairs of the others: insightface's `val`. With `"grid"` it is interpolated as published; otherwise it is
            the exact rule of `tar_at_far`.
        pca: reduce to so many dimensions by a PCA of the other folds' embeddings before each fold's accuracy, and make
            rows unit again; as published, `val` does not.

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
    check_choice(owner, "threshold", threshold, RULES)
    if pca is not None:
        check_number(owner, "pca", pca, min=1, integer=True)
    fars = check_fars(owner, val_fars)
    first, second = gather(owner, "left", left), gather(owner, "right", right)
    require(
        first.shape[0] == second.shape[0],
        owner,
        f"right must have one row for each of {first.shape[0]} rows of left, got {second.shape[0]}",
    )
    require(
        first.shape[1] == second.shape[1], owner, f"right must be (n, {first.shape[1]}) like left, got {second.shape}"
    )
    distances, _ = pair_distances(owner, first, second)
    truth = check_flags(owner, "same", same, first.shape[0])
    folds = check_folds(owner, truth, fold_ids)
    reduced = None
    if pca is not None:
        reduced = unit_rows(owner, "left", first), unit_rows(owner, "right", second)
    return judge(owner, distances, truth, folds, threshold=threshold, val_fars=fars, pca=pca, reduced=reduced)


def judge(
    owner: str,
    distances: FloatArray,
    truth: BoolArray,
    folds: IntArray,
    *,
    threshold: Rule,
    val_fars: Sequence[float],
    pca: int | None,
    reduced: tuple[FloatArray, FloatArray] | None,
) -> VerificationResult:
    """`verify_pairs` from squared distances (n,) of unit rows; `reduced` are the unit rows for a PCA."""
    if reduced is not None:
        check_number(owner, "pca", pca, min=1, max=reduced[0].shape[1], integer=True)
    accuracies, thresholds = [], []
    correct = np.zeros(truth.size, dtype=np.bool_)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        compared = distances
        if reduced is not None and pca is not None:
            compared = _reduced_distances(owner, *reduced, ~held, pca)
        if threshold == "facexzoo":
            compared = 1 - compared / 2
            limit = best_facexzoo(compared[~held], truth[~held])
            correct[held] = np.where(truth[held], compared[held] > limit, compared[held] < limit)
        else:
            limit = (best_grid if threshold == "grid" else best_exact)(compared[~held], truth[~held])
            correct[held] = (compared[held] < limit) == truth[held]
        thresholds.append(limit)
        accuracies.append(float(np.mean(correct[held])))
    scores = np.asarray(accuracies)
    rule = "grid" if threshold == "grid" else "exact"
    return VerificationResult(
        accuracy=float(scores.mean()),
        std=float(scores.std()),
        fold_accuracies=scores,
        thresholds=np.asarray(thresholds),
        threshold_rule=threshold,
        pairs=int(truth.size),
        val={far: _fold_tar(distances, truth, folds, far, rule) for far in val_fars},
        pca=pca,
        correct=correct,
    )


def pair_distances(
    owner: str, left: Any, right: Any, i: IntArray | None = None, j: IntArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Squared distances (n,) and cosines (n,) of unit rows, a few rows at a time.

    Args:
        owner: for errors.
        left: (n, d); or (m, d), of which the rows `i` are taken.
        right: (n, d); or (m, d), of which the rows `j` are taken.
        i: (n,) row numbers into `left`.
        j: (n,) row numbers into `right`.
    """
    count = len(left) if i is None else i.size
    distances, cosines = np.empty(count), np.empty(count)
    step = max(1, CELLS // left.shape[1] // 2)
    for start in range(0, count, step):
        part = slice(start, start + step)
        a = left[part if i is None else i[part]].astype(np.float64)
        b = right[part if j is None else j[part]].astype(np.float64)
        with np.errstate(all="ignore"):
            square = np.einsum("pd,pd->p", a, a), np.einsum("pd,pd->p", b, b)
        if not all(((each > 1e-100) & (each < 1e100)).all() for each in square):
            try:
                a, b = unit_block(owner, "left", a), unit_block(owner, "right", b)
            except ValueError:
                # Once more over all rows, for the number of the bad one and the count.
                for name, rows in (("left", left), ("right", right)):
                    check_rows(owner, name, rows)
                raise
            square = np.einsum("pd,pd->p", a, a), np.einsum("pd,pd->p", b, b)
        cosine = np.einsum("pd,pd->p", a, b) / np.sqrt(square[0] * square[1])
        distance = 2 - 2 * cosine
        near = np.flatnonzero(distance < 1e-4)
        if near.size:
            # Where the two nearly cancel, by the difference of unit rows.
            unit = [x[near] / np.sqrt(each[near])[:, None] for x, each in zip((a, b), square, strict=True)]
            distance[near] = np.square(unit[0] - unit[1]).sum(axis=1)
        distances[part], cosines[part] = distance, cosine
    return distances, cosines


def _reduced_distances(owner: str, left: FloatArray, right: FloatArray, train: BoolArray, pca: int) -> FloatArray:
    """Squared distances after a PCA of the training pairs' embeddings, rows made unit again."""
    rows = np.concatenate([left[train], right[train]])
    center = rows.mean(axis=0)
    most = min(rows.shape)
    require(pca <= most, owner, f"pca must be at most {most}, the rank of the other folds' embeddings, got {pca}")
    rows -= center
    _, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    axes = vectors[:, ::-1][:, :pca]
    moved = [unit_rows(owner, "embeddings after PCA", (x - center) @ axes) for x in (left, right)]
    return np.asarray(np.square(moved[0] - moved[1]).sum(axis=1))


def _fold_tar(distances: FloatArray, same: BoolArray, folds: IntArray, far: float, rule: str) -> FoldTar:
    tars, fars, thresholds, resolvable = [], [], [], True
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        impostor = distances[~held & ~same]
        limit = (grid_at_far if rule == "grid" else exact_at_far)(impostor, far)
        resolvable &= allowed_false_accepts(far, impostor.size) >= 1
        accepted = distances[held] < limit
        tars.append(float(accepted[same[held]].mean()))
        fars.append(float(accepted[~same[held]].mean()))
        thresholds.append(limit)
    values = np.asarray(tars)
    return FoldTar(
        tar=float(values.mean()),
        std=float(values.std()),
        far=float(np.mean(fars)),
        fold_tars=values,
        thresholds=np.asarray(thresholds),
        target=far,
        resolvable=resolvable,
        rule=rule,
    )


def contiguous_folds(count: int, folds: int = FOLDS) -> IntArray:
    """(count,) fold of each pair in their order; the first take one pair more, as scikit-learn's KFold cuts.

    Examples:
        >>> contiguous_folds(5, 2).tolist()
        [0, 0, 0, 1, 1]
    """
    return np.repeat(np.arange(folds), [part.size for part in np.array_split(np.arange(count), folds)])


def check_folds(owner: str, same: BoolArray, fold_ids: Any) -> IntArray:
    """Fold of each pair as 0 ... f-1; every fold must hold both kinds of pair."""
    if fold_ids is None:
        require(same.size >= 2 * FOLDS, owner, f"without fold_ids there must be {2 * FOLDS} pairs, got {same.size}")
        folds, names = contiguous_folds(same.size), np.arange(FOLDS)
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
