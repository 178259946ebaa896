"""Bounded reading of whole files."""

import io
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Protocol, TypeVar

from kdlib_faces._checks import InputError

__all__ = ["Progress", "mapped", "opened", "read_whole", "with_progress"]

T = TypeVar("T")


class Progress(Protocol):
    """A function that wraps an iterable and reports progress, such as `kdlib_faces.progress.progress`."""

    def __call__(self, iterable: Iterable[T], label: str, /) -> Iterable[T]:
        """Return the items of `iterable`, reported under `label`."""


def with_progress(iterable: Iterable[T], label: str, progress: Progress | None) -> Iterable[T]:
    """Wrap `iterable` by `progress`, or return it unchanged where that is None."""
    return iterable if progress is None else progress(iterable, label)


@contextmanager
def opened(path: str | PathLike[str], what: str) -> Iterator[io.BufferedReader]:
    """Open a file for reading; a failure to open or read it raises `InputError` with its path."""
    try:
        try:
            stream = Path(path).open("rb")  # noqa: SIM115  # closed below
        except ValueError:
            raise InputError(f"{what}: invalid path {str(path)[:80]!r}") from None
        with stream:
            yield stream
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{what} must be a file, got the folder {path}") from None
    except OSError as error:
        raise InputError(f"{what} not readable: {path} ({error.strerror or error})") from None


def _size(stream: io.BufferedReader, path: str | PathLike[str], what: str, max_bytes: int) -> int:
    size = os.fstat(stream.fileno()).st_size
    if size > max_bytes:
        raise InputError(f"{path}: {size:,} bytes; a {what} has at most {max_bytes:,}")
    if size == 0:
        raise InputError(f"{path}: the {what} is empty")
    return size


def read_whole(path: str | PathLike[str], what: str, max_bytes: int) -> bytes:
    """Read a file of 1 to `max_bytes` bytes.

    Raises:
        InputError: The file is missing, a folder, unreadable, empty or too large.
    """
    with opened(path, what) as stream:
        return stream.read(_size(stream, path, what, max_bytes))


@contextmanager
def mapped(path: str | PathLike[str], what: str, max_bytes: int) -> Iterator[mmap.mmap]:
    """Map a file read-only under the limits of `read_whole`, until the block ends."""
    with opened(path, what) as stream:
        size = _size(stream, path, what, max_bytes)
        with mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as data:
            yield data
