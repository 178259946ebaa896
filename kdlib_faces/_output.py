"""Output folders that are whole or not there. Touches the file system only."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdlib_faces._checks import InputError

__all__ = ["check_output", "staged", "swept"]


def check_output(output: Path) -> Path:
    """`output` must be a folder, or a name where one can be made; asked before hours of work, not after.

    Raises:
        InputError: it is a file, or lies in a folder that cannot be written to.
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
    """When the block fails, folders that it made and left empty in a new `output` go; results of stages stay."""
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
    """A folder beside `output` to write into; its content moves there when the block ends well, else it is removed.

    Files of the same name in an `output` that exists are replaced one by one, others stay.
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
