"""The record of a folder of crops: what was found in each photograph, appended as it is found."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import truncate
from pathlib import Path
from typing import IO

from kdlib._atomic import atomic_write
from kdlib_faces._checks import InputError, show_name
from kdlib_faces.alignment.photographs import AlignedPhotograph, Crop
from kdlib_faces.data.formats.files import opened

__all__ = ["MANIFEST", "Manifest", "PhotographState", "open_manifest"]

MANIFEST = "manifest.jsonl"
MAX_LINE = 1 << 20
MAX_NUMBER = 1e9
SHOWN = 5


@dataclass(frozen=True)
class PhotographState:
    """Size in bytes and modification time in nanoseconds of a file, by which a changed photograph is recognized."""

    size: int
    mtime: int

    @classmethod
    def of(cls, path: Path) -> "PhotographState":
        """Return the state of a file; that of a missing one is (0, 0)."""
        try:
            stat = path.stat()
        except OSError:
            return cls(0, 0)
        return cls(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Manifest:
    """Rows of a manifest.

    Attributes:
        rows: Path of a photograph, relative to the folder of photographs, to its state and what was found in it.
    """

    rows: dict[str, tuple[PhotographState, AlignedPhotograph]]
    _file: IO[bytes]

    def append(self, name: str, state: PhotographState, found: AlignedPhotograph) -> None:
        """Add a row, or replace that of the photograph."""
        crops = [[crop.score, crop.box, crop.points, crop.rival] for crop in found.crops]
        self._file.write(_line([name, state.size, state.mtime, found.faces, crops, found.error]))
        self._file.flush()
        self.rows[name] = (state, found)


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


@contextmanager
def open_manifest(output: Path, settings: Mapping[str, str]) -> Iterator[Manifest]:
    """Open the manifest of a folder of crops, or start one, until the block ends.

    An incomplete last line, which an interrupted run leaves, is removed.

    Raises:
        InputError: The manifest belongs to other settings (the message lists the differences), or is damaged.
        OSError: It cannot be written.
    """
    path = output / MANIFEST
    if not path.exists():
        with atomic_write(path, sole_writer=True) as file:
            file.write(_line(dict(settings)))
    rows, size = _read(path, settings)
    if size < path.stat().st_size:
        truncate(path, size)
    with path.open("ab") as file:
        yield Manifest(rows, file)


def _read(path: Path, settings: Mapping[str, str]) -> tuple[dict[str, tuple[PhotographState, AlignedPhotograph]], int]:
    """Return the rows of the complete lines, and the size of these lines in bytes."""
    rows: dict[str, tuple[PhotographState, AlignedPhotograph]] = {}
    size = number = 0
    with opened(path, "manifest") as file:
        while (line := file.readline(MAX_LINE)).endswith(b"\n"):
            number += 1
            try:
                value = json.loads(line)
                if number == 1:
                    _check_settings(path, value, settings)
                else:
                    name, state, found = _parse(value)
                    rows[name] = (state, found)
            except InputError:
                raise
            except (ValueError, RecursionError):
                raise InputError(
                    f"{path} line {number}: not a manifest of crops; remove the file to make all crops again"
                ) from None
            size += len(line)
    if not number:
        raise InputError(f"{path}: not a manifest of crops; remove the file to make all crops again")
    return rows, size


def _parse(value: object) -> tuple[str, PhotographState, AlignedPhotograph]:
    """Parse a row; ValueError for anything else."""
    match value:
        case [str() as name, int() as size, int() as mtime, int() as faces, list() as crops, str() as error]:
            parsed = tuple(_parse_crop(crop) for crop in crops)
            return name, PhotographState(size, mtime), AlignedPhotograph(faces, parsed, error)
    raise ValueError("no row of a photograph")


def _parse_crop(value: object) -> Crop:
    match value:
        case [score, list() as box, list() as points, rival] if (len(box), len(points)) in ((0, 0), (4, 10)):
            return Crop(_number(score), tuple(map(_number, box)), tuple(map(_number, points)), _number(rival))
    raise ValueError("no crop")


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and abs(value) < MAX_NUMBER:
        return float(value)
    raise ValueError("no number")


def _check_settings(path: Path, recorded: object, settings: Mapping[str, str]) -> None:
    if not isinstance(recorded, dict):
        raise ValueError("no settings")
    changed = [name for name in {**settings, **recorded} if recorded.get(name) != settings.get(name)]
    if changed:
        texts = [f"{show_name(name)} ({show_name(recorded.get(name))}, now {settings.get(name)})" for name in changed]
        raise InputError(
            f"align: {path.parent} holds crops of other settings: what differs is {', '.join(texts[:SHOWN])}; restore the "
            "settings or choose another output"
        )
