"""Orders of training images: shuffled, balanced by identity, or in cross-age pairs; each batch by its number."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

from kdlib_faces._checks import InputError

__all__ = [
    "BalancedOrder", "CrossAgeOrder", "Order", "ShuffledOrder", "choose_samples_per_identity", "count_cross_age_identities",
]  # fmt: skip


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


class Order(ABC):
    """Rows of each batch, a function of (seed, epoch, number of the batch) only."""

    @abstractmethod
    def rows(self, epoch: int, number: int) -> NDArray[np.int64]:
        """Return the `(batch_size,)` rows of a batch."""


class ShuffledOrder(Order):
    """Every image at most once in an epoch, in random order.

    Args:
        count: Number of images.
        batch_size: Images per batch.
        seed: Seed of the order.

    Examples:
        >>> order = ShuffledOrder(6, 3, seed=0)
        >>> sorted([*order.rows(0, 0).tolist(), *order.rows(0, 1).tolist()])
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._order = -1, np.arange(0)

    @override
    def rows(self, epoch: int, number: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._order = np.arange(self.count, dtype=np.int32 if self.count < 2**31 else np.int64)
            _rng(self.seed, epoch, 0).shuffle(self._order)
            self._epoch = epoch
        return self._order[number * self.batch_size : (number + 1) * self.batch_size].astype(np.int64)


class BalancedOrder(Order):
    """`samples_per_identity` images of each of `batch_size / samples_per_identity` different identities per batch.

    Identities are visited in rounds, each in a random order; those at the end of a round that do not fill a batch are
    dropped. The images of an identity are drawn without replacement within a batch, and repeat where it has too few.

    Args:
        identities: `(n,)` whole numbers.
        batch_size: Images per batch, a multiple of `samples_per_identity`.
        samples_per_identity: Images of each identity in a batch.
        seed: Seed of the order.

    Examples:
        >>> identities = np.array([5, 5, 8, 8, 9, 9])
        >>> order = BalancedOrder(identities, 4, 2, seed=0)
        >>> [sorted(identities[order.rows(0, number)].tolist()) for number in range(2)]
        [[8, 8, 9, 9], [5, 5, 8, 8]]
    """

    def __init__(self, identities: ArrayLike, batch_size: int, samples_per_identity: int, seed: int) -> None:
        labels = np.asarray(identities)
        self.samples_per_identity, self.seed = samples_per_identity, seed
        self.per_batch = batch_size // samples_per_identity
        self._sorted = np.argsort(labels, kind="stable")
        edges = np.flatnonzero(np.diff(labels[self._sorted])) + 1
        self._starts = np.concatenate([[0], edges])
        self._counts = np.diff(np.append(self._starts, len(labels)))
        self._visited = np.arange(len(self._counts))
        self._round, self._order = (-1, -1), self._visited

    @override
    def rows(self, epoch: int, number: int) -> NDArray[np.int64]:
        turn, place = divmod(number, len(self._visited) // self.per_batch)
        if (epoch, turn) != self._round:
            self._round = epoch, turn
            self._order = _rng(self.seed, epoch, 2, turn).permutation(self._visited)
        chosen = self._order[place * self.per_batch : (place + 1) * self.per_batch]
        return self._draw(chosen, _rng(self.seed, epoch, 3, number))

    def _draw(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Rows of the images that are drawn for some identities."""
        counts, samples = self._counts[chosen], self.samples_per_identity
        places = np.empty((len(chosen), samples), dtype=np.int64)
        for at in range(samples):
            # Draw among the images that are left, and step over those drawn before; start again when none is left.
            before = at % counts
            draw = (rng.random(len(chosen)) * (counts - before)).astype(np.int64)
            taken = np.where(np.arange(at)[None] >= (at - before)[:, None], places[:, :at], np.iinfo(np.int64).max)
            for each in np.sort(taken, axis=1).T:
                draw += draw >= each
            places[:, at] = draw
        return self._sorted[self._starts[chosen][:, None] + places].reshape(-1)


class CrossAgeOrder(BalancedOrder):
    """As `BalancedOrder`, of pairs of images at least `min_age_gap` apart in age.

    Only identities with such a pair are visited. The first image of a pair is drawn among those that have a partner, the
    second among its partners.

    Args:
        identities: `(n,)` whole numbers from 0, negative where unknown.
        ages: `(n,)` years, or age groups with a gap of 1; NaN or negative where unknown.
        min_age_gap: Minimum difference of a pair.
        batch_size: Images per batch, a multiple of `samples_per_identity`.
        samples_per_identity: Images of each identity in a batch, an even number.
        seed: Seed of the order.

    Raises:
        InputError: Too few identities have such a pair.

    Examples:
        >>> ages = np.array([3, 40, 5, 20, 25, 50, 7])
        >>> order = CrossAgeOrder([0, 0, 0, 1, 1, 1, 2], ages, 20, batch_size=4, samples_per_identity=2, seed=0)
        >>> bool((np.abs(np.diff(ages[order.rows(0, 0)].reshape(2, 2), axis=1)) >= 20).all())
        True
    """

    def __init__(
        self,
        identities: ArrayLike,
        ages: ArrayLike,
        min_age_gap: float,
        batch_size: int,
        samples_per_identity: int,
        seed: int,
    ) -> None:
        years, labels = np.asarray(ages, dtype=np.float64), np.asarray(identities)
        if samples_per_identity % 2:
            raise InputError(f"cross-age pairs: samples_per_identity must be even, got {samples_per_identity}")
        known = np.flatnonzero((years >= 0) & (labels >= 0))  # False for NaN
        known = known[np.lexsort((years[known], labels[known]))]
        super().__init__(labels[known], batch_size, samples_per_identity, seed)
        self._sorted = known
        self._years, self.min_age_gap = years[known], min_age_gap
        ends = self._starts + self._counts - 1
        spans = self._years[ends] - self._years[self._starts] if len(known) else np.zeros(0)
        self._visited = np.flatnonzero(spans >= min_age_gap)
        if len(self._visited) < self.per_batch:
            raise InputError(
                f"cross-age pairs: a batch of {batch_size} needs {self.per_batch} identities with images at least "
                f"{min_age_gap:g} apart in age, got {len(self._visited)}; reduce the batch size or the gap"
            )

    @override
    def _draw(self, chosen: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        rows: list[int] = []
        for identity in chosen.tolist():
            start, count = int(self._starts[identity]), int(self._counts[identity])
            years = self._years[start : start + count]
            younger = np.searchsorted(years, years - self.min_age_gap, side="right")  # partners are before this place
            older = np.searchsorted(years, years + self.min_age_gap, side="left")  # and from this place on
            partners = younger + count - older
            paired = np.flatnonzero(partners)
            for _ in range(self.samples_per_identity // 2):
                first = int(rng.choice(paired))
                place = int(rng.integers(partners[first]))
                second = place if place < younger[first] else int(older[first]) + place - int(younger[first])
                rows += [start + first, start + second]
        return self._sorted[rows]


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
