"""Means and slopes of scores over years, with intervals over identities."""

import numpy as np

from kdlib_faces.evaluation._types import FloatArray, IntArray
from kdlib_faces.evaluation.statistics.intervals import Estimate, percentiles, ratio


def pooled_slope(x: FloatArray, y: FloatArray, codes: IntArray, resamples: IntArray, level: float) -> Estimate:
    """Least-squares slope of y on x over all observations; None if x does not vary."""
    sums = _sums(x, y, codes, resamples.shape[1])
    value = ratio(*_centered(*(part.sum() for part in sums)))
    return _estimate(value, ratio(*_centered(*(resamples @ part for part in sums))), x.size, level)


def within_slope(x: FloatArray, y: FloatArray, codes: IntArray, resamples: IntArray, level: float) -> Estimate:
    """The slope that all identities share if each has its own level: sum of Cxy over sum of Cxx."""
    xy, xx = _centered(*_sums(x, y, codes, resamples.shape[1]))
    used = int(np.bincount(codes, minlength=xx.size)[xx > 0].sum())
    return _estimate(ratio(xy.sum(), xx.sum()), ratio(resamples @ xy, resamples @ xx), used, level)


def identity_slopes(x: FloatArray, y: FloatArray, codes: IntArray, identities: int) -> FloatArray:
    """(identities,) least-squares slope of each, NaN if its x does not vary."""
    return ratio(*_centered(*_sums(x, y, codes, identities)))


def mean_estimate(y: FloatArray, codes: IntArray, resamples: IntArray, level: float) -> Estimate:
    """Mean of y, with its interval over identities; None without observations."""
    count, _, total, *_ = _sums(np.zeros(y.size), y, codes, resamples.shape[1])
    value = ratio(total.sum(), count.sum())
    return _estimate(value, ratio(resamples @ total, resamples @ count), y.size, level)


def _sums(x: FloatArray, y: FloatArray, codes: IntArray, identities: int) -> tuple[FloatArray, ...]:
    """Sums of 1, x, y, x² and xy by identity."""
    return tuple(
        np.bincount(codes, weights=part, minlength=identities).astype(np.float64)
        for part in (np.ones(x.size), x, y, x * x, x * y)
    )


def _centered(
    n: FloatArray, x: FloatArray, y: FloatArray, xx: FloatArray, xy: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sums of products of deviations from the means; a variance that is only rounding is 0."""
    some = np.maximum(n, 1)
    cxx = xx - x * x / some
    return np.where(cxx > 1e-9 * xx, xy - x * y / some, 0.0), np.where(cxx > 1e-9 * xx, cxx, 0.0)


def _estimate(value: FloatArray, replicates: FloatArray, n: int, level: float) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None, None, None, 0, replicates)
    return Estimate(float(value), *percentiles(replicates, level), n, replicates)
