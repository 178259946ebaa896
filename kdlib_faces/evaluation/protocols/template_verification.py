"""Evaluation room: are two templates of one person? The 1:1 protocol of IJB-B and IJB-C. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_fars,
    check_flags,
    check_level,
    check_vector,
    look_up,
    require,
    to_numpy,
)
from kdlib_faces.evaluation.pair_scores import operating_points, pair_cosines
from kdlib_faces.evaluation.roc import TarAtFar, far_name
from kdlib_faces.evaluation.search import dot_rows, product_error
from kdlib_faces.evaluation.templates import Templates, pool_templates

__all__ = ["TemplateVerificationProtocol", "TemplateVerificationResult", "template_verification", "verify_templates"]

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class TemplateVerificationResult:
    """The result of `template_verification`.

    Args:
        tar: by target FAR, the operating point; as a number it is the TAR.
        templates: how many templates there are.
        genuine: how many pairs are of one person.
        impostor: how many are not.
        feature_norm: `"keep"` or `"unit"`.
        detector_scores: whether images were weighed by the detector's score.
        pooling: how templates were pooled, in words.
        mode: the rule of the operating points, `"exact"` or `"nearest"`.
    """

    tar: Mapping[float, TarAtFar]
    templates: int
    genuine: int
    impostor: int
    feature_norm: str
    detector_scores: bool
    pooling: str
    mode: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        entry: dict[str, Any] = {"tar": {far_name(far): point.to_dict() for far, point in self.tar.items()}}
        for name in ("templates", "genuine", "impostor", "feature_norm", "detector_scores", "pooling", "mode"):
            entry[name] = getattr(self, name)
        return entry


def template_verification(
    embeddings: Any,
    template_ids: Any,
    media_ids: Any,
    left: Any,
    right: Any,
    same: Any,
    *,
    detector_scores: Any = None,
    feature_norm: Literal["keep", "unit"] = "keep",
    fars: Sequence[float] = FARS,
    mode: Literal["exact", "nearest"] = "exact",
    level: float = 0.95,
) -> TemplateVerificationResult:
    """Pool images into templates and verify given pairs of them: IJB-B's and IJB-C's 1:1.

    Args:
        embeddings: (n, d) of images, not normalized; one array or shards.
        template_ids: (n,) whole numbers or strings.
        media_ids: (n,) whole numbers or strings.
        left: (p,) template id of each pair's first template.
        right: (p,) template id of its second.
        same: (p,) whether the pair is of one person.
        detector_scores: (n,) not negative; see `pool_templates`.
        feature_norm: `"keep"` or `"unit"`; see `pool_templates`.
        fars: target false accept rates.
        mode: `"exact"`, or `"nearest"` for parity with published figures; see `tar_at_far`.
        level: confidence of Wilson's intervals, which take pairs as independent.

    Returns:
        The operating points, and how templates were pooled.

    Raises:
        ValueError: a bad row, a template id in a pair that no image has (it is named), pairs of one kind only.

    Examples:
        >>> result = template_verification(
        ...     [[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]], [5, 9, 7], [1, 2, 3], [5, 5], [9, 7], [True, False], fars=(0.1,)
        ... )
        >>> float(result.tar[0.1]), result.tar[0.1].resolvable, result.feature_norm
        (1.0, False, 'keep')

    References:
        B. Maze et al., "IARPA Janus Benchmark - C", ICB 2018. Pooling as insightface's `eval_ijbc.py`.
    """
    templates = pool_templates(
        embeddings, template_ids, media_ids, detector_scores=detector_scores, feature_norm=feature_norm
    )
    return verify_templates(templates, left, right, same, fars=fars, mode=mode, level=level)


def verify_templates(
    templates: Templates,
    left: Any,
    right: Any,
    same: Any,
    *,
    fars: Sequence[float] = FARS,
    mode: Literal["exact", "nearest"] = "exact",
    level: float = 0.95,
) -> TemplateVerificationResult:
    """`template_verification` of templates that are pooled already.

    Args:
        templates: from `pool_templates`.
        left: (p,) template ids.
        right: (p,) template ids.
        same: (p,) whether the pair is of one person.
        fars: target false accept rates.
        mode: `"exact"` or `"nearest"`.
        level: confidence of the intervals.

    Examples:
        >>> pooled = pool_templates([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]], [5, 9, 7], [1, 2, 3])
        >>> float(verify_templates(pooled, [5, 5], [9, 7], [True, False], fars=(0.1,)).tar[0.1])
        1.0
    """
    owner = "template_verification"
    fars = check_fars(owner, fars)
    check_choice(owner, "mode", mode, ("exact", "nearest"))
    check_level(owner, level)
    i = look_up(owner, "left", left, templates.ids, "template_ids")
    check_vector(owner, "right", to_numpy(right), i.size, "left")
    j = look_up(owner, "right", right, templates.ids, "template_ids")
    flags = check_flags(owner, "same", same, i.size)
    alike = np.flatnonzero(i == j)
    require(
        alike.size == 0, owner, f"a pair must be of two templates, got pair {alike[:1].tolist()} of one and the same"
    )
    features = templates.features

    def exact(pairs: IntArray) -> FloatArray:
        return dot_rows(features, i[pairs], features, j[pairs])

    scores = pair_cosines(features.astype(np.float32, copy=False), i, j)
    points = operating_points(
        scores, flags, exact, product_error(features.shape[1]), fars, mode=mode, level=float(level)
    )
    genuine = int(np.count_nonzero(flags))
    return TemplateVerificationResult(
        tar=points,
        templates=templates.ids.size,
        genuine=genuine,
        impostor=flags.size - genuine,
        feature_norm=templates.feature_norm,
        detector_scores=templates.detector_scores,
        pooling=templates.convention,
        mode=mode,
    )


class TemplateVerificationProtocol:
    """`template_verification` as a protocol for `evaluate`; the arguments after `embeddings` are the same.

    Examples:
        >>> protocol = TemplateVerificationProtocol([5, 9, 7], [1, 2, 3], [5, 5], [9, 7], [True, False], fars=(0.1,))
        >>> protocol.evaluate([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]).impostor
        1
    """

    def __init__(
        self,
        template_ids: Any,
        media_ids: Any,
        left: Any,
        right: Any,
        same: Any,
        *,
        detector_scores: Any = None,
        feature_norm: Literal["keep", "unit"] = "keep",
        fars: Sequence[float] = FARS,
        mode: Literal["exact", "nearest"] = "exact",
        level: float = 0.95,
    ) -> None:
        check_choice("TemplateVerificationProtocol", "feature_norm", feature_norm, ("keep", "unit"))
        self.template_ids, self.media_ids = to_numpy(template_ids), to_numpy(media_ids)
        self.left, self.right, self.same = to_numpy(left), to_numpy(right), to_numpy(same)
        self.detector_scores = None if detector_scores is None else to_numpy(detector_scores)
        self.feature_norm: Literal["keep", "unit"] = feature_norm
        self.fars, self.level = check_fars("TemplateVerificationProtocol", fars), level
        self.mode: Literal["exact", "nearest"] = mode

    def __repr__(self) -> str:
        return (
            f"TemplateVerificationProtocol(<{self.template_ids.size} images>, <{self.left.size} pairs>, "
            f"feature_norm={self.feature_norm!r}, fars={self.fars}, mode={self.mode!r})"
        )

    def evaluate(self, embeddings: Any) -> TemplateVerificationResult:
        """Measure the images' embeddings (n, d), not normalized."""
        return template_verification(
            embeddings,
            self.template_ids,
            self.media_ids,
            self.left,
            self.right,
            self.same,
            detector_scores=self.detector_scores,
            feature_norm=self.feature_norm,
            fars=self.fars,
            mode=self.mode,
            level=self.level,
        )
