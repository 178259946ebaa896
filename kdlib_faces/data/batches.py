"""Batches of training images that depend on the seed, the epoch and the step only."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor

from kdlib._checks import check_choice, check_number
from kdlib_faces.data.images import check_pixels, to_float
from kdlib_faces.data.samplers import balanced_order
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig, augment

__all__ = ["FaceBatches"]


class FaceBatches:
    """Batches `(inputs, targets)` of an image tensor, for `kdlib.training.train`.

    Inputs are `(b, 3, s, s)` float32 in `[-1, 1]`. The last, smaller batch of an epoch is dropped. Targets are:

    - `"identity"`: `(b,)` int64, -1 unknown.
    - `"labeled"` and `"known_identity"`, if an identity is unknown: `(b,)` float32, 1 where the identity is known, else 0;
      and `(b,)` int64, the identity with 0 in place of -1, for a term with `sample_weight="labeled"`.
    - `"sample"`: `(b,)` int64, the sample id of each image.
    - `"view"`: `(b,)` int64, 0 plain and 1 mirrored; with `views`, the view number.
    - `"age"`, where ages are given: `(b,)` float32 years, NaN unknown.
    - `"age_group"`, where age groups are given: `(b,)` int64, -1 unknown.
    - `"identity_age"`, with `identity_age`: `(b, 2)` float64, identity and age, for `CrossAgePairLoss`.

    The order of an epoch is drawn from (seed, epoch) and the views of a batch from (seed, epoch, step). `iter_from(step)`
    therefore yields the same batches as a full iteration without computing those before `step`: training resumes exactly.

    Args:
        images: `(n, 3, s, s)` uint8, a tensor, array or memory map.
        identities: `(n,)` whole numbers, -1 where unknown.
        batch_size: Images per batch.
        seed: Seed of the order and the views.
        ages: `(n,)` years, or None.
        age_groups: `(n,)` whole numbers, or None.
        augment: Augmentation of the images; None leaves them plain.
        views: Views whose teacher outputs are cached, in place of `augment`.
        samples_per_identity: With `k`, each batch holds `k` images of each of `batch_size / k` different identities; an
            identity with fewer than `k` images repeats them. None shuffles the images.
        identity_age: Which target, `"age"` or `"age_group"`, is the age in `"identity_age"`; None omits that target.
        sample_ids: `(n,)` sample ids; None numbers the images from 0.

    Raises:
        TypeError: `images` is not uint8.
        ValueError: Shapes disagree, the batch is larger than the list, or both `augment` and `views` are given.

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
        views: SeededViews | None = None,
        samples_per_identity: int | None = None,
        identity_age: Literal["age", "age_group"] | None = None,
        sample_ids: ArrayLike | Tensor | None = None,
    ) -> None:
        owner = "FaceBatches"
        self.images = images if isinstance(images, Tensor) else torch.from_numpy(images)
        check_pixels(owner, self.images)
        check_number(owner, "batch_size", batch_size, min=1, integer=True)
        check_number(owner, "seed", seed, min=0, integer=True)
        count = len(self.images)
        if batch_size > count:
            raise ValueError(f"{owner}: batch_size must be at most the {count} images, got {batch_size}")
        if views is not None and not isinstance(views, SeededViews):
            raise TypeError(f"{owner}: views must be SeededViews, got {type(views).__name__}")
        if augment is not None and views is not None:
            raise ValueError(f"{owner}: augment and views exclude each other, got both")
        self.columns = {
            name: torch.as_tensor(values).to(dtype)
            for name, values, dtype in (
                ("identity", identities, torch.int64),
                ("sample", np.arange(count) if sample_ids is None else sample_ids, torch.int64),
                ("age", ages, torch.float32),
                ("age_group", age_groups, torch.int64),
            )
            if values is not None
        }
        for name, column in self.columns.items():
            if tuple(column.shape) != (count,):
                raise ValueError(f"{owner}: {name} must be (n,) = ({count},), got {tuple(column.shape)}")
        if identity_age is not None:
            check_choice(owner, "identity_age", identity_age, [name for name in self.columns if name.startswith("age")])
        known = self.columns["identity"] >= 0
        self._num_identities = len(np.unique(self.columns["identity"][known].numpy()))
        if not known.all():
            self.columns["labeled"] = known.float()
            self.columns["known_identity"] = self.columns["identity"].clamp(min=0)
        if samples_per_identity is not None:
            check_number(owner, "samples_per_identity", samples_per_identity, min=1, integer=True)
            if not known.all():
                raise ValueError(f"{owner}: identities must all be known for samples_per_identity, got -1")
            per_batch, rest = divmod(batch_size, samples_per_identity)
            if rest or per_batch > self._num_identities:
                raise ValueError(
                    f"{owner}: batch_size must be a multiple of samples_per_identity {samples_per_identity}, at most "
                    f"{samples_per_identity} x {self._num_identities} identities, got {batch_size}"
                )
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.augment, self.views = augment, views
        self.samples_per_identity, self.identity_age = samples_per_identity, identity_age
        self._part = slice(0, batch_size)

    def __repr__(self) -> str:
        return (
            f"FaceBatches(<{len(self.images)} images>, <{self._num_identities} identities>, "
            f"batch_size={self.batch_size}, seed={self.seed}, augment={self.augment!r}, views={self.views!r}, "
            f"samples_per_identity={self.samples_per_identity})"
        )

    def shard(self, rank: int, count: int) -> None:
        """Yield from now on part `rank` of `count` equal parts of each batch.

        Raises:
            ValueError: The batch size is not a multiple of `count`, or would part the images of an identity.
        """
        multiple = count * (self.samples_per_identity or 1)
        if self.batch_size % multiple:
            raise ValueError(
                f"FaceBatches: batch_size must be a multiple of {multiple} for {count} processes, got {self.batch_size}"
            )
        size = self.batch_size // count
        self._part = slice(rank * size, (rank + 1) * size)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = check_number("FaceBatches.set_epoch", "epoch", epoch, min=0, integer=True)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the batches of the epoch from `step` on, without computing those before it."""
        check_number("FaceBatches.iter_from", "step", step, min=0, integer=True)
        epoch, size = self.epoch, self.batch_size
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch, 0])))
        if self.samples_per_identity is None:
            order = rng.permutation(len(self.images)).astype(np.int64)
        else:
            identities = self.columns["identity"].numpy()
            order = balanced_order(identities, size, self.samples_per_identity, len(self), rng)
        for number in range(step, len(self)):
            inputs, targets = self._batch(torch.from_numpy(order[number * size : (number + 1) * size]), epoch, number)
            yield inputs[self._part], {name: target[self._part] for name, target in targets.items()}

    def _batch(self, rows: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.images[rows]
        targets = {name: column[rows] for name, column in self.columns.items()}
        if self.identity_age is not None:
            pairs = [targets["identity"].double(), targets[self.identity_age].double()]
            targets["identity_age"] = torch.stack(pairs, dim=1)
        if self.views is not None:
            targets["view"] = self.views.draw(len(rows), seed=self.seed, epoch=epoch, step=step)
            return self.views(pixels, targets["sample"], targets["view"]), targets
        if self.augment is None:
            targets["view"] = torch.zeros(len(rows), dtype=torch.int64)
            return to_float(pixels), targets
        state = np.random.SeedSequence([self.seed, epoch, 1, step]).generate_state(1, np.uint64)
        inputs, targets["view"] = augment(pixels, self.augment, Generator().manual_seed(int(state[0] >> np.uint64(1))))
        return inputs, targets
