"""Evaluation room: who is refused and who is taken for whom, by age, at one threshold. NumPy only; any size of set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_ages,
    check_fars,
    check_labels,
    check_level,
    check_people,
    require,
    unit_rows,
)
from kdlib_faces.evaluation.all_pairs import ScoredPairs, global_points
from kdlib_faces.evaluation.protocols.age_gap import group_bins
from kdlib_faces.evaluation.roc import TarAtFar, far_name
from kdlib_faces.evaluation.search import dot_rows
from kdlib_faces.evaluation.statistics.bins import AGE_STARTS, GAP_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.clustered import draws, rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs
from kdlib_faces.evaluation.statistics.slopes import mean_estimate, pooled_slope, within_slope

__all__ = ["AgeErrorProtocol", "AgeErrorResult", "ErrorBin"]

OWNER = "AgeErrorProtocol"


@dataclass(frozen=True)
class ErrorBin:
    """One bin of ages, gaps or age groups.

    Args:
        name: of the bin.
        pairs: how many pairs it holds.
        rates: by target FAR, the error rate at the one threshold; None in an empty bin.
        score: mean score of its genuine pairs; None for impostor bins.
    """

    name: str
    pairs: int
    rates: Mapping[float, Estimate]
    score: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rates = {far_name(far): estimate.to_dict() for far, estimate in self.rates.items()}
        entry = {"name": self.name, "pairs": self.pairs, "rates": rates}
        return entry if self.score is None else entry | {"score": self.score.to_dict()}


@dataclass(frozen=True)
class AgeErrorResult:
    """The result of an `AgeErrorProtocol`.

    Args:
        kind: `"gap"`, or `"group"` where there are age groups alone.
        fnmr_by_gap: false non-match rates by age gap, or by pair of groups.
        fnmr_by_younger_age: by the age of the younger image; empty without ages.
        fmr_same_age: false match rates among impostor pairs whose images are in one bin of ages, or in one group.
        slope: change of the genuine score over ten years of gap, over all pairs; None without ages.
        slope_within: the same within persons, each at a level of their own.
        operating_points: by target FAR, the global threshold and its counts.
        level: confidence of the intervals, which are over identities at thresholds kept as they are.
        genuine: every genuine pair with its score; not serialized.
        false_accepts: the impostor pairs accepted at the loosest of the thresholds, most alike first; not serialized.
    """

    kind: str
    fnmr_by_gap: tuple[ErrorBin, ...]
    fnmr_by_younger_age: tuple[ErrorBin, ...]
    fmr_same_age: tuple[ErrorBin, ...]
    slope: Estimate | None
    slope_within: Estimate | None
    operating_points: Mapping[float, TarAtFar]
    level: float
    genuine: ScoredPairs = field(repr=False, compare=False)
    false_accepts: ScoredPairs = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        entry: dict[str, Any] = {"kind": self.kind, "level": self.level}
        for name in ("fnmr_by_gap", "fnmr_by_younger_age", "fmr_same_age"):
            entry[name] = [each.to_dict() for each in getattr(self, name)]
        for name in ("slope", "slope_within"):
            estimate = getattr(self, name)
            entry[f"{name}_per_decade"] = None if estimate is None else estimate.to_dict()
        entry["operating_points"] = {far_name(far): point.to_dict() for far, point in self.operating_points.items()}
        return entry


class AgeErrorProtocol:
    """Errors of every pair of images at one global threshold, by age.

    The threshold is set on all impostor pairs by the exact rule of `tar_at_far`. At it: the false non-match rate of
    genuine pairs by age gap and by the age of the younger image, and the false match rate of impostor pairs whose two
    images are of one bin of ages: children are taken for children where a rate over all strangers does not show it.
    `AgeGapProtocol` has TAR, AUC and each bin's own threshold in turn; this one holds no list of all pairs, so a set of
    tens of thousands of images is no matter.

    Args:
        identities: (n,) whole numbers or strings.
        ages: (n,) years at each image.
        age_groups: (n,) age group of each image; used where there are no ages, by pairs of groups.
        fars: target false accept rates (false match rates), each allowing at most 20 million false accepts.
        gap_bins: rising lower ends of the gap bins, years.
        age_bins: rising lower ends of the bins of the younger image's age, years.
        replicates: bootstrap resamples over identities; 0 for none.
        seed: of the resamples.
        level: confidence of the intervals.

    Raises:
        ValueError: an argument that cannot be used; a bad age is named by its row.

    Examples:
        >>> protocol = AgeErrorProtocol([0, 0, 1, 1], ages=[3, 4, 5, 40], fars=(0.5,), replicates=20)
        >>> result = protocol.evaluate([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.9, 1.0]])
        >>> [(row.name, row.pairs, row.rates[0.5].value) for row in result.fnmr_by_gap if row.pairs]
        [('0-4', 1, 0.0), ('30+', 1, 0.0)]
    """

    def __init__(
        self,
        identities: Any,
        *,
        ages: Any = None,
        age_groups: Any = None,
        fars: Sequence[float] = (1e-2, 1e-3),
        gap_bins: Sequence[float] = GAP_STARTS,
        age_bins: Sequence[float] = AGE_STARTS,
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.codes, labels = check_people(OWNER, identities)
        require(ages is not None or age_groups is not None, OWNER, "ages or age_groups must be given, got neither")
        self.fars = check_fars(OWNER, fars)
        require(len(self.fars) > 0, OWNER, "fars must not be empty, got ()")
        check_level(OWNER, level)
        self.level = float(level)
        self.gap_starts, self.age_starts = (
            check_starts(OWNER, "gap_bins", gap_bins),
            check_starts(OWNER, "age_bins", age_bins),
        )
        self.draws = draws(OWNER, labels.size, replicates=replicates, seed=seed)
        self.ages = None if ages is None else check_ages(OWNER, ages, self.codes.size)
        if self.ages is not None:
            self.image_bin, self.image_names = place(self.age_starts, self.ages), bin_names(self.age_starts)
        else:
            self.image_bin, groups = check_labels(
                OWNER, "age_groups", age_groups, rows=self.codes.size, like="identities"
            )
            self.image_names = [str(group) for group in groups]

    def __repr__(self) -> str:
        by = "ages" if self.ages is not None else "age_groups"
        shape = f"<{self.codes.size} images of {self.codes.max() + 1} identities>"
        return f"AgeErrorProtocol({shape}, {by}=..., fars={self.fars}, level={self.level})"

    def evaluate(self, embeddings: Any) -> AgeErrorResult:
        """Measure (n, d) embeddings in the order of the identities.

        Raises:
            ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.
        """
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        i, j = genuine_pairs(self.codes)
        scores = dot_rows(unit, i, unit, j)
        points, hardest = global_points(OWNER, unit, self.codes, scores, self.fars, self.level)
        who = self.codes[i]
        younger: tuple[ErrorBin, ...] = ()
        slope = within = None
        if self.ages is not None:
            gap = np.abs(self.ages[i] - self.ages[j])
            by_gap = self._fnmr(bin_names(self.gap_starts), place(self.gap_starts, gap), who, scores, points)
            youngest = place(self.age_starts, np.minimum(self.ages[i], self.ages[j]))
            younger = self._fnmr(self.image_names, youngest, who, scores, points)
            slope, within = (fit(gap / 10, scores, who, self.draws, self.level) for fit in (pooled_slope, within_slope))
        else:
            names, table = group_bins(OWNER, self.image_names)
            by_gap = self._fnmr(
                names, table[self.image_bin[i], self.image_bin[j]].astype(np.int64), who, scores, points
            )
        return AgeErrorResult(
            kind="gap" if self.ages is not None else "group",
            fnmr_by_gap=by_gap,
            fnmr_by_younger_age=younger,
            fmr_same_age=tuple(
                self._fmr(number, name, hardest, points) for number, name in enumerate(self.image_names)
            ),
            slope=slope,
            slope_within=within,
            operating_points=points,
            level=self.level,
            genuine=ScoredPairs(i, j, scores),
            false_accepts=_accepted(hardest, min(point.threshold for point in points.values())),
        )

    def _fnmr(
        self, names: Sequence[str], bins: IntArray, who: IntArray, scores: FloatArray, points: Mapping[float, TarAtFar]
    ) -> tuple[ErrorBin, ...]:
        rows = []
        for number, name in enumerate(names):
            inside = np.flatnonzero(bins == number)
            rates = {
                far: rate_estimate(
                    (scores[inside] <= point.threshold).astype(np.float64), who[inside], self.draws, level=self.level
                )
                for far, point in points.items()
            }
            score = mean_estimate(scores[inside], who[inside], self.draws, self.level)
            rows.append(ErrorBin(name, inside.size, rates, score))
        return tuple(rows)

    def _fmr(
        self,
        number: int,
        name: str,
        hardest: ScoredPairs,
        points: Mapping[float, TarAtFar],
    ) -> ErrorBin:
        """A resample holds an impostor pair of i and j m_i m_j times, as `identity_bootstrap` has it."""
        first, second, falling = hardest.left, hardest.right, hardest.scores
        held = np.bincount(self.codes[self.image_bin == number], minlength=self.draws.shape[1]).astype(np.float64)
        pairs = int((held.sum() ** 2 - np.square(held).sum()) // 2)
        drawn = self.draws * held
        totals = (drawn.sum(axis=1) ** 2 - np.square(drawn).sum(axis=1)) / 2
        inside = np.flatnonzero((self.image_bin[first] == number) & (self.image_bin[second] == number))
        rates = {}
        for far, point in points.items():
            taken = inside[falling[inside] > point.threshold]
            a, b = self.codes[first[taken]], self.codes[second[taken]]
            wrong = np.array([np.dot(m[a], m[b]) for m in self.draws], dtype=np.float64)
            resampled = np.full(totals.shape, np.nan)
            np.divide(wrong, totals, out=resampled, where=totals > 0)
            value = taken.size / pairs if pairs else float("nan")
            clusters = int(np.count_nonzero(held)) or 1
            rates[far] = bootstrap_estimate(value, resampled, n=pairs, clusters=clusters, level=self.level)
        return ErrorBin(name, pairs, rates)


def _accepted(pairs: ScoredPairs, threshold: float) -> ScoredPairs:
    """Of pairs of falling scores those above a threshold."""
    count = int((pairs.scores > threshold).sum())
    return ScoredPairs(pairs.left[:count], pairs.right[:count], pairs.scores[:count])
