"""TAR at FAR, AUC and ROC curves of score vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import floor, isfinite
from typing import Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import check_one, check_scores, check_whole
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, FloatArray, JsonDict
from kdlib_faces.evaluation.statistics.intervals import Estimate, wilson


@dataclass(frozen=True)
class TarAtFar(float):
    """One operating point: a score strictly above `threshold` is accepted. As a number it is its TAR.

    Attributes:
        tar: Fraction of the genuine scores accepted.
        threshold: The score that must be exceeded; -inf if all are accepted.
        far: Measured fraction of the impostor scores accepted.
        target: Target false accept rate.
        resolvable: Whether the target allows at least one false accept; otherwise `tar` is measured without any.
        low: Lower end of Wilson's interval of `tar`.
        high: Upper end.
        genuine: Number of genuine scores.
        impostors: Number of impostor scores.
        false_accepts: Number of impostor scores accepted.
        mode: `"exact"` or `"nearest"`.
    """

    tar: float
    threshold: float
    far: float
    target: float
    resolvable: bool
    low: float
    high: float
    genuine: int
    impostors: int
    false_accepts: int
    mode: str

    def __new__(cls, tar: float, *_: object, **__: object) -> "TarAtFar":
        """A float of the TAR, so that operating points can be compared and printed as numbers."""
        return super().__new__(cls, tar)

    def __getnewargs__(self) -> tuple[float, ...]:  # type: ignore[override]  # all fields, not the TAR alone
        """Arguments of a copy."""
        return tuple(getattr(self, each.name) for each in fields(self))

    def __ne__(self, other: object) -> bool:
        """Two points differ if any field does; float would compare the TAR only."""
        return not self == other

    __hash__ = float.__hash__

    @property
    def estimate(self) -> Estimate:
        """The TAR with its interval and the number of genuine scores."""
        return Estimate(self.tar, self.low, self.high, self.genuine)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON: the estimate, the threshold and the counts."""
        return {
            **self.estimate.to_dict(),
            "threshold": self.threshold if isfinite(self.threshold) else None,
            "far": self.far,
            "false_accepts": self.false_accepts,
            "impostors": self.impostors,
            "resolvable": self.resolvable,
            "rule": self.mode,
        }


def allowed_false_accepts(far: float, total: float) -> int:
    """The largest k with k / total <= far: floor(far * total), free of the product's rounding and of that of a float32 far.

    Examples:
        >>> allowed_false_accepts(0.29, 100)  # 0.29 * 100 is 28.999999999999996
        29
    """
    far = decimal_rate(far)
    k = floor(far * total)
    if (k + 1) / total <= far:
        return k + 1
    return k - 1 if k / total > far else k


def decimal_rate(far: float) -> float:
    """The decimal of at most six digits that a float32 rate (of three, that a float16 rate) was rounded from.

    Examples:
        >>> decimal_rate(float(np.float32(1e-4)))  # 9.999999747378752e-05
        0.0001
    """
    for kind, digits in ((np.float32, 6), (np.float16, 3)):
        short = float(f"{far:.{digits}g}")
        if float(kind(short)) == far:
            return short
    return far


def by_far(values: "Mapping[float, Estimate | TarAtFar]") -> JsonDict:
    """Name of each FAR, such as `"0.001"`, to the plain values of its estimate or operating point."""
    return {f"{far:g}": value.to_dict() for far, value in values.items()}


def tar_at_far(
    genuine: ArrayLike,
    impostor: ArrayLike,
    far: float,
    *,
    mode: Literal["exact", "nearest"] = "exact",
    level: float = 0.95,
) -> TarAtFar:
    """True accept rate at a target false accept rate.

    `"exact"`: with N impostor scores and k = floor(far N), the threshold is the (k+1)-th largest impostor score, and a
    score is accepted if strictly above it. The measured FAR never exceeds the target, also with ties. With k = 0 the
    point is flagged as not resolvable: the TAR is the one without a false accept.

    `"nearest"`: the point of the ROC curve whose FAR is nearest to the target; of two equally near points the one of
    larger FAR, then of larger TAR. It may exceed the target. It is the rule of insightface's IJB scripts, for parity
    (they drop collinear points of the curve first, this function does not).

    Args:
        genuine: (g,) scores of genuine pairs, larger is more similar.
        impostor: (N,) scores of impostor pairs.
        far: The target, in (0, 1].
        mode: The rule.
        level: Confidence of the Wilson interval, which takes pairs as independent.

    Returns:
        The operating point.

    Raises:
        ValueError: A vector is empty, a score is not finite, or the target is out of range.

    Examples:
        >>> point = tar_at_far([0.9, 0.8, 0.3], [0.5, 0.2, 0.1, 0.0], 0.25)
        >>> round(point.tar, 4), point.threshold, point.far
        (1.0, 0.2, 0.25)
        >>> tar_at_far([0.9, 0.8, 0.3], [0.5, 0.2, 0.1, 0.0], 0.01).resolvable
        False
    """
    positive = check_scores("tar_at_far", "genuine", genuine)
    negative = check_scores("tar_at_far", "impostor", impostor)
    far = float(check_one("tar_at_far", "far", far, above=0, max=1))
    check_choice("tar_at_far", "mode", mode, ("exact", "nearest"))
    threshold = kth_largest(negative, allowed_false_accepts(far, negative.size))
    if mode == "nearest":
        threshold = nearest_threshold(negative, threshold, far)
    return operating_point(
        far,
        threshold,
        accepted=int((positive > threshold).sum()),
        genuine=positive.size,
        false_accepts=int((negative > threshold).sum()),
        impostors=negative.size,
        mode=mode,
        level=level,
    )


