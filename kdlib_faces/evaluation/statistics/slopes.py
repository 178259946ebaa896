"""Evaluation room: how a score moves with the years, with intervals over identities. NumPy only."""

import numpy as np

from kdlib_faces.evaluation._checks import FloatArray, IntArray
from kdlib_faces.evaluation.statistics.intervals import Estimate

__all__ = ["mean_estimate", "person_slopes", "pooled_slope", "within_slope"]


def pooled_slope(x: FloatArray, y: FloatArray, codes: IntArray, multiplicities: IntArray, level: float) -> Estimate:
    """Least-squares slope of y on x over all observations; None where x does not vary."""
    sums = _sums(x, y, codes, multiplicities.shape[1])
    value = _slope(*(part.sum() for part in sums))
    return _estimate(value, _slope(*(multiplicities @ part for part in sums)), x.size, level)


def within_slope(x: FloatArray, y: FloatArray, codes: IntArray, multiplicities: IntArray, level: float) -> Estimate:
    """The slope that all persons share when each may have a level of their own: sum of Cxy over sum of Cxx."""
    xy, xx = _centerd(*_sums(x, y, codes, multiplicities.shape[1]))
    value = _divided(xy.sum(), xx.sum())
    used = int((np.bincount(codes, minlength=xx.size)[xx > 0]).sum()) if x.size else 0
    return _estimate(value, _divided(multiplicities @ xy, multiplicities @ xx), used, level)


def person_slopes(x: FloatArray, y: FloatArray, codes: IntArray, people: int) -> FloatArray:
    """(people,) least-squares slope of each, NaN where a person's x does not vary."""
    return _divided(*_centerd(*_sums(x, y, codes, people)))


def mean_estimate(y: FloatArray, codes: IntArray, multiplicities: IntArray, level: float) -> Estimate:
    """Mean of y, with its interval over identities; None where there is no observation."""
    people = multiplicities.shape[1]
    total, count = (
        np.bincount(codes, weights=part, minlength=people).astype(np.float64) for part in (y, np.ones(y.size))
    )
    value = _divided(total.sum(), count.sum())
    return _estimate(value, _divided(multiplicities @ total, multiplicities @ count), y.size, level)


def _sums(x: FloatArray, y: FloatArray, codes: IntArray, people: int) -> tuple[FloatArray, ...]:
    return tuple(
        np.bincount(codes, weights=part, minlength=people).astype(np.float64)
        for part in (np.ones(x.size), x, y, x * x, x * y)
    )


def _centerd(
    n: FloatArray, x: FloatArray, y: FloatArray, xx: FloatArray, xy: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sums of products of deviations from each person's own means; a variance that is rounding is 0."""
    some = np.maximum(n, 1)
    cxx = xx - x * x / some
    return np.where(cxx > 1e-9 * xx, xy - x * y / some, 0.0), np.where(cxx > 1e-9 * xx, cxx, 0.0)


def _slope(n: FloatArray, x: FloatArray, y: FloatArray, xx: FloatArray, xy: FloatArray) -> FloatArray:
    return _divided(*_centerd(n, x, y, xx, xy))


def _divided(top: FloatArray, bottom: FloatArray) -> FloatArray:
    top, bottom = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    quotient = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=quotient, where=bottom > 0)
    return quotient


def _estimate(value: FloatArray, replicates: FloatArray, n: int, level: float) -> Estimate:
    if not np.isfinite(value):
        return Estimate(None, None, None, 0, replicates)
    finite = replicates[np.isfinite(replicates)]
    if finite.size == 0:
        return Estimate(float(value), None, None, n, replicates)
    low, high = (float(end) for end in np.quantile(finite, [(1 - level) / 2, (1 + level) / 2]))
    return Estimate(float(value), low, high, n, replicates)
