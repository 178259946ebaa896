"""Output folders that are written completely or not at all, and the environment that a report describes."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from kdlib_faces._checks import InputError

__all__ = ["check_output", "describe_environment", "staged", "swept"]


def describe_environment() -> dict[str, object]:
    """Versions and machine, for a report."""
    return {
        "torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count() or 1, "platform": platform.platform(),
    }  # fmt: skip


def check_output(output: Path) -> Path:
    """Check before the work starts that `output` is a folder or can be created.

    Raises:
        InputError: It is a file, or is in a folder that is not writable.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"the output must be a folder, {output} is a file")
    parent = next((each for each in (output, *output.absolute().parents) if each.exists()), output)
    if not parent.is_dir():
        raise InputError(f"the output {output} cannot be made: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"the output {output} cannot be made: {parent} is not writable")
    return output


@contextmanager
def swept(output: Path) -> Iterator[None]:
    """Remove the empty folders of a new `output` if the block fails; files that it wrote are kept."""
    fresh = not output.exists()
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
def staged(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output`. Its content is moved to `output` after the block, or removed on an error.

    In an existing `output`, files of the same name are replaced one by one, and other files are kept.
    """
    check_output(output)
    made = [each for each in (output.absolute().parent, *output.absolute().parents) if not each.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    stage.chmod(0o755)
    try:
        yield stage
        if output.exists():
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
    shutil.rmtree(stage, ignore_errors=True)
