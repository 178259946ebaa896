"""False non-match and false match rates by age, at one threshold for all pairs of a set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdlib_faces.evaluation._checks import check_fars, check_level, unit_rows
from kdlib_faces.evaluation._labels import check_identities
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, Embeddings, FloatArray, IntArray, JsonDict, Label
from kdlib_faces.evaluation.hardest import hardest_pairs
from kdlib_faces.evaluation.matching.all_pairs import ScoredPairs, global_points, rejection_rates
from kdlib_faces.evaluation.matching.search import dot_rows
from kdlib_faces.evaluation.roc import TarAtFar, by_far
from kdlib_faces.evaluation.statistics.bins import AGE_STARTS, GAP_STARTS, PairBins, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate, ratio, resample_counts
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs
from kdlib_faces.evaluation.statistics.slopes import mean_estimate, pooled_slope, within_slope
from kdlib_faces.evaluation.summary import (
    Bins,
    Description,
    HardPair,
    Measure,
    MeasuredValue,
    ModelSummary,
    ScoreTable,
    far_measures,
    far_text,
)

OWNER = "AgeErrorProtocol"


@dataclass(frozen=True)
class ErrorBin:
    """One bin of ages, gaps or age groups.

    Attributes:
        name: Name of the bin.
        pairs: Number of pairs.
        rates: Target FAR to the error rate at the one threshold; None in an empty bin.
        score: Mean score of its genuine pairs; None for a bin of impostor pairs.
    """

    name: str
    pairs: int
    rates: Mapping[float, Estimate]
    score: Estimate | None = None

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        entry: JsonDict = {"name": self.name, "pairs": self.pairs, "rates": by_far(self.rates)}
        return entry if self.score is None else entry | {"score": self.score.to_dict()}


@dataclass(frozen=True)
class AgeErrorResult:
    """Result of an `AgeErrorProtocol`.

    Attributes:
        fnmr_by_gap: False non-match rates by age gap, or by pair of groups.
        fnmr_by_younger_age: False non-match rates by the age of the younger image; empty without ages.
        fmr_same_age: False match rates of the impostor pairs whose images are in one bin of ages, or in one group.
        slope: Change of the genuine score over ten years of gap, over all pairs; None without ages.
        slope_within: The same within identities, each with its own level.
        operating_points: Target FAR to the global threshold and its counts.
        genuine: Every genuine pair with its score.
        false_accepts: The impostor pairs accepted at the lowest of the thresholds, the most similar first, then by rows.
    """

    fnmr_by_gap: tuple[ErrorBin, ...]
    fnmr_by_younger_age: tuple[ErrorBin, ...]
    fmr_same_age: tuple[ErrorBin, ...]
    slope: Estimate | None
    slope_within: Estimate | None
    operating_points: Mapping[float, TarAtFar]
    genuine: ScoredPairs = field(repr=False, compare=False)
    false_accepts: ScoredPairs = field(repr=False, compare=False)
    protocol: "AgeErrorProtocol" = field(repr=False, compare=False)

    def _bins(self) -> dict[str, tuple[ErrorBin, ...]]:
        return {
            "fnmr_by_gap": self.fnmr_by_gap,
            "fnmr_by_younger_age": self.fnmr_by_younger_age,
            "fmr_same_age": self.fmr_same_age,
        }

    def describe(self) -> Description:
        """What the protocol measures and how."""
        protocol, by_age = self.protocol, self.protocol.ages is not None
        texts = {
            "fnmr_by_gap": ("FNMR by age gap" if by_age else "FNMR by age groups", "age gap, years"),
            "fnmr_by_younger_age": ("FNMR by the younger age", "age of the younger image, years"),
            "fmr_same_age": ("FMR among images of one age", "age, years"),
        }
        bins = {}
        for key, rows in self._bins().items():
            names, counts = [row.name for row in rows], [row.pairs for row in rows]
            at = [float(number) for number in range(len(rows))] if by_age else None
            for far in protocol.fars if rows else ():
                title, axis = f"{texts[key][0]} at {far_text(far, 'FMR')}", texts[key][1] if by_age else ""
                bins[f"{key}_{far:g}"] = Bins(title, names, axis, at, list(counts))
        measures = far_measures("fnmr", "FNMR", protocol.fars, rate="FMR", lower_is_better=True)
        if by_age:
            slope = "Slope of the genuine score"
            measures["slope"] = Measure(slope, "score", "over ten years of gap, all pairs", "none")
            measures["slope_within"] = Measure("Slope within identities", "score", "over ten years of gap", "none")
        return Description(
            question="At which ages are genuine pairs rejected and impostor pairs accepted at one threshold for all?",
            convention={
                "Threshold": "one for all bins, the (k+1)-th largest of all impostor scores, k = floor(FMR x impostors)",
                "FMR among images of one age": "impostor pairs whose two images are in one bin of ages",
                "Score": "cosine",
            },
            intervals="bootstrap over identities, thresholds kept as they are; of the FNMR of all pairs Wilson's",
            counts={"images": protocol.codes.size, "identities": protocol.num_identities},
            measures=measures,
            bins=bins,
        )

    def summary(self) -> ModelSummary:
        """FNMR and slopes, and rates by age."""
        measures, points = {}, self.operating_points.items()
        for far, point in points:
            measures[f"fnmr_{far:g}"] = MeasuredValue.of(point.estimate.complement(), resolvable=point.resolvable)
        if self.protocol.ages is not None:
            measures |= {"slope": MeasuredValue.of(self.slope), "slope_within": MeasuredValue.of(self.slope_within)}
        bins = {
            f"{key}_{far:g}": [MeasuredValue.of(row.rates[far], resolvable=point.resolvable) for row in rows]
            for key, rows in self._bins().items()
            if rows
            for far, point in points
        }
        return ModelSummary(measures, bins)

    def outcomes(self) -> dict[str, Outcomes]:
        """Genuine pairs rejected at each FAR."""
        identities, scores = self.protocol.codes[self.genuine.left], self.genuine.scores
        return {
            f"fnmr_{far:g}": Outcomes(scores <= point.threshold, (identities, identities), "rejected")
            for far, point in self.operating_points.items()
        }

    def hardest(self, count: int) -> list[HardPair]:
        """The genuine pairs of lowest score and the false accepts of highest score, each identity once per kind."""
        pairs = [np.concatenate(parts) for parts in zip(self.genuine.arrays, self.false_accepts.arrays, strict=True)]
        left, right, scores = pairs
        same, ages = np.arange(scores.size) < self.genuine.scores.size, self.protocol.ages

        def pair(k: int) -> HardPair:
            i, j = int(left[k]), int(right[k])
            note = "" if ages is None else f"{ages[i]:g} and {ages[j]:g} years"
            return HardPair(i, j, float(scores[k]), bool(same[k]), note)

        return hardest_pairs(scores, same, (self.protocol.codes[left], self.protocol.codes[right]), count, pair)

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The scores of every genuine pair and of every false accept at the lowest threshold, with ages or groups."""
        protocol, kind = self.protocol, "group" if self.protocol.ages is None else "age"

        def age(row: int) -> str:
            groups = protocol.image_names
            return groups[protocol.image_bin[row]] if protocol.ages is None else f"{protocol.ages[row]:g}"

        def rows() -> Iterator[tuple[str | int, ...]]:
            for same, pairs in ((1, self.genuine), (0, self.false_accepts)):
                for left, right, score in zip(*(part.tolist() for part in pairs.arrays), strict=True):
                    yield label(left), label(right), same, f"{score:.8f}", age(left), age(right)

        columns = ("left", "right", "same", "score", f"left {kind}", f"right {kind}")
        return ScoreTable(columns, rows(), self.genuine.scores.size + self.false_accepts.scores.size)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        return {
            "kind": "group" if self.protocol.ages is None else "gap",
            "level": self.protocol.level,
            **{key: [row.to_dict() for row in rows] for key, rows in self._bins().items()},
            "slope_per_decade": None if self.slope is None else self.slope.to_dict(),
            "slope_within_per_decade": None if self.slope_within is None else self.slope_within.to_dict(),
            "operating_points": by_far(self.operating_points),
        }


