"""Training room: Ctrl-C and SIGTERM wait for the end of a step. Touches the signal handlers of the main thread."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["DeferredSignals"]


class DeferredSignals:
    """Within the block SIGINT and SIGTERM are noted, not served; `deliver` serves a noted one as it would have been.

    A second signal of the same kind is served at once, a noted one at the latest at the end of the block. Outside the
    main thread, or with `active=False`, nothing changes.

    Examples:
        >>> before = signal.signal(signal.SIGINT, signal.default_int_handler)
        >>> with DeferredSignals() as signals:
        ...     signal.raise_signal(signal.SIGINT)
        ...     signals.pending
        ...     try:
        ...         signals.deliver()
        ...     except KeyboardInterrupt:
        ...         print("served")
        True
        served
        >>> _ = signal.signal(signal.SIGINT, before)
    """

    def __init__(self, *, active: bool = True) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._previous: dict[int, Any] = {}
        self._noted: int | None = None
        self._process = os.getpid()

    @property
    def pending(self) -> bool:
        """Has a signal come?"""
        return self._noted is not None

    def deliver(self) -> None:
        """Serve the signal that has come, by the handler that stood before the block."""
        if self._noted is not None:
            noted, self._noted = self._noted, None
            self._restore()
            signal.raise_signal(noted)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # A loader's worker inherits this handler by fork and has no loop that would ever look at the note.
        if self._noted == signum or os.getpid() != self._process:
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)
            return
        self._noted = signum

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __enter__(self) -> Self:
        if self._active:
            for signum in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(signum)
                if handler is not None and handler is not signal.SIG_IGN:
                    self._previous[signum] = handler
                    signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if error is None:
            self.deliver()
