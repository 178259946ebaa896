"""Verification of templates, the 1:1 protocol of IJB-B and IJB-C."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import check_array, check_each, check_fars, check_flags, check_level, require
from kdlib_faces.evaluation._labels import label_array, look_up
from kdlib_faces.evaluation._types import ArrayLike, BoolArray, Embeddings, IntArray, JsonDict, Label, SingleArray
from kdlib_faces.evaluation.hardest import hardest_pairs
from kdlib_faces.evaluation.matching.pair_scores import operating_points, pair_cosines
from kdlib_faces.evaluation.matching.search import dot_rows, product_error
from kdlib_faces.evaluation.matching.templates import Templates, pool_templates
from kdlib_faces.evaluation.roc import TarAtFar, by_far
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.summary import (
    KEPT_THRESHOLDS,
    Description,
    HardPair,
    Histogram,
    MeasuredValue,
    ModelSummary,
    RocCurve,
    ScoreTable,
    far_measures,
)
from kdlib_faces.evaluation.thresholds import operating_thresholds

OWNER = "template_verification"
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HEADLINE_FAR = 1e-4
POINT_RULES = {
    "exact": "the (k+1)-th largest impostor score, k = floor(FAR x impostors)",
    "nearest": "the point whose FAR is nearest, as insightface; it may exceed the target",
}


@dataclass(frozen=True)
class TemplateVerificationResult:
    """Result of `template_verification`.

    Attributes:
        tar: Target FAR to the operating point; as a number it is the TAR.
        mode: Rule of the operating points, `"exact"` or `"nearest"`.
        templates: The pooled templates.
        left: (p,) number of each pair's first template.
        right: (p,) number of its second template.
        same: (p,) which pairs are genuine.
        scores: (p,) score of each pair, rounded to float32.
        accepted: Target FAR to the genuine pairs that are accepted, in their order.
    """

    tar: Mapping[float, TarAtFar]
    mode: str
    templates: Templates = field(repr=False, compare=False)
    left: IntArray = field(repr=False, compare=False)
    right: IntArray = field(repr=False, compare=False)
    same: BoolArray = field(repr=False, compare=False)
    scores: SingleArray = field(repr=False, compare=False)
    accepted: Mapping[float, BoolArray] = field(repr=False, compare=False)

    @property
    def genuine(self) -> int:
        """Number of genuine pairs."""
        return int(np.count_nonzero(self.same))

    @property
    def impostor(self) -> int:
        """Number of impostor pairs."""
        return self.same.size - self.genuine

    def describe(self) -> Description:
        """What the protocol measures and how."""
        # The FAR that tables of IJB-B and IJB-C are compared at comes first, then the others, falling.
        fars = sorted(self.tar, key=lambda far: (far != HEADLINE_FAR, -far))
        return Description(
            question="Do two templates show the same identity? A template is several images and frames of one identity.",
            convention={
                "Pooling": self.templates.convention,
                "Threshold": POINT_RULES[self.mode],
                "Score": "product of unit templates",
            },
            intervals="Wilson's, over genuine pairs",
            counts={
                "images": int(self.templates.images.sum()),
                "templates": self.templates.ids.size,
                "genuine pairs": self.genuine,
                "impostor pairs": self.impostor,
            },
            measures=far_measures("tar", "TAR", fars),
            difference_rule=KEPT_THRESHOLDS.format("enrolled templates"),
        )

    def summary(self) -> ModelSummary:
        """TAR at each FAR, and curves."""
        genuine, impostor = self.scores[self.same], self.scores[~self.same]
        threshold = next((point.threshold for point in self.tar.values() if point.resolvable), None)
        return ModelSummary(
            {f"tar_{far:g}": MeasuredValue.of(point) for far, point in self.tar.items()},
            roc=RocCurve.of(genuine, impostor),
            histogram=Histogram.of(genuine, impostor, threshold),
        )

    def outcomes(self) -> dict[str, Outcomes]:
        """Genuine pairs accepted at each FAR."""
        templates = self.left[self.same]
        return {f"tar_{far:g}": Outcomes(hits, (templates, templates)) for far, hits in self.accepted.items()}

    def hardest(self, count: int) -> list[HardPair]:
        """The genuine pairs of lowest and the impostor pairs of highest score, each template once per kind.

        A pair is shown by the first image of each template.
        """
        ids, rows = self.templates.ids, self.templates.first_rows

        def pair(k: int) -> HardPair:
            i, j = self.left[k], self.right[k]
            note = f"templates {ids[i]}, {ids[j]}"
            return HardPair(int(rows[i]), int(rows[j]), float(self.scores[k]), bool(self.same[k]), note)

        return hardest_pairs(self.scores, self.same, (self.left, self.right), count, pair)

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The score of every pair."""

        def rows() -> Iterator[tuple[str | int, ...]]:
            ids = self.templates.ids
            for i, j, same, score in zip(self.left, self.right, self.same, self.scores, strict=True):
                yield ids[i], ids[j], int(same), f"{score:.8f}"

        return ScoreTable(("left template", "right template", "same", "score"), rows(), self.same.size)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        return {
            "tar": by_far(self.tar),
            "templates": self.templates.ids.size,
            "genuine": self.genuine,
            "impostor": self.impostor,
            "feature_norm": self.templates.feature_norm,
            "detector_scores": self.templates.detector_scores,
            "pooling": self.templates.convention,
            "mode": self.mode,
            "thresholds": operating_thresholds(self.scores[~self.same]),
        }