class AgeErrorProtocol:
    """Errors of every pair of images at one global threshold, by age.

    The threshold is set on all impostor pairs by the exact rule of `tar_at_far`. At this threshold it gives the false
    non-match rate of genuine pairs by age gap and by the age of the younger image, and the false match rate of impostor
    pairs whose two images are in one bin of ages. The latter shows, for instance, children mistaken for each other, which
    a rate over all impostors hides. `AgeGapProtocol` has TAR, AUC and a threshold per bin instead; this protocol keeps no
    list of all pairs, so a set can have tens of thousands of images.

    Args:
        identities: (n,) whole numbers or strings.
        ages: (n,) years at each image.
        age_groups: (n,) age group of each image; used if there are no ages, by pairs of groups.
        fars: Target false accept rates (false match rates), each allowing at most 20 million false accepts.
        gap_bins: Rising lower ends of the gap bins, years.
        age_bins: Rising lower ends of the bins of the younger image's age, years.
        replicates: Bootstrap resamples over identities; 0 for none.
        seed: Seed of the resamples.
        level: Confidence of the intervals, which are over identities at thresholds kept as they are.

    Raises:
        ValueError: An age is NaN (the message gives its row), ages and groups are both absent, there is one identity only,
            no identity has two images, or the bins do not rise.

    Examples:
        >>> protocol = AgeErrorProtocol([0, 0, 1, 1], ages=[3, 4, 5, 40], fars=(0.5,), replicates=20)
        >>> result = protocol.evaluate([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.9, 1.0]])
        >>> [(row.name, row.pairs, row.rates[0.5].value) for row in result.fnmr_by_gap if row.pairs]
        [('0-4', 1, 0.0), ('30+', 1, 0.0)]
    """

    def __init__(
        self,
        identities: ArrayLike,
        *,
        ages: ArrayLike | None = None,
        age_groups: ArrayLike | None = None,
        fars: Sequence[float] = (1e-2, 1e-3),
        gap_bins: Sequence[float] = GAP_STARTS,
        age_bins: Sequence[float] = AGE_STARTS,
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.codes, labels = check_identities(OWNER, identities)
        self.num_identities = labels.size
        self.fars, self.level = check_fars(OWNER, fars, required=True), check_level(OWNER, level)
        self.resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)
        self.bins = PairBins(OWNER, self.codes, ages, age_groups, gap_bins, "gap_bins")
        self.ages, self.age_starts = self.bins.ages, check_starts(OWNER, "age_bins", age_bins)
        if self.ages is None:
            self.image_bin, self.image_names = self.bins.groups, self.bins.group_names
        else:
            self.image_bin, self.image_names = place(self.age_starts, self.ages), bin_names(self.age_starts)

    def __repr__(self) -> str:
        by = "ages" if self.ages is not None else "age_groups"
        shape = f"<{self.codes.size} images of {self.num_identities} identities>"
        return f"AgeErrorProtocol({shape}, {by}=..., fars={self.fars}, level={self.level})"

    def evaluate(self, embeddings: Embeddings) -> AgeErrorResult:
        """Measure embeddings (n, d) in the order of the identities."""
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        i, j = genuine_pairs(self.codes)
        scores, codes = dot_rows(unit, i, unit, j), self.codes[i]
        points, hardest = global_points(OWNER, unit, self.codes, scores, self.fars, self.level)

        def fnmr(names: Sequence[str], bins: AnyArray) -> tuple[ErrorBin, ...]:
            members = [np.flatnonzero(bins == number) for number in range(len(names))]
            return tuple(self._fnmr(name, codes[k], scores[k], points) for name, k in zip(names, members, strict=True))

        younger: tuple[ErrorBin, ...] = ()
        slope = slope_within = None
        if self.ages is not None:
            gap = np.abs(self.ages[i] - self.ages[j])
            younger = fnmr(self.image_names, place(self.age_starts, np.minimum(self.ages[i], self.ages[j])))
            slope = pooled_slope(gap / 10, scores, codes, self.resamples, self.level)
            slope_within = within_slope(gap / 10, scores, codes, self.resamples, self.level)
        accepted = int((hardest.scores > min(point.threshold for point in points.values())).sum())
        return AgeErrorResult(
            fnmr_by_gap=fnmr(self.bins.names, self.bins.of(i, j)),
            fnmr_by_younger_age=younger,
            fmr_same_age=tuple(self._fmr(number, hardest, points) for number in range(len(self.image_names))),
            slope=slope,
            slope_within=slope_within,
            operating_points=points,
            genuine=ScoredPairs(i, j, scores),
            false_accepts=ScoredPairs(hardest.left[:accepted], hardest.right[:accepted], hardest.scores[:accepted]),
            protocol=self,
        )

    def _fnmr(self, name: str, codes: IntArray, scores: FloatArray, points: Mapping[float, TarAtFar]) -> ErrorBin:
        rates = rejection_rates(scores, codes, points, self.resamples, self.level)
        return ErrorBin(name, scores.size, rates, mean_estimate(scores, codes, self.resamples, self.level))

    def _fmr(self, number: int, hardest: ScoredPairs, points: Mapping[float, TarAtFar]) -> ErrorBin:
        """A resample holds an impostor pair of i and j m_i m_j times, as in `identity_bootstrap`."""
        held = np.bincount(self.codes[self.image_bin == number], minlength=self.num_identities).astype(np.float64)
        pairs = int((held.sum() ** 2 - np.square(held).sum()) // 2)
        counts = self.resamples * held
        totals = (counts.sum(axis=1) ** 2 - np.square(counts).sum(axis=1)) / 2
        inside = np.flatnonzero((self.image_bin[hardest.left] == number) & (self.image_bin[hardest.right] == number))
        clusters = int(np.count_nonzero(held)) or 1
        rates = {}
        for far, point in points.items():
            taken = inside[hardest.scores[inside] > point.threshold]
            a, b = self.codes[hardest.left[taken]], self.codes[hardest.right[taken]]
            wrong = np.array([np.dot(m[a], m[b]) for m in self.resamples], dtype=np.float64)
            value = taken.size / pairs if pairs else float("nan")
            rates[far] = bootstrap_estimate(value, ratio(wrong, totals), n=pairs, clusters=clusters, level=self.level)
        return ErrorBin(self.image_names[number], pairs, rates)
