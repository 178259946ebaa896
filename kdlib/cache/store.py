"""Cache: build, open and read teacher outputs by sample and view. Touches the cache's directory alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_number, check_type
from kdlib.cache._checks import (
    check_build,
    check_complete,
    check_distinct,
    check_names,
    check_seal,
    check_size,
    check_source,
    check_views,
    check_whole,
    damaged_value,
    no_cache,
    no_row,
    unreadable,
)
from kdlib.cache.build import Job, build_cache, ids_digest
from kdlib.cache.codec import unpack
from kdlib.cache.fingerprint import Fingerprint
from kdlib.cache.layout import DTYPES, SEAL_BYTES, Layout, read_header, shard_path

__all__ = ["TeacherCache"]

_MAPPED = 256
"""Shards held mapped at a time: each takes a file descriptor."""


class TeacherCache:
    """Teacher outputs on disk, read through memory maps.

    Made by `TeacherCache.build` and `TeacherCache.open`. Opening reads one small file, however large the cache; reading
    touches the rows asked for. Can be pickled to the workers of a data loader, which map the files anew.

    Attributes:
        path: directory of the cache.
        fingerprint: what the outputs were computed from.
        features: name to shape of one sample, `(d,)` or `(c, h, w)`.
        samples: number of samples.
        views: number of views of each.
        dtype: type on disk, `"float16"`, `"float32"` or `"int8"`.
        error: for each feature `max_cosine` and `mean_cosine`, the error 1 - cos between a row of the teacher's and that
            on disk, and `max_relative`, the length of their difference over that of the row.
        notes: what the builder wished to be known.

    Examples:
        >>> import tempfile
        >>> from kdlib.adapters import OUTPUT, TeacherAdapter
        >>> images = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher = TeacherAdapter(nn.Linear(4, 2), {"embedding": OUTPUT})
        >>> def fetch(samples, view):  # view 1 is the flipped image
        ...     return images[samples].flip(1) if view else images[samples]
        >>> folder = tempfile.TemporaryDirectory()
        >>> cache = TeacherCache.build(folder.name, teacher, fetch, samples=5, views=2, dtype="float32")
        >>> embedding = cache.read(torch.tensor([3, 0]), torch.tensor([1, 1]))["embedding"]
        >>> torch.testing.assert_close(embedding, teacher(images[[3, 0]].flip(1))["embedding"])
        >>> folder.cleanup()
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.fingerprint = layout.fingerprint
        self.features = dict(layout.features)
        self.samples, self.views, self.dtype = layout.samples, layout.views, layout.dtype
        self.error = {name: dict(entry) for name, entry in layout.error.items()}
        self.notes = dict(layout.notes)
        self._layout = layout
        self._shards: dict[int, np.ndarray[Any, Any]] = {}
        self._ids: np.ndarray[Any, Any] | None = None

    @classmethod
    def build(
        cls,
        path: str | Path,
        teacher: nn.Module,
        fetch: Callable[[Tensor, int], Any],
        *,
        samples: int | Sequence[int] | Tensor,
        views: int = 1,
        fingerprint: str | Fingerprint | None = None,
        preprocessing: str = "",
        data: str = "",
        dtype: str = "float16",
        batch_size: int = 64,
        shard_bytes: int = 1 << 28,
        mark_seconds: float = 5.0,
        progress: Callable[[int, int], None] | None = None,
        shared: bool = False,
        prefetch: int = 0,
        notes: Mapping[str, str] | None = None,
    ) -> Self:
        """Compute the outputs of a teacher for every sample and view, or what is still missing of them.

        A build that was killed goes on where it stood when called again, without fetching what is done, and ends with
        the same bytes, given the same `batch_size` and number of threads. On a complete cache it returns at once.

        With `shared=True` in each, several processes build one cache at a time: each takes the next block of `batch_size`
        rows that nobody has, and all return when the last is there. One that is killed loses its unmarked blocks, which the
        others compute. All must be of one machine, or of machines whose common file system has POSIX locks.

        Args:
            path: directory, made if need be.
            teacher: inputs to named features; run in eval mode and without gradient.
            fetch: `fetch(samples, view)` with samples `(b,)` int64 gives the teacher's inputs, a tensor or a tuple. It
                must give the same for the same arguments: draw any augmentation from a seed made of both.
            samples: ids, distinct whole numbers; or n for 0 to n - 1.
            views: number of views of each sample: 2 for an image and its flip, or so many augmentations.
            fingerprint: what the outputs depend on, in a text or in its three parts; `None` takes that of the teacher,
                whose whole is its `model_fingerprint`.
            preprocessing: description of what happens to the inputs before the teacher, for the fingerprint.
            data: description or digest of the data and of how views are made, for the fingerprint.
            dtype: type on disk, `"float16"`, `"float32"`, or `"int8"` with a scale for each row of each feature. What
                this costs is measured and kept, see `error`.
            batch_size: samples in a forward.
            shard_bytes: largest size of a file; one row at least.
            mark_seconds: how often progress is made certain on disk; a kill loses at most that much work.
            progress: called with rows done and rows in all after each batch.
            shared: let other processes that say so too build the same cache at the same time. Not on Windows.
            prefetch: batches that `fetch` prepares ahead, in a thread of its own, while the teacher runs.
            notes: texts to keep in the header, of whoever begins the cache.

        Returns:
            The complete cache, open.

        Raises:
            CacheError: `path` holds the outputs of another teacher, preprocessing or data (which of them, where that is
                known), is being built, or cannot be written to.
            ValueError: ids that are not distinct, a feature that is not finite or does not fit `dtype`.
        """
        check_choice("TeacherCache", "dtype", dtype, tuple(DTYPES))
        for name, value in (("views", views), ("batch_size", batch_size), ("shard_bytes", shard_bytes)):
            check_number("TeacherCache", name, value, min=1, integer=True)
        check_number("TeacherCache", "mark_seconds", mark_seconds, min=0)
        check_number("TeacherCache", "prefetch", prefetch, min=0, integer=True)
        notes = {} if notes is None else notes
        check_build(teacher, fetch, progress, notes, preprocessing=preprocessing, data=data)
        if fingerprint is not None:
            check_type("TeacherCache", "fingerprint", fingerprint, (str, Fingerprint), "a str or a Fingerprint")
        ids = _ids(samples)
        if fingerprint is None or fingerprint == "":
            fingerprint = Fingerprint.of(teacher, preprocessing=preprocessing, data=data)
        wanted = Layout(
            fingerprint=fingerprint.whole if isinstance(fingerprint, Fingerprint) else fingerprint,
            samples=len(ids),
            views=views,
            ids=ids_digest(ids),
            first=int(ids[0]),
            dense=int(ids[-1]) - int(ids[0]) == len(ids) - 1,
            dtype=dtype,
            features={},
            shard_rows=1,
            parts=fingerprint.parts if isinstance(fingerprint, Fingerprint) else {},
            notes=dict(notes),
        )
        job = Job(
            Path(path),
            teacher,
            fetch,
            ids,
            batch_size=batch_size,
            shard_bytes=shard_bytes,
            mark_seconds=mark_seconds,
            prefetch=prefetch,
            progress=progress,
        )
        build_cache(job, wanted, shared=shared)
        return cls.open(path, fingerprint=fingerprint)

    @classmethod
    def open(cls, path: str | Path, *, fingerprint: str | Fingerprint | None = None) -> Self:
        """Open a complete cache.

        Args:
            path: its directory.
            fingerprint: what it must have been computed from; `None` does not ask. With a `Fingerprint` the error says
                which part differs.

        Raises:
            CacheError: there is none, it is not complete, or it was computed from something else.
        """
        path = Path(path)
        layout = read_header(path)
        if layout is None:
            raise no_cache(path)
        if fingerprint is not None:
            check_type("TeacherCache", "fingerprint", fingerprint, (str, Fingerprint), "a str or a Fingerprint")
            check_source(path, layout, fingerprint)
        check_complete(path, layout.complete, layout.rows, layout.total)
        return cls(path, layout)

    def read(
        self,
        samples: Tensor | Sequence[int],
        views: Tensor | Sequence[int] | int = 0,
        features: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Features of `b` samples.

        Args:
            samples: `(b,)` ids, in any order, repeats allowed.
            views: `(b,)` views, or one for all.
            features: which ones; `None` for all.

        Returns:
            Name to `(b, ...)` float32 on the CPU.

        Raises:
            CacheError: a sample or view that is not there, or a file that is damaged.
            ValueError: a feature that is not there.
        """
        wanted = _whole("samples", samples)
        seen = views if isinstance(views, int) else _whole("views", views)
        if not isinstance(seen, int):
            check_views(len(seen), len(wanted))
        check_names("TeacherCache", features or (), self.features)
        rows = self._rows(wanted, seen)
        out = self._read_rows(rows, list(self.features if features is None else features))
        self._check_finite(out, rows)
        return out

    def _check_finite(self, features: Mapping[str, Tensor], rows: np.ndarray[Any, Any]) -> None:
        for name, x in features.items():
            # One pass finds most of it; a sum beyond float32 is no fault of its terms.
            if not math.isfinite(float(x.sum())) and not torch.isfinite(x).all():
                at = int(torch.nonzero(~torch.isfinite(x).reshape(len(x), -1).all(1))[0])
                view, position = divmod(int(rows[at]), self.samples)
                raise damaged_value(self.path, name, self._ids_at(np.asarray([position]))[0], view)

    def _raw(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Bytes of consecutive rows."""
        pieces = self._layout.pieces(start, stop)
        return np.concatenate([self._shard(shard)[at : at + count] for shard, at, count in pieces])

    def _ids_at(self, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        found = positions + self._layout.first if self._layout.dense else self._mapped_ids()[positions]
        return np.asarray(found, np.int64)

    def _mapped_ids(self) -> np.ndarray[Any, Any]:
        if self._ids is None:
            count = self._layout.samples
            self._ids = self._map(self.path / "samples.i64", np.dtype("<i8"), (count,), 8 * count)
        return self._ids

    def _read_rows(self, rows: np.ndarray[Any, Any], names: list[str]) -> dict[str, Tensor]:
        layout = self._layout
        shards = rows // layout.shard_rows
        inside = rows - shards * layout.shard_rows
        one = int(shards[0]) if len(rows) else 0
        if len(rows) and (layout.shards == 1 or (shards == one).all()):
            return unpack(layout, np.asarray(self._shard(one)).take(inside, axis=0), names)
        # Each file is looked at before memory is taken on the word of the header.
        parts = [((shards == shard).nonzero()[0], self._shard(shard)) for shard in sorted(set(shards.tolist()))]
        found = np.empty((len(rows), layout.row_bytes), np.uint8)
        for here, content in parts:
            found[here] = np.asarray(content).take(inside[here], axis=0)
        return unpack(layout, found, names)

    def _rows(self, samples: np.ndarray[Any, Any], views: np.ndarray[Any, Any] | int) -> np.ndarray[Any, Any]:
        layout = self._layout
        if layout.dense:
            position = samples - layout.first
            # Far from a `first` of great size the difference wraps around.
            known = (samples >= layout.first) & (position >= 0) & (position < layout.samples)
        else:
            ids = self._mapped_ids()
            position = np.searchsorted(ids, samples)
            known = ids[np.minimum(position, layout.samples - 1)] == samples
        known &= (views >= 0) & (views < layout.views)
        if not known.all():
            at = int((~known).nonzero()[0][0])
            view = views if isinstance(views, int) else views[at]
            raise no_row(self.path, samples[at], view, layout)
        rows: np.ndarray[Any, Any] = views * layout.samples + position
        return rows

    def _shard(self, shard: int) -> np.ndarray[Any, Any]:
        """Bytes `(rows, row_bytes)` of one shard."""
        found = self._shards.get(shard)
        if found is None:
            layout, path = self._layout, shard_path(self.path, shard)
            shape = (layout.rows_of(shard), layout.row_bytes)
            found = self._map(path, np.dtype(np.uint8), shape, layout.bytes_of(shard))
            if layout.block:
                check_seal(path, _last_bytes(path, SEAL_BYTES) == layout.seal_of(shard))
            if len(self._shards) >= _MAPPED:
                self._shards.pop(next(iter(self._shards)), None)  # another thread may do the same
            self._shards[shard] = found
        return found

    def _map(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], size: int) -> np.ndarray[Any, Any]:
        try:
            check_size(path, size, path.stat().st_size if path.is_file() else 0)
            return np.memmap(path, dtype, mode="r", shape=shape)
        except OSError as error:
            raise unreadable(path, error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_ids": None}

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        return f"TeacherCache.open({str(self.path)!r}, fingerprint={self.fingerprint!r})"


def _last_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(-count, 2)
        return file.read(count)


def _ids(samples: int | Sequence[int] | Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids, ascending."""
    if isinstance(samples, int):
        check_number("TeacherCache", "samples", samples, min=1, integer=True)
        return np.arange(samples, dtype=np.int64)
    ids = np.sort(_whole("samples", samples))
    check_distinct(ids)
    return ids


def _whole(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    check_whole(name, found)
    return found.astype(np.int64, copy=False)
