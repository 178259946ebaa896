"""Verification and identification of one age group against another, the protocol of LAG."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdlib_faces.evaluation._checks import (
    MAX_PAIRS,
    check_fars,
    check_level,
    check_ranks,
    check_scalar,
    check_whole,
    require,
    unit_rows,
)
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import ArrayLike, BoolArray, Embeddings, FloatArray, IntArray, JsonDict, Label
from kdlib_faces.evaluation.hardest import first_disjoint, most_similar_impostors
from kdlib_faces.evaluation.matching.search import cosines, ranks_of
from kdlib_faces.evaluation.roc import TarAtFar, by_far, tar_at_far
from kdlib_faces.evaluation.statistics.clustered import rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, resample_counts
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.statistics.resampling import PairScores, bin_results, thin
from kdlib_faces.evaluation.summary import (
    MAX_CMC_RANK,
    CmcCurve,
    Description,
    HardPair,
    Histogram,
    Measure,
    MeasuredValue,
    ModelSummary,
    RocCurve,
    ScoreTable,
    far_measures,
)
from kdlib_faces.evaluation.thresholds import operating_thresholds

OWNER = "CrossGroupProtocol"


@dataclass(frozen=True)
class CrossGroupResult:
    """Result of a `CrossGroupProtocol`.

    Attributes:
        auc: AUC over all pairs of a probe and a gallery image, with an interval over identities.
        tar: Target FAR to TAR, with an interval over identities in which the threshold is set anew.
        rates: Rank to the part of the probes with a mate that is among the k most similar gallery images.
        operating_points: Target FAR to threshold and counts.
        ranks_of_mates: (m,) rank of the best mate of each probe that has one; equal scores are ordered by row.
        unit: (n, d) embeddings of length one.
    """

    auc: Estimate
    tar: Mapping[float, Estimate]
    rates: Mapping[int, Estimate]
    operating_points: Mapping[float, TarAtFar]
    ranks_of_mates: IntArray = field(repr=False, compare=False)
    unit: FloatArray = field(repr=False, compare=False)
    protocol: "CrossGroupProtocol" = field(repr=False, compare=False)

    def _scores(self) -> FloatArray:
        """(probes, gallery) cosines."""
        return cosines(self.unit[self.protocol.probes], self.unit[self.protocol.gallery])

    def describe(self) -> Description:
        """What the protocol measures and how."""
        protocol = self.protocol
        probe, gallery = protocol.groups
        measures = far_measures("tar", "TAR", protocol.fars)
        measures["auc"] = Measure("AUC", "auc")
        measures |= {f"rank{rank}": Measure(f"Rank-{rank}", note=f"{probe} among {gallery}") for rank in protocol.ranks}
        return Description(
            question=f"Is a {probe} face recognized among {gallery} ones? Every {probe} image against every {gallery} "
            "image, with all impostor pairs across the groups.",
            convention={
                "Threshold": "the (k+1)-th largest score of impostor pairs across the groups, k = floor(FAR x impostors)",
                "Ranks": f"{probe} probes with a mate, gallery of every {gallery} image; ties by row",
                "Score": "cosine",
            },
            intervals="bootstrap over identities, threshold set anew in each resample",
            counts=protocol.counts,
            measures=measures,
        )

    def summary(self) -> ModelSummary:
        """TAR, AUC and rates by rank, and curves."""
        scores, same, points = self._scores(), self.protocol.same, self.operating_points
        measures = {
            f"tar_{far:g}": MeasuredValue.of(each, resolvable=points[far].resolvable) for far, each in self.tar.items()
        }
        measures["auc"] = MeasuredValue.of(self.auc)
        measures |= {f"rank{rank}": MeasuredValue.of(each) for rank, each in self.rates.items()}
        max_rank = min(MAX_CMC_RANK, self.protocol.gallery.size)
        threshold = next((point.threshold for point in points.values()), None)
        return ModelSummary(
            measures,
            roc=RocCurve.of(scores[same], scores[~same]),
            cmc=CmcCurve.of(self.ranks_of_mates, max_rank),
            histogram=Histogram.of(scores[same], scores[~same], threshold),
        )

    def outcomes(self) -> dict[str, Outcomes]:
        """Genuine pairs accepted at each FAR, and probes identified at each rank."""
        protocol = self.protocol
        scores, probe = self._scores()[protocol.same], protocol.codes[protocol.probes]
        genuine = probe[np.nonzero(protocol.same)[0]]
        mated = probe[protocol.same.any(axis=1)]
        points, ranks = self.operating_points.items(), self.rates
        accepted = {f"tar_{far:g}": Outcomes(scores > point.threshold, (genuine, genuine)) for far, point in points}
        return accepted | {f"rank{rank}": Outcomes(self.ranks_of_mates <= rank, (mated, mated)) for rank in ranks}

    def hardest(self, count: int) -> list[HardPair]:
        """The genuine pairs of lowest and the impostor pairs of highest score, each identity once per kind."""
        protocol = self.protocol
        probes, gallery = protocol.probes, protocol.gallery
        i, j = np.nonzero(protocol.same)
        scores = self._scores()[i, j]
        order = np.argsort(scores, kind="stable").tolist()
        chosen = first_disjoint(order, lambda pair: [int(protocol.codes[probes[i[pair]]])], count)
        pairs = [HardPair(int(probes[i[k]]), int(gallery[j[k]]), float(scores[k]), True) for k in chosen]
        codes = protocol.codes[probes], protocol.codes[gallery]
        impostors = most_similar_impostors(self.unit[probes], self.unit[gallery], *codes, count)
        return pairs + [HardPair(int(probes[a]), int(gallery[b]), score, False) for a, b, score in impostors]

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The score of every probe with every gallery image."""
        protocol = self.protocol

        def rows() -> Iterator[tuple[str | int, ...]]:
            gallery = self.unit[protocol.gallery]
            for i, probe in enumerate(protocol.probes.tolist()):
                scores = gallery @ self.unit[probe]
                for j, row in enumerate(protocol.gallery.tolist()):
                    yield label(probe), label(row), int(protocol.same[i, j]), f"{scores[j]:.8f}"

        return ScoreTable(("probe", "gallery", "same", "score"), rows(), protocol.same.size)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        protocol = self.protocol
        return {
            "auc": self.auc.to_dict(),
            "tar": by_far(self.tar),
            **{f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()},
            "operating_points": by_far(self.operating_points),
            "probes": protocol.probes.size,
            "gallery": protocol.gallery.size,
            "mateless": protocol.mateless,
            "genuine": int(protocol.same.sum()),
            "groups": list(protocol.groups),
            "thresholds": operating_thresholds(self._scores()[~protocol.same], level=protocol.level),
        }


