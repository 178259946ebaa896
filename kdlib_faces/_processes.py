"""Worker processes that end with their parent, and SIGTERM as an orderly end."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["end_with_parent", "sigterm_exits"]


def end_with_parent() -> None:
    """End this process as soon as its parent ends, by SIGKILL too, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent too, which ends the workers
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C: finished work is recorded, temporary files removed and workers ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
