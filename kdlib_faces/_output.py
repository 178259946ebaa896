"""Output folders that are written completely or not at all, and the environment that a report describes."""

import errno
import glob
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from kdlib_faces._checks import InputError, show_name

__all__ = ["check_output", "describe_environment", "locked", "staged", "remove_empty_on_error"]

LOCK = ".lock"
MAX_NAME = 255
"""Bytes of a name on common file systems."""


def describe_environment() -> dict[str, object]:
    """Versions and machine, for a report."""
    return {
        "torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count() or 1, "platform": platform.platform(),
    }  # fmt: skip


def check_output(output: Path, *parts: str) -> Path:
    """Check before the work starts that `output` is a folder or can be created, and that writing stays inside it.

    Args:
        output: The folder; it may be a link to a folder.
        parts: Names of the files and folders in it that will be written; there must be no link at or below them.

    Raises:
        InputError: It is a file, has a name that is too long, is in a folder that is not writable, or contains a link.
    """
    long = next((part for part in output.parts if len(os.fsencode(part)) > MAX_NAME), None)
    if long is not None:
        raise InputError(
            f"the output needs names of at most {MAX_NAME} bytes, {long[:40]}... has {len(os.fsencode(long))}"
        )
    if output.is_symlink() and not output.exists():
        raise InputError(f"the output {output} is a link to a folder that does not exist; make the folder")
    if output.exists() and not output.is_dir():
        raise InputError(f"the output must be a folder, {output} is a file")
    parent = next((each for each in (output, *output.absolute().parents) if each.exists()), output)
    if not parent.is_dir():
        raise InputError(f"the output {output} cannot be made: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"the output {output} cannot be made: {parent} is not writable")
    for part in parts:
        below = () if (output / part).is_symlink() else (output / part).rglob("*")
        for path in (output / part, *below):
            if path.is_symlink():
                raise InputError(f"the output must not contain links that lead elsewhere, {path} is one; remove it")
    return output


@contextmanager
def remove_empty_on_error(output: Path) -> Iterator[None]:
    """Remove the empty folders of a new `output` if the block raises; folders with files are kept."""
    fresh = not os.path.exists(output)  # also for a name that is too long
    try:
        yield
    except BaseException:
        if fresh and output.is_dir():
            for folder in sorted((each for each in output.rglob("*") if each.is_dir()), reverse=True):
                _remove_empty(folder)
            _remove_empty(output)
        raise


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def locked(output: Path, active: bool = True) -> Iterator[None]:
    """Exclude other commands from an output folder until the block or the process ends.

    The lock is that of the operating system on the file `.lock`; it works where the file system supports `flock`.

    Args:
        output: The folder; created if absent.
        active: Whether this process takes the lock.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be used.
    """
    if not active:
        yield
        return
    check_output(output, LOCK)
    output.mkdir(parents=True, exist_ok=True)
    with _open_locked(output / LOCK) as stream:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}".encode())
        stream.flush()
        for stale in output.glob(".*.????????.part"):  # of a process that was killed while it held the lock
            stale.unlink(missing_ok=True)
        try:
            yield
        finally:
            if sys.platform != "win32":  # which refuses to remove an open file
                (output / LOCK).unlink(missing_ok=True)


def _open_locked(path: Path) -> BinaryIO:
    """Open a file and lock it until it is closed."""
    while True:
        stream = path.open("a+b")
        if not _try_lock(stream):
            stream.seek(0)
            owner = show_name(stream.read(200).decode(errors="replace")) or "another process"
            stream.close()
            raise InputError(
                f"the output {path.parent} is in use by {owner}; wait for its end, or choose another output"
            )
        # Its owner may have removed the file between the opening and the lock.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return stream
        stream.close()


def _try_lock(stream: BinaryIO) -> bool:
    """Lock an open file for this process; False if another one holds the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(1 << 20)  # beyond the text, which other processes read
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output`. Its content is moved to `output` after the block, or removed on an error.

    In an existing `output`, files of the same name are replaced one by one, and other files are kept. Temporary folders
    of interrupted processes are removed.
    """
    check_output(output)
    made = [each for each in (output.absolute().parent, *output.absolute().parents) if not each.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    stage, lock = _make_stage(output)
    try:
        yield stage
        if output.exists():
            check_output(output, *(each.name for each in stage.iterdir()))
            for file in sorted(each for each in stage.rglob("*") if each.is_file()):
                target = output / file.relative_to(stage)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        else:
            os.replace(stage, output)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            _remove_empty(folder)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    shutil.rmtree(stage, ignore_errors=True)


def _make_stage(output: Path) -> tuple[Path, int | None]:
    """Create a locked temporary folder; folders that no process locks any more are left from interrupted processes."""
    prefix = f".{output.name[:40]}."
    guard = _lock(output.parent, wait=True)  # so that no other process sees the new folder before it is locked
    try:
        for old in output.parent.glob(f"{glob.escape(prefix)}{'?' * 8}.part") if guard is not None else ():
            handle = _lock(old)
            if handle is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(handle)
        stage = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=output.parent))
        stage.chmod(0o755)
        return stage, _lock(stage)
    finally:
        if guard is not None:
            os.close(guard)


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock a folder until the descriptor is closed or the process ends; None where that is not possible."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (0 if wait else os.O_NOFOLLOW))
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle
