"""Evaluation room: given pairs of images, and the pair sets whose figures are published. NumPy only; reads no file."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import (
    IntArray,
    check_fars,
    check_flags,
    check_indices,
    check_labels,
    check_level,
    check_rows,
    gather,
    require,
    to_numpy,
    unit_rows,
)
from kdlib_faces.evaluation.fold_thresholds import RULES
from kdlib_faces.evaluation.roc import tar_at_far
from kdlib_faces.evaluation.splits import (
    IdentityOverlapWarning,
    identities_in_several_folds,
    identity_overlap,
    positives_first_folds,
)
from kdlib_faces.evaluation.statistics.clustered import draws, pair_rates
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate
from kdlib_faces.evaluation.verification import (
    Rule,
    VerificationResult,
    check_folds,
    contiguous_folds,
    judge,
    pair_distances,
)

__all__ = ["PAIR_SETS", "PairProtocol", "PairSet", "pair_set"]


class PairProtocol:
    """Given pairs of images: accuracy over folds, and TAR at FARs over all pairs where asked for.

    Args:
        left: (p,) row number of each pair's first image.
        right: (p,) row number of its second.
        same: (p,) whether the pair shows one identity.
        fold_ids: (p,) fold of each pair; None for 10 contiguous folds.
        threshold: `"grid"`, `"exact"` or `"facexzoo"`, see `verify_pairs`.
        fars: target false accept rates; the intervals of their TARs are Wilson's and take pairs as independent.
        images: how many rows the embeddings must have; None for at least as many as the row numbers need.
        tar_mode: `"exact"` or `"nearest"`, see `tar_at_far`.
        val_fars: see `verify_pairs`.
        pca: see `verify_pairs`.
        identities: (n,) identity of each image; the result then says how many people are in more than one fold, and
            `accuracy_estimate` gives the accuracy's interval over identities.
        train_identities: the people the model was trained on, named alike; those tested on are warned of.
        notes: what a reader of the number should know; passed on to the result.
        level: confidence of the intervals of the TARs.

    Raises:
        ValueError: lengths that differ, a negative row number, a pair of one identity that is said not to be one.

    Examples:
        >>> protocol = PairProtocol([0, 0, 1, 1], [1, 2, 0, 3], [1, 0, 1, 0], fold_ids=[0, 0, 1, 1])
        >>> protocol.evaluate(np.eye(3)[[0, 0, 1, 2]]).accuracy
        1.0
    """

    def __init__(
        self,
        left: Any,
        right: Any,
        same: Any,
        fold_ids: Any = None,
        threshold: Rule = "grid",
        fars: Sequence[float] = (),
        *,
        images: int | None = None,
        tar_mode: Literal["exact", "nearest"] = "exact",
        val_fars: Sequence[float] = (),
        pca: int | None = None,
        identities: Any = None,
        train_identities: Any = None,
        notes: Sequence[str] = (),
        level: float = 0.95,
    ) -> None:
        owner = "PairProtocol"
        self.left, self.right = check_indices(owner, "left", left), check_indices(owner, "right", right)
        require(
            self.left.size == self.right.size,
            owner,
            f"right must be as long as left ({self.left.size}), got {self.right.size}",
        )
        self.same = check_flags(owner, "same", same, self.left.size)
        if fold_ids is not None:
            check_labels(owner, "fold_ids", fold_ids, rows=self.left.size, like="left")
        check_choice(owner, "threshold", threshold, RULES)
        check_choice(owner, "tar_mode", tar_mode, ("exact", "nearest"))
        if pca is not None:
            check_number(owner, "pca", pca, min=1, integer=True)
        self.fold_ids = None if fold_ids is None else to_numpy(fold_ids)
        self.threshold: Rule = threshold
        self.tar_mode: Literal["exact", "nearest"] = tar_mode
        self.fars, self.val_fars, self.pca = check_fars(owner, fars), check_fars(owner, val_fars), pca
        self.needed = int(max(self.left.max(), self.right.max())) + 1
        if images is not None:
            check_number(owner, "images", images, min=self.needed, integer=True)
        self.images = images
        self.notes = tuple(notes)
        check_level(owner, level)
        self.level = float(level)
        self.codes: IntArray | None = None
        if identities is not None:
            self._know(identities, train_identities)

    def _know(self, identities: Any, train_identities: Any) -> None:
        """Check the pairs against the people in them, and note whom the folds or the training set share."""
        owner = "PairProtocol"
        codes, labels = check_labels(owner, "identities", identities)
        require(codes.size >= self.needed, owner, f"identities must hold row {self.needed - 1}, got {codes.size} rows")
        self.codes = codes
        first, second = codes[self.left], codes[self.right]
        wrong = np.flatnonzero((first == second) != self.same)
        require(
            wrong.size == 0,
            owner,
            f"same must agree with identities, got pair {wrong[:1].tolist()} that does not ({wrong.size} in all)",
        )
        folds = contiguous_folds(self.same.size) if self.fold_ids is None else self.fold_ids
        shared = identities_in_several_folds(first, second, folds)
        if shared:
            self.notes += (f"{len(shared)} of {labels.size} identities are in more than one fold",)
        trained = [] if train_identities is None else identity_overlap(train_identities, labels)
        if trained:
            self.notes += (f"{len(trained)} of {labels.size} identities were trained on",)
            warnings.warn(self.notes[-1], IdentityOverlapWarning, stacklevel=3)

    @classmethod
    def interleaved(
        cls,
        same: Any,
        fold_ids: Any = None,
        threshold: Rule = "grid",
        fars: Sequence[float] = (),
        *,
        level: float = 0.95,
    ) -> Self:
        """Pair k is rows 2k and 2k + 1, as in the `.bin` sets; exactly 2p embeddings are wanted.

        Args:
            same: (p,) whether each pair shows one identity.
            fold_ids: as in the class.
            threshold: as in the class.
            fars: as in the class.
            level: as in the class.

        Examples:
            >>> PairProtocol.interleaved([True, False]).right.tolist()
            [1, 3]
        """
        count = to_numpy(same).size
        left = np.arange(count) * 2
        return cls(left, left + 1, same, fold_ids, threshold, fars, images=2 * count, level=level)

    def __repr__(self) -> str:
        folds = "None" if self.fold_ids is None else "..."
        more = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("tar_mode", self.tar_mode, "exact"),
                ("val_fars", self.val_fars, ()),
                ("pca", self.pca, None),
                ("level", self.level, 0.95),
            )
            if value != default
        )
        return (
            f"PairProtocol(<{self.same.size} pairs>, fold_ids={folds}, threshold={self.threshold!r}, "
            f"fars={self.fars}, images={self.images}{more})"
        )

    def evaluate(self, embeddings: Any) -> VerificationResult:
        """Measure (n, d) embeddings; see `verify_pairs`."""
        owner = "PairProtocol"
        rows = gather(owner, "embeddings", embeddings)
        require(
            self.images is None or len(rows) == self.images,
            owner,
            f"embeddings must have one row for each of {self.images} images of {self.same.size} pairs, got {len(rows)}",
        )
        require(len(rows) >= self.needed, owner, f"embeddings must hold row {self.needed - 1}, got {len(rows)} rows")
        check_rows(owner, "embeddings", rows)
        distances, scores = pair_distances(owner, rows, rows, self.left, self.right)
        unit = None if self.pca is None else unit_rows(owner, "embeddings", rows)
        result = judge(
            owner,
            distances,
            self.same,
            check_folds(owner, self.same, self.fold_ids),
            threshold=self.threshold,
            val_fars=self.val_fars,
            pca=self.pca,
            reduced=None if unit is None else (unit[self.left], unit[self.right]),
        )
        genuine, impostor = scores[self.same], scores[~self.same]
        tar = {far: tar_at_far(genuine, impostor, far, mode=self.tar_mode, level=self.level) for far in self.fars}
        return replace(result, tar=tar, notes=self.notes)

    def accuracy_estimate(
        self, result: VerificationResult, *, replicates: int = 500, seed: int = 0, level: float = 0.95
    ) -> Estimate:
        """The share of pairs judged right, with its interval over identities; wants `identities`.

        Args:
            result: of this protocol.
            replicates: bootstrap resamples over identities.
            seed: of the resamples, the same for two models that are to be compared.
            level: the confidence.
        """
        owner = "PairProtocol.accuracy_estimate"
        require(result.correct.size == self.same.size, owner, "result must be of this protocol, got other pairs")
        if self.codes is None:
            raise InputError(f"{owner}: the protocol must have been given identities, got none")
        first, second = self.codes[self.left], self.codes[self.right]
        hits = result.correct.astype(np.float64)
        resampled = pair_rates(
            hits, first, second, draws(owner, int(self.codes.max()) + 1, replicates=replicates, seed=seed)
        )
        clusters = np.unique(np.concatenate([first, second])).size
        return bootstrap_estimate(float(hits.mean()), resampled, n=hits.size, clusters=clusters, level=level)


@dataclass(frozen=True)
class PairSet:
    """What is published of a pair set.

    Args:
        name: as the `.bin` sets are called.
        pairs: how many pairs it has, in 10 folds of equal halves.
        note: what the figure means and does not mean.
    """

    name: str
    pairs: int
    note: str = ""


_AGEDB = "all pairs are {} years apart: there is nothing to break down by gap inside the set"
PAIR_SETS = {
    each.name: each
    for each in (
        PairSet("lfw", 6000),
        *(PairSet(f"agedb_{years}", 6000, _AGEDB.format(int(years))) for years in ("05", "10", "20", "30")),
        PairSet("calfw", 6000, "the list was replaced in September 2018: figures of the old and the new one differ"),
        PairSet("cplfw", 6000),
        PairSet("cfp_ff", 7000),
        PairSet("cfp_fp", 7000),
        PairSet("cacd_vs", 4000, "no ages are published with the pairs"),
    )
}
"""The sets that `pair_set` knows, by name."""


def pair_set(
    name: str,
    left: Any,
    right: Any,
    same: Any,
    *,
    fold_ids: Any = None,
    order: Literal["folds", "positives_first"] = "folds",
    **options: Any,
) -> PairProtocol:
    """The protocol of a published pair set, its folds as published and what is missing said in the result.

    Args:
        name: one of `PAIR_SETS`: `"lfw"`, `"agedb_05"` to `"agedb_30"`, `"calfw"`, `"cplfw"`, `"cfp_ff"`, `"cfp_fp"`,
            `"cacd_vs"`.
        left: (p,) row number of each pair's first image.
        right: (p,) row number of its second.
        same: (p,) whether the pair shows one identity.
        fold_ids: (p,) fold of each pair, where the list says it; wanted where pairs are missing.
        order: without `fold_ids`, how the list is ordered: by folds, as the `.bin` sets and LFW's list are, or all pairs
            of one identity first, as the original lists of CALFW and CPLFW.
        options: of `PairProtocol`: `threshold`, `fars`, `val_fars`, `pca`, `identities` ...

    Returns:
        The protocol.

    Raises:
        ValueError: an unknown name, or a list that is not whole and says no folds: cutting it anew would move pairs from
            fold to fold.

    Examples:
        >>> same = np.tile(np.repeat([True, False], 300), 10)
        >>> pair_set("lfw", np.arange(6000) * 2, np.arange(6000) * 2 + 1, same, fars=(1e-3,))
        PairProtocol(<6000 pairs>, fold_ids=None, threshold='grid', fars=(0.001,), images=None)
    """
    check_choice("pair_set", "name", name, tuple(PAIR_SETS))
    check_choice("pair_set", "order", order, ("folds", "positives_first"))
    known, count = PAIR_SETS[name], to_numpy(same).size
    require(
        count <= known.pairs,
        "pair_set",
        f"{name} must have {known.pairs} pairs, got {count}: is it an old list, or another set?",
    )
    require(
        count == known.pairs or fold_ids is not None,
        "pair_set",
        f"fold_ids must be given where pairs of {name} are missing, got {count} of {known.pairs} pairs and no folds",
    )
    if fold_ids is None and order == "positives_first":
        fold_ids = positives_first_folds(same)
    notes = [f"{name}: {count} of {known.pairs} pairs", *([known.note] if known.note else [])]
    return PairProtocol(left, right, same, fold_ids, notes=(*notes, *options.pop("notes", ())), **options)
