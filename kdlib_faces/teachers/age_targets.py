"""Age groups and masks of known ages, shared by the losses that estimate age."""

from torch import Tensor, bucketize

__all__ = ["AGE_BOUNDARIES", "group_ages", "mean_of_known"]

AGE_BOUNDARIES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
"""Years at which MTLFace ends one age group and begins the next."""


def group_ages(ages: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the age groups `(b,)` int64 and a mask `(b,)` of known ages.

    Args:
        ages: `(b,)` years as floats (NaN where unknown), or groups as integers (-1 where unknown).
        boundaries: Years at which a group ends and the next begins.
    """
    if ages.is_floating_point():
        return bucketize(ages.nan_to_num(0.0).float(), boundaries, right=True), ages.isfinite()
    return ages.clamp(min=0), ages >= 0


def mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean of the values `(b,)` whose age is known; 0 with a graph where none is."""
    return (values * known).sum() / known.sum().clamp(min=1)
