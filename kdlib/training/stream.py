"""Batches over all epochs, with a position that can be saved and restored."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

import torch
from torch.utils.data import BatchSampler, DataLoader

from kdlib.training._checks import check_argument

__all__ = ["Batch", "BatchStream", "HasEpochs", "HasGenerator", "Position", "Seekable", "Shardable", "StreamState"]

_EMPTY = "loader must yield at least one batch, got none"

Batch = tuple[Any, Any]
"""`(inputs, targets)` as yielded by the loader."""


@runtime_checkable
class HasEpochs(Protocol):
    """A loader or sampler whose order depends on the epoch."""

    def set_epoch(self, epoch: int, /) -> object:
        """Set the epoch, from 0, before the loader is iterated."""
        ...


@runtime_checkable
class Seekable(Protocol):
    """A loader that can start within an epoch."""

    def iter_from(self, batch: int, /) -> Iterable[Batch]:
        """Yield the batches of the epoch from index `batch` on."""
        ...


@runtime_checkable
class Shardable(Protocol):
    """A loader whose batches several processes share; their order depends on the seed and the epoch only."""

    def shard(self, rank: int, count: int, /) -> object:
        """Yield from now on part `rank` of `count` equal parts of each batch."""
        ...


@runtime_checkable
class HasGenerator(Protocol):
    """A loader or sampler with random numbers of its own."""

    generator: torch.Generator | None


class StreamState(TypedDict):
    """Position of a stream: the epoch, the batches taken from it, and the random states at the start of the epoch."""

    epoch: int
    batch: int
    start: list[torch.Tensor]


class Position(TypedDict):
    """The position in the loader and the random states of one process."""

    stream: StreamState
    rng: dict[str, torch.Tensor]


class BatchStream:
    """Groups of `accumulate` batches, epoch after epoch.

    A saved position is restored exactly: the random states at the beginning of the epoch determine its order, so they
    are part of the position, and the batches already taken are skipped, or not computed if the loader is `Seekable`. The
    epoch is set on the loader and its samplers (`HasEpochs`).

    Args:
        loader: An iterable of batches, iterated once per epoch.
        accumulate: Batches per group; the last group of an epoch contains the remaining batches.
        exact: Whether an epoch must not have fewer batches than the length of the loader.
    """

    def __init__(self, loader: Iterable[Batch], accumulate: int, *, exact: bool = False) -> None:
        self.loader, self.accumulate, self.length = loader, accumulate, _length(loader)
        self.exact = exact and self.length is not None
        self.epoch = self.batch = 0
        self._batches: Iterator[Batch] | None = None
        self._start: list[torch.Tensor] = []

    def steps(self, epochs: int | None, max_steps: int | None) -> int:
        """Return the number of steps of the run."""
        check_argument(self.length != 0, _EMPTY)
        if epochs is None or self.length is None:
            check_argument(
                max_steps is not None, "loader must have a length when max_steps is not given, got one without"
            )
            return int(max_steps or 0)
        steps = epochs * (self.steps_per_epoch or 0)
        return steps if max_steps is None else min(steps, max_steps)

    @property
    def steps_per_epoch(self) -> int | None:
        """Number of steps of an epoch, `None` for a loader without a length."""
        return None if self.length is None else -(-self.length // self.accumulate)

    def peek(self) -> Batch:
        """Return the first batch of the first epoch without changing the position or the random states."""
        states = self.random_states()
        self._set_epoch(0)
        batch = next(iter(self.loader), None)
        check_argument(batch is not None, _EMPTY)
        self.set_random_states(states)
        return cast(Batch, batch)

    def take(self) -> tuple[int, int, list[Batch]]:
        """Return the epoch, the index of the first batch within it, and the next group of batches."""
        for _ in range(2):
            batches = self._open() if self._batches is None else self._batches
            group = list(islice(batches, self.accumulate))
            epoch, first = self.epoch, self.batch
            self.batch += len(group)
            # The iterator is exhausted at the end of an epoch, so that its last random draws belong to this epoch.
            if len(group) < self.accumulate or self.batch == self.length:
                wanted = f"loader must yield len(loader) = {self.length} batches"
                check_argument(next(batches, None) is None, f"{wanted}, got more")
                check_argument(
                    not self.exact or self.batch == self.length, f"{wanted} in every process, got {self.batch}"
                )
                self.epoch, self.batch, self._batches = epoch + 1, 0, None
            if group:
                break
        check_argument(bool(group), f"loader must yield batches in every epoch, got none in epoch {epoch}")
        return epoch, first, group

    def state_dict(self) -> StreamState:
        """Return the position."""
        return {"epoch": self.epoch, "batch": self.batch, "start": self._start if self.batch else self.random_states()}

    def load_state_dict(self, state: StreamState) -> None:
        """Restore a saved position, including the random states after the skipped batches."""
        self.epoch, self.batch, self._batches = state["epoch"], state["batch"], None
        self.set_random_states(state["start"])
        if self.batch:
            self._open()

    def _open(self) -> Iterator[Batch]:
        """Start the epoch at `self.batch`."""
        self._set_epoch(self.epoch)
        self._start = self.random_states()
        if self.batch and isinstance(self.loader, Seekable):
            self._batches = batches = iter(self.loader.iter_from(self.batch))
            return batches
        self._batches = batches = iter(self.loader)
        skipped = sum(1 for _ in islice(batches, self.batch))
        check_argument(
            skipped == self.batch,
            f"loader must yield the {self.batch} batches of the interrupted epoch again, got {skipped}",
        )
        return batches

    def _set_epoch(self, epoch: int) -> None:
        for part in _parts(self.loader):
            if isinstance(part, HasEpochs):
                part.set_epoch(epoch)

    def _generators(self) -> list[torch.Generator]:
        owned = [part.generator for part in _parts(self.loader) if isinstance(part, HasGenerator)]
        distinct = {id(generator): generator for generator in owned if isinstance(generator, torch.Generator)}
        return [torch.default_generator, *distinct.values()]

    def random_states(self) -> list[torch.Tensor]:
        """Return the states of the default generator and of the generators of the loader."""
        return [generator.get_state() for generator in self._generators()]

    def set_random_states(self, states: list[torch.Tensor]) -> None:
        """Restore the states of :meth:`random_states`."""
        generators = self._generators()
        check_argument(
            len(states) == len(generators),
            f"loader must have {len(states) - 1} generators as before, got {len(generators) - 1}",
        )
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _parts(loader: object) -> list[object]:
    """Return a loader and its samplers."""
    if not isinstance(loader, DataLoader):
        return [loader]
    batches = loader.batch_sampler
    return [loader, loader.sampler, batches, batches.sampler if isinstance(batches, BatchSampler) else None]


def _length(loader: Iterable[Batch]) -> int | None:
    """Return `len(loader)`, or `None`: `__len__` of a DataLoader over an iterable dataset raises TypeError."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None
