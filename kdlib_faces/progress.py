"""Progress bars on a terminal, and periodic lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from kdlib.training import TrainEvent

__all__ = ["TrainProgress", "progress", "progress_to", "say"]

T = TypeVar("T")
EVERY = 10.0


def say(text: str, *, quiet: bool = False) -> None:
    """Print one line to standard error without breaking a progress bar."""
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
    """Iterate over items and show the progress.

    Args:
        iterable: the items.
        label: description of the work.
        total: number of items; by default `len(iterable)` if it has a length.
        quiet: show nothing.
        stream: output stream, by default standard error.
        every: seconds between two lines if `stream` is not a terminal.

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
    """Yield a callback `(done, total)` that shows the progress until the block ends.

    Args:
        label: description of the work.
        quiet: show nothing.
        stream: output stream, by default standard error.
        every: seconds between two lines if `stream` is not a terminal.

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
    """A hook for `kdlib.training.train` that shows the step and the loss.

    Args:
        label: name of the model.
        quiet: show nothing.
        stream: output stream, by default standard error.
        every: seconds between two lines if `stream` is not a terminal.
    """

    def __init__(self, label: str, *, quiet: bool = False, stream: TextIO | None = None, every: float = EVERY) -> None:
        self.label, self.quiet, self.stream, self.every = label, quiet, stream, every
        self._meter: _Meter | None = None

    def __repr__(self) -> str:
        return f"TrainProgress({self.label!r}, quiet={self.quiet}, every={self.every})"

    def __call__(self, event: "TrainEvent") -> None:
        """Show a step and its loss; the last step closes the bar."""
        if self._meter is None:
            self._meter = _Meter(self.label, event.total_steps, quiet=self.quiet, stream=self.stream, every=self.every)
        self._meter.to(event.step, f"loss {event.total:.4g}, {event.images_per_second:.0f} images/s")
        if event.step >= event.total_steps:
            self.close()

    def close(self) -> None:
        """Close the bar, also if training stopped early."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None


class _Meter:
    """A tqdm bar on a terminal, otherwise one line every `every` seconds."""

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
