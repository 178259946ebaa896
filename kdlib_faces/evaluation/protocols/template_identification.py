"""Open-set and closed-set identification of templates, the 1:N protocol of IJB-B and IJB-C."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

import numpy as np

from kdlib._checks import check_choice, check_type
from kdlib_faces.evaluation._checks import check_fars, check_level, check_ranks, require
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import ArrayLike, Embeddings, IntArray, JsonDict, Label, LabelArray
from kdlib_faces.evaluation.hardest import missed_probes
from kdlib_faces.evaluation.matching.galleries import (
    Gallery,
    GalleryPoint,
    GallerySearch,
    enroll,
    point_at,
    search_gallery,
)
from kdlib_faces.evaluation.matching.templates import Templates, pool_templates
from kdlib_faces.evaluation.roc import by_far
from kdlib_faces.evaluation.statistics.clustered import rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, resample_counts
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.summary import (
    KEPT_THRESHOLDS,
    CmcCurve,
    Description,
    HardPair,
    Measure,
    MeasuredValue,
    ModelSummary,
    ScoreTable,
    SearchCurve,
    far_measures,
)

OWNER = "identify_templates"
HEADLINE_FPIRS = (0.01, 0.1)
Enrolled: TypeAlias = tuple[ArrayLike, ArrayLike]
"""Template ids and their subjects."""


@dataclass(frozen=True)
class TemplateIdentificationResult:
    """Result of `identify_templates`.

    Attributes:
        tpir: Target FPIR to the mean over the galleries, with an interval over subjects at thresholds kept as they are.
        points: Target FPIR to the operating point of each gallery.
        rates: Rank to the closed-set rate: hits in all galleries over all mated searches.
        searches: For each gallery, the results of all probes.
        templates: The pooled templates.
        probes: The probes.
        galleries: The galleries.
    """

    tpir: Mapping[float, Estimate]
    points: Mapping[float, tuple[GalleryPoint, ...]]
    rates: Mapping[int, Estimate]
    searches: tuple[GallerySearch, ...] = field(repr=False, compare=False)
    templates: Templates = field(repr=False, compare=False)
    probes: Gallery = field(repr=False, compare=False)
    galleries: tuple[Gallery, ...] = field(repr=False, compare=False)

    @property
    def mated(self) -> int:
        """Number of mated searches in all galleries."""
        return sum(int(search.mated.sum()) for search in self.searches)

    @property
    def convention(self) -> str:
        """How the numbers are defined, in words."""
        return (
            "galleries searched separately; FPIR over each other probe's largest score; TPIR requires the mate first and "
            "above the threshold; mean over galleries; ranks over all mated searches"
        )

    def _headlines(self) -> list[float]:
        """The FPIRs in the table of measures."""
        return [fpir for fpir in self.tpir if fpir in HEADLINE_FPIRS] or list(self.tpir)

    def describe(self) -> Description:
        """What the protocol measures and how."""
        measures = far_measures("tpir", "TPIR", self._headlines(), rate="FPIR")
        return Description(
            question="Which identity is it, if it is in the gallery at all? Probes are searched in each gallery separately.",
            convention={
                "Definition": self.convention,
                "Pooling": self.templates.convention,
                "Score": "product of unit templates",
            },
            intervals="bootstrap over subjects, thresholds kept as they are",
            counts={
                "probe templates": self.probes.rows.size,
                "mated searches": self.mated,
                "galleries": len(self.galleries),
            },
            measures=measures | {f"rank{rank}": Measure(f"Rank-{rank}", note="closed set") for rank in self.rates},
            difference_rule=KEPT_THRESHOLDS.format("subjects"),
            failures="identification",
        )

    def summary(self) -> ModelSummary:
        """TPIR and rates by rank, and their curves."""
        measures = {}
        for fpir in self._headlines():
            resolvable = all(point.resolvable for point in self.points[fpir])
            measures[f"tpir_{fpir:g}"] = MeasuredValue.of(self.tpir[fpir], resolvable=resolvable)
        measures |= {f"rank{rank}": MeasuredValue.of(estimate) for rank, estimate in self.rates.items()}
        return ModelSummary(
            measures,
            cmc=CmcCurve(list(self.rates), [estimate.value for estimate in self.rates.values()]),
            search=SearchCurve(list(self.tpir), [estimate.value for estimate in self.tpir.values()]),
        )

    def outcomes(self) -> dict[str, Outcomes | Estimate]:
        """TPIR with its resamples, and mated searches identified at each rank."""
        ranks = np.concatenate([search.ranks[search.mated] for search in self.searches])
        subjects = np.concatenate([self.probes.subjects[search.mated] for search in self.searches])
        tpir: dict[str, Outcomes | Estimate] = {f"tpir_{fpir:g}": self.tpir[fpir] for fpir in self._headlines()}
        return tpir | {f"rank{rank}": Outcomes(ranks <= rank, (subjects, subjects)) for rank in self.rates}

    def hardest(self, count: int) -> list[HardPair]:
        """The mated searches whose mate is furthest behind, by the first image of each template."""
        first_rows, parts = self.templates.first_rows, []
        for search, gallery in zip(self.searches, self.galleries, strict=True):
            late = np.flatnonzero(search.ranks > 1)
            rows = (self.probes.rows[late], gallery.rows[search.mates[late]], gallery.rows[search.best[late]])
            scores = search.mate_scores[late], search.best_scores[late]
            parts.append((*(first_rows[each] for each in rows), *scores, self.probes.subjects[late]))
        probes, mates, best, mate_scores, best_scores, subjects = map(np.concatenate, zip(*parts, strict=True))
        return missed_probes(probes, (mates, mate_scores), (best, best_scores), subjects, count)

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """Each probe in each gallery; rank and score of the mate are empty if it is not enrolled."""
        ids, probes = self.templates.ids, self.probes

        def rows() -> Iterator[tuple[str | int, ...]]:
            for number, (search, gallery) in enumerate(zip(self.searches, self.galleries, strict=True), 1):
                for k, best in enumerate(search.best.tolist()):
                    mate = (int(search.ranks[k]), f"{search.mate_scores[k]:.8f}") if search.mated[k] else ("", "")
                    found = ids[gallery.rows[best]], gallery.subjects[best], f"{search.best_scores[k]:.8f}"
                    yield number, ids[probes.rows[k]], probes.subjects[k], *mate, *found

        columns = ("gallery", "probe template", "probe subject", "rank of mate", "mate score")
        best = ("best template", "best subject", "best score")
        return ScoreTable((*columns, *best), rows(), len(self.galleries) * probes.rows.size)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        return {
            **{f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()},
            "tpir": by_far(self.tpir),
            "galleries": {f"{fpir:g}": [dict(vars(point)) for point in each] for fpir, each in self.points.items()},
            "probes": self.probes.rows.size,
            "mated": self.mated,
            "pooling": self.templates.convention,
            "convention": self.convention,
        }


def identify_templates(
    templates: Templates,
    galleries: Sequence[Enrolled],
    probes: Enrolled,
    *,
    fpirs: Sequence[float] = HEADLINE_FPIRS,
    ranks: Sequence[int] = (1, 5, 10),
    replicates: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> TemplateIdentificationResult:
    """Open-set and closed-set identification of templates: 1:N of IJB-B and IJB-C.

    All probes are searched in each gallery separately. The probes whose subject is not in it are the non-mated searches:
    with N of them and k = floor(FPIR N), the threshold is the (k+1)-th largest of their largest scores, so the measured
    FPIR never exceeds the target. TPIR is the part of the mated searches whose mate is first *and* above the threshold;
    the figure is the mean over galleries. Closed-set rank k is over the mated searches of all galleries. Equal scores are
    ordered as in the gallery.

    Args:
        templates: From `pool_templates`.
        galleries: For each gallery its template ids (g,) and their subjects (g,), one template per subject.
        probes: Template ids (p,) and their subjects (p,), named as in the galleries.
        fpirs: Target false positive identification rates.
        ranks: Ranks.
        replicates: Bootstrap resamples over subjects; 0 for none.
        seed: Seed of the resamples.
        level: Confidence of the intervals.

    Returns:
        The rates.

    Raises:
        ValueError: A gallery is empty, a template id has no image, a subject or a template occurs twice in a gallery, or a
            gallery has no mated or no non-mated probe.

    Examples:
        >>> pooled = pool_templates(np.eye(4)[[0, 1, 0, 1, 2]] + 0.1, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
        >>> result = identify_templates(pooled, [([1, 2], ["ann", "bob"])], ([3, 4, 5], ["ann", "bob", "cy"]), ranks=(1,))
        >>> result.rates[1].value, result.tpir[0.1].value, result.points[0.1][0].resolvable
        (1.0, 1.0, False)

    References:
        C. Whitelam et al., "IARPA Janus Benchmark-B", CVPR workshops 2017.
    """
    fpirs = check_fars(OWNER, fpirs)
    level = check_level(OWNER, level)
    ranks = check_ranks(OWNER, ranks)
    require(len(galleries) > 0, OWNER, "galleries must not be empty, got none")
    searched = enroll(OWNER, templates, "probes", probes, unique_subjects=False)
    enrolled = [
        enroll(OWNER, templates, f"galleries[{number}]", each, unique_subjects=True)
        for number, each in enumerate(galleries)
    ]
    for number, gallery in enumerate(enrolled):
        twice = templates.ids[np.intersect1d(searched.rows, gallery.rows)].tolist()
        require(not twice, OWNER, f"probes must not be templates of galleries[{number}], got {twice[:1]} in both")
    codes, subjects = check_labels(OWNER, "subjects of probes", searched.subjects)
    searches = [search_gallery(OWNER, templates.features, searched.rows, codes, subjects, each) for each in enrolled]
    for number, search in enumerate(searches):
        require(bool(search.mated.any()), OWNER, f"galleries[{number}] must have a mated probe, got none")
        others = bool((~search.mated).any()) or not fpirs
        require(others, OWNER, f"galleries[{number}] must have a non-mated probe, got none")
    resamples = resample_counts(OWNER, subjects.size, replicates=replicates, seed=seed)
    mated: IntArray = np.concatenate([codes[search.mated] for search in searches])
    mate_ranks = np.concatenate([search.ranks[search.mated] for search in searches])
    counts = [int(search.mated.sum()) for search in searches]
    share = np.repeat([1 / count for count in counts], counts)
    tpir, points = {}, {}
    for fpir in fpirs:
        each = [point_at(search, fpir) for search in searches]
        hits = np.concatenate([hit for _, hit in each])
        tpir[fpir] = rate_estimate(hits, mated, resamples, level=level, per=share)
        points[fpir] = tuple(point for point, _ in each)
    rates = {rank: rate_estimate(mate_ranks <= rank, mated, resamples, level=level) for rank in ranks}
    return TemplateIdentificationResult(tpir, points, rates, tuple(searches), templates, searched, tuple(enrolled))


class TemplateIdentificationProtocol:
    """Pool images into templates, then `identify_templates`: a protocol for `evaluate`.

    Args:
        template_ids: (n,) whole numbers or strings, of each row of the embeddings.
        media_ids: (n,) whole numbers or strings.
        galleries, probes: See `identify_templates`.
        detector_scores: See `pool_templates`.
        feature_norm: See `pool_templates`.
        fpirs, ranks, replicates, seed, level: See `identify_templates`.

    Examples:
        >>> protocol = TemplateIdentificationProtocol(
        ...     [1, 2, 3, 4], [1, 2, 3, 4], [([1, 2], ["ann", "bob"])], ([3, 4], ["ann", "cy"]), ranks=(1,)
        ... )
        >>> protocol.evaluate(np.eye(4)[[0, 1, 0, 2]] + 0.1).rates[1].value
        1.0
    """

    def __init__(
        self,
        template_ids: LabelArray | ArrayLike,
        media_ids: ArrayLike,
        galleries: Sequence[Enrolled],
        probes: Enrolled,
        *,
        detector_scores: ArrayLike | None = None,
        feature_norm: Literal["keep", "unit"] = "keep",
        fpirs: Sequence[float] = HEADLINE_FPIRS,
        ranks: Sequence[int] = (1, 5, 10),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        check_choice("TemplateIdentificationProtocol", "feature_norm", feature_norm, ("keep", "unit"))
        check_type("TemplateIdentificationProtocol", "galleries", galleries, (list, tuple), "a list of galleries")
        self.template_ids, self.galleries, self.feature_norm = template_ids, tuple(galleries), feature_norm
        self.pool = partial(
            pool_templates, template_ids=template_ids, media_ids=media_ids, detector_scores=detector_scores,
            feature_norm=feature_norm,
        )  # fmt: skip
        owner = "TemplateIdentificationProtocol"
        self.fpirs, self.ranks = check_fars(owner, fpirs), check_ranks(owner, ranks)
        self.identify = partial(
            identify_templates, galleries=self.galleries, probes=probes, fpirs=self.fpirs, ranks=self.ranks,
            replicates=replicates, seed=seed, level=check_level(owner, level),
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"TemplateIdentificationProtocol(<{np.size(self.template_ids)} images>, <{len(self.galleries)} galleries>, "
            f"feature_norm={self.feature_norm!r}, fpirs={self.fpirs}, ranks={self.ranks})"
        )

    def evaluate(self, embeddings: Embeddings) -> TemplateIdentificationResult:
        """Measure the images' embeddings (n, d), not normalized."""
        return self.identify(self.pool(embeddings))
