"""Build, open and read a cache of teacher outputs."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdlib._checks import check_choice, check_number, check_type
from kdlib.cache._checks import cache_error, check_argument, check_build, check_cache, check_names
from kdlib.cache.build import Job, build_cache, ids_digest
from kdlib.cache.codec import unpack
from kdlib.cache.fingerprint import Fingerprint, check_source
from kdlib.cache.layout import DTYPES, TRAILER_BYTES, Layout, check_size, read_header, shard_path

__all__ = ["TeacherCache"]

S = TypeVar("S", bound=np.generic)

_MAX_MAPPED = 256
"""Maximum number of memory-mapped shards, since each uses a file descriptor."""


class TeacherCache:
    """Teacher outputs on disk, read through memory maps.

    Use `TeacherCache.build` or `TeacherCache.open`. Opening reads only the header; reading accesses only the requested
    rows. A cache can be pickled to the workers of a data loader, which map the files themselves.

    Attributes:
        path: directory of the cache.
        fingerprint: fingerprint of teacher, preprocessing and data.
        features: name to shape of one sample, `(d,)` or `(c, h, w)`.
        samples: number of samples.
        views: number of views per sample.
        dtype: type on disk, `"float16"`, `"float32"` or `"int8"`.
        error: for each feature `max_cosine` and `mean_cosine`, the error 1 - cos between the teacher's row and the stored
            row, and `max_relative`, the L2 norm of their difference divided by that of the row.
        notes: texts given by the builder.
        parts: separate fingerprints of teacher, preprocessing and data, if known.

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
        self.notes, self.parts = dict(layout.notes), dict(layout.parts)
        self._layout = layout
        self._shards: dict[int, NDArray[np.uint8]] = {}
        self._ids: NDArray[np.int64] | None = None

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
        sync_seconds: float = 5.0,
        progress: Callable[[int, int], None] | None = None,
        prefetch: int = 0,
        notes: Mapping[str, str] | None = None,
    ) -> Self:
        """Compute the outputs of a teacher for all samples and views, or those that are missing.

        An interrupted build resumes when it is called again, without fetching complete rows again, and gives the same
        bytes, provided that `batch_size` and the number of threads are the same. A complete cache is returned immediately.

        Processes that build the same cache at the same time share the work: each takes the next free block of `batch_size`
        rows, and all return when the last block is complete. Unsynchronized blocks of an interrupted process are computed
        again by the others. The processes must run on one machine or share a file system with POSIX locks. On Windows,
        which has no such locks, only one process may build a cache.

        Args:
            path: directory, created if missing.
            teacher: maps inputs to named features; run in eval mode without gradient.
            fetch: `fetch(samples, view)` with samples `(b,)` int64 returns the teacher's inputs, a tensor or a tuple. It
                must be deterministic: seed any augmentation from both arguments.
            samples: distinct integer ids, or n for 0 to n - 1.
            views: number of views per sample: 2 for an image and its mirror image, or the number of augmentations.
            fingerprint: everything the outputs depend on, as a text or as three parts; `None` computes it from the
                teacher by `model_fingerprint`.
            preprocessing: description of the preprocessing before the teacher, for the fingerprint.
            data: description or digest of the data and the views, for the fingerprint.
            dtype: type on disk: `"float16"`, `"float32"`, or `"int8"` with one scale per row and feature. The error is
                measured, see `error`.
            batch_size: samples per forward pass.
            shard_bytes: maximum size of a file; a shard has at least one row.
            sync_seconds: seconds between flushes to disk; an interruption loses at most this much work.
            progress: called with the number of complete rows and all rows after each batch.
            prefetch: number of batches that `fetch` prepares in a separate thread while the teacher runs.
            notes: texts to store in the header; those of the process that starts the cache are kept.

        Returns:
            The complete cache.

        Raises:
            CacheError: `path` contains outputs of another teacher, preprocessing or data (the message says which, if
                known), is being built by another thread, or cannot be written.
            ValueError: ids are not distinct, or a feature is not finite or does not fit `dtype`.
        """
        check_choice("TeacherCache", "dtype", dtype, tuple(DTYPES))
        for name, value in (("views", views), ("batch_size", batch_size), ("shard_bytes", shard_bytes)):
            check_number("TeacherCache", name, value, min=1, integer=True)
        check_number("TeacherCache", "sync_seconds", sync_seconds, min=0)
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
            block=batch_size,
            parts=fingerprint.parts if isinstance(fingerprint, Fingerprint) else {},
            notes=dict(notes),
        )
        job = Job(Path(path), teacher, fetch, ids, batch_size, shard_bytes, sync_seconds, prefetch, progress)
        build_cache(job, wanted)
        return cls.open(path, fingerprint=fingerprint)

    @classmethod
    def open(cls, path: str | Path, *, fingerprint: str | Fingerprint | None = None) -> Self:
        """Open a complete cache.

        Args:
            path: directory of the cache.
            fingerprint: the expected fingerprint; `None` skips the check. With a `Fingerprint` the error names the part
                that differs.

        Raises:
            CacheError: there is no cache, it is incomplete, or it has another fingerprint.
        """
        path = Path(path)
        layout = read_header(path)
        if layout is None:
            raise cache_error(f"there is no cache at {path}")
        if fingerprint is not None:
            check_type("TeacherCache", "fingerprint", fingerprint, (str, Fingerprint), "a str or a Fingerprint")
            check_source(path, layout.fingerprint, layout.parts, fingerprint)
        check_cache(
            layout.complete,
            f"{path} contains {layout.rows} of {layout.total} rows; run the same build again to complete it",
        )
        return cls(path, layout)

    def read(
        self,
        samples: Tensor | Sequence[int],
        views: Tensor | Sequence[int] | int = 0,
        features: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Read the features of `b` samples.

        Args:
            samples: `(b,)` ids, in any order, possibly repeated.
            views: `(b,)` views, or one view for all samples.
            features: names of features; `None` for all.

        Returns:
            Feature name to `(b, ...)` float32 on the CPU.

        Raises:
            CacheError: a sample or view is not in the cache, or a file is damaged.
            ValueError: a feature is not in the cache.
        """
        wanted = _whole("samples", samples)
        seen = views if isinstance(views, int) else _whole("views", views)
        if not isinstance(seen, int):
            check_argument(
                len(seen) == len(wanted),
                f"TeacherCache: views must be (b,) like samples ({len(wanted)},), got ({len(seen)},)",
            )
        check_names("TeacherCache", features or (), self.features)
        rows = self._rows(wanted, seen)
        out = self._read_rows(rows, list(self.features if features is None else features))
        self._check_finite(out, rows)
        return out

    def _check_finite(self, features: Mapping[str, Tensor], rows: NDArray[np.int64]) -> None:
        for name, x in features.items():
            # The sum of finite values can overflow, so the values are checked only if the sum is not finite.
            if not math.isfinite(float(x.sum())) and not torch.isfinite(x).all():
                at = int(torch.nonzero(~torch.isfinite(x).reshape(len(x), -1).all(1))[0])
                view, position = divmod(int(rows[at]), self.samples)
                sample = self._ids_at(np.asarray([position]))[0]
                raise cache_error(
                    f"{self.path} is damaged: feature {name!r} of sample {sample}, view {view} is not finite; build the cache "
                    "again"
                )

    def _raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of consecutive rows."""
        pieces = self._layout.pieces(start, stop)
        return np.concatenate([self._shard(shard)[at : at + count] for shard, at, count in pieces])

    def _ids_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        found = positions + self._layout.first if self._layout.dense else self._mapped_ids()[positions]
        return np.asarray(found, np.int64)

    def _mapped_ids(self) -> NDArray[np.int64]:
        if self._ids is None:
            count = self._layout.samples
            self._ids = self._map(self.path / "samples.i64", np.dtype("<i8"), (count,), 8 * count)
        return self._ids

    def _read_rows(self, rows: NDArray[np.int64], names: list[str]) -> dict[str, Tensor]:
        layout = self._layout
        shards = rows // layout.shard_rows
        inside = rows - shards * layout.shard_rows
        one = int(shards[0]) if len(rows) else 0
        if len(rows) and (layout.shards == 1 or (shards == one).all()):
            return unpack(layout, np.asarray(self._shard(one)).take(inside, axis=0), names)
        # All files are checked before memory is allocated according to the header.
        parts = [((shards == shard).nonzero()[0], self._shard(shard)) for shard in sorted(set(shards.tolist()))]
        content = np.empty((len(rows), layout.row_bytes), np.uint8)
        for here, shard_rows in parts:
            content[here] = np.asarray(shard_rows).take(inside[here], axis=0)
        return unpack(layout, content, names)

    def _rows(self, samples: NDArray[np.int64], views: NDArray[np.int64] | int) -> NDArray[np.int64]:
        layout = self._layout
        if layout.dense:
            position = samples - layout.first
            # The difference can wrap around if `first` is very large.
            known = (samples >= layout.first) & (position >= 0) & (position < layout.samples)
        else:
            ids = self._mapped_ids()
            position = np.searchsorted(ids, samples)
            known = ids[np.minimum(position, layout.samples - 1)] == samples
        known &= (views >= 0) & (views < layout.views)
        if not known.all():
            at = int((~known).nonzero()[0][0])
            view = views if isinstance(views, int) else views[at]
            raise cache_error(
                f"{self.path} has no sample {samples[at]}, view {view}; it has {layout.samples} samples"
                f"{f' from {layout.first}' if layout.dense else ''}, views 0 to {layout.views - 1}"
            )
        rows: NDArray[np.int64] = views * layout.samples + position
        return rows

    def _shard(self, shard: int) -> NDArray[np.uint8]:
        """Return the bytes `(rows, row_bytes)` of one shard."""
        content = self._shards.get(shard)
        if content is None:
            layout, path = self._layout, shard_path(self.path, shard)
            shape = (layout.rows_of(shard), layout.row_bytes)
            content = self._map(path, np.dtype(np.uint8), shape, layout.bytes_of(shard))
            with path.open("rb") as file:
                file.seek(-TRAILER_BYTES, os.SEEK_END)
                check_cache(
                    file.read() == layout.trailer_of(shard),
                    f"{path} does not match the header: one of them belongs to another cache or was changed",
                )
            if len(self._shards) >= _MAX_MAPPED:
                self._shards.pop(next(iter(self._shards)), None)  # another thread may remove the same entry
            self._shards[shard] = content
        return content

    def _map(self, path: Path, dtype: np.dtype[S], shape: tuple[int, ...], size: int) -> NDArray[S]:
        try:
            check_size(path, size)
            return np.memmap(path, dtype, mode="r", shape=shape)
        except OSError as error:
            raise cache_error(f"{path} cannot be read: {error.strerror or error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_ids": None}

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        return f"TeacherCache.open({str(self.path)!r}, fingerprint={self.fingerprint!r})"


def _ids(samples: int | Sequence[int] | Tensor) -> NDArray[np.int64]:
    """Return the ids in ascending order."""
    if isinstance(samples, int):
        check_number("TeacherCache", "samples", samples, min=1, integer=True)
        return np.arange(samples, dtype=np.int64)
    ids = np.sort(_whole("samples", samples))
    check_argument(len(ids) > 0, "TeacherCache: samples must contain at least one id, got none")
    repeated = ids[1:][ids[1:] == ids[:-1]].tolist()
    check_argument(not repeated, f"TeacherCache: samples must be distinct, got repeated ids {repeated[:4]}")
    return ids


def _whole(name: str, values: Any) -> NDArray[np.int64]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    check_argument(
        array.ndim == 1 and (not len(array) or array.dtype.kind in "iu"),
        f"TeacherCache: {name} must be (b,) integers, got {array.dtype} {array.shape}",
    )
    return array.astype(np.int64, copy=False)
