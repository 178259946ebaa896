"""Genuine scores and errors over elapsed years, a protocol defined by this project."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import check_ages, check_fars, check_level, check_numbers, check_one, unit_rows
from kdlib_faces.evaluation._labels import check_identities
from kdlib_faces.evaluation._types import ArrayLike, Embeddings, FloatArray, IntArray, JsonDict, Label
from kdlib_faces.evaluation.hardest import first_disjoint
from kdlib_faces.evaluation.matching.all_pairs import global_points, rejection_rates
from kdlib_faces.evaluation.matching.search import dot_rows
from kdlib_faces.evaluation.roc import TarAtFar, by_far
from kdlib_faces.evaluation.statistics.intervals import Estimate, resample_counts
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs
from kdlib_faces.evaluation.statistics.slopes import identity_slopes, mean_estimate, within_slope
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

OWNER = "LongitudinalProtocol"


@dataclass(frozen=True)
class ElapsedErrors:
    """Scores and errors after a number of years.

    Attributes:
        years: Elapsed years, the center of the window.
        pairs: Number of genuine pairs in the window.
        identities: Number of their identities.
        score: Mean genuine score.
        fnmr: Target FAR to the part of the pairs that is rejected.
    """

    years: float
    pairs: int
    identities: int
    score: Estimate
    fnmr: Mapping[float, Estimate]

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        counts = {"years": self.years, "pairs": self.pairs, "identities": self.identities}
        return {**counts, "score": self.score.to_dict(), "fnmr": by_far(self.fnmr)}


@dataclass(frozen=True)
class LongitudinalResult:
    """Result of a `LongitudinalProtocol`.

    Attributes:
        slope: Change of the genuine score over ten years within an identity, with its interval over identities.
        identity_slopes: (p,) change of each identity over ten years, NaN if its years do not vary.
        after: The errors at each number of years.
        elapsed: (g,) years of each genuine pair.
        scores: (g,) score of each genuine pair.
        operating_points: Target FAR to the global threshold and its counts.
    """

    slope: Estimate
    identity_slopes: FloatArray
    after: tuple[ElapsedErrors, ...]
    elapsed: FloatArray
    scores: FloatArray
    operating_points: Mapping[float, TarAtFar]
    protocol: "LongitudinalProtocol" = field(repr=False, compare=False)

    @property
    def falling(self) -> float | None:
        """The part of the identities with a slope whose score falls with the years; None without any."""
        known = self.identity_slopes[np.isfinite(self.identity_slopes)]
        return float((known < 0).mean()) if known.size else None

    def describe(self) -> Description:
        """What the protocol measures and how."""
        protocol = self.protocol
        labels, at = [f"{each.years:g}" for each in self.after], [float(each.years) for each in self.after]
        axis, counts = "years since the reference, within the window", [each.pairs for each in self.after]
        bins = {
            f"fnmr_{far:g}": Bins(f"FNMR at {far_text(far, 'FMR')}", labels, axis, at, list(counts))
            for far in protocol.fars
        }
        bins["score"] = Bins("Mean genuine score", labels, axis, at, list(counts), "score")
        measures = far_measures("fnmr", "FNMR", protocol.fars, rate="FMR", lower_is_better=True)
        measures["slope"] = Measure("Slope of the genuine score", "score", "within identities, over ten years")
        measures["falling"] = Measure(
            "Identities whose score falls", note="of those seen at several ages", better="low"
        )
        return Description(
            question="Is a face still recognized after so many years? A protocol of this project: no published set fixes "
            "one, so its numbers can be compared with each other only.",
            convention={
                "Definition": protocol.definition,
                "Slope": "within identities: each has its own level, all share the change over time",
                "Score": "cosine",
            },
            intervals="bootstrap over identities, thresholds kept as they are; of the FNMR of all pairs Wilson's",
            counts={
                "images": protocol.codes.size,
                "identities": protocol.num_identities,
                "genuine pairs": self.elapsed.size,
            },
            measures=measures,
            bins=bins,
        )

    def summary(self) -> ModelSummary:
        """FNMR, slope and the part of falling scores; FNMR and score by elapsed years."""
        measures, bins = {}, {}
        for far, point in self.operating_points.items():
            measures[f"fnmr_{far:g}"] = MeasuredValue.of(point.estimate.complement(), resolvable=point.resolvable)
            bins[f"fnmr_{far:g}"] = [
                MeasuredValue.of(each.fnmr[far], resolvable=point.resolvable) for each in self.after
            ]
        measures["slope"] = MeasuredValue.of(self.slope)
        measures["falling"] = MeasuredValue(self.falling, n=int(np.isfinite(self.identity_slopes).sum()))
        bins["score"] = [MeasuredValue.of(each.score) for each in self.after]
        return ModelSummary(measures, bins)

    def outcomes(self) -> dict[str, Outcomes]:
        """Genuine pairs rejected at each FAR."""
        identities = self.protocol.codes[self.protocol.pairs()[0]]
        return {
            f"fnmr_{far:g}": Outcomes(self.scores <= point.threshold, (identities, identities), "rejected")
            for far, point in self.operating_points.items()
        }

    def hardest(self, count: int) -> list[HardPair]:
        """The genuine pairs of lowest score, each identity once."""
        rows, later = self.protocol.pairs()
        order = np.argsort(self.scores, kind="stable").tolist()
        return [
            HardPair(int(rows[k]), int(later[k]), float(self.scores[k]), True, f"{self.elapsed[k]:.3g} years")
            for k in first_disjoint(order, lambda pair: [int(self.protocol.codes[rows[pair]])], count)
        ]

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The score of every genuine pair with its years."""

        def rows() -> Iterator[tuple[str, ...]]:
            pairs = (part.tolist() for part in (*self.protocol.pairs(), self.elapsed, self.scores))
            for reference, image, years, score in zip(*pairs, strict=True):
                yield label(reference), label(image), f"{years:.6g}", f"{score:.8f}"

        return ScoreTable(("reference", "image", "years", "score"), rows(), self.scores.size)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON; the slopes of the identities as quartiles."""
        known = self.identity_slopes[np.isfinite(self.identity_slopes)]
        quartiles = np.quantile(known, [0.25, 0.5, 0.75]).tolist() if known.size else None
        return {
            "slope_per_decade": self.slope.to_dict(),
            "identity_slopes": {"identities": int(known.size), "quartiles": quartiles, "falling": self.falling},
            "after": [each.to_dict() for each in self.after],
            "operating_points": by_far(self.operating_points),
            "definition": self.protocol.definition,
            "level": self.protocol.level,
        }


class LongitudinalProtocol:
    """Genuine score and error against elapsed time. Defined by this project; no published set fixes such a protocol.

    Each identity is enrolled with its image of the lowest age (`reference="first"`), and every later image is compared
    with it; or all pairs of an identity are compared (`"all"`). The threshold is set on all impostor pairs of the set by
    the exact rule of `tar_at_far`. The slope is within identities: score = level_i + slope x elapsed / 10 years, with one
    level per identity and one slope for all. The error after y years is the false non-match rate of the pairs whose
    elapsed time is within `window` of y. Intervals are over identities, at thresholds kept as they are.

    Args:
        identities: (n,) whole numbers or strings.
        ages: (n,) age in years at each image, or any dates in years.
        years: Elapsed times at which errors are reported.
        window: Maximal distance of a pair from them, years.
        reference: `"first"` or `"all"`.
        fars: Target false accept rates, each allowing at most 20 million false accepts.
        replicates: Bootstrap resamples over identities; 0 for none.
        seed: Seed of the resamples.
        level: Confidence of the intervals.

    Examples:
        >>> protocol = LongitudinalProtocol([0, 0, 0, 1, 1], [20, 25, 40, 30, 35], years=(5, 20), fars=(0.5,))
        >>> result = protocol.evaluate([[1.0, 0.0], [1.0, 0.1], [1.0, 0.8], [0.0, 1.0], [0.1, 1.0]])
        >>> [(each.years, each.pairs, each.fnmr[0.5].value) for each in result.after], result.slope.value < 0
        ([(5, 2, 0.0), (20, 1, 0.0)], True)
    """

    def __init__(
        self,
        identities: ArrayLike,
        ages: ArrayLike,
        *,
        years: Sequence[float] = (5, 10, 20, 30),
        window: float = 2.5,
        reference: Literal["first", "all"] = "first",
        fars: Sequence[float] = (1e-2, 1e-3),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.codes, labels = check_identities(OWNER, identities)
        self.num_identities = labels.size
        self.ages = check_ages(OWNER, ages, self.codes.size)
        self.years = check_numbers(OWNER, "years", years, above=0)
        self.window = check_one(OWNER, "window", window, above=0)
        check_choice(OWNER, "reference", reference, ("first", "all"))
        self.level, self.fars = check_level(OWNER, level), check_fars(OWNER, fars, required=True)
        self.reference = reference
        self.resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)

    @property
    def definition(self) -> str:
        """The protocol in words."""
        compared = "the identity's first image" if self.reference == "first" else "every other image of the identity"
        return (
            f"longitudinal protocol of this project: each image against {compared}; threshold on all impostor pairs; "
            f"errors within {self.window:g} years of each elapsed time"
        )

    def __repr__(self) -> str:
        return (
            f"LongitudinalProtocol(<{self.codes.size} images of {self.num_identities} identities>, <ages>, "
            f"years={self.years}, window={self.window}, reference={self.reference!r}, fars={self.fars})"
        )

    def pairs(self) -> tuple[IntArray, IntArray]:
        """Rows (g,), (g,) of the genuine pairs that are compared, the reference first."""
        if self.reference == "all":
            return genuine_pairs(self.codes)
        order = np.lexsort((np.arange(self.codes.size), self.ages, self.codes))
        starts = np.concatenate([[True], np.diff(self.codes[order]) > 0])
        enrolled = order[np.maximum.accumulate(np.where(starts, np.arange(order.size), 0))]
        return enrolled[~starts], order[~starts]

    def evaluate(self, embeddings: Embeddings) -> LongitudinalResult:
        """Measure embeddings (n, d) in the order of the identities."""
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        i, j = self.pairs()
        scores, elapsed, codes = dot_rows(unit, i, unit, j), np.abs(self.ages[j] - self.ages[i]), self.codes[i]
        points, _ = global_points(OWNER, unit, self.codes, scores, self.fars, self.level)
        after = []
        for year in self.years:
            inside = np.flatnonzero(np.round(np.abs(elapsed - year), 4) <= self.window)
            fnmr = rejection_rates(scores[inside], codes[inside], points, self.resamples, self.level)
            score = mean_estimate(scores[inside], codes[inside], self.resamples, self.level)
            after.append(ElapsedErrors(year, inside.size, np.unique(codes[inside]).size, score, fnmr))
        return LongitudinalResult(
            slope=within_slope(elapsed / 10, scores, codes, self.resamples, self.level),
            identity_slopes=identity_slopes(elapsed / 10, scores, codes, self.num_identities),
            after=tuple(after),
            elapsed=elapsed,
            scores=scores,
            operating_points=points,
            protocol=self,
        )
