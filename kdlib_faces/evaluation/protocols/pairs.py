"""Verification of given pairs of images: accuracy over folds, and TAR at FAR over all pairs."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

import numpy as np

from kdlib._checks import check_choice, check_type
from kdlib_faces.evaluation._checks import (
    check_ages,
    check_each,
    check_fars,
    check_flags,
    check_indices,
    check_level,
    check_rows,
    check_vector,
    check_whole,
    gather,
    require,
    unit_rows,
)
from kdlib_faces.evaluation._labels import check_labels, label_array
from kdlib_faces.evaluation._types import ArrayLike, Embeddings, FloatArray, IntArray, JsonDict, Label
from kdlib_faces.evaluation.fold_thresholds import BEST, Rule
from kdlib_faces.evaluation.hardest import hardest_pairs
from kdlib_faces.evaluation.roc import TarAtFar, auc, tar_at_far
from kdlib_faces.evaluation.splits import IdentityOverlapWarning, identities_in_several_folds, identity_overlap
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.clustered import clustered_rate, pair_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, Sampling, wilson, wilson_estimate
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.summary import (
    KEPT_THRESHOLDS,
    Bins,
    Description,
    HardPair,
    Histogram,
    Measure,
    MeasuredValue,
    ModelSummary,
    RocCurve,
    ScoreTable,
    far_measures,
    far_text,
)
from kdlib_faces.evaluation.thresholds import operating_thresholds
from kdlib_faces.evaluation.verification import (
    VerificationResult,
    check_folds,
    contiguous_folds,
    fold_accuracy,
    pair_distances,
)

OWNER = "PairProtocol"
POINT_RULES = {
    "exact": "threshold at the (k+1)-th largest impostor score, k = floor(FAR x impostors), accepted above it",
    "nearest": "the point of the curve whose FAR is nearest, as insightface's scripts; it may exceed the target",
}


@dataclass(frozen=True, kw_only=True)
class PairResult(VerificationResult):
    """Result of a `PairProtocol`: the accuracy over folds, and operating points over all pairs.

    Attributes:
        tar: Target FAR to the operating point over all pairs; empty without `fars`.
        scores: (p,) cosine of each pair.
    """

    tar: Mapping[float, TarAtFar]
    scores: FloatArray = field(repr=False, compare=False)
    protocol: "PairProtocol" = field(repr=False, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the pairs, such as identities in more than one fold."""
        return self.protocol.notes

    def accuracy_estimate(self) -> Estimate:
        """Share of the pairs decided correctly, with an interval over identities, or over pairs without identities."""
        hits, protocol = self.correct.astype(np.float64), self.protocol
        identities = protocol.pair_identities
        if identities is None:
            interval = wilson(self.accuracy * self.pairs, self.pairs, level=protocol.level)
            return Estimate(self.accuracy, *interval, self.pairs)
        folds = check_folds(OWNER, protocol.same, protocol.fold_ids)
        sizes = np.bincount(folds)
        # Every fold counts alike, as in the accuracy.
        per = None if np.ptp(sizes) == 0 else 1 / sizes[folds]
        return pair_estimate(self.accuracy, hits, identities, protocol.num_identities, protocol.sampling, per)

    def _tar_value(self, point: TarAtFar) -> MeasuredValue:
        protocol = self.protocol
        if protocol.pair_identities is None:
            return MeasuredValue.of(point)
        accepted, identities = self.scores[protocol.same] > point.threshold, protocol.pair_identities[0][protocol.same]
        estimate = clustered_rate(accepted, identities, **asdict(protocol.sampling))
        return MeasuredValue.of(estimate, resolvable=point.resolvable)

    def describe(self) -> Description:
        """What the protocol measures and how."""
        protocol, same = self.protocol, self.protocol.same
        measures = {"accuracy": Measure("Accuracy", note=f"over {len(self.fold_accuracies)} folds")}
        measures |= far_measures("tar", "TAR", protocol.fars)
        measures |= far_measures("val", "TAR", protocol.val_fars, note="over folds")
        bins = {}
        if protocol.gap_bin is not None and protocol.fars:
            bins["fnmr"] = Bins(
                f"FNMR at {far_text(protocol.fars[0], 'FMR')}",
                bin_names(protocol.gap_starts),
                "age gap, years",
                protocol.gap_starts.tolist(),
                [int((protocol.gap_bin == number).sum()) for number in range(protocol.gap_starts.size)],
            )
        known = protocol.pair_identities is not None
        return Description(
            question="Do two images show the same identity? The threshold for given pairs is set on other pairs.",
            convention={
                "Accuracy": self.convention,
                **({"TAR at FAR": POINT_RULES[protocol.tar_mode]} if protocol.fars else {}),
                "Score": "cosine",
            },
            intervals="bootstrap over identities, of TAR at thresholds kept as they are"
            if known
            else "accuracy: Wilson's, over pairs; TAR: Wilson's, over genuine pairs",
            counts={
                "genuine pairs": int(same.sum()),
                "impostor pairs": int((~same).sum()),
                "images": int(np.unique(np.concatenate([protocol.left, protocol.right])).size),
            },
            measures=measures | {"auc": Measure("AUC", "auc")},
            bins=bins,
            notes=self.notes,
            difference_rule=KEPT_THRESHOLDS.format("identities" if known else "pairs, as identities are not known"),
        )

    def summary(self) -> ModelSummary:
        """Measures, FNMR by age gap, and curves."""
        protocol, genuine, impostor = self.protocol, self.scores[self.protocol.same], self.scores[~self.protocol.same]
        interval, spread = self.accuracy_estimate(), f"± {100 * self.std:.2f} over folds"
        measures = {"accuracy": MeasuredValue(self.accuracy, interval.low, interval.high, self.pairs, note=spread)}
        measures |= {f"tar_{far:g}": self._tar_value(point) for far, point in self.tar.items()}
        for far, fold in self.val.items():
            measures[f"val_{far:g}"] = MeasuredValue(fold.tar, note=f"± {100 * fold.std:.2f} over folds")
        measures["auc"] = MeasuredValue(auc(genuine, impostor), n=genuine.size)
        threshold = next((point.threshold for point in self.tar.values()), None)
        bins, histogram = {}, Histogram.of(genuine, impostor, threshold)
        if protocol.gap_bin is not None and threshold is not None:
            rejected = [genuine[protocol.gap_bin == number] <= threshold for number in range(protocol.gap_starts.size)]
            bins["fnmr"] = [MeasuredValue.of(wilson_estimate(each, level=protocol.level)) for each in rejected]
        return ModelSummary(measures, bins, roc=RocCurve.of(genuine, impostor), histogram=histogram)

    def outcomes(self) -> dict[str, Outcomes]:
        """Pairs decided correctly, and genuine pairs accepted at each FAR."""
        identities, same = self.protocol.pair_identities, self.protocol.same
        genuine = None if identities is None else (identities[0][same], identities[1][same])
        accepted = {
            f"tar_{far:g}": Outcomes(self.scores[same] > point.threshold, genuine) for far, point in self.tar.items()
        }
        return {"accuracy": Outcomes(self.correct, identities), **accepted}

    def hardest(self, count: int) -> list[HardPair]:
        """The genuine pairs of lowest and the impostor pairs of highest score, each image once per kind."""
        left, right, same = self.protocol.left, self.protocol.right, self.protocol.same

        def pair(k: int) -> HardPair:
            return HardPair(int(left[k]), int(right[k]), float(self.scores[k]), bool(same[k]))

        return hardest_pairs(self.scores, same, (left, right), count, pair)

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The score of every pair."""

        def rows() -> Iterator[tuple[str | int, ...]]:
            pairs = zip(self.protocol.left, self.protocol.right, self.protocol.same, self.scores, strict=True)
            for left, right, same, score in pairs:
                yield label(int(left)), label(int(right)), int(same), f"{score:.8f}"

        return ScoreTable(("left", "right", "same", "score"), rows(), self.pairs)

    def _extra(self) -> JsonDict:
        entry = super()._extra()
        entry["thresholds"] = operating_thresholds(self.scores[~self.protocol.same], level=self.protocol.level)
        if self.tar:
            entry["tar"] = {f"{far:g}": point.estimate.to_dict() for far, point in self.tar.items()}
            entry["tar_rule"] = self.protocol.tar_mode
            entry["tar_unresolvable"] = [f"{far:g}" for far, point in self.tar.items() if not point.resolvable]
        return entry | ({"notes": list(self.notes)} if self.notes else {})


class PairProtocol:
    """Given pairs of images: accuracy over folds, and optionally TAR at FARs over all pairs.

    Args:
        left: (p,) row number of each pair's first image.
        right: (p,) row number of its second image.
        same: (p,) whether the pair is genuine.
        fold_ids: (p,) fold of each pair; None for 10 contiguous folds.
        threshold: `"grid"`, `"exact"` or `"facexzoo"`, see `verify_pairs`.
        fars: Target false accept rates. Without `identities` the intervals of the TARs are Wilson's, over pairs.
        images: Number of rows of the embeddings; None for at least as many as the row numbers need.
        tar_mode: `"exact"` or `"nearest"`, see `tar_at_far`.
        val_fars: See `verify_pairs`.
        pca: See `verify_pairs`.
        identities: (n,) identity of each image. The result then reports how many identities are in more than one fold,
            and intervals are over identities.
        train_identities: Identities of the training set, named in the same way; an overlap raises a warning.
        ages: (n,) age of each image in years, NaN if unknown; adds the FNMR by age gap at the first FAR.
        gap_bins: Rising lower ends of the bins of age gaps, years.
        notes: Remarks for the reader of the number, passed on to the result.
        replicates: Bootstrap resamples over identities.
        seed: Seed of the resamples.
        level: Confidence of the intervals.

    Examples:
        >>> protocol = PairProtocol([0, 0, 1, 1], [1, 2, 0, 3], [1, 0, 1, 0], fold_ids=[0, 0, 1, 1])
        >>> protocol.evaluate(np.eye(3)[[0, 0, 1, 2]]).accuracy
        1.0
    """

    def __init__(
        self,
        left: ArrayLike,
        right: ArrayLike,
        same: ArrayLike,
        fold_ids: ArrayLike | None = None,
        threshold: Rule = "grid",
        fars: Sequence[float] = (),
        *,
        images: int | None = None,
        tar_mode: Literal["exact", "nearest"] = "exact",
        val_fars: Sequence[float] = (),
        pca: int | None = None,
        identities: ArrayLike | None = None,
        train_identities: ArrayLike | None = None,
        ages: ArrayLike | None = None,
        gap_bins: Sequence[float] = GAP_STARTS,
        notes: Sequence[str] = (),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.left, self.right = check_indices(OWNER, "left", left), check_indices(OWNER, "right", right)
        count = self.left.size
        check_vector(OWNER, "right", self.right, count, "left")
        self.same = check_flags(OWNER, "same", same, count)
        check_choice(OWNER, "threshold", threshold, tuple(BEST))
        check_choice(OWNER, "tar_mode", tar_mode, tuple(POINT_RULES))
        self.level = check_level(OWNER, level)
        self.needed = int(max(self.left.max(), self.right.max())) + 1
        self.images = None if images is None else check_whole(OWNER, "images", images, min=self.needed)
        self.pca = None if pca is None else check_whole(OWNER, "pca", pca, min=1)
        self.fold_ids = None if fold_ids is None else label_array(OWNER, "fold_ids", fold_ids, rows=count, like="left")
        self.threshold: Rule = threshold
        self.tar_mode: Literal["exact", "nearest"] = tar_mode
        self.fars, self.val_fars = check_fars(OWNER, fars), check_fars(OWNER, val_fars)
        check_type(OWNER, "notes", notes, (list, tuple), "a list or tuple of strings")
        alone = int(np.count_nonzero(self.left == self.right))
        self.notes = (*notes, *([f"{alone} of {count} pairs compare an image with itself"] if alone else []))
        replicates, seed = check_whole(OWNER, "replicates", replicates, min=0), check_whole(OWNER, "seed", seed, min=0)
        self.sampling = Sampling(replicates, seed, self.level)
        self.gap_starts = check_starts(OWNER, "gap_bins", gap_bins)
        self.num_identities = 0
        self.pair_identities: tuple[IntArray, IntArray] | None = None
        if identities is not None:
            self._set_identities(identities, train_identities)
        require(
            identities is not None or train_identities is None, OWNER, "train_identities needs identities, got none"
        )
        self.gap_bin: IntArray | None = None
        if ages is not None:
            years = check_ages(OWNER, ages, unknown=True)
            self._set_images("ages", years.size)
            gaps = np.abs(years[self.left[self.same]] - years[self.right[self.same]])
            self.gap_bin = place(self.gap_starts, gaps) if np.isfinite(gaps).any() else None

    def _set_identities(self, identities: ArrayLike, train_identities: ArrayLike | None) -> None:
        """Check the pairs against the identities, and note which of them the folds or the training set share."""
        codes, labels = check_labels(OWNER, "identities", identities)
        self._set_images("identities", codes.size)
        # Identities of images in no pair are no part of the resamples.
        used, places = np.unique(codes[np.concatenate([self.left, self.right])], return_inverse=True)
        labels, self.num_identities = labels[used], used.size
        first, second = self.pair_identities = places[: self.left.size], places[self.left.size :]
        check_each(OWNER, "same", (first == second) == self.same, "in agreement with identities", "pair")
        folds = contiguous_folds(self.same.size) if self.fold_ids is None else self.fold_ids
        shared = identities_in_several_folds(first, second, folds)
        if shared:
            self.notes += (f"{len(shared)} of {labels.size} identities are in more than one fold",)
        trained = [] if train_identities is None else identity_overlap(train_identities, labels)
        if trained:
            self.notes += (f"{len(trained)} of {labels.size} identities were trained on",)
            warnings.warn(self.notes[-1], IdentityOverlapWarning, stacklevel=3)

    def _set_images(self, name: str, rows: int) -> None:
        """An argument with a row for each image fixes their number."""
        require(rows >= self.needed, OWNER, f"{name} must hold row {self.needed - 1}, got {rows} rows")
        require(
            self.images in (None, rows), OWNER, f"{name} must have a row for each of {self.images} images, got {rows}"
        )
        self.images = rows

    @classmethod
    def interleaved(
        cls,
        same: ArrayLike,
        fold_ids: ArrayLike | None = None,
        threshold: Rule = "grid",
        fars: Sequence[float] = (),
        *,
        level: float = 0.95,
    ) -> Self:
        """Pair k is rows 2k and 2k + 1, as in the `.bin` sets; the arguments are those of the class."""
        left = np.arange(check_flags(OWNER, "same", same).size) * 2
        return cls(left, left + 1, same, fold_ids, threshold, fars, images=2 * left.size, level=level)

    def __repr__(self) -> str:
        usual = {"tar_mode": "exact", "val_fars": (), "pca": None, "level": 0.95}
        more = "".join(f", {key}={getattr(self, key)!r}" for key in usual if getattr(self, key) != usual[key])
        return (
            f"PairProtocol(<{self.same.size} pairs>, fold_ids={None if self.fold_ids is None else '...'}, "
            f"threshold={self.threshold!r}, fars={self.fars}, images={self.images}{more})"
        )

    def evaluate(self, embeddings: Embeddings) -> PairResult:
        """Measure embeddings (n, d); see `verify_pairs`."""
        rows = gather(OWNER, "embeddings", embeddings)
        wanted = f"one row for each of {self.images} images of {self.same.size} pairs"
        require(self.images in (None, len(rows)), OWNER, f"embeddings must have {wanted}, got {len(rows)}")
        require(len(rows) >= self.needed, OWNER, f"embeddings must hold row {self.needed - 1}, got {len(rows)} rows")
        check_rows(OWNER, "embeddings", rows)
        distances, scores = pair_distances(OWNER, rows, rows, self.left, self.right)
        unit = None if self.pca is None else unit_rows(OWNER, "embeddings", rows)
        result = fold_accuracy(
            OWNER,
            distances,
            self.same,
            check_folds(OWNER, self.same, self.fold_ids),
            threshold=self.threshold,
            val_fars=self.val_fars,
            pca=self.pca,
            reduced=None if unit is None else (unit[self.left], unit[self.right]),
        )
        kinds = scores[self.same], scores[~self.same]
        tar = {far: tar_at_far(*kinds, far, mode=self.tar_mode, level=self.level) for far in self.fars}
        return PairResult(**vars(result), tar=tar, scores=scores, protocol=self)