class CrossGroupProtocol:
    """Every image of one age group against every image of another: verification and identification.

    Args:
        identities: (n,) whole numbers or strings.
        groups: (n,) age group of each image, whole numbers or strings; images of other groups are left out.
        probe: Group of the probes.
        gallery: Group of the gallery.
        fars: Target false accept rates.
        ranks: Ranks.
        replicates: Bootstrap resamples over identities; 0 for none.
        seed: Seed of the resamples.
        level: Confidence of the intervals.
        max_impostors: With more impostor pairs, the resamples use a weighted sample of them, as in `AgeGapProtocol`.

    Examples:
        >>> protocol = CrossGroupProtocol(["a", "a", "b", "b"], ["young", "adult", "young", "adult"], fars=(0.5,))
        >>> protocol.evaluate([[1.0, 0.0], [1.0, 0.3], [0.0, 1.0], [0.2, 1.0]]).rates[1].value
        1.0

    References:
        S. Bianco, "Large age-gap face verification by feature injection in deep networks", Pattern Recognition Letters 90, 2017.
    """

    def __init__(
        self,
        identities: ArrayLike,
        groups: ArrayLike,
        *,
        probe: str | int = "young",
        gallery: str | int = "adult",
        fars: Sequence[float] = (1e-2, 1e-3),
        ranks: Sequence[int] = (1,),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
        max_impostors: int = 2_000_000,
    ) -> None:
        self.codes, _ = check_labels(OWNER, "identities", identities)
        group_codes, group_labels = check_labels(OWNER, "groups", groups, rows=self.codes.size, like="identities")
        known = group_labels.tolist()
        chosen = [check_scalar(OWNER, name, x) for name, x in (("probe", probe), ("gallery", gallery))]
        for name, group in zip(("probe", "gallery"), chosen, strict=True):
            require(group in known, OWNER, f"{name} must be one of {', '.join(map(repr, known))}, got {group!r}")
        require(chosen[0] != chosen[1], OWNER, f"probe and gallery must be two groups, got {chosen[0]!r} twice")
        self.probes, self.gallery = (np.flatnonzero(group_codes == known.index(each)) for each in chosen)
        self.groups = (str(chosen[0]), str(chosen[1]))
        count = self.probes.size * self.gallery.size
        require(count <= MAX_PAIRS, OWNER, f"probes x gallery must be at most {MAX_PAIRS} pairs, got {count}")
        self.same: BoolArray = self.codes[self.probes][:, None] == self.codes[self.gallery]
        require(bool(self.same.any()), OWNER, "identities must hold one with images of both groups, got none")
        require(not self.same.all(), OWNER, "identities must hold an impostor pair across the groups, got one identity")
        # Identities of other groups are no part of the resamples.
        used = np.concatenate([self.probes, self.gallery])
        kept, self.codes[used] = np.unique(self.codes[used], return_inverse=True)
        self.ranks = check_ranks(OWNER, ranks, max=self.gallery.size, required=False)
        self.fars, self.level = check_fars(OWNER, fars), check_level(OWNER, level)
        self.max_impostors = check_whole(OWNER, "max_impostors", max_impostors, min=1)
        self.seed = check_whole(OWNER, "seed", seed, min=0)
        self.resamples = resample_counts(OWNER, kept.size, replicates=replicates, seed=seed)

    @property
    def mateless(self) -> int:
        """Number of probes without a mate in the gallery; they count as impostors, not as trials of identification."""
        return int((~self.same.any(axis=1)).sum())

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of images and pairs."""
        genuine = int(self.same.sum())
        return {
            f"{self.groups[0]} images": self.probes.size,
            f"{self.groups[1]} images": self.gallery.size,
            "probes without a mate": self.mateless,
            "genuine pairs": genuine,
            "impostor pairs": self.same.size - genuine,
        }

    def __repr__(self) -> str:
        return (
            f"CrossGroupProtocol(<{self.codes.size} images>, <{self.probes.size} {self.groups[0]}, {self.gallery.size} "
            f"{self.groups[1]}>, fars={self.fars}, ranks={self.ranks}, level={self.level})"
        )

    def evaluate(self, embeddings: Embeddings) -> CrossGroupResult:
        """Measure embeddings (n, d) in the order of the identities."""
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        scores, same = cosines(unit[self.probes], unit[self.gallery]), self.same
        mated = same.any(axis=1)
        _, ranks_of_mates = ranks_of(scores[mated], np.where(same, scores, -np.inf)[mated].argmax(axis=1))
        pairs = self._pairs(-scores)
        thinned = thin(pairs, max_pairs=self.max_impostors, fars=self.fars, seed=self.seed)
        (whole,) = bin_results(pairs, thinned, (), self.fars, self.resamples, self.level)
        probes = self.codes[self.probes][mated]
        return CrossGroupResult(
            auc=whole.auc,
            tar=whole.tar,
            rates={
                rank: rate_estimate(ranks_of_mates <= rank, probes, self.resamples, level=self.level)
                for rank in self.ranks
            },
            operating_points={
                far: tar_at_far(-pairs.genuine_cost, -pairs.impostor_cost, far, level=self.level) for far in self.fars
            },
            ranks_of_mates=ranks_of_mates,
            unit=unit,
            protocol=self,
        )

    def _pairs(self, cost: FloatArray) -> PairScores:
        same = self.same
        genuine, impostor = np.argsort(cost[same], kind="stable"), np.argsort(cost[~same])
        first = np.broadcast_to(self.codes[self.probes][:, None], cost.shape)
        second = np.broadcast_to(self.codes[self.gallery], cost.shape)
        return PairScores(
            genuine_cost=cost[same][genuine],
            genuine_identity=first[same][genuine],
            genuine_bin=np.full(genuine.size, -1),
            impostor_cost=cost[~same][impostor],
            impostor_first=first[~same][impostor],
            impostor_second=second[~same][impostor],
            impostor_bin=np.full(impostor.size, -1),
            bins=0,
        )
