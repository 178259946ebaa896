"""Rates whose observations belong to identities, with intervals over identities."""

import numpy as np

from kdlib_faces.evaluation._checks import check_array, check_each, check_level, check_scores, rows_at_a_time
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, FloatArray, IntArray
from kdlib_faces.evaluation.statistics.intervals import Estimate, Sampling, bootstrap_estimate, ratio, resample_counts

ROWS = 64


def clustered_rate(
    hits: ArrayLike, identities: ArrayLike, *, replicates: int = 500, seed: int = 0, level: float = 0.95
) -> Estimate:
    """A rate over observations, with the interval of a bootstrap over the identities they belong to.

    Args:
        hits: (n,) values to average, in [0, 1]; booleans for a rate.
        identities: (n,) identity of each observation, whole numbers or strings.
        replicates: Bootstrap resamples; 0 for no interval.
        seed: Seed of the resamples.
        level: Confidence, in (0, 1).

    Returns:
        The mean of the hits; if all resamples agree the interval is Wilson's, with identities as trials.

    Raises:
        ValueError: Lengths differ, or a hit is outside [0, 1].

    Examples:
        >>> estimate = clustered_rate([1, 1, 1, 0], ["ann", "ann", "bob", "cy"])
        >>> estimate.value, estimate.n, estimate.low < 0.75 < estimate.high
        (0.75, 4, True)
    """
    owner = "clustered_rate"
    given = check_array(owner, "hits", hits)
    values = check_scores(owner, "hits", given.astype(np.float64) if given.dtype.kind == "b" else given)
    check_each(owner, "hits", (values >= 0) & (values <= 1), "in [0, 1]", "entry")
    codes, labels = check_labels(owner, "identities", identities, rows=values.size, like="hits")
    level = check_level(owner, level)
    return rate_estimate(
        values, codes, resample_counts(owner, labels.size, replicates=replicates, seed=seed), level=level
    )


def rate_estimate(
    hits: AnyArray, codes: IntArray, resamples: IntArray, *, level: float = 0.95, per: FloatArray | None = None
) -> Estimate:
    """Mean of `hits` (n,) in [0, 1], weighted by `per` (n,), with its interval over identities; None if n is 0.

    `codes` (n,) are columns of `resamples` (r, identities).
    """
    weights = np.ones(hits.size) if per is None else per
    count = resamples.shape[1]
    won = np.bincount(codes, weights=hits * weights, minlength=count).astype(np.float64)
    held = np.bincount(codes, weights=weights, minlength=count).astype(np.float64)
    value, rates = float(ratio(won.sum(), held.sum())), ratio(resamples @ won, resamples @ held)
    return bootstrap_estimate(value, rates, n=int(hits.size), clusters=int(np.count_nonzero(held)) or 1, level=level)


def pair_estimate(
    value: float,
    hits: FloatArray,
    pairs: tuple[IntArray, IntArray],
    num_identities: int,
    sampling: Sampling,
    per: FloatArray | None,
) -> Estimate:
    """A rate over pairs (n,) of identities, with the interval of `pair_rates`."""
    resamples = resample_counts("pair_estimate", num_identities, replicates=sampling.replicates, seed=sampling.seed)
    rates, clusters = pair_rates(hits, *pairs, resamples, per), np.unique(np.concatenate(pairs)).size
    return bootstrap_estimate(value, rates, n=hits.size, clusters=clusters, level=sampling.level)


def pair_rates(
    hits: FloatArray, first: IntArray, second: IntArray, resamples: IntArray, per: FloatArray | None = None
) -> FloatArray:
    """(r,) mean of `hits` (n,) in each resample: a genuine pair counts m_i times, an impostor pair m_i m_j times.

    `per` (n,) are further weights.
    """
    rates = np.empty(len(resamples))
    genuine, step = first == second, rows_at_a_time(ROWS, hits.size)
    for start in range(0, len(resamples), step):
        m = resamples[start : start + step]
        weight: AnyArray = m[:, first] * np.where(genuine, 1, m[:, second])
        weight = weight if per is None else weight * per
        rates[start : start + step] = ratio(weight @ hits, weight.sum(axis=1))
    return rates
