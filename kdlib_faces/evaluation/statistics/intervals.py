"""Confidence intervals of rates: Wilson's, and bootstraps over identities.

Two images of one identity are not two independent observations, and neither are two pairs that share an identity. A rate
over pairs therefore gets its interval by resampling identities (a cluster bootstrap). Wilson's interval is for rates over
independent trials.
"""

from dataclasses import dataclass, field
from math import isfinite, sqrt
from statistics import NormalDist

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import check_level, check_one, check_whole, require
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import ArrayLike, BoolArray, FloatArray, IntArray, JsonDict

MAX_COUNTS = 200_000_000


def wilson(successes: float, trials: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    With p = successes / trials, n = trials and z the normal quantile of `level`, the ends are
    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). It stays inside [0, 1] and has a width at p = 0 and p = 1.

    Args:
        successes: Number of successes, from 0 to `trials`; need not be whole.
        trials: Number of trials, above 0.
        level: Confidence, in (0, 1).

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> low, high = wilson(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)

    References:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    trials = check_one("wilson", "trials", trials, above=0)
    successes = check_one("wilson", "successes", successes, min=0, max=trials)
    level = check_level("wilson", level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, n = successes / trials, trials
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are 0 and 1 there by algebra; rounding would move them.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == trials else min(1.0, center + half)
    return low, high


def wilson_estimate(hits: BoolArray, *, level: float = 0.95) -> "Estimate":
    """The rate of hits (n,) with Wilson's interval; None without observations."""
    if not hits.size:
        return Estimate(None, None, None, 0)
    count = int(hits.sum())
    return Estimate(count / hits.size, *wilson(count, hits.size, level=level), hits.size)


@dataclass(frozen=True)
class Sampling:
    """Number and seed of the resamples behind the intervals, and the confidence of the intervals.

    Attributes:
        replicates: Number of resamples.
        seed: Seed of the resamples.
        level: Confidence of the intervals, in (0, 1).

    Examples:
        >>> Sampling(replicates=1000, level=0.9)
        Sampling(replicates=1000, seed=0, level=0.9)
    """

    replicates: int = 500
    seed: int = 0
    level: float = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and its number of observations.

    Attributes:
        value: The number, or None if there was nothing to measure.
        low: Lower end of the interval, or None.
        high: Upper end, or None.
        n: Number of observations (pairs or probes); 0 with a value of None.
        replicates: Its bootstrap replicates (r,), NaN if a resample held no observation; not serialized.

    Examples:
        >>> Estimate(0.5, 0.25, 0.75, 12).to_dict()
        {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 12}
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    replicates: FloatArray | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON, without the replicates."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def complement(self) -> "Estimate":
        """The estimate of 1 - value."""
        value, low, high = (None if end is None else 1 - end for end in (self.value, self.high, self.low))
        return Estimate(value, low, high, self.n, None if self.replicates is None else 1 - self.replicates)

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals overlap; an estimate without an interval overlaps everything."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def identity_bootstrap(identities: ArrayLike, *, replicates: int, seed: int) -> IntArray:
    """How often each identity occurs in each bootstrap resample.

    A resample takes as many identities with replacement as there are. In it, a genuine pair of identity i has the weight
    m_i, and an impostor pair of i and j the weight m_i m_j: each copy of an identity has its own pairs. A pair between two
    copies of one identity is left out, since it would compare an image with itself.

    Args:
        identities: (n,) identity of each image, whole numbers or strings.
        replicates: Number of resamples.
        seed: Seed; the same seed gives the same resamples, so two models can be compared in pairs.

    Returns:
        (replicates, num_identities) counts, columns in the sorted order of the identities; each row sums to their
        number.

    Raises:
        ValueError: An argument is empty or malformed.

    Examples:
        >>> counts = identity_bootstrap(["a", "a", "b", "c"], replicates=4, seed=0)
        >>> counts.shape, counts.sum(axis=1).tolist()
        ((4, 3), [3, 3, 3, 3])
    """
    _, labels = check_labels("identity_bootstrap", "identities", identities)
    return resample_counts("identity_bootstrap", labels.size, replicates=replicates, seed=seed)


def resample_counts(owner: str, identities: int, *, replicates: int, seed: int) -> IntArray:
    """`identity_bootstrap` for a number of identities; `owner` is for errors."""
    replicates, seed = check_whole(owner, "replicates", replicates, min=0), check_whole(owner, "seed", seed, min=0)
    limit = MAX_COUNTS // identities
    message = f"replicates must be at most {limit} for {identities} identities (1.6 GB), got {replicates}"
    require(replicates <= limit, owner, message)
    return np.random.default_rng(seed).multinomial(identities, np.full(identities, 1 / identities), size=replicates)


def ratio(top: FloatArray, bottom: FloatArray) -> FloatArray:
    """`top / bottom`, NaN where `bottom` is not above 0."""
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    quotient = np.full(bottom.shape, np.nan)
    np.divide(top, bottom, out=quotient, where=bottom > 0)
    return quotient


def percentiles(replicates: FloatArray, level: float) -> tuple[float | None, float | None]:
    """The percentile interval of bootstrap replicates (r,), of which NaN are ignored; None without any."""
    finite = replicates[np.isfinite(replicates)]
    if not finite.size:
        return None, None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def bootstrap_estimate(value: float, replicates: FloatArray, *, n: int, clusters: int, level: float = 0.95) -> Estimate:
    """An estimate of a rate with the percentile interval of its bootstrap replicates.

    If all replicates are equal (a rate of 0 or 1, or a single identity) the bootstrap interval has no width, which would
    look like certainty; the interval is then Wilson's, with the number of identities as trials.

    Args:
        value: The rate over all pairs, in [0, 1], or NaN without pairs.
        replicates: (r,) the rate in each resample, NaN if it held no pair.
        n: Number of pairs.
        clusters: Number of identities of those pairs.
        level: Confidence, in (0, 1).

    Returns:
        The estimate; without pairs its value is None and its n 0, without replicates it has no interval.

    Examples:
        >>> estimate = bootstrap_estimate(1.0, np.ones(100), n=50, clusters=10)
        >>> round(estimate.low, 3), estimate.high
        (0.722, 1.0)
    """
    level = check_level("bootstrap_estimate", level)
    if not isfinite(value):
        return Estimate(None, None, None, 0, replicates)
    finite = replicates[np.isfinite(replicates)]
    if finite.size and np.ptp(finite) < 1e-12:
        interval = wilson(min(max(float(value), 0.0), 1.0) * clusters, clusters, level=level)
        return Estimate(float(value), *interval, n, replicates)
    return Estimate(float(value), *percentiles(replicates, level), n, replicates)


def paired_difference(a: Estimate, b: Estimate, *, level: float = 0.95) -> Estimate:
    """The difference a - b with the interval of its paired replicates.

    Both must come from the same resamples (same identities, replicates and seed). What both share, such as a hard
    identity, then cancels, and the interval is narrower than two separate intervals suggest.

    Args:
        a: The first estimate, with replicates.
        b: The second estimate, with replicates.
        level: Confidence, in (0, 1).

    Returns:
        The difference; None with n = 0 if either has no value.

    Raises:
        ValueError: Replicates are missing or of different lengths.

    Examples:
        >>> a = Estimate(0.9, 0.8, 1.0, 9, np.array([0.8, 0.9, 1.0]))
        >>> b = Estimate(0.7, 0.6, 0.8, 9, np.array([0.6, 0.7, 0.8]))
        >>> round(paired_difference(a, b).low, 6)
        0.2
    """
    level = check_level("paired_difference", level)
    first, second = a.replicates, b.replicates
    if first is None or second is None or first.shape != second.shape:
        sizes = " and ".join("none" if x is None else str(x.size) for x in (first, second))
        raise InputError(f"paired_difference: a and b must hold equally many replicates, got {sizes}")
    if a.value is None or b.value is None:
        return Estimate(None, None, None, 0)
    difference = first - second
    return Estimate(a.value - b.value, *percentiles(difference, level), min(a.n, b.n), difference)
