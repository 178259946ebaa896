"""Cache: the checks of what is on disk, of who builds it and of what goes in. Words errors; opens no file."""

import errno
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdlib._checks import check_callable, check_name, check_type

__all__ = [
    "CacheError",
    "another_process",
    "another_thread",
    "check_ascending",
    "check_block",
    "check_build",
    "check_checksum",
    "check_close",
    "check_complete",
    "check_distinct",
    "check_features",
    "check_fits",
    "check_ids_checksum",
    "check_names",
    "check_no_strays",
    "check_reads",
    "check_row_bytes",
    "check_rows",
    "check_same_features",
    "check_same_job",
    "check_seal",
    "check_size",
    "check_source",
    "check_together",
    "check_views",
    "check_whole",
    "damaged_value",
    "disk_full",
    "no_cache",
    "no_locks",
    "no_row",
    "other_feature",
    "undescribed",
    "unlockable",
    "unreadable",
    "unwritable",
]


class CacheError(ValueError):
    """The cache on disk is not the one asked for, is not complete, or is damaged."""


# Files.


def unwritable(path: Path, error: OSError) -> CacheError:
    """A disk that is full, or a folder that may not be written to."""
    return CacheError(
        f"TeacherCache: cannot write {path}: {error.strerror or error}; what was marked before stays, and the same "
        "build goes on from there"
    )


def disk_full() -> OSError:
    """A write that the system has cut short, in the system's own words."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unreadable(path: Path, error: OSError) -> CacheError:
    """A file that is there and cannot be read."""
    return CacheError(f"TeacherCache: {path} cannot be read: {error.strerror or error}")


def unlockable(path: Path, error: OSError) -> CacheError:
    """A file system without POSIX locks."""
    return CacheError(
        f"TeacherCache: {path} cannot be locked ({error.strerror or error}); build on a disk of this machine"
    )


def check_size(path: Path, size: int, got: int) -> None:
    """A file must have the size that the header gives it."""
    if got != size:
        raise CacheError(f"TeacherCache: {path} must have {size} bytes, got {got}")


def check_rows(path: Path, there: bool) -> None:
    """A shard must hold the rows that are marked."""
    if not there:
        raise CacheError(f"TeacherCache: {path} is shorter than its header says; delete the cache and build it anew")


def check_no_strays(path: Path, strays: bool) -> None:
    """Where there is no cache there must be no shards either: they are somebody's."""
    if strays:
        raise CacheError(f"TeacherCache: {path} holds shard files that are no part of a cache; give another path")


def check_seal(path: Path, good: bool) -> None:
    """A shard must bear the seal of its cache and place."""
    if not good:
        raise CacheError(
            f"TeacherCache: {path} does not belong to its header: one of the two is of another cache, or was changed"
        )


def check_block(path: Path, files: Collection[str], good: bool, start: int, stop: int) -> None:
    """A block of rows, in one file or more, must have its checksum."""
    if not good:
        raise CacheError(
            f"TeacherCache: {path / ' or '.join(sorted(files))} is damaged: rows {start} to {stop - 1} do not "
            "have their checksum; build the cache anew"
        )


def check_ascending(path: Path, ids: NDArray[np.int64]) -> None:
    """Ids on disk must ascend."""
    if (ids[1:] <= ids[:-1]).any():
        raise CacheError(f"TeacherCache: {path} is damaged: its ids do not ascend")


def check_ids_checksum(path: Path, good: bool) -> None:
    """The file of ids must have the checksum that the header gives it."""
    if not good:
        raise CacheError(f"TeacherCache: {path} is damaged: its ids do not have the checksum of the header")


def check_checksum(path: Path, good: bool) -> None:
    """A whole file must have the checksum that the header gives it."""
    if not good:
        raise CacheError(f"TeacherCache: {path} is damaged: it does not have the checksum of the header")


def damaged_value(path: Path, feature: str, sample: int, view: int) -> CacheError:
    """A value on disk that no build writes."""
    return CacheError(
        f"TeacherCache: {path} is damaged: feature {feature!r} of sample {sample}, view {view} is not finite"
    )


# Builders and readers of a cache.


def another_process(path: Path, *, shared: bool) -> CacheError:
    """A cache that another process is building, which one of the two does not share."""
    hint = "" if shared else "; shared=True in all of them lets several build it together"
    return CacheError(f"TeacherCache: {path} is being built by another process{hint}")


def another_thread(path: Path) -> CacheError:
    """A cache that this process is building."""
    return CacheError(f"TeacherCache: {path} is being built by another process or by a thread of this one")


def no_locks() -> CacheError:
    """A shared build without POSIX locks."""
    return CacheError("TeacherCache: shared=True needs POSIX locks, which Windows has not")


def no_cache(path: Path) -> CacheError:
    """A directory without a header."""
    return CacheError(f"TeacherCache: there is no cache at {path}")


def check_source(path: Path, found: Any, wanted: Any, *, building: bool = False) -> None:
    """The header `found` must have the fingerprint `wanted`, a text or a `Fingerprint`, which knows its parts."""
    whole = wanted if isinstance(wanted, str) else wanted.whole
    if found.fingerprint == whole:
        return
    which = "" if isinstance(wanted, str) or not found.parts else wanted.difference(found.parts)
    known = f"what differs is {which}; " if which else ""
    another = f"another teacher, preprocessing or data: {known}its fingerprint is {found.fingerprint!r}, asked for is {whole!r}"
    if building:
        raise CacheError(f"TeacherCache: {path} holds {another}; give another path, or delete it")
    raise CacheError(f"TeacherCache: {path} was computed from {another}")


