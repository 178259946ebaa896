"""Data room: image sets in MXNet's RecordIO (`train.rec`, `train.idx`, `property`), read without MXNet.

Touches the file system and NumPy; decodes no image. The bytes are `_record_format`'s.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.formats.files import opened
from kdlib_faces.data.formats.record_format import payload, peek, unpack
from kdlib_faces.data.formats.record_parts import EXACT, IdentityRanges, Record, RecordProperties, read_property

__all__ = ["RecordReader"]

MAX_RECORDS = 1_000_000_000
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class RecordReader(Sequence[Record]):
    """The images of a RecordIO file, by number.

    A face set has a header record with key 0 and two labels `(a, b)`: keys 1 to a - 1 are images, a to b - 1 identity
    records. Where record 0 has no label array, or there is no key 0, every record is an image. Images are numbered in the order
    of their keys. Without an `.idx` file the `.rec` is read once from front to back; keys are then the numbers that the
    records give themselves, or, where those repeat, their places.

    The file is mapped, not read. Each process opens it for itself, so a reader may go through `fork`, `spawn` and
    pickling into the workers of a loader.

    Args:
        path: the `.rec` file.
        index: the `.idx` file; by default the one beside `path`, where there is one.
        progress: wraps an iterable and a label, as `kdlib_faces.progress.progress` does; used where the index has to be made.

    Raises:
        InputError: a missing, empty or cut file, an index that does not belong to it, a header that names keys which are
            not there; later, from `reader[i]`, a record that is none. The message names record and byte.

    Examples:
        >>> import pathlib, tempfile
        >>> from kdlib_faces.data.formats.record_writer import save_records
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.rec"
        >>> save_records(file, [b"one", b"two", b"three"], [0, 0, 1])
        >>> reader = RecordReader(file)
        >>> len(reader), reader[2].image, reader[2].identity, reader.properties.num_identities
        (3, b'three', 1, 2)
    """

    def __init__(
        self,
        path: str | PathLike[str],
        index: str | PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.path = Path(path)
        beside = self.path.with_suffix(".idx")
        self.index_path = Path(index) if index is not None else beside if beside.is_file() else None
        self._map: mmap.mmap | None = None
        self._process = 0
        self._state: tuple[int, int] | None = None
        keys, offsets = self._scanned(progress) if self.index_path is None else self._indexed(self.index_path)
        order = np.argsort(keys, kind="stable")
        self._keys, self._offsets = keys[order], offsets[order]
        if (repeated := np.flatnonzero(self._keys[1:] == self._keys[:-1])).size:
            raise InputError(f"{self.index_path or self.path}: key {self._keys[repeated[0]]} stands there twice")
        self.header: tuple[int, int] | None = None
        self._exact = True
        self._images = self._find_images()

    # The file

    def _data(self) -> mmap.mmap:
        if self._map is None or self._process != os.getpid():
            with opened(self.path, "record file") as stream:
                stat = os.fstat(stream.fileno())
                if stat.st_size == 0:
                    raise InputError(f"{self.path}: the record file is empty")
                state = (stat.st_size, stat.st_mtime_ns)
                if self._state not in (None, state):
                    raise InputError(f"{self.path}: the file has changed since the reader was made")
                self._map, self._process, self._state = (
                    mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ),
                    os.getpid(),
                    state,
                )
        return self._map

    def close(self) -> None:
        """Let go of the file; the next access opens it again."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None, "_process": 0}

    def _indexed(self, index: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        keys, offsets = read_integers(index, (np.int64, np.int64), what="record index", most=MAX_RECORDS)
        size = len(self._data())
        bad = (offsets % 4 != 0) | (offsets > size - 8)
        if bad.any():
            row = int(bad.argmax())
            raise InputError(
                f"{index} row {row + 1}: no record can start at byte {offsets[row]} of {self.path.name} ({size} bytes)"
            )
        return keys, offsets

    def _scanned(self, progress: Progress | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        data = self._data()
        numbers: list[int] = []
        offsets: list[int] = []

        def walk() -> Iterable[None]:
            at = 0
            while at < len(data):
                where = f"{self.path} record {len(offsets)}"
                offsets.append(at)
                head, at = payload(data, at, where, most=28)
                numbers.append(peek(head, where)[1])
                yield None

        for _ in walk() if progress is None else progress(walk(), f"records of {self.path.name}"):
            pass
        unique = len(set(numbers)) == len(numbers) and 0 <= min(numbers) <= max(numbers) < MAX_RECORDS
        keys = np.asarray(numbers if unique else range(len(numbers)), dtype=np.int64)
        return keys, np.asarray(offsets, dtype=np.int64)

    # What is where

    def _find_images(self) -> NDArray[np.int64]:
        """Rows of `_keys` that are images."""
        every = np.arange(len(self._keys))
        if not len(every):
            raise InputError(f"{self.index_path or self.path}: the record index is empty")
        if self._keys[0] != 0:
            return every
        first = self._read(0)
        if len(first.labels) < 2 or not self._is_header(first):
            return every
        a, b = (int(label) for label in first.labels[:2])
        if a >= EXACT:
            self._exact, a = False, self._boundary(a)
            b = max(b, a)
        rows = every[(self._keys >= 1) & (self._keys < a)]
        if len(rows) != a - 1:
            raise InputError(
                f"{self.path} record 0: names images 1 to {a - 1}, {a - 1 - len(rows)} of them are not in the index"
            )
        if not len(rows):
            raise InputError(f"{self.path} record 0: names no image")
        self.header = (a, b)
        return rows

    def _is_header(self, first: Record) -> bool:
        """Two whole labels in order; with bytes behind them it is an image, unless they name the very keys there are."""
        a, b = first.labels[:2]
        fits = a == a and b == b and 1 <= a <= b < MAX_RECORDS and a == int(a) and b == int(b)
        if not first.image and not fits:
            raise InputError(f"{first.where}: a header's labels must be whole numbers 1 <= a <= b, got {a!r} and {b!r}")
        return fits and (not first.image or b == self._keys[-1] + 1)

    def _boundary(self, a: int) -> int:
        """The first key without an image near `a`, which as a float32 stands for a few whole numbers."""
        step = int(np.spacing(np.float32(a)))
        near = np.flatnonzero((self._keys >= a - step) & (self._keys <= a + step))
        for row in near:
            if not self._read(int(row)).image:
                return int(self._keys[row])
        return int(self._keys[near[-1]]) + 1 if len(near) else a

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        return f"<RecordReader: {len(self)} images of {self.path.name}>"

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"RecordReader: index must be in [{-len(self)}, {len(self)}), got {index}")
        return self._read(int(self._images[index]))

    def _read(self, row: int) -> Record:
        key, offset = int(self._keys[row]), int(self._offsets[row])
        where = f"{self.path} record {key}"
        data, _ = payload(self._data(), offset, where)
        labels, number, start = unpack(data, f"{where} at byte {offset}")
        return Record(data[start:], labels[0], labels, key, number, where)

    def _identity(self, image: int) -> int:
        """The identity of an image, from the first bytes of its record."""
        row = int(self._images[image])
        where = f"{self.path} record {int(self._keys[row])}"
        data, _ = payload(self._data(), int(self._offsets[row]), where, most=28)
        return Record(b"", peek(data, where)[0], (), 0, 0, where).identity

    @property
    def keys(self) -> NDArray[np.int64]:
        """`(n,)` int64, the key of each image."""
        return self._keys[self._images]

    @property
    def properties(self) -> RecordProperties | None:
        """What the file `property` beside the set says; None where there is none."""
        file = self.path.with_name("property")
        return read_property(file) if file.is_file() else None

    def ranges(self) -> IdentityRanges | None:
        """The identity records; None where the set has none, or is so large that float32 cannot hold its keys.

        Raises:
            InputError: an identity record that is not there, or names no images of the set.
        """
        if self.header is None or not self._exact or self.header[0] == self.header[1]:
            return None
        a, b = self.header
        rows = self._identity_rows()
        if len(rows) != b - a:
            raise InputError(
                f"{self.path} record 0: names identities {a} to {b - 1}, {b - a - len(rows)} are not in the index"
            )
        spans = np.empty((len(rows), 2), dtype=np.int64)
        for at, row in enumerate(rows):
            found = self._read(int(row))
            start, end = (*found.labels, -1.0, -1.0)[:2]
            if not (1 <= start < end <= a) or start != int(start) or end != int(end):
                raise InputError(
                    f"{found.where}: an identity's images must be keys from 1 to {a - 1}, got {found.labels[:2]}"
                )
            spans[at] = int(start), int(end)
        return IdentityRanges(self._keys[rows], spans[:, 0], spans[:, 1])

    def _identity_rows(self) -> NDArray[np.int64]:
        a, b = self.header or (0, 0)
        return np.flatnonzero((self._keys >= a) & (self._keys < b))

    def labels(self, *, progress: Progress | None = None) -> NDArray[np.int64]:
        """`(n,)` int64, the identity of each image; by the identity records where they are all there and name every image.

        Raises:
            InputError: a label that is no whole number below 2^24, or images of one identity record with different labels.
        """
        out = np.full(len(self), -1, dtype=np.int64)
        a, b = self.header or (0, 0)
        spans = self.ranges() if len(self._identity_rows()) == b - a else None
        if spans is not None and int((spans.ends - spans.starts).sum()) == len(self):
            work: Iterable[Any] = list(
                zip(spans.keys.tolist(), spans.starts.tolist(), spans.ends.tolist(), strict=True)
            )
            for key, start, end in work if progress is None else progress(work, "identities"):
                first, last = self._identity(start - 1), self._identity(end - 2)
                if first != last:
                    raise InputError(
                        f"{self.path} record {key}: its images {start} and {end - 1} have labels {first} and {last}"
                    )
                out[start - 1 : end - 1] = first
        if (out < 0).any():
            rows: Iterable[Any] = range(len(self))
            for at in rows if progress is None else progress(rows, "labels"):
                out[at] = self._identity(at)
        return out
