"""Deferred handling of Ctrl-C and SIGTERM until the end of a training step."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["DeferredSignals"]


class DeferredSignals:
    """Context manager that records SIGINT and SIGTERM; `deliver` passes the recorded signal to the original handler.

    A second signal of the same kind is handled immediately, a recorded one at the end of the block at the latest. Outside
    the main thread, or with `active=False`, signals are handled as usual.

    Examples:
        >>> before = signal.signal(signal.SIGINT, signal.default_int_handler)
        >>> with DeferredSignals() as signals:
        ...     signal.raise_signal(signal.SIGINT)
        ...     signals.pending
        ...     try:
        ...         signals.deliver()
        ...     except KeyboardInterrupt:
        ...         print("handled")
        True
        handled
        >>> _ = signal.signal(signal.SIGINT, before)
    """

    def __init__(self, *, active: bool = True) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._recorded: int | None = None
        self._process = os.getpid()

    @property
    def pending(self) -> bool:
        """Whether a signal was recorded."""
        return self._recorded is not None

    def deliver(self) -> None:
        """Pass the recorded signal to the handler that was installed before the block."""
        if self._recorded is not None:
            signum, self._recorded = self._recorded, None
            self._restore()
            signal.raise_signal(signum)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        # A loader worker inherits this handler by fork, but has no loop that would deliver the signal.
        if self._recorded == signum or os.getpid() != self._process:
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)
            return
        self._recorded = signum

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
