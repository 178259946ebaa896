"""Verification of all pairs of a set of images, by age gap or by age groups, at one threshold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from kdlib_faces.evaluation._checks import MAX_PAIRS, check_fars, check_level, check_whole, gather, require, unit_rows
from kdlib_faces.evaluation._labels import check_identities
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, Embeddings, FloatArray, JsonDict, Label
from kdlib_faces.evaluation.hardest import first_disjoint, most_similar_impostors
from kdlib_faces.evaluation.matching.all_pairs import rows_of_scores
from kdlib_faces.evaluation.roc import TarAtFar, curve, tar_at_far
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, PairBins
from kdlib_faces.evaluation.statistics.intervals import Estimate, resample_counts
from kdlib_faces.evaluation.statistics.resampling import BinResult, bin_results, genuine_pairs, score_pairs, thin
from kdlib_faces.evaluation.summary import (
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

EDGES = np.linspace(-1, 1, 81)
OWNER = "AgeGapProtocol"


@dataclass(frozen=True)
class AgeGapResult:
    """Result of an `AgeGapProtocol`.

    Attributes:
        bins: The bins in order.
        all: All pairs, also those in no bin.
        operating_points: Target FAR to the global threshold and its counts; its own interval takes pairs as independent.
        roc: Measured FAR and TAR, for `"all"`, and for the bin of the largest gap against its own impostor pairs.
        large_gap: Name of that bin; None if no bin has a genuine pair. Without impostor pairs it has no `roc`.
        edges: (e + 1,) edges of the histogram's score bins.
        genuine_counts: Bin name to (e,) genuine scores per score bin.
        impostor_counts: (e,) impostor scores per score bin, over all pairs.
        thresholds: The threshold at each FAR over all pairs; see `operating_thresholds`.
        embeddings: (n, d) the evaluated embeddings.
    """

    bins: tuple[BinResult, ...]
    all: BinResult
    operating_points: Mapping[float, TarAtFar]
    roc: Mapping[str, tuple[FloatArray, FloatArray]]
    large_gap: str | None
    edges: FloatArray
    genuine_counts: Mapping[str, list[int]]
    impostor_counts: list[int]
    thresholds: JsonDict = field(repr=False, compare=False)
    protocol: "AgeGapProtocol" = field(repr=False, compare=False)
    embeddings: AnyArray = field(repr=False, compare=False)

    def bin(self, name: str) -> BinResult:
        """The bin of this name, or `"all"`."""
        known = {entry.name: entry for entry in (*self.bins, self.all)}
        require(name in known, "AgeGapResult.bin", f"name must be one of {', '.join(known)}, got {name!r}")
        return known[name]

    def unresolved(self) -> list[str]:
        """The estimates with too few impostor pairs for their FAR, such as `"30+: own_tar@0.001 (412 impostor pairs)"`."""
        points = self.operating_points.items()
        lines = [f"all: tar@{far:g} ({p.impostors} impostor pairs)" for far, p in points if not p.resolvable]
        return lines + [
            f"{entry.name}: own_tar@{far:g} ({entry.impostor} impostor pairs)"
            for entry in self.bins
            for far in entry.own_tar
            if not entry.resolves(far)
        ]

    def describe(self) -> Description:
        """What the protocol measures and how."""
        protocol, large = self.protocol, self.large_gap
        gap = "age gap" if protocol.bins.kind == "gap" else "age groups"
        measures: dict[str, Measure] = {}
        if large is not None:
            note = f"{gap} {large}"
            measures |= far_measures("large_tar", "TAR", protocol.fars, note=note)
            measures["large_own_auc"] = Measure("AUC against own impostors", "auc", note)
            measures |= far_measures("large_own", "TAR against own impostors", protocol.fars, note=note)
        measures |= far_measures("tar", "TAR", protocol.fars, note="all pairs")
        measures["auc"] = Measure("AUC", "auc", "all pairs")
        names, counts = [entry.name for entry in self.bins], [entry.genuine for entry in self.bins]
        at = protocol.bins.starts.tolist() if protocol.bins.kind == "gap" else None
        axis = "age gap, years" if protocol.bins.kind == "gap" else ""
        bins = {
            f"fnmr_{far:g}": Bins(f"FNMR at {far_text(far, 'FMR')}", names, axis, at, list(counts))
            for far in protocol.fars
        }
        bins["own_auc"] = Bins(f"AUC against impostors of the same {gap}", names, axis, at, list(counts), "auc")
        return Description(
            question="Are genuine pairs still accepted when years lie between the two images? All pairs of the set, with "
            "one threshold.",
            convention={
                "Threshold": "one for all bins, the (k+1)-th largest of all impostor scores, k = floor(FAR x impostors)",
                "Own impostors": "impostor pairs in the same bin, with a threshold of their own",
                "Curves drawn": f"{large} pairs against impostor pairs of the same kind" if large else "all pairs",
                "Score": "cosine",
            },
            intervals="bootstrap over identities, threshold set anew in each resample",
            counts={
                "images": protocol.codes.size,
                "identities": protocol.num_identities,
                "genuine pairs": self.all.genuine,
                "impostor pairs": self.all.impostor,
            },
            measures=measures,
            bins=bins,
            notes=tuple(f"{line}: too few impostor pairs for this rate" for line in self.unresolved()),
            difference_rule="Paired bootstrap over identities; the threshold is set anew in each resample.",
        )

    def _estimates(self) -> dict[str, tuple[Estimate, bool]]:
        """Measure key to estimate, and whether there are enough impostor pairs for it."""
        points = self.operating_points
        named = {f"tar_{far:g}": (estimate, points[far].resolvable) for far, estimate in self.all.tar.items()}
        named["auc"] = self.all.auc, True
        if self.large_gap is None:
            return named
        large = self.bin(self.large_gap)
        own = {f"large_own_{far:g}": (estimate, large.resolves(far)) for far, estimate in large.own_tar.items()}
        pooled = {f"large_tar_{far:g}": (estimate, points[far].resolvable) for far, estimate in large.tar.items()}
        return {**pooled, "large_own_auc": (large.own_auc, True), **own, **named}

    def summary(self) -> ModelSummary:
        """TAR and AUC over all pairs and at the largest gap, FNMR by bin, and curves."""
        large, points = self.large_gap, self.operating_points
        measures = {key: MeasuredValue.of(each, resolvable=good) for key, (each, good) in self._estimates().items()}
        bins = {
            f"fnmr_{far:g}": [MeasuredValue.of(each.fnmr[far], resolvable=point.resolvable) for each in self.bins]
            for far, point in points.items()
        }
        bins["own_auc"] = [MeasuredValue.of(entry.own_auc) for entry in self.bins]
        far, tar = self.roc[large if large is not None and large in self.roc else "all"]
        genuine = list(self.genuine_counts.values()) if large is None else [self.genuine_counts[large]]
        threshold = next((point.threshold for point in points.values()), -np.inf)
        histogram = Histogram(
            self.edges.tolist(),
            np.sum(genuine, axis=0).tolist(),
            list(self.impostor_counts),
            float(threshold) if np.isfinite(threshold) else None,
        )
        return ModelSummary(measures, bins, roc=RocCurve(far.tolist(), tar.tolist()), histogram=histogram)

    def outcomes(self) -> dict[str, Estimate]:
        """The estimates with their resamples; none without resamples."""
        return {key: each for key, (each, _) in self._estimates().items() if len(self.protocol.resamples)}

    def hardest(self, count: int) -> list[HardPair]:
        """The genuine pairs of lowest score across the largest gap, and the impostor pairs of highest score.

        Each identity occurs in at most one genuine and one impostor pair.
        """
        protocol = self.protocol
        unit = unit_rows(OWNER, "embeddings", self.embeddings)
        pairs = []
        if self.large_gap is not None:
            i, j = genuine_pairs(protocol.codes)
            inside = protocol.bins.of(i, j) == protocol.bins.names.index(self.large_gap)
            i, j = i[inside], j[inside]
            scores = np.einsum("gd,gd->g", unit[i], unit[j])
            order = np.argsort(scores, kind="stable").tolist()
            chosen = first_disjoint(order, lambda pair: [int(protocol.codes[i[pair]])], count)
            pairs = [HardPair(int(i[k]), int(j[k]), float(scores[k]), True) for k in chosen]
        impostors = most_similar_impostors(unit, unit, protocol.codes, protocol.codes, count)
        return pairs + [HardPair(min(a, b), max(a, b), score, False) for a, b, score in impostors]

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The score of every pair of images, computed in blocks."""
        codes = self.protocol.codes

        def rows() -> Iterator[tuple[str | int, ...]]:
            for i, scores in rows_of_scores(self.embeddings):
                left = label(i)
                for j, score in enumerate(scores, i + 1):
                    yield left, label(j), int(codes[i] == codes[j]), f"{score:.8f}"

        return ScoreTable(("left", "right", "same", "score"), rows(), codes.size * (codes.size - 1) // 2)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON: the `age_gap` entry of a report."""
        return {
            "kind": self.protocol.bins.kind,
            "bins": [entry.to_dict() for entry in self.bins],
            "all": self.all.to_dict(),
            "roc": {name: {"far": far.tolist(), "tar": tar.tolist()} for name, (far, tar) in self.roc.items()},
            "histogram": {
                "edges": self.edges.tolist(),
                "genuine": {name: list(counts) for name, counts in self.genuine_counts.items()},
                "impostor": list(self.impostor_counts),
            },
            "thresholds": self.thresholds,
        }


class AgeGapProtocol:
    """Verification of every pair of images, by the years between them.

    With ages, a pair belongs to the bin of its gap `|age_i - age_j|`: bins (0, 5, 10) are the gaps [0, 5), [5, 10) and
    10 or more, named `"0-4"`, `"5-9"`, `"10+"`; a gap of 4.7 years is in `"0-4"`. With age groups alone, there is one bin
    for each unordered pair of groups, such as `"adult-young"`. Each bin has:

    - `tar` at each FAR, at one threshold for all bins, set on all impostor pairs by the exact rule of `tar_at_far`
      (FNMR = 1 - TAR), and `auc` against all impostor pairs;
    - `own_tar` and `own_auc`, against the impostor pairs of the same bin. Both kinds of pair then have the same gap, so
      age alone cannot separate them. This is the stricter comparison at small gaps. At large gaps it shows whether the
      embedding still holds the identity where a global threshold no longer accepts it.

    Intervals come from a bootstrap over identities in which the threshold is set anew in each resample
    (`identity_bootstrap`, `bootstrap_estimate`).

    Args:
        identities: (n,) identity of each image, whole numbers or strings.
        ages: (n,) age in years at each image, with or without fractions.
        age_groups: (n,) age group of each image, whole numbers or strings; used if there are no ages.
        bins: Rising lower ends of the gap bins, in years; a gap below the first is in no bin.
        fars: Target false accept rates, in (0, 1].
        replicates: Bootstrap resamples; 0 for no intervals.
        seed: Seed of the resamples. Use the same for all models, so that their differences are paired.
        level: Confidence of the intervals, in (0, 1).
        max_impostors: If a set has more impostor pairs, the resamples (not the values) use its most similar pairs and a
            weighted sample of the others.

    Raises:
        ValueError: An argument is not usable: an age is NaN (the message gives its row), there is one identity only, no
            identity has two images, or the bins do not rise.

    Examples:
        >>> protocol = AgeGapProtocol([0, 0, 1, 1], ages=[10.0, 14.7, 20.0, 45.0], fars=(0.5,), replicates=0)
        >>> result = protocol.evaluate([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.9, 1.0]])
        >>> [(entry.name, entry.genuine, entry.tar[0.5].value) for entry in result.bins if entry.genuine]
        [('0-4', 1, 1.0), ('20-29', 1, 1.0)]
    """

    def __init__(
        self,
        identities: ArrayLike,
        *,
        ages: ArrayLike | None = None,
        age_groups: ArrayLike | None = None,
        bins: Sequence[float] = GAP_STARTS,
        fars: Sequence[float] = (1e-2, 1e-3),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
        max_impostors: int = 2_000_000,
    ) -> None:
        self.codes, labels = check_identities(OWNER, identities)
        self.num_identities, count = labels.size, self.codes.size * (self.codes.size - 1) // 2
        message = f"images must make at most {MAX_PAIRS} pairs, got {count}; AgeErrorProtocol holds no list of them"
        require(count <= MAX_PAIRS, OWNER, message)
        self.level, self.fars = check_level(OWNER, level), check_fars(OWNER, fars)
        self.max_impostors = check_whole(OWNER, "max_impostors", max_impostors, min=1)
        self.seed = check_whole(OWNER, "seed", seed, min=0)
        self.resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)
        self.bins = PairBins(OWNER, self.codes, ages, age_groups, bins)

    def __repr__(self) -> str:
        gaps = self.bins.kind == "gap"
        by = f"ages=..., bins={tuple(self.bins.starts.tolist())}" if gaps else "age_groups=..."
        return (
            f"AgeGapProtocol(<{self.codes.size} images of {self.num_identities} identities>, {by}, "
            f"fars={self.fars}, replicates={len(self.resamples)}, seed={self.seed}, level={self.level}, "
            f"max_impostors={self.max_impostors})"
        )

    @property
    def fingerprint(self) -> str:
        """Digest of the identities and ages of the images in their order, and of all settings."""
        settings = (self.bins.names, self.fars, len(self.resamples), self.seed, self.level, self.max_impostors)
        digest = sha256(repr((self.bins.kind, *settings)).encode())
        for array in (self.codes, self.bins.values):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def evaluate(self, embeddings: Embeddings) -> AgeGapResult:
        """Measure embeddings (n, d) in the order of the identities."""
        rows, names = gather(OWNER, "embeddings", embeddings), self.bins.names
        unit = unit_rows(OWNER, "embeddings", rows, rows=self.codes.size)
        pairs = score_pairs(unit, self.codes, self.bins.of, len(names))
        thinned = thin(pairs, max_pairs=self.max_impostors, fars=self.fars, seed=self.seed)
        results = bin_results(pairs, thinned, names, self.fars, self.resamples, self.level)
        large = self.bins.largest()
        roc = {"all": curve(pairs.genuine_cost, pairs.impostor_cost)}
        if large is not None and results[number := names.index(large)].impostor:
            own = pairs.impostor_cost[pairs.impostors_in(number)]
            roc[large] = curve(pairs.genuine_cost[pairs.genuine_in(number)], own)
        genuine, impostor = -pairs.genuine_cost, -pairs.impostor_cost
        return AgeGapResult(
            bins=tuple(results[:-1]),
            all=results[-1],
            operating_points={far: tar_at_far(genuine, impostor, far, level=self.level) for far in self.fars},
            roc=roc,
            large_gap=large,
            edges=EDGES,
            genuine_counts={name: _histogram(genuine[pairs.genuine_in(number)]) for number, name in enumerate(names)},
            impostor_counts=_histogram(impostor),
            thresholds=operating_thresholds(impostor, level=self.level),
            protocol=self,
            embeddings=rows,
        )


def _histogram(scores: FloatArray) -> list[int]:
    counts: list[int] = np.histogram(np.clip(scores, -1, 1), EDGES)[0].tolist()
    return counts