class TemplateVerificationProtocol:
    """`template_verification` as a protocol for `evaluate`; the arguments after `embeddings` are the same.

    Examples:
        >>> protocol = TemplateVerificationProtocol([5, 9, 7], [1, 2, 3], [5, 5], [9, 7], [True, False], fars=(0.1,))
        >>> protocol.evaluate([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]).impostor
        1
    """

    def __init__(
        self,
        template_ids: ArrayLike,
        media_ids: ArrayLike,
        left: ArrayLike,
        right: ArrayLike,
        same: ArrayLike,
        *,
        detector_scores: ArrayLike | None = None,
        feature_norm: Literal["keep", "unit"] = "keep",
        fars: Sequence[float] = FARS,
        mode: Literal["exact", "nearest"] = "exact",
        level: float = 0.95,
    ) -> None:
        check_choice(OWNER, "feature_norm", feature_norm, ("keep", "unit"))
        check_choice(OWNER, "mode", mode, tuple(POINT_RULES))
        self.template_ids = label_array(OWNER, "template_ids", template_ids)
        self.left, self.right = label_array(OWNER, "left", left), label_array(OWNER, "right", right)
        self.same = check_array(OWNER, "same", same)
        self.feature_norm, media = feature_norm, label_array(OWNER, "media_ids", media_ids)
        self.pool = partial(
            pool_templates, template_ids=self.template_ids, media_ids=media, detector_scores=detector_scores,
            feature_norm=feature_norm,
        )  # fmt: skip
        self.mode: Literal["exact", "nearest"] = mode
        self.fars, self.level = check_fars(OWNER, fars), check_level(OWNER, level)

    def __repr__(self) -> str:
        return (
            f"TemplateVerificationProtocol(<{self.template_ids.size} images>, <{self.left.size} pairs>, "
            f"feature_norm={self.feature_norm!r}, fars={self.fars}, mode={self.mode!r})"
        )

    def evaluate(self, embeddings: Embeddings) -> TemplateVerificationResult:
        """Measure the images' embeddings (n, d), not normalized."""
        return self.verify(self.pool(embeddings))

    def verify(self, templates: Templates) -> TemplateVerificationResult:
        """Measure pooled templates."""
        i = look_up(OWNER, "left", self.left, templates.ids, "template_ids")
        j = look_up(OWNER, "right", self.right, templates.ids, "template_ids")
        require(i.size == j.size, OWNER, f"right must be as long as left ({i.size}), got {j.size}")
        same = check_flags(OWNER, "same", self.same, i.size)
        check_each(OWNER, "every pair", i != j, "of two templates", "pair")
        features = templates.features
        scores = pair_cosines(features.astype(np.float32, copy=False), i, j)
        points, accepted = operating_points(
            scores,
            same,
            lambda pairs: dot_rows(features, i[pairs], features, j[pairs], single=features.dtype == np.float32),
            product_error(features.shape[1]),
            self.fars,
            mode=self.mode,
            level=self.level,
        )
        return TemplateVerificationResult(points, self.mode, templates, i, j, same, scores, accepted)


def template_verification(
    embeddings: Embeddings,
    template_ids: ArrayLike,
    media_ids: ArrayLike,
    left: ArrayLike,
    right: ArrayLike,
    same: ArrayLike,
    *,
    detector_scores: ArrayLike | None = None,
    feature_norm: Literal["keep", "unit"] = "keep",
    fars: Sequence[float] = FARS,
    mode: Literal["exact", "nearest"] = "exact",
    level: float = 0.95,
) -> TemplateVerificationResult:
    """Pool images into templates and verify given pairs of them: 1:1 of IJB-B and IJB-C.

    Args:
        embeddings: (n, d) of images, not normalized; one array or shards.
        template_ids: (n,) whole numbers or strings.
        media_ids: (n,) whole numbers or strings.
        left: (p,) template id of each pair's first template.
        right: (p,) template id of its second template.
        same: (p,) whether the pair is genuine.
        detector_scores: (n,) not negative; see `pool_templates`.
        feature_norm: `"keep"` or `"unit"`; see `pool_templates`.
        fars: Target false accept rates.
        mode: `"exact"`, or `"nearest"` for parity with published figures; see `tar_at_far`.
        level: Confidence of Wilson's intervals, which take pairs as independent.

    Returns:
        The operating points, and how templates were pooled.

    Raises:
        ValueError: A row is not usable, a template id of a pair has no image (the message gives it), or all pairs are of
            one kind.

    Examples:
        >>> result = template_verification(
        ...     [[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]], [5, 9, 7], [1, 2, 3], [5, 5], [9, 7], [True, False], fars=(0.1,)
        ... )
        >>> float(result.tar[0.1]), result.tar[0.1].resolvable, result.templates.feature_norm
        (1.0, False, 'keep')

    References:
        B. Maze et al., "IARPA Janus Benchmark - C", ICB 2018. Pooling as in insightface's `eval_ijbc.py`.
    """
    protocol = TemplateVerificationProtocol(
        template_ids,
        media_ids,
        left,
        right,
        same,
        detector_scores=detector_scores,
        feature_norm=feature_norm,
        fars=fars,
        mode=mode,
        level=level,
    )
    return protocol.evaluate(embeddings)
