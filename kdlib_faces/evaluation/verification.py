"""Verification accuracy over folds, as LFW publishes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import (
    CELLS,
    check_fars,
    check_flags,
    check_rows,
    check_whole,
    gather,
    require,
    unit_block,
    unit_rows,
)
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, BoolArray, Embeddings, FloatArray, IntArray, JsonDict
from kdlib_faces.evaluation.fold_thresholds import BEST, FoldTar, Rule, exact_at_far, grid_at_far
from kdlib_faces.evaluation.matching.search import DECIMALS
from kdlib_faces.evaluation.roc import allowed_false_accepts

FOLDS = 10


@dataclass(frozen=True)
class VerificationResult:
    """Accuracy over folds.

    Attributes:
        accuracy: Mean of the folds' accuracies.
        std: Their population standard deviation (ddof = 0), as in published tables.
        fold_accuracies: (f,) accuracy of each held-out fold.
        thresholds: (f,) squared distance chosen on the other folds; a pair is accepted below it. With the rule
            `"facexzoo"` a cosine; a pair is accepted above it.
        threshold_rule: `"grid"`, `"exact"` or `"facexzoo"`.
        pairs: Number of pairs.
        val: Target FAR to TAR over folds; empty without `val_fars`.
        pca: Number of dimensions to which the embeddings of each fold were reduced; None for no reduction.
        correct: (n,) whether each pair was decided correctly while its fold was held out, for `paired_test`.
    """

    accuracy: float
    std: float
    fold_accuracies: FloatArray
    thresholds: FloatArray
    threshold_rule: str
    pairs: int
    val: Mapping[float, FoldTar]
    pca: int | None
    correct: BoolArray = field(repr=False, compare=False)

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

    def to_dict(self) -> JsonDict:
        """Plain values for JSON; further measures only if requested, and then with the conventions in words."""
        extra = self._extra()
        if extra or self.threshold_rule == "facexzoo":
            extra |= {"standard_error": self.standard_error, "convention": self.convention}
        return {
            "accuracy": self.accuracy,
            "std": self.std,
            "folds": self.fold_accuracies.tolist(),
            "threshold_rule": self.threshold_rule,
            "pairs": self.pairs,
            **extra,
        }

    def _extra(self) -> JsonDict:
        """The optional measures."""
        val: JsonDict = {"val": {f"{far:g}": point.to_dict() for far, point in self.val.items()}} if self.val else {}
        return val if self.pca is None else val | {"pca": self.pca}


def verify_pairs(
    left: Embeddings,
    right: Embeddings,
    same: ArrayLike,
    *,
    fold_ids: ArrayLike | None = None,
    threshold: Rule = "grid",
    val_fars: Sequence[float] = (),
    pca: int | None = None,
) -> VerificationResult:
    """Verification accuracy over folds: the threshold is chosen on the other folds and applied to the held-out one.

    Rows are normalized, d = sum (left - right)² in [0, 4], and a pair is accepted if d < t. For each fold t is the lowest
    of the best thresholds on the other folds.

    Args:
        left: (n, d) embeddings, normalized or not; one array or shards.
        right: (n, d) embeddings of the pairs' other images.
        same: (n,) whether each pair is genuine.
        fold_ids: (n,) fold of each pair, whole numbers or strings. None cuts the given order into 10 contiguous folds,
            which requires a file ordered by folds: the `.bin` sets are, lists with all genuine pairs first are not (see
            `positives_first_folds`).
        threshold: `"grid"` tries 0, 0.01, ... 3.99, as insightface does, for parity with published figures; `"exact"`
            tries the midpoints of neighboring distances of the other folds; `"facexzoo"` takes the cosine of largest
            TPR - FPR in 1000 steps, and a score equal to it is always wrong.
        val_fars: False accept rates at which TAR is also reported over folds, with the threshold of each fold set on the
            impostor pairs of the others: insightface's `val`. With `"grid"` it is interpolated as published, otherwise
            it follows the exact rule of `tar_at_far`.
        pca: Reduce to so many dimensions by a PCA of the other folds' embeddings before each fold's accuracy, and
            normalize again; as published, `val` is not reduced.

    Returns:
        The accuracies; they use every pair once.

    Raises:
        ValueError: An embedding is not finite or zero (the message gives its row), lengths differ, or a fold has pairs of
            one kind only.

    Examples:
        >>> left = np.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]]
        >>> right = np.eye(4)[[0, 1, 1, 2, 2, 3, 3, 0]]
        >>> verify_pairs(left, right, [1, 0] * 4, fold_ids=[0, 0, 1, 1, 2, 2, 3, 3]).accuracy
        1.0

    References:
        G. B. Huang et al., "Labeled Faces in the Wild", technical report 07-49, 2007. The figures agree with
        insightface's `verification.py`; FaceX-Zoo defines threshold and spread differently.
    """
    owner = "verify_pairs"
    check_choice(owner, "threshold", threshold, tuple(BEST))
    pca = None if pca is None else check_whole(owner, "pca", pca, min=1)
    fars = check_fars(owner, val_fars)
    first, second = gather(owner, "left", left), gather(owner, "right", right)
    rows, width = first.shape
    require(len(second) == rows, owner, f"right must have one row for each of {rows} rows of left, got {len(second)}")
    require(second.shape[1] == width, owner, f"right must be (n, {width}) like left, got {second.shape}")
    try:
        distances, _ = pair_distances(owner, first, second)
    except InputError:  # of the first rows that are bad; the error of all rows counts them
        for name, each in (("left", first), ("right", second)):
            check_rows(owner, name, each)
        raise
    truth = check_flags(owner, "same", same, first.shape[0])
    folds = check_folds(owner, truth, fold_ids)
    reduced = None
    if pca is not None:
        reduced = unit_rows(owner, "left", first), unit_rows(owner, "right", second)
    return fold_accuracy(owner, distances, truth, folds, threshold=threshold, val_fars=fars, pca=pca, reduced=reduced)


def fold_accuracy(
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
    """`verify_pairs` from squared distances (n,) of unit rows; `reduced` are the unit rows of both sides for a PCA."""
    if reduced is not None and pca is not None:
        check_whole(owner, "pca", pca, min=1, max=reduced[0].shape[1])
    accuracies, thresholds = [], []
    correct = np.zeros(truth.size, dtype=np.bool_)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        compared = distances
        if reduced is not None and pca is not None:
            compared = _reduced_distances(owner, *reduced, ~held, pca)
        if threshold == "facexzoo":
            compared = 1 - compared / 2
        limit = BEST[threshold](compared[~held], truth[~held])
        correct[held] = (compared[held] < limit) == truth[held]
        if threshold == "facexzoo":
            correct[held] = np.where(truth[held], compared[held] > limit, compared[held] < limit)
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
    owner: str, left: AnyArray, right: AnyArray, i: IntArray | None = None, j: IntArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Squared distances (n,) and cosines (n,) of rows (n, d), or of the rows `i` of `left` and `j` of `right`.

    Rows are checked and normalized a few at a time; an error has the number of the row among these.
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
            a, b = unit_block(owner, "left", a), unit_block(owner, "right", b)
            square = np.einsum("pd,pd->p", a, a), np.einsum("pd,pd->p", b, b)
        cosine = np.einsum("pd,pd->p", a, b) / np.sqrt(square[0] * square[1])
        # Rounded, so that pairs of equal directions tie whatever the lengths of their rows.
        distance = np.round(2 - 2 * cosine, DECIMALS)
        near = np.flatnonzero(distance < 1e-4)
        if near.size:
            # 2 - 2 cos loses precision for nearly equal rows; their distance comes from the difference of unit rows.
            unit = [x[near] / np.sqrt(each[near])[:, None] for x, each in zip((a, b), square, strict=True)]
            distance[near] = np.round(np.square(unit[0] - unit[1]).sum(axis=1), DECIMALS + 4)
        distances[part], cosines[part] = distance, np.round(cosine, DECIMALS)
    return distances, cosines


def _reduced_distances(owner: str, left: FloatArray, right: FloatArray, train: BoolArray, pca: int) -> FloatArray:
    """Squared distances after a PCA of the training pairs' embeddings, rows normalized again."""
    rows = np.concatenate([left[train], right[train]])
    center = rows.mean(axis=0)
    rows -= center
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    rank = int((values > 1e-12).sum())
    require(pca <= rank, owner, f"pca must be at most {rank}, the rank of the other folds' embeddings, got {pca}")
    axes = vectors[:, ::-1][:, :pca]
    moved = [unit_rows(owner, "embeddings after PCA", (x - center) @ axes) for x in (left, right)]
    return np.asarray(np.round(np.square(moved[0] - moved[1]).sum(axis=1), DECIMALS))


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
    """(count,) contiguous fold of each pair; the first folds may have one pair more, as in scikit-learn's KFold."""
    return np.repeat(np.arange(folds), [part.size for part in np.array_split(np.arange(count), folds)])


def check_folds(owner: str, same: BoolArray, fold_ids: ArrayLike | None) -> IntArray:
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
        kind = "impostor" if positive == 0 else "genuine"
        message = f"every fold must hold both kinds of pair, got fold {name!r} with only {kind} pairs{advice}"
        require(0 < positive < count, owner, message)
    return folds.astype(np.int64)
