"""Encoded images by row: the base class, image files, and subsets and joins of other sources."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from kdlib_faces._checks import InputError

__all__ = ["MAX_IMAGE", "FileImages", "ImageSource", "JoinedImages"]

MAX_IMAGE = 256 * 2**20
"""Bytes of an encoded image; larger ones are refused."""


class ImageSource(ABC):
    """Encoded images by row, read when they are needed.

    A source can be passed to the workers of a loader by `fork`, `spawn` or pickling: each process opens the files itself.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int, /) -> bytes:
        """Return the bytes of an encoded image.

        Raises:
            InputError: It cannot be read; the message starts with its name.
        """

    @abstractmethod
    def name(self, row: int, /) -> str:
        """Return the name of an image in messages and lists of pairs, a path where it is a file."""

    @abstractmethod
    def layout(self, rows: NDArray[np.int64], /, *, modified: bool = False) -> Iterator[bytes | memoryview]:
        """Yield bytes that change with the names, sizes or order of some images, without reading the images.

        Args:
            rows: `(m,)` rows.
            modified: Include the modification times of the files, and not only what a copy of the files keeps.
        """

    def subset(self, rows: NDArray[np.int64]) -> "ImageSource":
        """Return some rows, in that order."""
        return _Subset(self, rows)


class FileImages(ImageSource):
    """Image files.

    Args:
        paths: The files.

    Examples:
        >>> FileImages(["a/1.jpg", "a/2.jpg"]).name(1)
        'a/2.jpg'
    """

    def __init__(self, paths: Sequence[str | PathLike[str]]) -> None:
        self.paths = tuple(map(Path, paths))

    def __repr__(self) -> str:
        return f"<FileImages: {len(self)} files>"

    @override
    def __len__(self) -> int:
        return len(self.paths)

    @override
    def __getitem__(self, row: int) -> bytes:
        path = self.paths[row]
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_IMAGE + 1)
        except FileNotFoundError:
            raise InputError(f"{path}: image file not found") from None
        except OSError as error:
            raise InputError(f"{path}: not a readable image ({error.strerror or error})") from None
        if len(data) > MAX_IMAGE:
            raise InputError(f"{path}: an image has at most {MAX_IMAGE:,} bytes")
        return data

    @override
    def name(self, row: int) -> str:
        return str(self.paths[row])

    @override
    def layout(self, rows: NDArray[np.int64], *, modified: bool = False) -> Iterator[bytes | memoryview]:
        for row in rows.tolist():
            path = self.paths[row]
            try:
                stat = path.stat()
                size, time = stat.st_size, stat.st_mtime_ns
            except OSError:  # an error where the image is read
                size = time = -1
            when = time if modified else ""
            yield f"\n{'/'.join(path.parts[-2:])}\t{size}\t{when}".encode("utf-8", "surrogateescape")

    @override
    def subset(self, rows: NDArray[np.int64]) -> "FileImages":
        return FileImages([self.paths[row] for row in rows.tolist()])


class _Subset(ImageSource):
    """Some rows of a source."""

    def __init__(self, source: ImageSource, rows: NDArray[np.int64]) -> None:
        self.source, self.rows = source, rows

    @override
    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, row: int) -> bytes:
        return self.source[int(self.rows[row])]

    @override
    def name(self, row: int) -> str:
        return self.source.name(int(self.rows[row]))

    @override
    def layout(self, rows: NDArray[np.int64], *, modified: bool = False) -> Iterator[bytes | memoryview]:
        yield from self.source.layout(self.rows[rows], modified=modified)

    @override
    def subset(self, rows: NDArray[np.int64]) -> ImageSource:
        return _Subset(self.source, self.rows[rows])


class JoinedImages(ImageSource):
    """The images of several sources, one source after the other."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = tuple(sources)
        self._ends = np.cumsum([len(each) for each in self.sources])

    def __repr__(self) -> str:
        return f"<JoinedImages: {len(self)} images of {len(self.sources)} sources>"

    @override
    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, row: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self.sources[number], row - int(self._ends[number] - len(self.sources[number]))

    @override
    def __getitem__(self, row: int) -> bytes:
        source, at = self._find(row)
        return source[at]

    @override
    def name(self, row: int) -> str:
        source, at = self._find(row)
        return source.name(at)

    @override
    def layout(self, rows: NDArray[np.int64], *, modified: bool = False) -> Iterator[bytes | memoryview]:
        start = 0
        for source, end in zip(self.sources, self._ends.tolist(), strict=True):
            chosen = np.flatnonzero((rows >= start) & (rows < end))
            yield chosen.data.cast("B") if len(chosen) else b""
            yield from source.layout(rows[chosen] - start, modified=modified)
            start = end
