"""Atomic file writing: a private module that kdlib and kdlib_faces share on purpose."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "sync_folder"]


@contextmanager
def atomic_write(path: str | PathLike[str], *, durable: bool = False, sole_writer: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block succeeds and is removed when it fails.

    Args:
        path: The file to write. Missing parent folders are created; a symbolic link is replaced, not followed.
        durable: Flush the file and its folder to disk, so that the new file also survives a power failure.
        sole_writer: No other process writes `path`. The temporary file then has a fixed name, so that a file left by an
            interrupted process is replaced instead of being left behind.

    Yields:
        A binary stream.

    Raises:
        OSError: The file cannot be written. An earlier file at `path` is left unchanged.

    Examples:
        >>> folder = tempfile.mkdtemp()
        >>> with atomic_write(Path(folder) / "note.txt") as stream:
        ...     _ = stream.write(b"done")
        >>> (Path(folder) / "note.txt").read_text()
        'done'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if sole_writer:
        temporary = str(target.with_name(f".{target.name}.part"))
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    else:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        if durable:
            sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk; only POSIX systems can open a folder for this."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
