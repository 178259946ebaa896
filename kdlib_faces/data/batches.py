"""Data room: batches for training, the same for the same seed, epoch and step. Touches tensors in memory only."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor

from kdlib._checks import check_number
from kdlib_faces.data.images import to_float
from kdlib_faces.data.views import AugmentConfig, augment

__all__ = ["FaceBatches"]


class FaceBatches:
    """Batches `(inputs, targets)` of an image tensor, for `kdlib.training.train`.

    Inputs are `(b, 3, s, s)` float32 in `[-1, 1]`. Targets are `"identity"` (b,) int64; `"sample"` (b,) int64, the id
    of the image in the whole list; `"view"` (b,) int64, 0 plain and 1 mirrored; and, where given, `"age"` (b,) float32
    years, NaN unknown, and `"age_group"` (b,) int64, -1 unknown. The last, smaller batch of an epoch is left out.

    The order of an epoch is drawn from (seed, epoch), the views of a batch from (seed, epoch, step): `iter_from(step)`
    gives the very batches that would have come, without making those before, so that a resumed run is the same run.

    Args:
        images: `(n, 3, s, s)` uint8, a tensor, array or memory map.
        identities: `(n,)` whole numbers.
        batch_size: images a batch.
        seed: what order and views are drawn from.
        ages: `(n,)` years or None.
        age_groups: `(n,)` whole numbers or None.
        augment: views of the training images; None gives them plain.
        samples_per_identity: with `k`, each batch holds `k` images of each of `batch_size / k` identities, all different;
            an identity with fewer than `k` images repeats them. None draws images alone.
        sample_ids: `(n,)` ids of the images; None numbers them from 0.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: shapes that do not agree, or a batch larger than the list.

    Examples:
        >>> pixels = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
        >>> batches = FaceBatches(pixels, [0, 0, 1, 1, 2, 2, 3, 3], batch_size=4, seed=0)
        >>> inputs, targets = next(iter(batches))
        >>> len(batches), inputs.shape, sorted(targets)
        (2, torch.Size([4, 3, 4, 4]), ['identity', 'sample', 'view'])
    """

    def __init__(
        self,
        images: Tensor | NDArray[np.uint8],
        identities: ArrayLike | Tensor,
        *,
        batch_size: int,
        seed: int,
        ages: ArrayLike | Tensor | None = None,
        age_groups: ArrayLike | Tensor | None = None,
        augment: AugmentConfig | None = None,
        samples_per_identity: int | None = None,
        sample_ids: ArrayLike | Tensor | None = None,
    ) -> None:
        pixels = images if isinstance(images, Tensor) else torch.from_numpy(images)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"FaceBatches: images must be uint8, got {pixels.dtype}")
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise ValueError(f"FaceBatches: images must be (n, 3, s, s), got {tuple(pixels.shape)}")
        check_number("FaceBatches", "batch_size", batch_size, min=1, integer=True)
        check_number("FaceBatches", "seed", seed, min=0, integer=True)
        count = len(pixels)
        if batch_size > count:
            raise ValueError(f"FaceBatches: batch_size must be at most the {count} images, got {batch_size}")
        self.images = pixels
        self.batch_size, self.seed, self.augment, self.samples_per_identity = (
            batch_size,
            seed,
            augment,
            samples_per_identity,
        )
        self.epoch = 0
        columns: dict[str, tuple[Any, torch.dtype]] = {
            "identity": (identities, torch.int64),
            "sample": (np.arange(count) if sample_ids is None else sample_ids, torch.int64),
        }
        if ages is not None:
            columns["age"] = (ages, torch.float32)
        if age_groups is not None:
            columns["age_group"] = (age_groups, torch.int64)
        self.columns = {name: torch.as_tensor(values).to(dtype) for name, (values, dtype) in columns.items()}
        for name, column in self.columns.items():
            if tuple(column.shape) != (count,):
                raise ValueError(f"FaceBatches: {name} must be (n,) = ({count},), got {tuple(column.shape)}")
        self._who = self.columns["identity"].numpy()
        if samples_per_identity is not None:
            self._check_per_identity(samples_per_identity)

    def _check_per_identity(self, samples_per_identity: int) -> None:
        check_number("FaceBatches", "samples_per_identity", samples_per_identity, min=1, integer=True)
        people = len(np.unique(self._who))
        if self.batch_size % samples_per_identity:
            raise ValueError(
                f"FaceBatches: batch_size must be a multiple of samples_per_identity {samples_per_identity}, got {self.batch_size}"
            )
        if self.batch_size // samples_per_identity > people:
            raise ValueError(
                f"FaceBatches: batch_size / samples_per_identity must be at most the {people} identities, "
                f"got {self.batch_size // samples_per_identity}"
            )

    def __repr__(self) -> str:
        return (
            f"FaceBatches(<{len(self.images)} images>, <{len(np.unique(self._who))} identities>, "
            f"batch_size={self.batch_size}, seed={self.seed}, augment={self.augment!r}, "
            f"samples_per_identity={self.samples_per_identity})"
        )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        check_number("FaceBatches.set_epoch", "epoch", epoch, min=0, integer=True)
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The batches of the epoch from `step` on, those before it not made."""
        check_number("FaceBatches.iter_from", "step", step, min=0, integer=True)
        epoch = self.epoch
        order = self._order(epoch)
        for at in range(step, len(self)):
            yield self._batch(torch.from_numpy(order[at * self.batch_size : (at + 1) * self.batch_size]), epoch, at)

    def _batch(self, rows: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.images[rows]
        targets = {name: column[rows] for name, column in self.columns.items()}
        if self.augment is None:
            inputs, targets["view"] = to_float(pixels), torch.zeros(len(rows), dtype=torch.int64)
        else:
            state = np.random.SeedSequence([self.seed, epoch, 1, step]).generate_state(1, np.uint64)
            generator = Generator().manual_seed(int(state[0] >> np.uint64(1)))
            inputs, targets["view"] = augment(pixels, self.augment, generator)
        return inputs, targets

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, 0])))
        if self.samples_per_identity is None:
            return rng.permutation(len(self.images)).astype(np.int64)
        return self._balanced_order(rng, self.samples_per_identity)

    def _balanced_order(self, rng: np.random.Generator, k: int) -> NDArray[np.int64]:
        """Rounds over all identities, `k` images of each; a round's rest smaller than a batch is dropped."""
        _, who = np.unique(self._who, return_inverse=True)
        counts = np.bincount(who)
        starts = np.cumsum(counts) - counts
        per_batch = self.batch_size // k
        batches: list[NDArray[np.int64]] = []
        while len(batches) < len(self):
            shuffled = np.lexsort((rng.random(len(who)), who))
            people = rng.permutation(len(counts))
            for at in range(0, len(people) - per_batch + 1, per_batch):
                chosen = people[at : at + per_batch, None]
                batches.append(shuffled[starts[chosen] + np.arange(k) % counts[chosen]].reshape(-1).astype(np.int64))
        return np.concatenate(batches[: len(self)])
