"""Reading of image sets in MXNet's RecordIO (`train.rec`, `train.idx`, `property`) without MXNet."""

import mmap
import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.formats.files import Progress, opened, with_progress
from kdlib_faces.data.formats.record_format import (
    EXACT,
    HEAD,
    LENGTH_BITS,
    MAGIC,
    WHOLE,
    IdentityRanges,
    Record,
    RecordProperties,
    payload,
    read_property,
    unpack,
)

__all__ = ["RecordReader"]

MAX_RECORDS = 1_000_000_000


class RecordReader(Sequence[Record]):
    """The images of a RecordIO file, by number.

    A face set has a header record with key 0 and two labels `(a, b)`: keys 1 to a - 1 are images, keys a to b - 1 identity
    records. Where record 0 has no label array, or there is no key 0, every record is an image. Images are numbered in the
    order of their keys. Without an `.idx` file the `.rec` file is scanned once; keys are then the numbers that the records
    store, or their positions where those numbers repeat.

    The file is memory-mapped, by each process for itself: a reader can be passed to workers by `fork`, `spawn` or pickling.

    Args:
        path: The `.rec` file.
        index: The `.idx` file; None uses the one beside `path`, if it exists.
        progress: Wraps an iterable and a label, as `kdlib_faces.progress.progress` does; used when the file is scanned.

    Raises:
        InputError: The file is missing, empty or truncated, the index does not belong to it, or the header names keys
            that do not exist. `reader[i]` raises it for a broken record. The message names record and byte.

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
        self, path: str | PathLike[str], index: str | PathLike[str] | None = None, *, progress: Progress | None = None
    ) -> None:
        self.path = Path(path)
        beside = self.path.with_suffix(".idx")
        self.index_path = Path(index) if index is not None else beside if beside.is_file() else None
        self._map: mmap.mmap | None = None
        self._process = 0
        self._state: tuple[int, int] | None = None
        keys, offsets = self._scan(progress) if self.index_path is None else self._read_index(self.index_path)
        if keys[-1] < keys[0]:  # insightface writes record 0 last; a rotation needs less memory than sorting
            keys = np.roll(keys, 1)
            offsets = np.roll(offsets, 1)
        if not (keys[1:] > keys[:-1]).all():
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            offsets = offsets[order]
            if (repeated := np.flatnonzero(keys[1:] == keys[:-1])).size:
                raise InputError(f"{self.index_path or self.path}: key {keys[repeated[0]]} occurs twice")
        first, count = int(keys[0]), len(keys)
        self._keys: range | NDArray[np.int64] = range(first, first + count) if keys[-1] - first == count - 1 else keys
        self._offsets = offsets
        self.header: tuple[int, int] | None = None
        self._exact = True
        self._images = self._find_images()

    def _data(self) -> mmap.mmap:
        if self._map is None or self._process != os.getpid():
            with opened(self.path, "record file") as stream:
                stat = os.fstat(stream.fileno())
                if stat.st_size == 0:
                    raise InputError(f"{self.path}: the record file is empty")
                state = (stat.st_size, stat.st_mtime_ns)
                if self._state not in (None, state):
                    raise InputError(f"{self.path}: the file has changed since the reader was created")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                self._process, self._state = os.getpid(), state
        return self._map

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_map": None, "_process": 0}

    def _read_index(self, index: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        keys, offsets = read_integers(index, (np.int64, np.int64), what="record index", max_rows=MAX_RECORDS)
        size = len(self._data())
        bad = (offsets % 4 != 0) | (offsets > size - 8)
        if bad.any():
            row = int(bad.argmax())
            raise InputError(
                f"{index} row {row + 1}: no record can start at byte {offsets[row]} of {self.path.name} ({size} bytes)"
            )
        return keys, offsets

    def _scan(self, progress: Progress | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys and offsets of the records, found by reading the file once."""
        data = self._data()

        def records() -> Iterator[tuple[int, int]]:
            at = number = 0
            while at < len(data):
                where = f"{self.path} record {number}"
                head, end = payload(data, at, where, max_bytes=HEAD)
                yield unpack(head, where, max_labels=1)[1], at
                at, number = end, number + 1

        found = list(with_progress(records(), f"records of {self.path.name}", progress))
        numbers, offsets = zip(*found, strict=True)
        unique = len(set(numbers)) == len(numbers) and max(numbers) < MAX_RECORDS
        return np.asarray(numbers if unique else range(len(found)), dtype=np.int64), np.asarray(offsets, dtype=np.int64)

    def _find_images(self) -> range:
        """Rows of `_keys` that are images."""
        every = range(len(self._keys))
        if self._keys[0] != 0:
            return every
        first = self._read(0)
        if len(first.labels) < 2 or not self._is_header(first):
            return every
        a, b = (int(label) for label in first.labels[:2])
        if a >= EXACT:
            self._exact, a = False, self._boundary(a)
            b = max(b, a)
        rows = self._rows_between(1, a)
        if len(rows) != a - 1:
            raise InputError(
                f"{self.path} record 0: names images 1 to {a - 1}, {a - 1 - len(rows)} of them are not in the index"
            )
        if not len(rows):
            raise InputError(f"{self.path} record 0: names no image")
        self.header = (a, b)
        return rows

    def _rows_between(self, low: int, high: int) -> range:
        """Rows of the keys from `low` to `high` - 1."""
        if isinstance(self._keys, range):
            start, stop = np.clip([low - self._keys.start, high - self._keys.start], 0, len(self._keys)).tolist()
        else:
            start, stop = np.searchsorted(self._keys, [low, high]).tolist()
        return range(start, max(start, stop))

    def _is_header(self, first: Record) -> bool:
        """Two whole labels in order; a record with an image is a header only if the labels name exactly the known keys."""
        a, b = first.labels[:2]
        fits = a == a and b == b and 1 <= a <= b < MAX_RECORDS and a == int(a) and b == int(b)
        if not first.image and not fits:
            raise InputError(f"{first.where}: a header's labels must be whole numbers 1 <= a <= b, got {a!r} and {b!r}")
        return fits and (not first.image or b == self._keys[-1] + 1)

    def _boundary(self, a: int) -> int:
        """The first key without an image near `a`, which as a float32 stands for several whole numbers."""
        step = int(np.spacing(np.float32(a)))
        near = self._rows_between(a - step, a + step + 1)
        without = (int(self._keys[row]) for row in near if not self._read(row).image)
        return next(without, int(self._keys[near[-1]]) + 1 if len(near) else a)

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
        return self._read(self._images[index])

    def _read(self, row: int) -> Record:
        key, offset = int(self._keys[row]), int(self._offsets[row])
        where = f"{self.path} record {key}"
        data, _ = payload(self._data(), offset, where)
        labels, number, start = unpack(data, f"{where} at byte {offset}")
        return Record(data[start:], labels[0], labels, key, number, where)

    @property
    def keys(self) -> NDArray[np.int64]:
        """`(n,)` int64, the key of each image."""
        return np.asarray(self._keys[self._images.start : self._images.stop], dtype=np.int64)

    def key(self, index: int) -> int:
        """Return the key of an image."""
        return int(self._keys[self._images[index]])

    def offsets(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes at which the records of some images start."""
        return self._offsets[self._images.start : self._images.stop][indices]

    @property
    def properties(self) -> RecordProperties | None:
        """Contents of the `property` file beside the set; None where there is none."""
        file = self.path.with_name("property")
        return read_property(file) if file.is_file() else None

    def ranges(self) -> IdentityRanges | None:
        """Read the identity records; None where the set has none, or has so many keys that float32 cannot hold them.

        A record of one number gives the first image; the range then ends where the next one starts.

        Raises:
            InputError: An identity record is missing, names no images of the set, those of several identities,
                or those of another identity record.
        """
        a, b = self.header or (0, 0)
        if not self._exact or a == b:
            return None
        spans = self._spans(a, b)
        labels = self.labels()
        for (start, end), key in zip(spans.tolist(), range(a, b), strict=True):
            found = labels[start - 1 : end - 1]
            if (found != found[0]).any():
                other = int((found != found[0]).argmax())
                raise InputError(
                    f"{self.path} record {key}: its images {start} and {start + other} have labels {found[0]} and "
                    f"{found[other]}"
                )
        order = np.argsort(spans[:, 0], kind="stable")
        if (shared := np.flatnonzero(spans[order][1:, 0] < spans[order][:-1, 1])).size:
            first, second = (a + int(row) for row in order[shared[0] : shared[0] + 2])
            raise InputError(f"{self.path}: identity records {first} and {second} name the same images")
        return IdentityRanges(np.arange(a, b), spans[:, 0], spans[:, 1])

    def _spans(self, a: int, b: int) -> NDArray[np.int64]:
        """`(k, 2)` the first image of each identity record and the one after its last."""
        rows = self._rows_between(a, b)
        if len(rows) != b - a:
            raise InputError(
                f"{self.path} record 0: names identities {a} to {b - 1}, {b - a - len(rows)} are not in the index"
            )
        data = self._data()
        words = np.frombuffer(data, "<u4", len(data) // 4)
        starts = self._offsets[rows.start : rows.stop] // 4
        magic, length, count, first, last = (words.take(starts + at, mode="clip") for at in (0, 1, 2, 8, 9))
        # A record of one part with two labels; the others are read one by one.
        simple = (magic == MAGIC) & (count == 2) & (length >= 32) & (length <= 4 * (len(words) - starts) - 8)
        del words  # The map cannot be closed while an array refers to it.
        spans = np.stack([first.view("<f4"), last.view("<f4")], axis=1).astype(np.float64)
        for at in np.flatnonzero(~simple).tolist():
            following = float(self._read(rows[at + 1]).label) if at + 1 < len(rows) else float(a)
            spans[at] = (*self._read(rows[at]).labels, following)[:2]
        wrong = ~(
            (spans[:, 0] >= 1)
            & (spans[:, 0] < spans[:, 1])
            & (spans[:, 1] <= a)
            & (spans == np.floor(spans)).all(axis=1)
        )
        if wrong.any():
            at = int(wrong.argmax())
            record = self._read(rows[at])
            raise InputError(
                f"{record.where}: an identity's images must be keys from 1 to {a - 1}, got {record.labels[:2]}"
            )
        return spans.astype(np.int64)

    def identities(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number the identities of the images from 0.

        Identity records are used where they name every image once and agree with the labels of 64 images, so that
        not every record need be read; else the labels of all images.

        Returns:
            `(n,)` int64 numbers in the order in which the identities occur, and the label of each, `(k,)` int64.
        """
        a, b = self.header or (0, 0)
        if self._exact and a < b:
            try:
                spans = self._spans(a, b)
            except InputError:  # `ranges` reports it; the labels of the images are complete without these records
                spans = np.zeros((0, 2), dtype=np.int64)
            spans = spans[np.argsort(spans[:, 0])]
            counts = spans[:, 1] - spans[:, 0]
            if len(spans) and spans[0, 0] == 1 and spans[-1, 1] == a and (spans[1:, 0] == spans[:-1, 1]).all():
                names = np.arange(len(spans))
                chosen = np.unique(np.linspace(0, len(spans) - 1, 32).astype(np.int64))
                ends = np.concatenate([spans[chosen, 0], spans[chosen, 1] - 1]) - 1
                agree = bool((self._labels(ends) == np.concatenate([chosen, chosen])).all())
                self.close()  # the pages that were read all over the file need not stay mapped
                if agree:
                    return np.repeat(names, counts), names
        labels = self.labels()
        names, first, codes = np.unique(labels, return_index=True, return_inverse=True)
        order = np.argsort(first)
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        return ranks[codes.reshape(-1)], names[order]

    def labels(self) -> NDArray[np.int64]:
        """Read the identity of each image from its record; identity records are not used.

        Returns:
            `(n,)` int64.

        Raises:
            InputError: A record is broken, or a label is not a whole number below 2^24.
        """
        return self._labels(np.arange(len(self)))

    def _labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        data = self._data()
        words = np.frombuffer(data, "<u4", len(data) // 4)
        starts = self.offsets(indices) // 4
        magic, length, count, label = (words.take(starts + at, mode="clip") for at in range(4))
        labels = label.view("<f4").astype(np.float64)
        # A record of one part whose header has one label. The others are few, or their labels are arrays.
        simple = (magic == MAGIC) & (length >> LENGTH_BITS == WHOLE) & (count == 0)
        simple &= (length >= HEAD - 4) & (length <= 4 * (len(words) - starts) - 8)
        simple &= (labels >= 0) & (labels < EXACT) & (labels == np.floor(labels))
        del words  # The map cannot be closed while an array refers to it.
        for at in np.flatnonzero(~simple).tolist():
            labels[at] = self[int(indices[at])].identity
        return labels.astype(np.int64)
