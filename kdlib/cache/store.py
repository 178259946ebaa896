"""Cache: build, open and read teacher outputs by sample and view. Touches the cache's directory alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_number
from kdlib.cache.build import build_cache, ids_digest
from kdlib.cache.fingerprint import model_fingerprint
from kdlib.cache.layout import DTYPES, CacheError, Layout, read_header, shard_path

__all__ = ["TeacherCache"]


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
        dtype: type on disk, `"float16"` or `"float32"`.

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
        fingerprint: str | None = None,
        preprocessing: str = "",
        data: str = "",
        dtype: str = "float16",
        batch_size: int = 64,
        shard_bytes: int = 1 << 28,
        mark_seconds: float = 5.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Compute the outputs of a teacher for every sample and view, or what is still missing of them.

        A build that was killed goes on where it stood when called again, without fetching what is done, and ends with
        the same bytes, given the same `batch_size`. On a complete cache it returns at once. One process at a time.

        Args:
            path: directory, made if need be.
            teacher: inputs to named features; run in eval mode and without gradient.
            fetch: `fetch(samples, view)` with samples `(b,)` int64 gives the teacher's inputs, a tensor or a tuple. It
                must give the same for the same arguments: draw any augmentation from a seed made of both.
            samples: ids, distinct whole numbers; or n for 0 to n - 1.
            views: number of views of each sample: 2 for an image and its flip, or so many augmentations.
            fingerprint: what the outputs depend on; `None` computes the `model_fingerprint` of the teacher.
            preprocessing: description of what happens to the inputs before the teacher, for the fingerprint.
            data: description or digest of the data and of how views are made, for the fingerprint.
            dtype: type on disk, `"float16"` or `"float32"`.
            batch_size: samples in a forward.
            shard_bytes: largest size of a file; one row at least.
            mark_seconds: how often progress is made certain on disk; a kill loses at most that much work.
            progress: called with rows done and rows in all after each batch.

        Returns:
            The complete cache, open.

        Raises:
            CacheError: `path` holds the outputs of another teacher, preprocessing or data, or is being built.
            ValueError: ids that are not distinct, a feature that is not finite or does not fit `dtype`.
        """
        check_choice("TeacherCache", "dtype", dtype, tuple(DTYPES))
        for name, value in (("views", views), ("batch_size", batch_size), ("shard_bytes", shard_bytes)):
            check_number("TeacherCache", name, value, least=1, integer=True)
        check_number("TeacherCache", "mark_seconds", mark_seconds, least=0)
        ids = _ids(samples)
        wanted = Layout(
            fingerprint=fingerprint or model_fingerprint(teacher, preprocessing=preprocessing, data=data),
            samples=len(ids),
            views=views,
            ids=ids_digest(ids),
            first=int(ids[0]),
            dense=int(ids[-1]) - int(ids[0]) == len(ids) - 1,
            dtype=dtype,
            features={},
            shard_rows=1,
        )
        build_cache(
            Path(path),
            teacher,
            fetch,
            ids,
            wanted,
            batch_size=batch_size,
            shard_bytes=shard_bytes,
            mark_seconds=mark_seconds,
            progress=progress,
        )
        return cls.open(path, fingerprint=wanted.fingerprint)

    @classmethod
    def open(cls, path: str | Path, *, fingerprint: str | None = None) -> Self:
        """Open a complete cache.

        Args:
            path: its directory.
            fingerprint: what it must have been computed from; `None` does not ask.

        Raises:
            CacheError: there is none, it is not complete, or it was computed from something else.
        """
        path = Path(path)
        layout = read_header(path)
        if layout is None:
            raise CacheError(f"TeacherCache: there is no cache at {path}")
        if fingerprint is not None and layout.fingerprint != fingerprint:
            raise CacheError(
                f"TeacherCache: {path} was computed from another teacher, preprocessing or data: "
                f"its fingerprint is {layout.fingerprint!r}, asked for is {fingerprint!r}"
            )
        if not layout.complete:
            raise CacheError(
                f"TeacherCache: {path} holds {layout.rows} of {layout.total} rows; run the same build again to complete it"
            )
        return cls(path, layout)

    def read(self, samples: Tensor | Sequence[int], views: Tensor | Sequence[int] | int = 0) -> dict[str, Tensor]:
        """Features of `b` samples.

        Args:
            samples: `(b,)` ids, in any order, repeats allowed.
            views: `(b,)` views, or one for all.

        Returns:
            Name to `(b, ...)` float32 on the CPU.

        Raises:
            CacheError: a sample or view that is not there, or a file that is damaged.
        """
        wanted = _whole("samples", samples)
        seen = np.full(len(wanted), views, np.int64) if isinstance(views, int) else _whole("views", views)
        if len(seen) != len(wanted):
            raise ValueError(f"TeacherCache: views must be (b,) like samples ({len(wanted)},), got ({len(seen)},)")
        rows = self._rows(wanted, seen)
        out = {name: np.empty((len(rows), *shape), np.float32) for name, shape in self.features.items()}
        shards = rows // self._layout.shard_rows
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            content = self._shard(int(shard))[rows[here] % self._layout.shard_rows]
            for at, name in enumerate(self.features):
                out[name][here] = content[f"f{at}"]
        return {name: torch.from_numpy(x) for name, x in out.items()}

    def _rows(self, samples: np.ndarray[Any, Any], views: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        layout = self._layout
        if layout.dense:
            position = samples - layout.first
            known = (samples >= layout.first) & (position < layout.samples)
        else:
            if self._ids is None:
                self._ids = self._map(self.path / "samples.i64", np.dtype("<i8"), layout.samples)
            position = np.searchsorted(self._ids, samples)
            known = self._ids[np.minimum(position, layout.samples - 1)] == samples
        missing = np.flatnonzero(~known | (views < 0) | (views >= layout.views))
        if len(missing):
            at = missing[0]
            raise CacheError(
                f"TeacherCache: {self.path} has no sample {samples[at]}, view {views[at]}; it has {layout.samples} samples"
                f"{f' from {layout.first}' if layout.dense else ''}, views 0 to {layout.views - 1}"
            )
        rows: np.ndarray[Any, Any] = views * layout.samples + position
        return rows

    def _shard(self, shard: int) -> np.ndarray[Any, Any]:
        if shard not in self._shards:
            path = shard_path(self.path, shard)
            self._shards[shard] = self._map(path, self._layout.row, self._layout.rows_of(shard))
        return self._shards[shard]

    def _map(self, path: Path, dtype: np.dtype[Any], rows: int) -> np.ndarray[Any, Any]:
        size = path.stat().st_size if path.exists() else -1
        if size != rows * dtype.itemsize:
            raise CacheError(f"TeacherCache: {path} must have {rows * dtype.itemsize} bytes, got {max(size, 0)}")
        return np.memmap(path, dtype, mode="r", shape=(rows,))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_ids": None}

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        return f"TeacherCache.open({str(self.path)!r}, fingerprint={self.fingerprint!r})"


def _ids(samples: int | Sequence[int] | Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids, ascending."""
    if isinstance(samples, int):
        check_number("TeacherCache", "samples", samples, least=1, integer=True)
        return np.arange(samples, dtype=np.int64)
    ids = np.sort(_whole("samples", samples))
    if not len(ids):
        raise ValueError("TeacherCache: samples must hold at least one id, got none")
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if len(repeated):
        raise ValueError(f"TeacherCache: samples must be distinct, got {ids[repeated[0]]} twice")
    return ids


def _whole(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise ValueError(f"TeacherCache: {name} must be (b,) whole numbers, got {found.dtype} {found.shape}")
    return found.astype(np.int64)
