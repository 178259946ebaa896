"""Batches of training images that depend on the seed, the epoch and the step only."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.dataset import FaceImages, list_errors
from kdlib_faces.data.images import check_pixels, to_float
from kdlib_faces.data.samplers import BalancedOrder, CrossAgeOrder, Order, ShuffledOrder
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig, augment, draw_views, find_opencv

__all__ = ["FaceBatches"]

T = TypeVar("T")
Batch: TypeAlias = tuple[Tensor, dict[str, Tensor]]


class FaceBatches:
    """Batches `(inputs, targets)` of face images, for `kdlib.training.train`.

    Inputs are `(b, 3, s, s)` float32 in `[-1, 1]`, in channels-last memory format where images are decoded. The last, smaller batch of an epoch is dropped. Targets are:

    - `"identity"`: `(b,)` int64, -1 unknown.
    - `"labeled"` and `"known_identity"`, if an identity is unknown: `(b,)` float32, 1 where the identity is known, else 0;
      and `(b,)` int64, the identity with 0 in place of -1, for a term with `sample_weight="labeled"`.
    - `"sample"`: `(b,)` int64, the sample id of each image.
    - `"view"`: `(b,)` int64, 0 plain and 1 mirrored; with `views`, the view number.
    - `"age"`, where ages are given: `(b,)` float32 years, NaN unknown.
    - `"age_group"`, where age groups are given: `(b,)` int64, -1 unknown.
    - `"identity_age"`, with `identity_age`: `(b, 2)` float64, identity and age, for `CrossAgePairLoss`.

    The rows of a batch and its views are drawn from (seed, epoch, number of the batch), by whichever process decodes it. The
    batches are therefore the same for any number of `workers`, and `iter_from(step)` yields those of a full iteration without
    computing the ones before `step`: training resumes exactly. After `shard`, each process of a distributed run yields its
    part of the same batches.

    An image that cannot be read is an `InputError`. With `FaceImages(..., on_error="skip")`, another image of the batch takes
    its place, one of the same identity if there is one, and the dictionary `unreadable` of rows and messages grows.

    Args:
        images: `(n, 3, s, s)` uint8, a tensor or array, or images that are decoded when they are read.
        identities: `(n,)` whole numbers, -1 where unknown.
        batch_size: Images per batch, of all processes together.
        seed: Seed of the order and the views.
        ages: `(n,)` years, or None.
        age_groups: `(n,)` whole numbers, or None.
        augment: Augmentation of the images; None leaves them plain.
        views: Views whose teacher outputs are cached, in place of `augment`.
        samples_per_identity: With `k`, each batch holds `k` images of each of `batch_size / k` different identities; an
            identity with fewer than `k` images repeats them. None shuffles the images.
        min_age_gap: With `samples_per_identity`, these images are pairs at least so far apart in `identity_age`; see
            `kdlib_faces.data.samplers.CrossAgeOrder`.
        identity_age: Which target, `"age"` or `"age_group"`, is the age in `"identity_age"`; None omits that target.
        sample_ids: `(n,)` sample ids; None numbers the images from 0.
        workers: Processes that decode and augment the batches ahead of the training; 0 does both when a batch is taken.

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
        images: FaceImages | Tensor | NDArray[np.uint8],
        identities: ArrayLike | Tensor,
        *,
        batch_size: int,
        seed: int,
        ages: ArrayLike | Tensor | None = None,
        age_groups: ArrayLike | Tensor | None = None,
        augment: AugmentConfig | None = None,
        views: SeededViews | None = None,
        samples_per_identity: int | None = None,
        min_age_gap: float | None = None,
        identity_age: Literal["age", "age_group"] | None = None,
        sample_ids: ArrayLike | Tensor | None = None,
        workers: int = 0,
    ) -> None:
        owner = "FaceBatches"
        self.images = images if isinstance(images, FaceImages | Tensor) else torch.from_numpy(images)
        if isinstance(self.images, Tensor):
            check_pixels(owner, self.images)
        check_number(owner, "batch_size", batch_size, min=1, integer=True)
        check_number(owner, "seed", seed, min=0, integer=True)
        check_number(owner, "workers", workers, min=0, integer=True)
        count = len(self.images)
        if batch_size > count:
            raise ValueError(f"{owner}: batch_size must be at most the {count} images, got {batch_size}")
        if views is not None and not isinstance(views, SeededViews):
            raise TypeError(f"{owner}: views must be SeededViews, got {type(views).__name__}")
        if augment is not None and views is not None:
            raise ValueError(f"{owner}: augment and views exclude each other, got both")
        columns = {
            name: torch.as_tensor(values).to(dtype)
            for name, values, dtype in (
                ("identity", identities, torch.int64),
                ("sample", sample_ids, torch.int64),
                ("age", ages, torch.float32),
                ("age_group", age_groups, torch.int64),
            )
            if values is not None
        }
        for name, column in columns.items():
            if tuple(column.shape) != (count,):
                raise ValueError(f"{owner}: {name} must be (n,) = ({count},), got {tuple(column.shape)}")
        if identity_age is not None:
            check_choice(owner, "identity_age", identity_age, [name for name in columns if name.startswith("age")])
        labels: NDArray[np.int64] = columns["identity"].numpy()
        all_labeled = bool(labels.min() >= 0)
        self._num_identities = _count_distinct(labels if all_labeled else labels[labels >= 0])
        self._order: Order = ShuffledOrder(count, batch_size, seed)
        if samples_per_identity is not None:
            check_number(owner, "samples_per_identity", samples_per_identity, min=1, integer=True)
            if not all_labeled:
                raise ValueError(f"{owner}: identities must all be known for samples_per_identity, got -1")
            per_batch, rest = divmod(batch_size, samples_per_identity)
            if rest or per_batch > self._num_identities:
                raise ValueError(
                    f"{owner}: batch_size must be a multiple of samples_per_identity {samples_per_identity}, at most "
                    f"{samples_per_identity} x {self._num_identities} identities, got {batch_size}"
                )
            if min_age_gap is None:
                self._order = BalancedOrder(labels, batch_size, samples_per_identity, seed)
        if min_age_gap is not None:
            if samples_per_identity is None or identity_age is None:
                given = {"samples_per_identity": samples_per_identity, "identity_age": identity_age}
                absent = " and no ".join(name for name, value in given.items() if value is None)
                raise ValueError(
                    f"{owner}: min_age_gap must come with samples_per_identity and identity_age, got no {absent}"
                )
            years = columns[identity_age].numpy()
            self._order = CrossAgeOrder(labels, years, min_age_gap, batch_size, samples_per_identity, seed)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.samples_per_identity = samples_per_identity
        self.unreadable: dict[int, str] = {}
        self._maker = _BatchMaker(self.images, columns, seed, all_labeled, augment, views, identity_age)
        self._plan = _Plan(self)
        self._loader: DataLoader[_Made] | None = None

    def __repr__(self) -> str:
        return (
            f"FaceBatches(<{len(self.images)} images>, <{self._num_identities} identities>, "
            f"batch_size={self.batch_size}, seed={self.seed}, augment={self._maker.augment!r}, views={self._maker.views!r}, "
            f"samples_per_identity={self.samples_per_identity}, workers={self.workers})"
        )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

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
        self._plan.part = range(rank * size, (rank + 1) * size)
        self.close()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._plan.epoch = check_number("FaceBatches.set_epoch", "epoch", epoch, min=0, integer=True)

    def close(self) -> None:
        """End the workers; the next iteration starts others."""
        self._loader = None

    def __iter__(self) -> Iterator[Batch]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[Batch]:
        """Yield the batches of the epoch from `step` on, without computing those before it."""
        check_number("FaceBatches.iter_from", "step", step, min=0, integer=True)
        self._plan.start = step
        if not self.workers:
            return self._checked(map(self._maker.__getitem__, iter(self._plan)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
            if self._loader is None:
                self._loader = DataLoader(
                    self._maker,
                    batch_size=None,
                    sampler=self._plan,
                    num_workers=self.workers,
                    collate_fn=_unchanged,
                    worker_init_fn=_start_worker,
                    persistent_workers=True,
                    prefetch_factor=4,
                    generator=Generator(),  # its own, so that workers do not change torch's random state
                )
            made = iter(self._loader)
        return self._checked(made)

    def _checked(self, made: Iterator["_Made"]) -> Iterator[Batch]:
        for inputs, targets, errors in made:
            if errors and isinstance(self.images, FaceImages) and (self.images.on_error == "stop" or not len(inputs)):
                raise InputError(list_errors(list(errors.values()), self.batch_size))
            self.unreadable |= errors
            yield inputs, targets


def _count_distinct(labels: NDArray[np.int64]) -> int:
    if labels.max(initial=0) > 1 << 26:
        return len(np.unique(labels))
    return int(np.count_nonzero(np.bincount(labels)))  # faster for millions of images


@dataclass(frozen=True)
class _Item:
    """A batch to make: its epoch, its number, its rows, and the places in it that this process yields."""

    epoch: int
    number: int
    rows: NDArray[np.int64]
    part: range


_Made: TypeAlias = tuple[Tensor, dict[str, Tensor], dict[int, str]]
"""Inputs and targets, and the messages of rows that cannot be read."""


def _unchanged(made: T) -> T:
    return made


def _start_worker(number: int) -> None:
    """Leave one thread to OpenCV, as the loader leaves one to torch."""
    if (opencv := find_opencv()) is not None:
        opencv.setNumThreads(0)


class _Plan(Sampler[_Item]):
    """The batches of an epoch, from a step on."""

    def __init__(self, batches: FaceBatches) -> None:
        self.batches, self.epoch, self.start, self.part = batches, 0, 0, range(batches.batch_size)

    def __len__(self) -> int:
        return max(0, len(self.batches) - self.start)

    @override
    def __iter__(self) -> Iterator[_Item]:
        return self._items(self.epoch, range(self.start, len(self.batches)))

    def _items(self, epoch: int, steps: range) -> Iterator[_Item]:
        for step in steps:
            yield _Item(epoch, step, self.batches._order.rows(epoch, step), self.part)


@dataclass(frozen=True, eq=False)
class _BatchMaker(Dataset[_Made]):
    """Decodes and augments the images of a batch."""

    images: FaceImages | Tensor
    columns: Mapping[str, Tensor]
    seed: int
    all_labeled: bool
    augment: AugmentConfig | None
    views: SeededViews | None
    identity_age: Literal["age", "age_group"] | None

    @override
    def __getitem__(self, item: _Item) -> _Made:
        own = slice(item.part.start, min(item.part.stop, len(item.rows)))
        rows, errors = torch.from_numpy(item.rows[own]), dict[int, str]()
        if isinstance(self.images, Tensor):
            pixels = self.images[rows]
        else:
            pixels, found = self.images.read(rows.tolist())
            if found:
                errors = {int(rows[at]): error for at, error in found.items()}
                rows, pixels = self._replaced(rows, pixels, list(found))
        targets = self._targets(rows)
        if not len(rows):
            return to_float(pixels), targets, errors
        if self.views is not None:
            views = self.views.draw(len(item.rows), seed=self.seed, epoch=item.epoch, step=item.number)
            targets["view"] = views[own]
            return self.views(pixels, targets["sample"], targets["view"]), targets, errors
        if self.augment is None:
            targets["view"] = torch.zeros(len(rows), dtype=torch.int64)
            return to_float(pixels), targets, errors
        state = np.random.SeedSequence([self.seed, item.epoch, 1, item.number]).generate_state(1, np.uint64)
        # Drawn for the whole batch, of which this process makes its part.
        draws = draw_views(len(item.rows), Generator().manual_seed(int(state[0] >> np.uint64(1))))
        inputs, targets["view"] = augment(pixels, self.augment, draws[own])
        return inputs, targets, errors

    def _targets(self, rows: Tensor) -> dict[str, Tensor]:
        targets = {name: column[rows] for name, column in self.columns.items()}
        targets.setdefault("sample", rows)
        if not self.all_labeled:
            targets["labeled"] = (targets["identity"] >= 0).float()
            targets["known_identity"] = targets["identity"].clamp(min=0)
        if self.identity_age is not None:
            pairs = [targets["identity"].double(), targets[self.identity_age].double()]
            targets["identity_age"] = torch.stack(pairs, dim=1)
        return targets

    def _replaced(self, rows: Tensor, pixels: Tensor, bad: list[int]) -> tuple[Tensor, Tensor]:
        """Put other images of the batch in the place of those that cannot be read, of the same identity if possible."""
        good = [at for at in range(len(rows)) if at not in bad]
        if not good:
            return rows[:0], pixels[:0]
        identities = self.columns["identity"][rows].tolist()
        source = list(range(len(rows)))
        for number, at in enumerate(bad):
            same = [other for other in good if identities[other] == identities[at]] or good
            source[at] = same[number % len(same)]
        return rows[source], pixels[source]
