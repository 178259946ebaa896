"""Evaluation room: how sure a number is. NumPy only.

Two images of one person are not two independent observations, and two pairs that share a person are not either. So a
rate over pairs gets its interval by resampling *identities* (a cluster bootstrap), and Wilson's interval is kept for
rates over independent trials.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import FloatArray, IntArray, check_labels, check_level

__all__ = ["Estimate", "bootstrap_estimate", "identity_bootstrap", "paired_difference", "wilson"]


def wilson(successes: float, trials: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    With p = successes / trials, n = trials and z the normal quantile of `level`, the ends are
    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). It stays inside [0, 1] and has a width at p = 0 and p = 1.

    Args:
        successes: how many trials succeeded, from 0 to `trials`; need not be whole.
        trials: how many there were, above 0.
        level: the confidence, in (0, 1).

    Returns:
        The lower and upper end.

    Raises:
        ValueError: an argument out of range.

    Examples:
        >>> low, high = wilson(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)

    References:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    check_number("wilson", "trials", trials, above=0)
    check_number("wilson", "successes", successes, min=0, max=trials)
    check_level("wilson", level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p, n = successes / trials, trials
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The ends are 0 and 1 there by algebra; rounding must not say otherwise.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == trials else min(1.0, center + half)
    return low, high


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and the count it rests on.

    Args:
        value: the number, or None where there was nothing to measure.
        low: lower end of the interval, or None.
        high: upper end, or None.
        n: how many pairs (or probes) it rests on; 0 with a value of None.
        replicates: its bootstrap replicates (r,), NaN where a resample held no pair; not serialized.

    Examples:
        >>> Estimate(0.5, 0.25, 0.75, 12).to_dict()
        {'value': 0.5, 'low': 0.25, 'high': 0.75, 'n': 12}
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    replicates: FloatArray | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> Mapping[str, Any]:
        """Plain values for JSON, without the replicates."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals meet; an estimate without an interval meets everything."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def identity_bootstrap(identities: Any, *, replicates: int, seed: int) -> IntArray:
    """How often each identity is drawn in each bootstrap resample.

    As many identities are drawn with replacement as there are. In a resample a genuine pair of identity i weighs m_i,
    an impostor pair of i and j weighs m_i m_j: each copy of an identity brings its own pairs, and a pair *between* two
    copies of one identity is left out, since it would compare an image with itself.

    Args:
        identities: (n,) identity of each image, whole numbers or strings.
        replicates: how many resamples.
        seed: of the draws; the same seed gives the same resamples, so two models can be compared in pairs.

    Returns:
        (replicates, num_identities) counts, columns in the sorted order of the identities; each row sums to their
        number.

    Raises:
        ValueError: an empty or malformed argument.

    Examples:
        >>> draws = identity_bootstrap(["a", "a", "b", "c"], replicates=4, seed=0)
        >>> draws.shape, draws.sum(axis=1).tolist()
        ((4, 3), [3, 3, 3, 3])
    """
    _, labels = check_labels("identity_bootstrap", "identities", identities)
    check_number("identity_bootstrap", "replicates", replicates, min=0, integer=True)
    check_number("identity_bootstrap", "seed", seed, min=0, integer=True)
    count = labels.size
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=replicates)


def bootstrap_estimate(value: float, replicates: FloatArray, *, n: int, clusters: int, level: float = 0.95) -> Estimate:
    """An estimate of a rate with the percentile interval of its bootstrap replicates.

    Where all replicates are equal (a rate of 0 or 1, or a single identity) the bootstrap has no width and would pass
    for certainty; the interval is then Wilson's, with the number of identities as trials.

    Args:
        value: the rate measured on all pairs, in [0, 1], or NaN where there were none.
        replicates: (r,) the rate in each resample, NaN where it held no pair.
        n: how many pairs the value rests on.
        clusters: how many identities those pairs come from.
        level: the confidence, in (0, 1).

    Returns:
        The estimate; without pairs its value is None and its n 0, with no replicates it has no interval.

    Examples:
        >>> estimate = bootstrap_estimate(1.0, np.ones(100), n=50, clusters=10)
        >>> round(estimate.low, 3), estimate.high
        (0.722, 1.0)
    """
    check_level("bootstrap_estimate", level)
    if not isfinite(value):
        return Estimate(None, None, None, 0, replicates)
    finite = replicates[np.isfinite(replicates)]
    if finite.size == 0:
        return Estimate(float(value), None, None, n, replicates)
    if np.ptp(finite) < 1e-12:
        low, high = wilson(min(max(float(value), 0.0), 1.0) * clusters, clusters, level=level)
    else:
        low, high = (float(end) for end in np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]))
    return Estimate(float(value), low, high, n, replicates)


def paired_difference(a: Estimate, b: Estimate, *, level: float = 0.95) -> Estimate:
    """The difference a - b with the interval of its paired replicates.

    Both must come from the same resamples (same identities, replicates and seed): what is common to both, such as a
    hard identity, then cancels, and the interval is narrower than two separate ones suggest.

    Args:
        a: the first estimate, with replicates.
        b: the second.
        level: the confidence, in (0, 1).

    Returns:
        The difference; None with n = 0 where either has no value.

    Raises:
        ValueError: replicates that are missing or of different lengths.

    Examples:
        >>> a = Estimate(0.9, 0.8, 1.0, 9, np.array([0.8, 0.9, 1.0]))
        >>> b = Estimate(0.7, 0.6, 0.8, 9, np.array([0.6, 0.7, 0.8]))
        >>> round(paired_difference(a, b).low, 6)
        0.2
    """
    check_level("paired_difference", level)
    first, second = a.replicates, b.replicates
    if first is None or second is None or first.shape != second.shape:
        sizes = " and ".join("none" if x is None else str(x.size) for x in (first, second))
        raise InputError(f"paired_difference: a and b must hold equally many replicates, got {sizes}")
    if a.value is None or b.value is None:
        return Estimate(None, None, None, 0)
    difference = first - second
    finite = difference[np.isfinite(difference)]
    n = min(a.n, b.n)
    if finite.size == 0:
        return Estimate(a.value - b.value, None, None, n, difference)
    low, high = (float(end) for end in np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]))
    return Estimate(a.value - b.value, low, high, n, difference)