def operating_point(
    far: float,
    threshold: float,
    *,
    accepted: int,
    genuine: int,
    false_accepts: int,
    impostors: int,
    mode: str = "exact",
    level: float = 0.95,
) -> TarAtFar:
    """The operating point at a threshold from its counts, for callers that do not hold all scores."""
    low, high = wilson(accepted, genuine, level=level)
    return TarAtFar(
        tar=accepted / genuine,
        threshold=float(threshold),
        far=false_accepts / impostors,
        target=far,
        resolvable=allowed_false_accepts(far, impostors) >= 1,
        low=low,
        high=high,
        genuine=genuine,
        impostors=impostors,
        false_accepts=false_accepts,
        mode=mode,
    )


def points_of_largest(
    falling: FloatArray, impostors: int, genuine: FloatArray, fars: Sequence[float], level: float
) -> dict[float, TarAtFar]:
    """The exact operating point at each FAR from all genuine scores (g,) and the largest of `impostors` impostor scores.

    Those are falling, and one more than the false accepts of the largest FAR, or all.
    """
    points = {}
    for far in fars:
        k = allowed_false_accepts(far, impostors)
        threshold = float(falling[k]) if k < impostors else -np.inf
        points[far] = operating_point(
            far,
            threshold,
            accepted=int((genuine > threshold).sum()),
            genuine=genuine.size,
            false_accepts=int((falling > threshold).sum()) if k < impostors else impostors,
            impostors=impostors,
            level=level,
        )
    return points


def kth_largest(scores: FloatArray, k: int) -> float:
    """The (k+1)-th largest score, -inf if there are only k."""
    if k >= scores.size:
        return -np.inf
    place = scores.size - 1 - k
    return float(np.partition(scores, place)[place])


def nearest_threshold(impostor: AnyArray, exact: float, far: float) -> float:
    """The threshold of `"nearest"`: of the two points around the target the one of nearer FAR, else the larger FAR.

    At one FAR the largest TAR belongs to the lowest threshold, the largest impostor score that is not accepted.
    """
    if exact == -np.inf:
        return exact
    far = decimal_rate(far)
    fewer, more = int((impostor > exact).sum()), int((impostor >= exact).sum())
    if abs(fewer / impostor.size - far) < abs(more / impostor.size - far):
        return exact
    below = impostor[impostor < exact]
    return float(below.max()) if below.size else -np.inf


def auc(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a genuine score exceeds an impostor score, ties counting one half.

    Args:
        genuine: (g,) scores.
        impostor: (N,) scores.

    Returns:
        The area, in [0, 1].

    Raises:
        ValueError: A vector is empty, or a score is not finite.

    Examples:
        >>> auc([0.9, 0.5], [0.5, 0.1])
        0.875
    """
    positive, negative = check_scores("auc", "genuine", genuine), np.sort(check_scores("auc", "impostor", impostor))
    below = np.searchsorted(negative, positive, side="left")
    upto = np.searchsorted(negative, positive, side="right")
    return float((below.sum() + upto.sum()) / (2 * positive.size * negative.size))


def roc_points(genuine: ArrayLike, impostor: ArrayLike, points: int = 200) -> tuple[FloatArray, FloatArray]:
    """The ROC curve at FARs evenly spaced on a log axis, from one false accept to all, each by the exact rule.

    Args:
        genuine: (g,) scores.
        impostor: (N,) scores.
        points: Maximal number of points; fewer if N is small.

    Returns:
        Measured FAR (p,) and TAR (p,), both rising.

    Raises:
        ValueError: A vector is empty, or a score is not finite.

    Examples:
        >>> far, tar = roc_points([0.9, 0.3], [0.5, 0.2, 0.1, 0.0])
        >>> far.tolist(), tar.tolist()
        ([0.25, 0.5, 0.75, 1.0], [1.0, 1.0, 1.0, 1.0])
    """
    positive = check_scores("roc_points", "genuine", genuine)
    negative = check_scores("roc_points", "impostor", impostor)
    points = check_whole("roc_points", "points", points, min=2, max=1_000_000)
    return curve(np.sort(-positive), np.sort(-negative), points)


def curve(genuine_cost: FloatArray, impostor_cost: FloatArray, points: int = 200) -> tuple[FloatArray, FloatArray]:
    """`roc_points` of negated scores in rising order, for callers with millions of them."""
    count = impostor_cost.size
    allowed = np.unique(np.floor(np.geomspace(1, count, points)).astype(np.int64))
    allowed[-1] = count
    limits = np.append(impostor_cost, np.inf)[allowed]
    far = np.searchsorted(impostor_cost, limits, side="left") / count
    tar = np.searchsorted(genuine_cost, limits, side="left") / genuine_cost.size
    return far, tar
