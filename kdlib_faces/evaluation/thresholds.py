"""Thresholds to deploy: the score at each false accept rate, with an interval, from the impostor scores of an evaluation."""

from collections.abc import Sequence
from math import lgamma, log, log1p

import numpy as np

from kdlib_faces.evaluation._checks import check_fars, check_level, check_scores
from kdlib_faces.evaluation._types import ArrayLike, JsonDict
from kdlib_faces.evaluation.roc import allowed_false_accepts

__all__ = ["DEPLOYED_FARS", "operating_thresholds"]

OWNER = "operating_thresholds"
DEPLOYED_FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def operating_thresholds(
    impostor: ArrayLike, *, fars: Sequence[float] = DEPLOYED_FARS, level: float = 0.95
) -> JsonDict:
    """The threshold at each false accept rate, by the exact rule of `tar_at_far`, with an interval.

    With N impostor scores, the number of scores above the true threshold of a FAR is binomial (N, FAR). The interval is
    between the order statistics at its quantiles. It takes pairs as independent; pairs that share images are not, so it is
    too narrow for all pairs of a small set. A FAR whose interval has no upper end, below about 3.7 / N at a level of 95 %,
    is left out with the reason.

    Args:
        impostor: (N,) scores of impostor pairs, larger is more similar.
        fars: False accept rates, in (0, 1].
        level: Confidence of the intervals, in (0, 1).

    Returns:
        Plain values for JSON: `"impostors"`, `"level"`, `"rule"`, `"fars"` (FAR to `"threshold"`, `"low"`, `"high"` and
        `"false_accepts"`), and `"left_out"` (FAR to the reason).

    Raises:
        ValueError: A score is not finite, there is none, or a rate is out of range.

    Examples:
        >>> found = operating_thresholds(np.arange(1000) / 1000, fars=(1e-2, 1e-3))
        >>> found["fars"]["0.01"]
        {'threshold': 0.989, 'low': 0.982, 'high': 0.996, 'false_accepts': 10}
        >>> found["left_out"]
        {'0.001': 'needs at least 3,688 impostor pairs, got 1,000'}
    """
    scores = np.sort(check_scores(OWNER, "impostor", impostor))[::-1]
    fars, level = check_fars(OWNER, fars), check_level(OWNER, level)
    points: JsonDict = {}
    left_out: JsonDict = {}
    tail = (1 - level) / 2
    for far in fars:
        name = f"{far:g}"
        few, many = _binomial_quantiles(scores.size, far, tail)
        if few < 1:
            left_out[name] = (
                f"needs at least {int(np.ceil(log(tail) / log1p(-far))):,} impostor pairs, got {scores.size:,}"
            )
            continue
        allowed = allowed_false_accepts(far, scores.size)
        threshold = float(scores[min(allowed, scores.size - 1)])
        points[name] = {
            "threshold": threshold,
            "low": float(scores[min(many, scores.size - 1)]),
            "high": float(scores[few - 1]),
            "false_accepts": int((scores > threshold).sum()),
        }
    return {
        "rule": "the (k+1)-th largest impostor score, k = floor(FAR x impostors), accepted above it; interval of order "
        "statistics, pairs taken as independent",
        "impostors": int(scores.size), "level": level, "fars": points, "left_out": left_out,
    }  # fmt: skip


def _binomial_quantiles(trials: int, rate: float, tail: float) -> tuple[int, int]:
    """The smallest k with P(X <= k) > tail, and the smallest with P(X <= k) >= 1 - tail, of a binomial variable X."""
    if rate >= 1:
        return trials, trials
    spread = 12 * int(np.sqrt(trials * rate) + 4)
    k = np.arange(max(0, int(trials * rate) - spread), min(trials, int(trials * rate) + spread) + 1)
    logs = np.array([lgamma(trials + 1) - lgamma(each + 1) - lgamma(trials - each + 1) for each in k.tolist()])
    chances = np.cumsum(np.exp(logs + k * log(rate) + (trials - k) * log1p(-rate)))
    few, many = np.searchsorted(chances, tail, side="right"), np.searchsorted(chances, 1 - tail)
    return int(k[int(few)]), int(k[min(int(many), k.size - 1)])
