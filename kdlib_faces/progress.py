"""Progress bars on a terminal, and periodic lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from kdlib.training import TrainEvent

__all__ = ["TrainProgress", "progress", "progress_to", "say"]

T = TypeVar("T")
EVERY = 10.0
"""Default seconds between two lines."""


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
    meter = _Meter(label, quiet=quiet, stream=stream, every=every)
    meter.start(count)
    try:
        for done, item in enumerate(iterable, 1):
            yield item
            meter.show(done, count)
    finally:
        meter.close()


@contextmanager
def progress_to(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback `(done, total)` that shows the progress until the block ends.

    Examples:
        >>> with progress_to("rows", quiet=True) as show:
        ...     show(1, 2)
    """
    meter = _Meter(label, quiet=quiet)
    try:
        yield meter.show
    finally:
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
        self._meter = _Meter(label, quiet=quiet, stream=stream, every=every)

    def __repr__(self) -> str:
        return f"TrainProgress({self._meter.label!r}, quiet={self._meter.quiet}, every={self._meter.every})"

    def __call__(self, event: "TrainEvent") -> None:
        """Show a step and its loss; the last step closes the bar."""
        step = f"{event.step_seconds * 1000:.0f} ms/step, {event.data_wait:.0%} waiting for data"
        memory = f", {event.memory / 2**30:.1f} GiB" if event.memory else ""
        note = f"loss {event.total:.4g}, {event.images_per_second:.0f} images/s, {step}{memory}"
        self._meter.show(event.step, event.total_steps, note)
        if event.step >= event.total_steps:
            self.close()

    def close(self) -> None:
        """Close the bar if training stopped early."""
        self._meter.close()


class _Meter:
    """A tqdm bar on a terminal, otherwise one line every `every` seconds; the first call starts it."""

    def __init__(self, label: str, *, quiet: bool, stream: TextIO | None = None, every: float = EVERY) -> None:
        self.label, self.quiet, self.every = label, quiet, every
        self.stream = stream if stream is not None else sys.stderr
        self.started: float | None = None
        self.bar: tqdm[Any] | None = None

    def start(self, total: int | None) -> float:
        """Return the time of the start, which is now if there was none."""
        if self.started is None:
            self.started = self.last = time.monotonic()
            if not self.quiet and self.stream.isatty():
                interval = min(self.every, 0.1)
                self.bar = tqdm(
                    total=total, desc=self.label, file=self.stream, leave=False, dynamic_ncols=True, mininterval=interval
                )  # fmt: skip
        return self.started

    def show(self, done: int, total: int | None, note: str = "") -> None:
        """Show that `done` items of `total` are done."""
        started = self.start(total)
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
        elif not self.quiet and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            of = "" if total is None else f" of {total}"
            tail = f", {note}" if note else ""
            print(f"{self.label}: {done}{of}{tail}, {self.last - started:.0f} s", file=self.stream, flush=True)

    def close(self) -> None:
        """Remove the bar; the next call starts again."""
        if self.bar is not None:
            self.bar.close()
        self.started = self.bar = None
