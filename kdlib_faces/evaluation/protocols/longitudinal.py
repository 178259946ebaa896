"""Evaluation room: is a person still recognized after 5, 10, 20, 30 years? A protocol of our own. NumPy only.

Sets followed over years, such as LogiFace of the LIAAD paper, have no public release and no published protocol; this is
one that any set of dated images can carry. Its numbers are comparable with each other, not with anybody's table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdlib._checks import check_choice, check_number
from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_ages,
    check_fars,
    check_level,
    check_people,
    require,
    unit_rows,
)
from kdlib_faces.evaluation.all_pairs import global_points
from kdlib_faces.evaluation.roc import TarAtFar, far_name
from kdlib_faces.evaluation.search import dot_rows
from kdlib_faces.evaluation.statistics.clustered import draws, rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs
from kdlib_faces.evaluation.statistics.slopes import mean_estimate, person_slopes, within_slope

__all__ = ["ElapsedErrors", "LongitudinalProtocol", "LongitudinalResult"]

OWNER = "LongitudinalProtocol"


@dataclass(frozen=True)
class ElapsedErrors:
    """What is left after so many years.

    Args:
        years: elapsed, in the middle of the window.
        pairs: genuine pairs in the window.
        people: how many people they are of.
        score: mean genuine score.
        fnmr: by target FAR, the part of them refused.
    """

    years: float
    pairs: int
    people: int
    score: Estimate
    fnmr: Mapping[float, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "years": self.years,
            "pairs": self.pairs,
            "people": self.people,
            "score": self.score.to_dict(),
            "fnmr": {far_name(far): estimate.to_dict() for far, estimate in self.fnmr.items()},
        }


@dataclass(frozen=True)
class LongitudinalResult:
    """The result of a `LongitudinalProtocol`.

    Args:
        slope: within-person change of the genuine score over ten years, with its interval over people.
        person_slopes: (p,) each person's own change over ten years, NaN where the years do not vary.
        after: the errors at each number of years.
        elapsed: (g,) years of each genuine pair.
        scores: (g,) its score.
        operating_points: by target FAR, the global threshold and its counts.
        definition: the protocol in words.
        level: confidence of the intervals.
    """

    slope: Estimate
    person_slopes: FloatArray
    after: tuple[ElapsedErrors, ...]
    elapsed: FloatArray
    scores: FloatArray
    operating_points: Mapping[float, TarAtFar]
    definition: str
    level: float

    @property
    def falling(self) -> float | None:
        """The part of the people with a slope of their own whose score falls with the years; None without any."""
        known = self.person_slopes[np.isfinite(self.person_slopes)]
        return float((known < 0).mean()) if known.size else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; people's slopes as quartiles."""
        known = self.person_slopes[np.isfinite(self.person_slopes)]
        quartiles = np.quantile(known, [0.25, 0.5, 0.75]).tolist() if known.size else None
        return {
            "slope_per_decade": self.slope.to_dict(),
            "person_slopes": {"people": int(known.size), "quartiles": quartiles, "falling": self.falling},
            "after": [each.to_dict() for each in self.after],
            "operating_points": {far_name(far): point.to_dict() for far, point in self.operating_points.items()},
            "definition": self.definition,
            "level": self.level,
        }


class LongitudinalProtocol:
    """Genuine score and error against elapsed time. Defined by this project; no published set fixes one.

    Each person is enrolled with the image of the lowest age (`reference="first"`), and every later image is compared
    with it; or all pairs of a person are taken (`"all"`). The threshold is set on all impostor pairs of the set by the
    exact rule of `tar_at_far`. The slope is within persons: each has a level of their own, all share the change over
    time, score = level_i + slope x elapsed / 10 years. The error after y years is the false non-match rate of the pairs
    whose elapsed time is within `window` of y. Intervals are over people, at thresholds kept as they are.

    Args:
        identities: (n,) whole numbers or strings.
        ages: (n,) age in years at each image, or any dates in years.
        years: elapsed times at which errors are told.
        window: how far from them a pair may be, years.
        reference: `"first"` or `"all"`.
        fars: target false accept rates, each allowing at most 20 million false accepts.
        replicates: bootstrap resamples over people; 0 for none.
        seed: of the resamples.
        level: confidence of the intervals.

    Raises:
        ValueError: an argument that cannot be used; a bad age is named by its row.

    Examples:
        >>> protocol = LongitudinalProtocol([0, 0, 0, 1, 1], [20, 25, 40, 30, 35], years=(5, 20), fars=(0.5,))
        >>> result = protocol.evaluate([[1.0, 0.0], [1.0, 0.1], [1.0, 0.8], [0.0, 1.0], [0.1, 1.0]])
        >>> [(each.years, each.pairs, each.fnmr[0.5].value) for each in result.after], result.slope.value < 0
        ([(5, 2, 0.0), (20, 1, 0.0)], True)
    """

    def __init__(
        self,
        identities: Any,
        ages: Any,
        *,
        years: Sequence[float] = (5, 10, 20, 30),
        window: float = 2.5,
        reference: Literal["first", "all"] = "first",
        fars: Sequence[float] = (1e-2, 1e-3),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.codes, labels = check_people(OWNER, identities)
        self.ages = check_ages(OWNER, ages, self.codes.size)
        for year in years:
            check_number(OWNER, "years", year, above=0)
        check_number(OWNER, "window", window, above=0)
        check_choice(OWNER, "reference", reference, ("first", "all"))
        check_level(OWNER, level)
        self.fars = check_fars(OWNER, fars)
        require(len(self.fars) > 0, OWNER, "fars must not be empty, got ()")
        self.years, self.window, self.reference, self.level = tuple(years), window, reference, float(level)
        self.draws = draws(OWNER, labels.size, replicates=replicates, seed=seed)

    def __repr__(self) -> str:
        return (
            f"LongitudinalProtocol(<{self.codes.size} images of {self.codes.max() + 1} identities>, <ages>, "
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

    def evaluate(self, embeddings: Any) -> LongitudinalResult:
        """Measure (n, d) embeddings in the order of the identities.

        Raises:
            ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.
        """
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        i, j = self.pairs()
        scores, elapsed, who = dot_rows(unit, i, unit, j), np.abs(self.ages[j] - self.ages[i]), self.codes[i]
        points, _ = global_points(OWNER, unit, self.codes, scores, self.fars, self.level)
        compared = "the person's first image" if self.reference == "first" else "every other image of the person"
        return LongitudinalResult(
            slope=within_slope(elapsed / 10, scores, who, self.draws, self.level),
            person_slopes=person_slopes(elapsed / 10, scores, who, self.draws.shape[1]),
            after=tuple(self._after(year, elapsed, scores, who, points) for year in self.years),
            elapsed=elapsed,
            scores=scores,
            operating_points=points,
            definition=(
                f"longitudinal protocol of this project: each image against {compared}; threshold on all impostor pairs; "
                f"errors within {self.window:g} years of each elapsed time"
            ),
            level=self.level,
        )

    def _after(
        self,
        year: float,
        elapsed: FloatArray,
        scores: FloatArray,
        who: IntArray,
        points: Mapping[float, TarAtFar],
    ) -> ElapsedErrors:
        inside = np.flatnonzero(np.round(np.abs(elapsed - year), 4) <= self.window)
        fnmr = {
            far: rate_estimate(
                (scores[inside] <= point.threshold).astype(np.float64), who[inside], self.draws, level=self.level
            )
            for far, point in points.items()
        }
        score = mean_estimate(scores[inside], who[inside], self.draws, self.level)
        return ElapsedErrors(year, inside.size, np.unique(who[inside]).size, score, fnmr)
