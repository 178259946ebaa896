"""Verification of the checksums of a cache and of its rows against the teacher."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_number, check_type
from kdlib.cache._checks import cache_error, check_argument, check_cache
from kdlib.cache.blocks import NAME, block_digest, record_type
from kdlib.cache.build import ids_digest, teacher_outputs
from kdlib.cache.codec import unpack
from kdlib.cache.layout import check_size, shard_path
from kdlib.cache.store import TeacherCache

__all__ = ["CacheCheck", "verify_cache"]

TOLERANCE = 1e-4
"""Cosine error allowed in addition to the storage error, for another machine or another batch composition."""


@dataclass(frozen=True)
class CacheCheck:
    """Result of `verify_cache` for an intact cache.

    Attributes:
        rows: number of rows with correct checksums and finite values.
        shards: number of files.
        recomputed: number of rows that the teacher computed again.
        max_cosine: for each feature the maximum 1 - cos between recomputed and stored rows.

    Examples:
        >>> CacheCheck(rows=10, shards=1, recomputed=4, max_cosine={"embedding": 0.0}).rows
        10
    """

    rows: int
    shards: int
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
    """Check the ids, the checksums of all blocks and the finiteness of all values; recompute some rows by the teacher.

    Args:
        cache: an open cache.
        teacher: recomputes some rows; `None` skips this.
        fetch: as in `TeacherCache.build`.
        recompute: number of random rows to recompute.
        seed: seed of the random rows.
        progress: called with the number of checked rows and all rows.

    Returns:
        Counts of the checked rows and files.

    Raises:
        CacheError: a file is damaged (the message names the file and the rows), or a row differs from the teacher's.
        ValueError: only one of `teacher` and `fetch` is given.

    Examples:
        >>> import tempfile
        >>> from kdlib.adapters import OUTPUT, TeacherAdapter
        >>> images = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher = TeacherAdapter(nn.Linear(4, 2), {"embedding": OUTPUT})
        >>> fetch = lambda samples, view: images[samples]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache.build(folder, teacher, fetch, samples=5)
        ...     check = verify_cache(cache, teacher=teacher, fetch=fetch)
        >>> check.rows, check.shards, check.recomputed
        (5, 1, 5)
    """
    check_type("verify_cache", "cache", cache, TeacherCache, "a TeacherCache")
    check_number("verify_cache", "recompute", recompute, min=0, integer=True)
    given = "fetch" if teacher is None else "teacher"
    check_argument(
        (teacher is None) == (fetch is None),
        f"verify_cache: teacher and fetch must be given together, got only {given}",
    )
    layout = cache._layout
    ids, file = cache._mapped_ids(), cache.path / "samples.i64"
    check_cache(not (ids[1:] <= ids[:-1]).any(), f"{file} is damaged: its ids are not ascending")
    check_cache(ids_digest(ids) == layout.ids, f"{file} is damaged: its ids do not match the checksum in the header")
    file, kind = cache.path / NAME, record_type(layout)
    check_size(file, layout.blocks * kind.itemsize)
    content = file.read_bytes()
    good = hashlib.sha256(content).hexdigest() == layout.checks
    check_cache(good, f"{file} is damaged: it does not match the checksum in the header")
    records = np.frombuffer(content, kind)
    for block in range(layout.blocks):
        start, stop = layout.rows_in(block)
        rows = cache._raw(start, stop)
        files = {shard_path(cache.path, shard).name for shard, _, _ in layout.pieces(start, stop)}
        check_cache(
            np.array_equal(records["digest"][block], block_digest(rows)),
            f"{cache.path / ' or '.join(sorted(files))} is damaged: the checksum of rows {start} to {stop - 1} does not "
            "match; build the cache again",
        )
        cache._check_finite(unpack(layout, rows, layout.features), np.arange(start, stop))
        if progress is not None:
            progress(stop, layout.total)
    count, distances = 0, {}
    if teacher is not None and fetch is not None:
        count = min(recompute, layout.total)
        chosen = np.sort(np.random.default_rng(seed).choice(layout.total, count, replace=False))
        distances = _recompute(cache, teacher, fetch, chosen)
    return CacheCheck(layout.total, layout.shards, count, distances)


def _recompute(
    cache: TeacherCache, teacher: nn.Module, fetch: Callable[[Tensor, int], Any], rows: NDArray[np.int64]
) -> dict[str, float]:
    layout = cache._layout
    largest = dict.fromkeys(layout.features, 0.0)
    views, positions = np.divmod(rows, layout.samples)
    for view in np.unique(views):
        here = positions[views == view]
        for start in range(0, len(here), layout.block):
            samples = cache._ids_at(here[start : start + layout.block])
            ids = torch.from_numpy(samples)
            outputs = teacher_outputs(teacher, fetch(ids, int(view)), len(ids))
            stored = cache.read(ids, int(view))
            for name, x in stored.items():
                if name not in outputs or outputs[name].shape != x.shape:
                    shape = tuple(x.shape[1:])
                    raise cache_error(f"{cache.path} has a feature {name!r} {shape}, which the teacher does not return")
                error = 1 - F.cosine_similarity(x.flatten(1).double(), outputs[name].flatten(1).double())
                # Two zero rows are equal.
                error[(x.flatten(1) == 0).all(1) & (outputs[name].flatten(1) == 0).all(1)] = 0.0
                allowed = 2 * layout.error.get(name, {}).get("max_cosine", 0.0) + TOLERANCE
                at = int(error.argmax())
                check_cache(
                    float(error[at]) <= allowed,
                    f"{cache.path} differs from the teacher's output: feature {name!r} of sample {samples[at]}, view "
                    f"{view} has a cosine error of {error[at]:.2g}, allowed is {allowed:.2g}",
                )
                largest[name] = max(largest[name], float(error[at]))
    return largest
