"""Evaluation room: which person is it, if any of these? The 1:N protocol of IJB-B and IJB-C. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_choice, check_number
from kdlib_faces.evaluation._checks import (
    BoolArray,
    FloatArray,
    IntArray,
    check_distinct,
    check_fars,
    check_labels,
    check_level,
    check_vector,
    look_up,
    require,
    to_numpy,
)
from kdlib_faces.evaluation.roc import allowed_false_accepts, far_name
from kdlib_faces.evaluation.statistics.clustered import draws, rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate
from kdlib_faces.evaluation.templates import Templates, pool_templates

__all__ = [
    "GalleryPoint",
    "GallerySearch",
    "TemplateIdentificationProtocol",
    "TemplateIdentificationResult",
    "identify_templates",
]

OWNER = "identify_templates"
BLOCK = 1024
Enrolled = tuple[Any, Any]


@dataclass(frozen=True)
class GalleryPoint:
    """One gallery at one FPIR.

    Args:
        tpir: part of its mated probes whose mate is first and scores above the threshold.
        fpir: measured part of its other probes with any score above it.
        threshold: the score that must be exceeded.
        resolvable: whether the target allows one false positive.
        mated: how many probes have their mate in it.
        nonmated: how many have not.
    """

    tpir: float
    fpir: float
    threshold: float
    resolvable: bool
    mated: int
    nonmated: int


@dataclass(frozen=True)
class GallerySearch:
    """What one gallery says of every probe.

    Args:
        best: (p,) entry of the gallery that is most alike, the first of equal ones.
        best_scores: (p,) its score.
        mated: (p,) whether the probe's subject is in the gallery.
        mate_scores: (p,) score of the mate, -inf without one.
        places: (p,) place of the mate, from 1; 0 without one.
    """

    best: IntArray
    best_scores: FloatArray
    mated: BoolArray
    mate_scores: FloatArray
    places: IntArray


@dataclass(frozen=True)
class TemplateIdentificationResult:
    """The result of `identify_templates`.

    Args:
        tpir: by target FPIR, the mean over the galleries, with an interval over subjects at thresholds kept as they are.
        galleries: by target FPIR, each gallery's own point.
        rates: by rank, closed-set: hits of all galleries over all mated searches.
        probes: how many probe templates there are.
        mated: mated searches in all galleries.
        pooling: how templates were pooled, in words.
        searches: of each gallery, what it says of every probe; not serialized.
    """

    tpir: Mapping[float, Estimate]
    galleries: Mapping[float, tuple[GalleryPoint, ...]]
    rates: Mapping[int, Estimate]
    probes: int
    mated: int
    pooling: str
    searches: tuple[GallerySearch, ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        entry: dict[str, Any] = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry["tpir"] = {far_name(fpir): estimate.to_dict() for fpir, estimate in self.tpir.items()}
        entry["galleries"] = {
            far_name(fpir): [dict(vars(point)) for point in points] for fpir, points in self.galleries.items()
        }
        entry |= {"probes": self.probes, "mated": self.mated, "pooling": self.pooling}
        entry["convention"] = (
            "galleries searched separately; FPIR over each other probe's largest score; TPIR wants the mate first and "
            "above the threshold; mean over galleries; ranks over all mated searches"
        )
        return entry


def identify_templates(
    templates: Templates,
    galleries: Sequence[Enrolled],
    probes: Enrolled,
    *,
    fpirs: Sequence[float] = (0.01, 0.1),
    ranks: Sequence[int] = (1, 5, 10),
    replicates: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> TemplateIdentificationResult:
    """Open-set and closed-set identification of templates: IJB-B's and IJB-C's 1:N.

    Each gallery is searched on its own by all probes. Those whose subject is not in it are the non-mated searches: with
    N of them and k = floor(FPIR N), the threshold is the (k+1)-th largest of their largest scores, so the measured FPIR
    never exceeds the target. TPIR is the part of the mated searches whose mate is first *and* above the threshold;
    the figure is the mean over galleries. Closed-set rank k is over the mated searches of all galleries. Of equal
    scores the one earlier in the gallery is first.

    Args:
        templates: from `pool_templates`.
        galleries: for each gallery its template ids (g,) and their subjects (g,), one template a subject.
        probes: template ids (p,) and their subjects (p,), named as in the galleries.
        fpirs: target false positive identification rates.
        ranks: the k's.
        replicates: bootstrap resamples over subjects; 0 for none.
        seed: of the resamples.
        level: confidence of the intervals.

    Returns:
        The rates.

    Raises:
        ValueError: an empty gallery, a template id that no image has, a subject or a template twice in a gallery, a
            gallery without a mated or without a non-mated probe.

    Examples:
        >>> pooled = pool_templates(np.eye(4)[[0, 1, 0, 1, 2]] + 0.1, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
        >>> result = identify_templates(pooled, [([1, 2], ["ann", "bob"])], ([3, 4, 5], ["ann", "bob", "cy"]), ranks=(1,))
        >>> result.rates[1].value, result.tpir[0.1].value, result.galleries[0.1][0].resolvable
        (1.0, 1.0, False)

    References:
        C. Whitelam et al., "IARPA Janus Benchmark-B", CVPR workshops 2017.
    """
    fpirs = check_fars(OWNER, fpirs)
    check_level(OWNER, level)
    require(len(ranks) > 0, OWNER, "ranks must not be empty, got ()")
    for rank in ranks:
        check_number(OWNER, "ranks", rank, min=1, integer=True)
    require(len(galleries) > 0, OWNER, "galleries must not be empty, got none")
    rows, subjects = _enrolled(templates, "probes", probes, one_each=False)
    enrolled = [
        _enrolled(templates, f"galleries[{number}]", gallery, one_each=True) for number, gallery in enumerate(galleries)
    ]
    codes, people = check_labels(OWNER, "subjects of probes", subjects)
    searches = [_search(templates.features, rows, codes, people, *each) for each in enrolled]
    for number, search in enumerate(searches):
        for kind, held in (("mated", search.mated), ("non-mated", ~search.mated)):
            require(
                bool(held.any()) or (kind == "non-mated" and not fpirs),
                OWNER,
                f"galleries[{number}] must have a {kind} probe, got none",
            )
    multiplicities = draws(OWNER, people.size, replicates=replicates, seed=seed)
    who = np.concatenate([codes[search.mated] for search in searches])
    place = np.concatenate([search.places[search.mated] for search in searches])
    share = np.concatenate([np.full(int(search.mated.sum()), 1 / search.mated.sum()) for search in searches])
    tpir, points = {}, {}
    for fpir in fpirs:
        each = [_point(search, fpir) for search in searches]
        hits = np.concatenate([hit for _, hit in each])
        tpir[fpir] = rate_estimate(hits, who, multiplicities, level=level, per=share)
        points[fpir] = tuple(point for point, _ in each)
    rates = {
        int(rank): rate_estimate((place <= rank).astype(np.float64), who, multiplicities, level=level) for rank in ranks
    }
    return TemplateIdentificationResult(tpir, points, rates, rows.size, who.size, templates.convention, tuple(searches))


def _enrolled(templates: Templates, name: str, given: Enrolled, *, one_each: bool) -> tuple[IntArray, Any]:
    """Rows of the templates, and their subjects."""
    require(
        isinstance(given, (tuple, list)) and len(given) == 2, OWNER, f"{name} must be template ids and their subjects"
    )
    ids, subjects = (to_numpy(x) for x in given)
    check_vector(OWNER, f"template ids of {name}", ids)
    check_vector(OWNER, f"subjects of {name}", subjects, ids.size, "their template ids")
    check_distinct(OWNER, f"template ids of {name}", *check_labels(OWNER, f"template ids of {name}", ids))
    codes, labels = check_labels(OWNER, f"subjects of {name}", subjects)
    if one_each:
        check_distinct(OWNER, f"subjects of {name}", codes, labels)
    return look_up(OWNER, f"template ids of {name}", ids, templates.ids, "template_ids"), labels[codes]


def _search(
    features: npt.NDArray[Any], probes: IntArray, codes: IntArray, people: Any, gallery: IntArray, subjects: Any
) -> GallerySearch:
    """Search one gallery, a block of probes at a time."""
    kinds = ["strings" if labels.dtype.kind == "U" else "numbers" for labels in (people, subjects)]
    require(kinds[0] == kinds[1], OWNER, f"subjects must be named alike, got {kinds[0]} and {kinds[1]}")
    order = np.argsort(subjects, kind="stable")
    spot = np.minimum(np.searchsorted(subjects[order], people), subjects.size - 1)
    column = np.where(subjects[order][spot] == people, order[spot], -1)[codes]
    best, places = np.empty(probes.size, dtype=np.int64), np.empty(probes.size, dtype=np.int64)
    best_scores, mate_scores = np.empty(probes.size), np.empty(probes.size)
    enrolled = features[gallery].astype(np.float64, copy=False).T
    for start in range(0, probes.size, BLOCK):
        part = slice(start, start + BLOCK)
        scores, own = features[probes[part]].astype(np.float64, copy=False) @ enrolled, column[part]
        best[part] = scores.argmax(axis=1)
        best_scores[part] = np.take_along_axis(scores, best[part][:, None], axis=1)[:, 0]
        score = np.take_along_axis(scores, np.maximum(own, 0)[:, None], axis=1)
        ahead = (scores > score) | ((scores == score) & (np.arange(gallery.size) < own[:, None]))
        mate_scores[part] = np.where(own >= 0, score[:, 0], -np.inf)
        places[part] = np.where(own >= 0, 1 + ahead.sum(axis=1), 0)
    return GallerySearch(best, best_scores, column >= 0, mate_scores, places)


def _point(search: GallerySearch, fpir: float) -> tuple[GalleryPoint, FloatArray]:
    """The gallery's point at one FPIR, and which of its mated searches are hits."""
    others = search.best_scores[~search.mated]
    k = allowed_false_accepts(fpir, others.size)
    threshold = float(-np.partition(-others, k)[k]) if k < others.size else -np.inf
    hits = ((search.places == 1) & (search.mate_scores > threshold))[search.mated].astype(np.float64)
    point = GalleryPoint(
        tpir=float(hits.mean()),
        fpir=float((others > threshold).mean()),
        threshold=threshold,
        resolvable=k >= 1,
        mated=hits.size,
        nonmated=others.size,
    )
    return point, hits


class TemplateIdentificationProtocol:
    """Pool images, then `identify_templates`: a protocol for `evaluate`.

    Args:
        template_ids: (n,) whole numbers or strings, of each row of the embeddings.
        media_ids: (n,) whole numbers or strings.
        galleries: see `identify_templates`.
        probes: see `identify_templates`.
        detector_scores: see `pool_templates`.
        feature_norm: see `pool_templates`.
        fpirs: see `identify_templates`.
        ranks: see `identify_templates`.
        replicates: see `identify_templates`.
        seed: see `identify_templates`.
        level: see `identify_templates`.

    Examples:
        >>> protocol = TemplateIdentificationProtocol(
        ...     [1, 2, 3, 4], [1, 2, 3, 4], [([1, 2], ["ann", "bob"])], ([3, 4], ["ann", "cy"]), ranks=(1,)
        ... )
        >>> protocol.evaluate(np.eye(4)[[0, 1, 0, 2]] + 0.1).rates[1].value
        1.0
    """

    def __init__(
        self,
        template_ids: Any,
        media_ids: Any,
        galleries: Sequence[Enrolled],
        probes: Enrolled,
        *,
        detector_scores: Any = None,
        feature_norm: Literal["keep", "unit"] = "keep",
        fpirs: Sequence[float] = (0.01, 0.1),
        ranks: Sequence[int] = (1, 5, 10),
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        check_choice("TemplateIdentificationProtocol", "feature_norm", feature_norm, ("keep", "unit"))
        check_level("TemplateIdentificationProtocol", level)
        self.template_ids, self.media_ids, self.detector_scores = template_ids, media_ids, detector_scores
        self.galleries, self.probes = tuple(galleries), probes
        self.feature_norm: Literal["keep", "unit"] = feature_norm
        self.fpirs, self.ranks = check_fars("TemplateIdentificationProtocol", fpirs), tuple(ranks)
        self.replicates, self.seed, self.level = replicates, seed, level

    def __repr__(self) -> str:
        return (
            f"TemplateIdentificationProtocol(<{len(self.template_ids)} images>, <{len(self.galleries)} galleries>, "
            f"feature_norm={self.feature_norm!r}, fpirs={self.fpirs}, ranks={self.ranks})"
        )

    def evaluate(self, embeddings: Any) -> TemplateIdentificationResult:
        """Measure the images' embeddings (n, d), not normalized."""
        templates = pool_templates(
            embeddings,
            self.template_ids,
            self.media_ids,
            detector_scores=self.detector_scores,
            feature_norm=self.feature_norm,
        )
        return identify_templates(
            templates,
            self.galleries,
            self.probes,
            fpirs=self.fpirs,
            ranks=self.ranks,
            replicates=self.replicates,
            seed=self.seed,
            level=self.level,
        )
