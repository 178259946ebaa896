"""Data room: whole files in and out. Files appear under their name only when they are whole. Touches the file system."""

import io
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from kdlib_faces._checks import InputError

__all__ = ["mapped", "opened", "read_whole", "written"]


@contextmanager
def opened(path: str | PathLike[str], what: str) -> Iterator[io.BufferedReader]:
    """The file, open for reading; what goes wrong with the file itself is an `InputError` that names it."""
    try:
        stream = Path(path).open("rb")  # noqa: SIM115  # closed by the block below
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{what} must be a file, got the folder {path}") from None
    except OSError as error:
        raise InputError(f"{what} not readable: {path} ({error.strerror or error})") from None
    except ValueError:
        raise InputError(f"{what}: no file can be called {str(path)[:80]!r}") from None
    with stream:
        try:
            yield stream
        except OSError as error:
            raise InputError(f"{what} not readable: {path} ({error.strerror or error})") from None


def _size(stream: BinaryIO, path: str | PathLike[str], what: str, most: int) -> int:
    size = os.fstat(stream.fileno()).st_size
    if size > most:
        raise InputError(f"{path}: {size:,} bytes; this is no {what}, above {most:,} it is refused")
    if size == 0:
        raise InputError(f"{path}: the {what} is empty")
    return size


def read_whole(path: str | PathLike[str], what: str, most: int) -> bytes:
    """The bytes of a file that is not empty and not above `most` bytes.

    Raises:
        InputError: the file is missing, a folder, unreadable, empty or too large.
    """
    with opened(path, what) as stream:
        return stream.read(_size(stream, path, what, most))


@contextmanager
def mapped(path: str | PathLike[str], what: str, most: int) -> Iterator[mmap.mmap]:
    """The same as a read-only map, closed when the block ends."""
    with opened(path, what) as stream:
        size = _size(stream, path, what, most)
        with mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as data:
            yield data


@contextmanager
def written(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name when the block ends well and vanishes otherwise; folders are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        os.chmod(part, 0o644)
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
