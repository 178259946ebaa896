"""Evaluation room: does recognition hold across the years? All pairs of a set of images, by age gap. NumPy only.

The question a face verifier with one threshold faces: of the pairs whose images lie 20 years apart, how many are still
accepted? The threshold is set once, on all impostor pairs, and each bin of gaps is measured at it.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_ages,
    check_fars,
    check_labels,
    check_level,
    check_people,
    check_vector,
    require,
    to_numpy,
    unit_rows,
)
from kdlib_faces.evaluation.protocols.age_gap_result import AgeGapResult, BinResult
from kdlib_faces.evaluation.roc import curve, tar_at_far
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.intervals import bootstrap_estimate, identity_bootstrap
from kdlib_faces.evaluation.statistics.resampling import (
    PairScores,
    Rates,
    genuine_pairs,
    resampled_rates,
    score_pairs,
    thin,
)

__all__ = ["AgeGapProtocol", "group_bins"]

EDGES = np.linspace(-1, 1, 81)
OWNER = "AgeGapProtocol"


class AgeGapProtocol:
    """Verification of every pair of images, broken down by the years between them.

    With ages, a pair is in the bin of its gap `|age_i - age_j|`: bins (0, 5, 10) are the gaps [0, 5), [5, 10) and from 10
    on, named `"0-4"`, `"5-9"`, `"10+"`; a gap of 4.7 years is in `"0-4"`. With age groups alone, there is one bin for
    each unordered pair of groups, `"adult-young"`. Per bin:

    - `tar` at each FAR, with one threshold for all bins, set on all impostor pairs by the exact rule of `tar_at_far`
      (FNMR = 1 - TAR), and `auc` against all impostor pairs;
    - `own_tar` and `own_auc`, against the impostor pairs of the same bin. There the gap is the same for both kinds of
      pair, so age alone cannot tell them apart: the strict comparison at small gaps, and at large ones the one that
      says whether identity is still in the embedding when a global threshold has lost it.

    Intervals come from a bootstrap over identities in which the threshold is set anew in each resample
    (`identity_bootstrap`, `bootstrap_estimate`). A resample counts a genuine pair m_i times and an impostor pair m_i
    m_j times; pairs between two copies of one identity are left out.

    Args:
        identities: (n,) identity of each image, whole numbers or strings.
        ages: (n,) age in years at each image, fractions welcome.
        age_groups: (n,) age group of each image, whole numbers or strings; used where there are no ages.
        bins: the rising lower ends of the gap bins, in years; a gap below the first is in no bin.
        fars: target false accept rates, in (0, 1].
        replicates: bootstrap resamples; 0 for no intervals.
        seed: of the resamples; the same for all models, so that their differences are paired.
        level: confidence of the intervals, in (0, 1).
        most_impostors: where a set has more impostor pairs, the *resamples* (never the values) run on its most alike
            pairs and a weighted sample of the others.

    Raises:
        ValueError: an argument that cannot be used: an age that is NaN (its row is named), one identity only, no
            identity with two images, bins that do not rise.

    Examples:
        >>> protocol = AgeGapProtocol([0, 0, 1, 1], ages=[10.0, 14.7, 20.0, 45.0], fars=(0.5,), replicates=0)
        >>> result = protocol.evaluate([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.9, 1.0]])
        >>> [(entry.name, entry.genuine, entry.tar[0.5].value) for entry in result.bins if entry.genuine]
        [('0-4', 1, 1.0), ('20-29', 1, 1.0)]
    """

    def __init__(
        self,
        identities: Any,
        *,
        ages: Any = None,
        age_groups: Any = None,
        bins: Sequence[float] = GAP_STARTS,
        fars: Sequence[float] = (1e-2, 1e-3),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
        most_impostors: int = 2_000_000,
    ) -> None:
        self.codes, _ = check_people(OWNER, identities)
        require(ages is not None or age_groups is not None, OWNER, "ages or age_groups must be given, got neither")
        check_number(OWNER, "replicates", replicates, min=0, integer=True)
        check_number(OWNER, "seed", seed, min=0, integer=True)
        check_level(OWNER, level)
        check_number(OWNER, "most_impostors", most_impostors, min=1, integer=True)
        self.fars = check_fars(OWNER, fars)
        self.replicates, self.seed, self.level, self.most_impostors = replicates, seed, float(level), most_impostors
        self.ages: FloatArray | None = None
        self.groups: IntArray | None = None
        if ages is not None:
            self.kind = "gap"
            self.ages = check_ages(OWNER, ages, self.codes.size)
            self.starts = check_starts(OWNER, "bins", bins)
            self.names = bin_names(self.starts)
        else:
            self.kind = "group"
            check_vector(OWNER, "age_groups", to_numpy(age_groups), self.codes.size, "identities")
            self.groups, group_labels = check_labels(OWNER, "age_groups", age_groups)
            self.names, self._table = group_bins(OWNER, [str(label) for label in group_labels])

    def __repr__(self) -> str:
        by = "ages" if self.kind == "gap" else "age_groups"
        shape = f"<{self.codes.size} images of {self.codes.max() + 1} identities>"
        bins = f", bins={tuple(self.starts.tolist())}" if self.kind == "gap" else ""
        return (
            f"AgeGapProtocol({shape}, {by}=...{bins}, fars={self.fars}, replicates={self.replicates}, "
            f"seed={self.seed}, level={self.level}, most_impostors={self.most_impostors})"
        )

    @property
    def fingerprint(self) -> str:
        """Of the images' identities and ages and of all settings, in their order."""
        digest = sha256(repr((self.kind, self.names, self.fars, self.replicates, self.seed, self.level)).encode())
        digest.update(repr(self.most_impostors).encode())
        for array in (self.codes, self.ages, self.groups):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def bin_of(self, i: IntArray, j: IntArray) -> npt.NDArray[np.int16]:
        """Bin of the pairs of rows i and j (broadcast together), -1 for none."""
        if self.ages is not None:
            return place(self.starts, np.abs(self.ages[i] - self.ages[j])).astype(np.int16)
        assert self.groups is not None
        return self._table[self.groups[i], self.groups[j]]

    def large_gap(self) -> str | None:
        """Name of the bin of the largest gap that holds genuine pairs; of groups, the mixed bin that holds most."""
        counts = np.bincount(np.maximum(self.bin_of(*genuine_pairs(self.codes)) + 1, 0), minlength=len(self.names) + 1)
        held = counts[1:]
        if self.groups is not None:
            held = np.where(np.isin(np.arange(held.size), np.diag(self._table)), 0, held)
            return self.names[int(held.argmax())] if held.any() else None
        return self.names[int(np.flatnonzero(held)[-1])] if held.any() else None

    def evaluate(self, embeddings: Any) -> AgeGapResult:
        """Measure (n, d) embeddings, normalized or not, in the order of the identities.

        Raises:
            ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.
        """
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        pairs = score_pairs(unit, self.codes, self.bin_of, len(self.names))
        values = resampled_rates(pairs, None, self.fars)
        draws = identity_bootstrap(self.codes, replicates=self.replicates, seed=self.seed)
        thinned = thin(pairs, most=self.most_impostors, fars=self.fars, seed=self.seed)
        resampled = resampled_rates(thinned, draws, self.fars)
        results = [self._result(pairs, place, values, resampled) for place in range(pairs.bins + 1)]
        name = self.large_gap()
        roc = {"all": curve(pairs.genuine_cost, pairs.impostor_cost)}
        if name is not None and results[self.names.index(name)].impostor:
            place = self.names.index(name)
            own = pairs.impostor_cost[pairs.impostors_in(place)]
            roc[name] = curve(pairs.genuine_cost[pairs.genuine_in(place)], own)
        return AgeGapResult(
            kind=self.kind,
            bins=tuple(results[:-1]),
            all=results[-1],
            operating_points={far: _operating_point(pairs, far, self.level) for far in self.fars},
            roc=roc,
            large_gap=name,
            edges=EDGES,
            genuine_counts={
                label: _histogram(pairs.genuine_cost[pairs.genuine_in(place)]) for place, label in enumerate(self.names)
            },
            impostor_counts=_histogram(pairs.impostor_cost),
            level=self.level,
            fingerprint=self.fingerprint,
        )

    def _result(self, pairs: PairScores, place: int, values: Rates, resampled: Rates) -> BinResult:
        members = pairs.genuine_in(place)
        genuine = pairs.genuine_cost[members].size
        clusters = np.unique(pairs.genuine_identity[members]).size

        def estimate(value: FloatArray, replicates: FloatArray) -> Any:
            return bootstrap_estimate(float(value), replicates, n=genuine, clusters=clusters, level=self.level)

        tar, own_tar = (
            {far: estimate(v[0, place, k], r[:, place, k]) for k, far in enumerate(self.fars)}
            for v, r in ((values.tar, resampled.tar), (values.own_tar, resampled.own_tar))
        )
        return BinResult(
            name="all" if place == pairs.bins else self.names[place],
            genuine=genuine,
            impostor=pairs.impostor_cost[pairs.impostors_in(place)].size,
            auc=estimate(values.auc[0, place], resampled.auc[:, place]),
            tar=tar,
            own_auc=estimate(values.own_auc[0, place], resampled.own_auc[:, place]),
            own_tar=own_tar,
        )


def _operating_point(pairs: PairScores, far: float, level: float) -> Any:
    return tar_at_far(-pairs.genuine_cost, -pairs.impostor_cost, far, level=level)


def _histogram(cost: FloatArray) -> list[int]:
    counts: list[int] = np.histogram(np.clip(-cost, -1, 1), EDGES)[0].tolist()
    return counts


def group_bins(owner: str, labels: list[str]) -> tuple[list[str], npt.NDArray[np.int16]]:
    """Names of the unordered pairs of groups, and the bin of each pair (groups, groups)."""
    require(len(labels) <= 64, owner, f"age_groups must hold at most 64 groups, got {len(labels)}")
    joint = " / " if any("-" in label for label in labels) else "-"
    table = np.zeros((len(labels), len(labels)), dtype=np.int16)
    names: list[str] = []
    for a, b in zip(*np.triu_indices(len(labels)), strict=True):
        table[a, b] = table[b, a] = len(names)
        names.append(labels[a] + joint + labels[b])
    return names, table
