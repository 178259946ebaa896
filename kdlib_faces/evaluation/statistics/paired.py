"""Paired comparison of two models on the same observations."""

from dataclasses import dataclass, field
from math import comb, exp, lgamma, log, ulp

import numpy as np

from kdlib_faces.evaluation._checks import check_booleans, check_level, check_whole, require
from kdlib_faces.evaluation._labels import check_label_pairs
from kdlib_faces.evaluation._types import ArrayLike, BoolArray, JsonDict, LabelArray
from kdlib_faces.evaluation.statistics.clustered import pair_rates
from kdlib_faces.evaluation.statistics.intervals import Estimate, percentiles, resample_counts

OWNER = "paired_test"
MANY = 50_000


@dataclass(frozen=True)
class Outcomes:
    """Outcome of every observation behind a rate.

    Attributes:
        hits: (n,) whether each observation counts for the rate.
        identities: The two identities of each observation, (n,) each; None to resample observations.
        verb: Name of a hit: `"correct"` or `"rejected"`.

    Examples:
        >>> outcomes = Outcomes(np.array([True, True, False]), identities=None)
        >>> float(outcomes.hits.mean()), outcomes.verb
        (0.6666666666666666, 'correct')
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
            takes observations as independent; if identities have many observations, rely on the interval. It is never
            0: below 5e-324 it is that number.
    """

    difference: Estimate
    only_a: int
    only_b: int
    p_value: float

    @property
    def p_text(self) -> str:
        """The p as text: `"p = 0.022"`, or `"p < 1e-16"`."""
        return f"p = {self.p_value:.2g}" if self.p_value >= 1e-16 else "p < 1e-16"

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
    level = check_level(OWNER, level)
    first = check_booleans(OWNER, "a", a)
    second = check_booleans(OWNER, "b", b, first.size, "a")
    require(identities is not None or other_identities is None, OWNER, "identities must be given with other_identities")
    gap = first.astype(np.float64) - second.astype(np.float64)
    only_a, only_b = int((gap > 0).sum()), int((gap < 0).sum())
    p_value = _exact_binomial(only_a, only_b)
    if identities is None and gap.size > MANY:
        # Resamples of the observations are resamples of the three kinds of them.
        replicates, seed = check_whole(OWNER, "replicates", replicates, min=0), check_whole(OWNER, "seed", seed, min=0)
        share = np.array([only_a, only_b, gap.size - only_a - only_b]) / gap.size
        drawn = np.random.default_rng(seed).multinomial(gap.size, share, size=replicates)
        rates = (drawn[:, 0] - drawn[:, 1]) / gap.size
        difference = Estimate(float(gap.mean()), *percentiles(rates, level), gap.size, rates)
        return PairedTest(difference, only_a, only_b, p_value)
    given = np.arange(gap.size) if identities is None else identities
    others = given if other_identities is None else other_identities
    names = ("identities", "other_identities")
    first_codes, second_codes, labels = check_label_pairs(OWNER, names, given, others, gap.size, "a")
    resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)
    rates = pair_rates(gap, first_codes, second_codes, resamples)
    difference = Estimate(float(gap.mean()), *percentiles(rates, level), gap.size, rates)
    return PairedTest(difference, only_a, only_b, p_value)


def _exact_binomial(a: int, b: int) -> float:
    """Two-sided: twice the lower tail of Binomial(a + b, 1/2) at the smaller count, at most 1."""
    n, m = a + b, min(a, b)
    if a == b:
        return 1.0
    if n <= 1000:
        return float(2 * sum(comb(n, k) for k in range(m + 1)) / 2**n)
    # The terms fall quickly from the last one, which may be below the range of floating point.
    total = term = 1.0
    for k in range(m, 0, -1):
        term *= k / (n - k + 1)
        total += term
        if term < 1e-18 * total:
            break
    log_p = lgamma(n + 1) - lgamma(m + 1) - lgamma(n - m + 1) - (n - 1) * log(2) + log(total)
    return min(1.0, max(exp(log_p), ulp(0.0)))
