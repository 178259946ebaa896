"""Evaluation room: rates whose observations belong to identities, with intervals over identities. NumPy only."""

from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import FloatArray, IntArray, check_each, check_labels, check_level, check_scores
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate

__all__ = ["clustered_rate", "draws", "pair_rates", "rate_estimate", "weighted_rates"]


def clustered_rate(
    hits: Any, identities: Any, *, replicates: int = 500, seed: int = 0, level: float = 0.95
) -> Estimate:
    """A rate over observations, with the interval of a bootstrap over the identities they belong to.

    Args:
        hits: (n,) what is averaged, in [0, 1]; booleans for a rate.
        identities: (n,) identity of each observation, whole numbers or strings.
        replicates: bootstrap resamples; 0 for no interval.
        seed: of the resamples.
        level: the confidence, in (0, 1).

    Returns:
        The mean of the hits; where all resamples agree the interval is Wilson's, with identities as trials.

    Raises:
        ValueError: lengths that differ, a hit outside [0, 1].

    Examples:
        >>> estimate = clustered_rate([1, 1, 1, 0], ["ann", "ann", "bob", "cy"])
        >>> estimate.value, estimate.n, estimate.low < 0.75 < estimate.high
        (0.75, 4, True)
    """
    owner = "clustered_rate"
    values = check_scores(owner, "hits", np.asarray(hits, dtype=np.float64))
    check_each(owner, "hits", (values >= 0) & (values <= 1), "in [0, 1]", "entry")
    codes, labels = check_labels(owner, "identities", identities, rows=values.size, like="hits")
    check_level(owner, level)
    return rate_estimate(values, codes, draws(owner, labels.size, replicates=replicates, seed=seed), level=level)


def draws(owner: str, identities: int, *, replicates: int, seed: int) -> IntArray:
    """(replicates, identities) how often each identity is drawn: as `identity_bootstrap`, for codes; `owner` for errors."""
    check_number(owner, "replicates", replicates, min=0, integer=True)
    check_number(owner, "seed", seed, min=0, integer=True)
    return np.random.default_rng(seed).multinomial(identities, np.full(identities, 1 / identities), size=replicates)


def rate_estimate(
    hits: FloatArray, codes: IntArray, multiplicities: IntArray, *, level: float = 0.95, per: FloatArray | None = None
) -> Estimate:
    """Mean of `hits` (n,), weighed by `per`, with its interval over identities; None where n is 0.

    Args:
        hits: (n,) in [0, 1].
        codes: (n,) identity of each, as a column of `multiplicities`.
        multiplicities: (r, identities) from `draws`.
        level: the confidence.
        per: (n,) weights; ones by default.
    """
    weights = np.ones(hits.size) if per is None else per
    count = multiplicities.shape[1]
    won: FloatArray = np.bincount(codes, weights=hits * weights, minlength=count).astype(np.float64)
    held: FloatArray = np.bincount(codes, weights=weights, minlength=count).astype(np.float64)
    value = float(won.sum() / held.sum()) if held.sum() > 0 else float("nan")
    replicates = weighted_rates(multiplicities, won, held)
    return bootstrap_estimate(
        value, replicates, n=int(hits.size), clusters=int(np.count_nonzero(held)) or 1, level=level
    )


def weighted_rates(multiplicities: IntArray, won: FloatArray, held: FloatArray) -> FloatArray:
    """(r,) rate in each resample from sums by identity, NaN where a resample holds nothing."""
    top, bottom = multiplicities @ won, multiplicities @ held
    rates = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=rates, where=bottom > 0)
    return rates


def pair_rates(
    hits: FloatArray, first: IntArray, second: IntArray, multiplicities: IntArray, *, rows: int = 64
) -> FloatArray:
    """(r,) rate over pairs in each resample: a pair of one identity counts m_i times, one of two m_i m_j times.

    Args:
        hits: (n,) what is averaged.
        first: (n,) identity of each pair's first image.
        second: (n,) identity of its second.
        multiplicities: (r, identities) from `draws`.
        rows: how many resamples are worked on at a time.
    """
    rates = np.full(len(multiplicities), np.nan)
    genuine = first == second
    for start in range(0, len(multiplicities), rows):
        m = multiplicities[start : start + rows]
        weight = m[:, first] * np.where(genuine, 1, m[:, second])
        held = weight.sum(axis=1)
        np.divide(weight @ hits, held, out=rates[start : start + rows], where=held > 0)
    return rates
