"""Search of probe templates in galleries."""

from dataclasses import dataclass

import numpy as np

from kdlib_faces.evaluation._checks import require, rows_at_a_time, unit_block
from kdlib_faces.evaluation._labels import check_distinct, check_labels, check_same_kind, find_labels, look_up
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, BoolArray, FloatArray, IntArray, LabelArray
from kdlib_faces.evaluation.matching.search import cosines, ranks_of
from kdlib_faces.evaluation.matching.templates import Templates
from kdlib_faces.evaluation.roc import allowed_false_accepts, kth_largest

BLOCK = 1024


@dataclass(frozen=True)
class Gallery:
    """Templates and their subjects: a gallery, or the probes.

    Attributes:
        rows: (g,) number of each template.
        subjects: (g,) its subject.
    """

    rows: IntArray
    subjects: LabelArray


@dataclass(frozen=True)
class GalleryPoint:
    """Operating point of one gallery at one FPIR.

    Attributes:
        tpir: Part of its mated probes whose mate is first and scores above the threshold.
        fpir: Measured part of its non-mated probes with any score above it.
        threshold: The score that must be exceeded.
        resolvable: Whether the target allows one false positive.
        mated: Number of probes whose mate is in it.
        nonmated: Number of probes without a mate in it.
    """

    tpir: float
    fpir: float
    threshold: float
    resolvable: bool
    mated: int
    nonmated: int


@dataclass(frozen=True)
class GallerySearch:
    """Results of all probes in one gallery.

    Attributes:
        best: (p,) the most similar entry of the gallery, the first of equal ones.
        best_scores: (p,) its score.
        mates: (p,) entry of the probe's subject, -1 if it is not in the gallery.
        mate_scores: (p,) score of the mate, -inf without one.
        ranks: (p,) rank of the mate, from 1; 0 without one.
    """

    best: IntArray
    best_scores: FloatArray
    mates: IntArray
    mate_scores: FloatArray
    ranks: IntArray

    @property
    def mated(self) -> BoolArray:
        """(p,) whether the probe's subject is in the gallery."""
        return self.mates >= 0


def enroll(
    owner: str, templates: Templates, name: str, given: tuple[ArrayLike, ArrayLike], *, unique_subjects: bool
) -> Gallery:
    """Check template ids and subjects, and look the templates up."""
    pair = isinstance(given, (tuple, list)) and len(given) == 2
    require(pair, owner, f"{name} must be template ids and their subjects")
    ids, subjects = given
    template_codes, distinct = check_labels(owner, f"template ids of {name}", ids)
    check_distinct(owner, f"template ids of {name}", template_codes, distinct)
    codes, labels = check_labels(
        owner, f"subjects of {name}", subjects, rows=template_codes.size, like="their template ids"
    )
    if unique_subjects:
        check_distinct(owner, f"subjects of {name}", codes, labels)
    return Gallery(look_up(owner, f"template ids of {name}", ids, templates.ids, "template_ids"), labels[codes])


def search_gallery(
    owner: str, features: AnyArray, probes: IntArray, codes: IntArray, labels: LabelArray, gallery: Gallery
) -> GallerySearch:
    """Search one gallery, a block of probes at a time; the subject of probe k is `labels[codes[k]]`."""
    subjects = gallery.subjects
    check_same_kind(owner, "subjects", labels, subjects)
    mates = find_labels(labels, subjects)[codes]
    best, ranks = np.empty(probes.size, dtype=np.int64), np.empty(probes.size, dtype=np.int64)
    best_scores, mate_scores = np.empty(probes.size), np.empty(probes.size)
    enrolled = unit_block(owner, "templates", features[gallery.rows])
    step = rows_at_a_time(BLOCK, subjects.size)
    for start in range(0, probes.size, step):
        part = slice(start, start + step)
        scores, own = cosines(unit_block(owner, "templates", features[probes[part]]), enrolled), mates[part]
        best[part] = scores.argmax(axis=1)
        best_scores[part] = np.take_along_axis(scores, best[part][:, None], axis=1)[:, 0]
        score, rank = ranks_of(scores, np.maximum(own, 0))
        mate_scores[part], ranks[part] = np.where(own >= 0, score, -np.inf), np.where(own >= 0, rank, 0)
    return GallerySearch(best, best_scores, mates, mate_scores, ranks)


def point_at(search: GallerySearch, fpir: float) -> tuple[GalleryPoint, BoolArray]:
    """The operating point of one gallery at one FPIR, and which of its mated searches are hits."""
    others = search.best_scores[~search.mated]
    k = allowed_false_accepts(fpir, others.size)
    threshold = kth_largest(others, k)
    hits: BoolArray = ((search.ranks == 1) & (search.mate_scores > threshold))[search.mated]
    point = GalleryPoint(
        tpir=float(hits.mean()),
        fpir=float((others > threshold).mean()),
        threshold=threshold,
        resolvable=k >= 1,
        mated=hits.size,
        nonmated=others.size,
    )
    return point, hits
