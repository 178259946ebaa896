"""Paired comparison of two models on the same observations."""

from dataclasses import dataclass, field
from math import exp, lgamma, log

import numpy as np

from kdlib_faces.evaluation._checks import check_each, check_labels, check_level, check_vector, require, to_numpy
from kdlib_faces.evaluation._types import ArrayLike, BoolArray, JsonDict, LabelArray
from kdlib_faces.evaluation.statistics.clustered import pair_rates
from kdlib_faces.evaluation.statistics.intervals import Estimate, percentiles, resample_counts

OWNER = "paired_test"


@dataclass(frozen=True)
class Outcomes:
    """Outcome of every observation behind a rate.

    Attributes:
        hits: (n,) whether each observation counts for the rate.
        identities: The two identities of each observation, (n,) each; None to resample observations.
        verb: What a hit is: `"correct"` or `"rejected"`.
    """

    hits: BoolArray
    identities: tuple[LabelArray, LabelArray] | None = field(repr=False)
    verb: str = "correct"


@dataclass(frozen=True)
class PairedTest:
    """Whether model a is correct more often than model b.

    Attributes:
        difference: Rate of a minus rate of b, with the interval of paired resamples.
        only_a: Number of observations on which only a is correct.
        only_b: Number of observations on which only b is correct.
        p_value: McNemar's exact two-sided p: the probability of a split at least as uneven if the models are equal. It
            takes observations as independent; if identities have many observations, rely on the interval.
    """

    difference: Estimate
    only_a: int
    only_b: int
    p_value: float

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        return {**vars(self), "difference": self.difference.to_dict()}


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    identities: ArrayLike | None = None,
    other_identities: ArrayLike | None = None,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedTest:
    """Compare two models on the same observations: pairs decided correctly, mates accepted, probes identified.

    Args:
        a: (n,) booleans of one model, such as `VerificationResult.correct`.
        b: (n,) booleans of the other model, in the same order.
        identities: (n,) identity of each observation, or of each pair's first image; None resamples observations.
        other_identities: (n,) identity of each pair's second image.
        replicates: Bootstrap resamples.
        seed: Seed of the resamples.
        level: Confidence.

    Returns:
        The difference and the exact test.

    Raises:
        ValueError: Lengths differ, or values are not booleans.

    Examples:
        >>> test = paired_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1])
        >>> test.only_a, test.only_b, test.p_value
        (5, 1, 0.21875)

    References:
        Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12, 1947.
    """
    check_level(OWNER, level)
    first, second = to_numpy(a), to_numpy(b)
    check_vector(OWNER, "a", first)
    check_vector(OWNER, "b", second, first.size, "a")
    for name, array in (("a", first), ("b", second)):
        check_each(OWNER, name, np.isin(array, (0, 1)), "boolean (or 0 and 1)", "entry")
    require(identities is not None or other_identities is None, OWNER, "identities must be given with other_identities")
    gap = first.astype(np.float64) - second.astype(np.float64)
    given = np.arange(gap.size) if identities is None else to_numpy(identities)
    check_vector(OWNER, "identities", given, gap.size, "a")
    others = given if other_identities is None else to_numpy(other_identities)
    check_vector(OWNER, "other_identities", others, gap.size, "a")
    codes, labels = check_labels(OWNER, "identities", np.concatenate([given, others]))
    resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)
    rates = pair_rates(gap, codes[: gap.size], codes[gap.size :], resamples)
    only_a, only_b = int((gap > 0).sum()), int((gap < 0).sum())
    difference = Estimate(float(gap.mean()), *percentiles(rates, level), gap.size, rates)
    return PairedTest(difference, only_a, only_b, _exact_binomial(only_a, only_b))


def _exact_binomial(a: int, b: int) -> float:
    """Two-sided: twice the lower tail of Binomial(a + b, 1/2) at the smaller count, at most 1."""
    n = a + b
    tail = sum(exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2)) for k in range(min(a, b) + 1))
    return min(1.0, round(2 * tail, 15))
