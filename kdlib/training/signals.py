"""Deferred handling of Ctrl-C and SIGTERM until the end of a training step."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self, TypeAlias

from kdlib.training._checks import Interrupted, interrupted

__all__ = ["DeferredSignals"]

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class DeferredSignals:
    """Context manager that records SIGINT and SIGTERM; `deliver` passes the recorded signal to the original handler.

    A second signal of the same kind is handled immediately unless `repeated`, a recorded one at the end of the block at the
    latest. Outside the main thread, or with `active=False`, signals are handled as usual.

    Args:
        active: Whether to record signals.
        repeated: Whether one request to stop may arrive several times: `torchrun` forwards a signal that its processes
            also receive from the terminal or the scheduler.

    Examples:
        >>> before = signal.signal(signal.SIGINT, signal.default_int_handler)
        >>> with DeferredSignals() as signals:
        ...     signal.raise_signal(signal.SIGINT)
        ...     signals.pending == signal.SIGINT
        ...     try:
        ...         signals.deliver()
        ...     except KeyboardInterrupt:
        ...         print("handled")
        True
        handled
        >>> _ = signal.signal(signal.SIGINT, before)
    """

    def __init__(self, *, active: bool = True, repeated: bool = False) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._repeated = repeated
        self._interruptible = False
        self._previous: dict[int, _Handler] = {}
        self._process = os.getpid()
        self.pending = 0
        """Number of the recorded signal, 0 for none."""

    def deliver(self, signum: int | None = None) -> None:
        """Pass `signum`, by default the recorded signal, to the handler that was installed before the block."""
        signum, self.pending = signum or self.pending, 0
        if signum:
            self._restore()
            signal.raise_signal(signum)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """End the block at once when a signal is recorded.

        With `repeated`, the signal waits for the end of the block, because other processes may wait for this one in it.
        """
        try:
            try:
                self._interruptible = not self._repeated
                yield
            finally:
                self._interruptible = False
        except Interrupted:
            pass

    def _record(self, signum: int, frame: FrameType | None) -> None:
        # A loader worker inherits this handler by fork, but has no loop that would deliver the signal.
        if os.getpid() != self._process or (self.pending == signum and not self._repeated):
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)
            return
        self.pending = signum
        if sys.platform != "win32" and signal.SIGCHLD not in self._previous:
            # Loader workers that receive the same signal end. A DataLoader would raise an error in the middle of a step.
            self._previous[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._interruptible:
            raise interrupted()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __enter__(self) -> Self:
        if self._active:
            for signum in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(signum)
                if handler is not None and handler is not signal.SIG_IGN:
                    self._previous[signum] = handler
                    signal.signal(signum, self._record)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._restore()
        if error is None:
            self.deliver()
