"""Orders of the training images in which identities are balanced, and counts of identities with cross-age pairs."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib_faces._checks import InputError

__all__ = ["balanced_order", "choose_samples_per_identity", "count_cross_age_identities"]


def balanced_order(
    identities: ArrayLike, batch_size: int, samples_per_identity: int, num_batches: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rows in an order in which each batch holds `samples_per_identity` images of each of its identities.

    Identities are visited in rounds, each in a random order. The identities at the end of a round that do not fill a batch
    are dropped. The images of an identity are drawn without replacement within a round and repeat where it has too few.

    Args:
        identities: `(n,)` whole numbers.
        batch_size: Images per batch, a multiple of `samples_per_identity`.
        samples_per_identity: Images of each identity in a batch.
        num_batches: Number of batches.
        rng: Source of randomness.

    Returns:
        `(num_batches * batch_size,)` int64 rows.

    Examples:
        >>> rows = balanced_order([5, 5, 8, 8, 9, 9], 4, 2, 3, np.random.default_rng(0))
        >>> [sorted(set(np.array([5, 5, 8, 8, 9, 9])[batch].tolist())) for batch in rows.reshape(3, 4)]
        [[5, 9], [5, 9], [8, 9]]
    """
    _, labels = np.unique(np.asarray(identities), return_inverse=True)
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    per_batch = batch_size // samples_per_identity
    batches: list[NDArray[np.int64]] = []
    while len(batches) < num_batches:
        shuffled = np.lexsort((rng.random(len(labels)), labels))
        order = rng.permutation(len(counts))
        for start in range(0, len(order) - per_batch + 1, per_batch):
            chosen = order[start : start + per_batch, None]
            rows = starts[chosen] + np.arange(samples_per_identity) % counts[chosen]
            batches.append(shuffled[rows].reshape(-1).astype(np.int64))
    return np.concatenate(batches[:num_batches])


def choose_samples_per_identity(batch_size: int, num_identities: int) -> int:
    """Images of each identity in a batch with cross-age pairs: 4, else 2, else the smallest number that fits.

    Raises:
        InputError: No number of images divides the batch among the identities.

    Examples:
        >>> choose_samples_per_identity(64, 100), choose_samples_per_identity(6, 2)
        (4, 3)
    """
    choices: list[int] = [4, 2, *range(3, batch_size + 1)]
    for samples in choices:
        if batch_size % samples == 0 and batch_size // samples <= num_identities:
            return samples
    raise InputError(f"batch_size {batch_size} cannot hold cross-age pairs of {num_identities} identities")


def count_cross_age_identities(identities: ArrayLike, ages: ArrayLike, min_age_gap: float) -> int:
    """Count the identities with two images at least `min_age_gap` apart in age.

    Args:
        identities: `(n,)` whole numbers from 0, negative where unknown.
        ages: `(n,)` years, or age groups with a gap of 1; NaN or negative where unknown.
        min_age_gap: Minimum difference, years.

    Examples:
        >>> count_cross_age_identities([0, 0, 1, 1, 2, 2], [3, 40, 20, 25, 7, float("nan")], 10.0)
        1
    """
    years = np.asarray(ages, dtype=np.float64)
    known = (years >= 0) & (np.asarray(identities) >= 0)  # False for NaN
    labels, years = np.asarray(identities)[known], years[known]
    if not len(labels):
        return 0
    youngest, oldest = np.full(labels.max() + 1, np.inf), np.full(labels.max() + 1, -np.inf)
    np.minimum.at(youngest, labels, years)
    np.maximum.at(oldest, labels, years)
    return int((oldest - youngest >= min_age_gap).sum())
