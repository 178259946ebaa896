"""Cache: is every byte as it was written, and is it what the teacher says? Reads the cache's directory alone."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_number, check_type
from kdlib.cache._checks import (
    check_ascending,
    check_block,
    check_checksum,
    check_close,
    check_ids_checksum,
    check_size,
    check_together,
    other_feature,
)
from kdlib.cache.blocks import NAME, block_digest, record_type
from kdlib.cache.build import ask
from kdlib.cache.codec import unpack
from kdlib.cache.layout import Layout, shard_path
from kdlib.cache.store import TeacherCache

__all__ = ["CacheCheck", "verify_cache"]

SLACK = 1e-4
"""Cosine error that a teacher may make on another machine, or with other neighbors in a batch, over that on disk."""


@dataclass(frozen=True)
class CacheCheck:
    """What `verify_cache` has looked at and found good.

    Attributes:
        rows: rows whose checksums and values are good.
        shards: files they lie in.
        checksums: whether there were any: caches of the first version have none.
        recomputed: rows that the teacher was asked for again.
        max_cosine: for each feature the largest 1 - cos between those and the rows on disk.
    """

    rows: int
    shards: int
    checksums: bool
    recomputed: int
    max_cosine: dict[str, float]


def verify_cache(
    cache: TeacherCache,
    *,
    teacher: nn.Module | None = None,
    fetch: Callable[[Tensor, int], Any] | None = None,
    recompute: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CacheCheck:
    """Read a whole cache: ids, the checksum of every block in every shard, finite values; and ask the teacher again.

    Args:
        cache: an open cache.
        teacher: asked again for some rows; `None` for none.
        fetch: as in `TeacherCache.build`.
        recompute: how many rows, drawn from `seed`.
        seed: of that draw.
        progress: called with rows done and rows in all.

    Returns:
        What was looked at.

    Raises:
        CacheError: the first damage, with the file and the rows; or a sample whose row is not what the teacher says.
        ValueError: a teacher without `fetch`, or the reverse.

    Examples:
        >>> import tempfile
        >>> from kdlib.adapters import OUTPUT, TeacherAdapter
        >>> images = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher = TeacherAdapter(nn.Linear(4, 2), {"embedding": OUTPUT})
        >>> fetch = lambda samples, view: images[samples]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache.build(folder, teacher, fetch, samples=5)
        ...     found = verify_cache(cache, teacher=teacher, fetch=fetch)
        >>> found.rows, found.shards, found.recomputed
        (5, 1, 5)
    """
    check_type("verify_cache", "cache", cache, TeacherCache, "a TeacherCache")
    check_number("verify_cache", "recompute", recompute, min=0, integer=True)
    check_together(teacher, fetch)
    layout = cache._layout
    _check_ids(cache.path, layout)
    records = _records(cache.path, layout) if layout.block else None
    for block, (start, stop) in enumerate(_spans(layout)):
        rows = cache._raw(start, stop)
        if records is not None:
            files = {shard_path(cache.path, shard).name for shard, _, _ in layout.pieces(start, stop)}
            good = np.array_equal(records["digest"][block], block_digest(rows))
            check_block(cache.path, files, good, start, stop)
        cache._check_finite(unpack(layout, rows, layout.features), np.arange(start, stop))
        if progress is not None:
            progress(stop, layout.total)
    count, distances = 0, {}
    if teacher is not None and fetch is not None:
        count = min(recompute, layout.total)
        rows = np.sort(np.random.default_rng(seed).choice(layout.total, count, replace=False))
        distances = _recompute(cache, teacher, fetch, rows)
    return CacheCheck(layout.total, layout.shards, records is not None, count, distances)


def _check_ids(path: Path, layout: Layout) -> None:
    file, digest, last = path / "samples.i64", hashlib.sha256(), None
    check_size(file, 8 * layout.samples, file.stat().st_size if file.is_file() else 0)
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
            ids = np.frombuffer(part, "<i8")
            ids = ids if last is None else np.concatenate([[last], ids])
            last = ids[-1]
            check_ascending(file, ids)
    check_ids_checksum(file, digest.hexdigest() == layout.ids)


def _records(path: Path, layout: Layout) -> np.ndarray[Any, Any]:
    file, kind = path / NAME, record_type(layout)
    check_size(file, layout.blocks * kind.itemsize, file.stat().st_size if file.is_file() else 0)
    content = file.read_bytes()
    check_checksum(file, hashlib.sha256(content).hexdigest() == layout.checks)
    return np.frombuffer(content, kind)


def _spans(layout: Layout) -> Iterator[tuple[int, int]]:
    if layout.block:
        yield from map(layout.rows_in, range(layout.blocks))
        return
    step = max(1, (1 << 22) // layout.row_bytes)
    for start in range(0, layout.total, step):
        yield start, min(start + step, layout.total)


def _recompute(
    cache: TeacherCache, teacher: nn.Module, fetch: Callable[[Tensor, int], Any], rows: NDArray[np.int64]
) -> dict[str, float]:
    layout = cache._layout
    largest = dict.fromkeys(layout.features, 0.0)
    views, positions = np.divmod(rows, layout.samples)
    for view in np.unique(views):
        here = positions[views == view]
        for start in range(0, len(here), layout.block or 64):
            samples = cache._ids_at(here[start : start + (layout.block or 64)])
            said, held = ask(teacher, fetch, samples, int(view)), cache.read(torch.from_numpy(samples), int(view))
            for name, x in held.items():
                if name not in said or said[name].shape != x.shape:
                    raise other_feature(cache.path, name, tuple(x.shape[1:]))
                apart = 1 - F.cosine_similarity(x.flatten(1).double(), said[name].flatten(1).double())
                # Two rows of zeros have no direction to differ in.
                apart[(x.flatten(1) == 0).all(1) & (said[name].flatten(1) == 0).all(1)] = 0.0
                allowed = 2 * layout.error.get(name, {}).get("max_cosine", 0.0) + SLACK
                at = int(apart.argmax())
                check_close(cache.path, name, samples[at], view, apart=float(apart[at]), allowed=allowed)
                largest[name] = max(largest[name], float(apart[at]))
    return largest
