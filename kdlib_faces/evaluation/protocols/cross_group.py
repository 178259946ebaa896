"""Evaluation room: a young face against adult ones, where no exact ages are known. The protocol of LAG. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import IntArray, check_fars, check_labels, check_level, require, unit_rows
from kdlib_faces.evaluation.roc import TarAtFar, far_name, tar_at_far
from kdlib_faces.evaluation.statistics.clustered import draws, rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate
from kdlib_faces.evaluation.statistics.resampling import PairScores, resampled_rates, thin

__all__ = ["CrossGroupProtocol", "CrossGroupResult"]

OWNER = "CrossGroupProtocol"


@dataclass(frozen=True)
class CrossGroupResult:
    """The result of a `CrossGroupProtocol`.

    Args:
        auc: over all pairs of a probe and a gallery image, with an interval over identities.
        tar: by target FAR, with an interval over identities in which the threshold is set anew.
        rates: by rank, probes whose mate is among the k most alike gallery images.
        operating_points: by target FAR, threshold and counts.
        probes: images of the probe group.
        gallery: images of the gallery group.
        mateless: probes without a mate in the gallery; they are impostors, and no trials of identification.
        genuine: pairs of one identity across the groups.
        groups: the probe's and the gallery's group.
    """

    auc: Estimate
    tar: Mapping[float, Estimate]
    rates: Mapping[int, Estimate]
    operating_points: Mapping[float, TarAtFar]
    probes: int
    gallery: int
    mateless: int
    genuine: int
    groups: tuple[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        entry: dict[str, Any] = {"auc": self.auc.to_dict()}
        entry["tar"] = {far_name(far): estimate.to_dict() for far, estimate in self.tar.items()}
        entry |= {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry["operating_points"] = {far_name(far): point.to_dict() for far, point in self.operating_points.items()}
        for name in ("probes", "gallery", "mateless", "genuine"):
            entry[name] = getattr(self, name)
        return entry | {"groups": list(self.groups)}


class CrossGroupProtocol:
    """Every image of one age group against every image of another: verification and identification across the gap.

    Args:
        identities: (n,) whole numbers or strings.
        groups: (n,) age group of each image, whole numbers or strings; images of other groups are left out.
        probe: the group of the probes.
        gallery: the group searched in.
        fars: target false accept rates.
        ranks: the k's.
        replicates: bootstrap resamples over identities; 0 for none.
        seed: of the resamples.
        level: confidence of the intervals.
        most_impostors: where there are more impostor pairs, the resamples run on a weighted sample of them, as in
            `AgeGapProtocol`.

    Raises:
        ValueError: an argument that cannot be used, a group without an image, no identity in both groups.

    Examples:
        >>> protocol = CrossGroupProtocol(["a", "a", "b", "b"], ["young", "adult", "young", "adult"], fars=(0.5,))
        >>> protocol.evaluate([[1.0, 0.0], [1.0, 0.3], [0.0, 1.0], [0.2, 1.0]]).rates[1].value
        1.0

    References:
        S. Bianco, "Large age-gap face verification by feature injection in deep networks", Pattern Recognition Letters 90, 2017.
    """

    def __init__(
        self,
        identities: Any,
        groups: Any,
        *,
        probe: Any = "young",
        gallery: Any = "adult",
        fars: Sequence[float] = (1e-2, 1e-3),
        ranks: Sequence[int] = (1,),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
        most_impostors: int = 2_000_000,
    ) -> None:
        self.codes, labels = check_labels(OWNER, "identities", identities)
        places, names = check_labels(OWNER, "groups", groups, rows=self.codes.size, like="identities")
        rows = []
        for name, group in (("probe", probe), ("gallery", gallery)):
            known = names.tolist()
            require(group in known, OWNER, f"{name} must be one of {', '.join(map(repr, known))}, got {group!r}")
            rows.append(np.flatnonzero(places == known.index(group)))
        require(probe != gallery, OWNER, f"probe and gallery must be two groups, got {probe!r} twice")
        self.probes, self.gallery = rows
        self.groups = (str(probe), str(gallery))
        both = np.intersect1d(self.codes[self.probes], self.codes[self.gallery])
        require(both.size > 0, OWNER, "identities must hold one with images of both groups, got none")
        require(
            labels.size > 1, OWNER, f"identities must hold at least two identities, got only {labels.tolist()[0]!r}"
        )
        for rank in ranks:
            check_number(OWNER, "ranks", rank, min=1, max=self.gallery.size, integer=True)
        check_level(OWNER, level)
        check_number(OWNER, "most_impostors", most_impostors, min=1, integer=True)
        self.fars, self.ranks, self.level, self.seed = check_fars(OWNER, fars), tuple(ranks), float(level), seed
        self.most_impostors = most_impostors
        self.draws = draws(OWNER, labels.size, replicates=replicates, seed=seed)

    def __repr__(self) -> str:
        return (
            f"CrossGroupProtocol(<{self.codes.size} images>, <{self.probes.size} {self.groups[0]}, {self.gallery.size} "
            f"{self.groups[1]}>, fars={self.fars}, ranks={self.ranks}, level={self.level})"
        )

    def evaluate(self, embeddings: Any) -> CrossGroupResult:
        """Measure (n, d) embeddings in the order of the identities.

        Raises:
            ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.
        """
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=self.codes.size)
        scores = unit[self.probes] @ unit[self.gallery].T
        probe, gallery = self.codes[self.probes], self.codes[self.gallery]
        same = probe[:, None] == gallery
        rows = same.any(axis=1)
        best = np.where(same, scores, -np.inf).max(axis=1)[rows]
        place = 1 + ((scores[rows] > best[:, None]) & ~same[rows]).sum(axis=1)
        pairs = self._pairs(-scores, probe, gallery, same)
        values = resampled_rates(pairs, None, self.fars)
        thinned = thin(pairs, most=self.most_impostors, fars=self.fars, seed=self.seed)
        resampled = resampled_rates(thinned, self.draws, self.fars)
        genuine, clusters = pairs.genuine_cost.size, np.unique(pairs.genuine_identity).size

        def estimate(value: Any, replicates: Any) -> Estimate:
            return bootstrap_estimate(float(value), replicates, n=genuine, clusters=clusters, level=self.level)

        return CrossGroupResult(
            auc=estimate(values.auc[0, 0], resampled.auc[:, 0]),
            tar={far: estimate(values.tar[0, 0, k], resampled.tar[:, 0, k]) for k, far in enumerate(self.fars)},
            rates={
                int(rank): rate_estimate((place <= rank).astype(np.float64), probe[rows], self.draws, level=self.level)
                for rank in self.ranks
            },
            operating_points={
                far: tar_at_far(-pairs.genuine_cost, -pairs.impostor_cost, far, level=self.level) for far in self.fars
            },
            probes=self.probes.size,
            gallery=self.gallery.size,
            mateless=int((~rows).sum()),
            genuine=genuine,
            groups=self.groups,
        )

    def _pairs(self, cost: Any, probe: IntArray, gallery: IntArray, same: Any) -> PairScores:
        genuine = np.argsort(cost[same], kind="stable")
        impostor = np.argsort(cost[~same])
        first, second = (np.broadcast_to(x, cost.shape) for x in (probe[:, None], gallery))
        return PairScores(
            cost[same][genuine],
            first[same][genuine],
            np.full(genuine.size, -1),
            cost[~same][impostor],
            first[~same][impostor],
            second[~same][impostor],
            np.full(impostor.size, -1),
            0,
        )