def check_same_job(path: Path, name: str, found: object, asked: object) -> None:
    """A build that goes on must be asked for the same ids, views and dtype."""
    if found != asked:
        what = "other samples" if name == "ids" else f"another {name.removesuffix('s')}"
        raise CacheError(
            f"TeacherCache: {path} holds {what}: its {name} is {found!r}, asked for is {asked!r}; "
            "give another path, or delete it"
        )


def check_complete(path: Path, complete: bool, rows: int, total: int) -> None:
    """A cache is opened whole."""
    if not complete:
        raise CacheError(f"TeacherCache: {path} holds {rows} of {total} rows; run the same build again to complete it")


def no_row(path: Path, sample: int, view: int, layout: Any) -> CacheError:
    """A sample or a view that is not in the cache."""
    first = f" from {layout.first}" if layout.dense else ""
    return CacheError(
        f"TeacherCache: {path} has no sample {sample}, view {view}; it has {layout.samples} samples{first}, "
        f"views 0 to {layout.views - 1}"
    )


# What is given to build and read.


def check_together(teacher: object, fetch: object) -> None:
    """A teacher is asked by what `fetch` gives."""
    if (teacher is None) != (fetch is None):
        given = "fetch" if teacher is None else "teacher"
        raise ValueError(f"verify_cache: teacher and fetch go together, got {given} alone")


def check_build(teacher: object, fetch: object, progress: object, notes: object, **texts: object) -> None:
    """What a build runs, and the texts that it writes: a header with anything else could not be read again."""
    check_type("TeacherCache", "teacher", teacher, nn.Module, "a Module")
    check_callable("TeacherCache", "fetch", fetch)
    if progress is not None:
        check_callable("TeacherCache", "progress", progress)
    for name, text in texts.items():
        check_type("TeacherCache", name, text, str, "a str")
    check_type("TeacherCache", "notes", notes, Mapping, "a mapping of names to texts")
    for key, text in dict(notes).items():  # type: ignore[call-overload]  # a mapping, as was just checked
        check_type("TeacherCache", "a name in notes", key, str, "a str")
        check_type("TeacherCache", f"notes[{key!r}]", text, str, "a str")


def check_reads(reads: Sequence[str]) -> None:
    """Names of one target or two."""
    if isinstance(reads, str) or len(reads) not in (1, 2):
        raise ValueError(f"CachedTeacher: reads must name the sample and the view, or the sample alone, got {reads!r}")
    for index, name in enumerate(reads):
        check_type("CachedTeacher", f"reads[{index}]", name, str, "a str")


def check_names(owner: str, features: Collection[str], known: Collection[str]) -> None:
    """Features must be a collection of names that the cache has; a string is one of letters."""
    if isinstance(features, str):
        raise TypeError(f"{owner}: features must be a sequence of names, got {features!r}")
    for name in features:
        check_name(owner, "feature", name, known)


def undescribed(preprocess: str) -> ValueError:
    """Preprocessing that looks like another."""
    return ValueError(
        f"model_fingerprint: preprocess {preprocess} cannot be told apart from another; describe it by preprocessing="
    )


def check_whole(name: str, values: NDArray[Any]) -> None:
    """Ids and views must be `(b,)` whole numbers."""
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise ValueError(f"TeacherCache: {name} must be (b,) whole numbers, got {values.dtype} {values.shape}")


def check_distinct(ids: NDArray[np.int64]) -> None:
    """Ascending ids must be there, each once."""
    if not len(ids):
        raise ValueError("TeacherCache: samples must hold at least one id, got none")
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if len(repeated):
        raise ValueError(f"TeacherCache: samples must be distinct, got {ids[repeated[0]]} twice")


def check_views(views: int, samples: int) -> None:
    """As many views as samples."""
    if views != samples:
        raise ValueError(f"TeacherCache: views must be (b,) like samples ({samples},), got ({views},)")


# What a teacher says.


def check_features(features: object, batch: int) -> None:
    """A teacher must return named floating-point features of the batch."""
    if not isinstance(features, Mapping) or not features:
        raise TypeError(f"TeacherCache: teacher must return named features, got {type(features).__name__}")
    for name, x in features.items():
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != batch or not x.is_floating_point():
            shown = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"TeacherCache: feature {name!r} must be floating point ({batch}, d, ...), got {shown}")


def check_same_features(before: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A teacher must return the same features for every batch."""
    if shapes != before:
        raise CacheError(f"TeacherCache: features must be {before} as before, got {shapes}")


def check_row_bytes(size: int) -> None:
    """A row is read by one call of the system."""
    if size >= 2**31:
        raise ValueError(f"TeacherCache: features of one sample must take less than 2 GiB, got {size} bytes")


def check_fits(dtype: str, feature: str, largest: Tensor, limit: float, name_row: Callable[[int], str]) -> None:
    """The largest magnitude of each row must be finite and within the type on disk."""
    bad = (~(largest <= limit)).nonzero().flatten()
    if len(bad):
        value = float(largest[bad[0]])
        remedy = '; use dtype="float32"' if math.isfinite(value) else ""
        raise ValueError(
            f"TeacherCache: feature {feature!r} of {name_row(int(bad[0]))} must fit {dtype}, got {value:.4g}{remedy}"
        )


def other_feature(path: Path, feature: str, shape: tuple[int, ...]) -> CacheError:
    """A feature on disk that the teacher does not return."""
    return CacheError(f"TeacherCache: {path} has a feature {feature!r} {shape}, which the teacher has not")


def check_close(path: Path, feature: str, sample: int, view: int, *, apart: float, allowed: float) -> None:
    """A row on disk must be what the teacher says."""
    if not apart <= allowed:
        raise CacheError(
            f"TeacherCache: {path} is not what the teacher says: feature {feature!r} of sample "
            f"{sample}, view {view} has a cosine error of {apart:.2g}, allowed are {allowed:.2g}"
        )
