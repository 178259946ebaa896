"""Progress: bars on a terminal, an occasional line elsewhere. Touches tqdm and standard error only."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from kdlib.training.events import TrainEvent

__all__ = ["TrainProgress", "progress", "progress_to", "say"]

T = TypeVar("T")
EVERY = 10.0


def say(text: str, *, quiet: bool = False) -> None:
    """One line to standard error, past any bar that is shown."""
    if not quiet:
        tqdm.write(text, file=sys.stderr)


def progress(
    iterable: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    quiet: bool = False,
    stream: TextIO | None = None,
    every: float = EVERY,
) -> Iterator[T]:
    """Pass the items on, and show how far they are.

    Args:
        iterable: the items.
        label: what is being done.
        total: how many there are; by default `len(iterable)` where it has one.
        quiet: show nothing.
        stream: where to; standard error by default.
        every: seconds between two lines where `stream` is no terminal.

    Examples:
        >>> list(progress([1, 2], "numbers", quiet=True))
        [1, 2]
    """
    count = total if total is not None else (len(iterable) if isinstance(iterable, Sized) else None)
    meter = _Meter(label, count, quiet=quiet, stream=stream, every=every)
    done = 0
    try:
        for done, item in enumerate(iterable, 1):
            yield item
            meter.to(done)
    finally:
        meter.close()


@contextmanager
def progress_to(
    label: str, *, quiet: bool = False, stream: TextIO | None = None, every: float = EVERY
) -> Iterator[Callable[[int, int], None]]:
    """For work that tells how far it is: a function of the number done and the number in all, shown until the block ends.

    Args:
        label: what is being done.
        quiet: show nothing.
        stream: where to; standard error by default.
        every: seconds between two lines where `stream` is no terminal.

    Examples:
        >>> with progress_to("rows", quiet=True) as show:
        ...     show(1, 2)
    """
    meter: _Meter | None = None

    def show(done: int, total: int) -> None:
        nonlocal meter
        meter = meter or _Meter(label, total, quiet=quiet, stream=stream, every=every)
        meter.to(done)

    try:
        yield show
    finally:
        if meter is not None:
            meter.close()


class TrainProgress:
    """A hook for `kdlib.training.train`: shows step and loss as they come.

    Args:
        label: what is being trained.
        quiet: show nothing.
        stream: where to; standard error by default.
        every: seconds between two lines where `stream` is no terminal.
    """

    def __init__(self, label: str, *, quiet: bool = False, stream: TextIO | None = None, every: float = EVERY) -> None:
        self.label, self.quiet, self.stream, self.every = label, quiet, stream, every
        self._meter: _Meter | None = None

    def __repr__(self) -> str:
        return f"TrainProgress({self.label!r}, quiet={self.quiet}, every={self.every})"

    def __call__(self, event: "TrainEvent") -> None:
        """Show a step, and its loss; the last step takes the bar away."""
        if self._meter is None:
            self._meter = _Meter(self.label, event.total_steps, quiet=self.quiet, stream=self.stream, every=self.every)
        self._meter.to(event.step, f"loss {event.total:.4g}, {event.images_per_second:.0f} images/s")
        if event.step >= event.total_steps:
            self.close()

    def close(self) -> None:
        """Take the bar away; also when training stopped early."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None


class _Meter:
    """A tqdm bar on a terminal; elsewhere a line when `every` seconds have passed."""

    def __init__(self, label: str, total: int | None, *, quiet: bool, stream: TextIO | None, every: float) -> None:
        self.label, self.total, self.quiet, self.every = label, total, quiet, every
        self.stream = stream if stream is not None else sys.stderr
        self.start = self.last = time.monotonic()
        self.done = 0
        self.bar = None
        if not quiet and self.stream.isatty():
            self.bar = tqdm(
                total=total, desc=label, file=self.stream, leave=False, dynamic_ncols=True, mininterval=min(every, 0.1)
            )

    def to(self, done: int, note: str = "") -> None:
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif not self.quiet and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            of = "" if self.total is None else f" of {self.total}"
            tail = f", {note}" if note else ""
            print(f"{self.label}: {done}{of}{tail}, {self.last - self.start:.0f} s", file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
