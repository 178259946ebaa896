"""Checks and error messages of the cache package."""

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
    """A cache is missing, incomplete, damaged, or belongs to something else."""


# Files.


def unwritable(path: Path, error: OSError) -> CacheError:
    """Error for a full disk or a missing permission."""
    return CacheError(
        f"TeacherCache: cannot write {path}: {error.strerror or error}; complete blocks are kept, and the same "
        "build resumes from there"
    )


def disk_full() -> OSError:
    """The system's error for a short write."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unreadable(path: Path, error: OSError) -> CacheError:
    """Error for an unreadable file."""
    return CacheError(f"TeacherCache: {path} cannot be read: {error.strerror or error}")


def unlockable(path: Path, error: OSError) -> CacheError:
    """Error for a file system without POSIX locks."""
    return CacheError(f"TeacherCache: {path} cannot be locked ({error.strerror or error}); build on a local disk")


def check_size(path: Path, size: int, got: int) -> None:
    """A file must have the size stated in the header."""
    if got != size:
        raise CacheError(f"TeacherCache: {path} must have {size} bytes, got {got}")


def check_rows(path: Path, large_enough: bool) -> None:
    """A shard must contain all complete rows."""
    if not large_enough:
        raise CacheError(f"TeacherCache: {path} is shorter than its header states; delete the cache and build it again")


def check_no_strays(path: Path, strays: bool) -> None:
    """A directory without a cache must not contain shards, which are not ours to delete."""
    if strays:
        raise CacheError(f"TeacherCache: {path} contains shard files without a header; use another path")


def check_seal(path: Path, good: bool) -> None:
    """A shard must end with the seal of its cache and number."""
    if not good:
        raise CacheError(
            f"TeacherCache: {path} does not match the header: one of them belongs to another cache or was changed"
        )


def check_block(path: Path, files: Collection[str], good: bool, start: int, stop: int) -> None:
    """A block of rows, in one or several files, must match its checksum."""
    if not good:
        raise CacheError(
            f"TeacherCache: {path / ' or '.join(sorted(files))} is damaged: the checksum of rows {start} to "
            f"{stop - 1} does not match; build the cache again"
        )


def check_ascending(path: Path, ids: NDArray[np.int64]) -> None:
    """Ids on disk must be ascending."""
    if (ids[1:] <= ids[:-1]).any():
        raise CacheError(f"TeacherCache: {path} is damaged: its ids are not ascending")


def check_ids_checksum(path: Path, good: bool) -> None:
    """The file of ids must match the checksum in the header."""
    if not good:
        raise CacheError(f"TeacherCache: {path} is damaged: its ids do not match the checksum in the header")


def check_checksum(path: Path, good: bool) -> None:
    """A file must match the checksum in the header."""
    if not good:
        raise CacheError(f"TeacherCache: {path} is damaged: it does not match the checksum in the header")


def damaged_value(path: Path, feature: str, sample: int, view: int) -> CacheError:
    """Error for a non-finite value on disk."""
    return CacheError(
        f"TeacherCache: {path} is damaged: feature {feature!r} of sample {sample}, view {view} is not finite"
    )


# Building and opening.


def another_process(path: Path, *, shared: bool) -> CacheError:
    """Error for a cache that another process is building."""
    hint = "" if shared else "; several processes can build it together with shared=True"
    return CacheError(f"TeacherCache: {path} is being built by another process{hint}")


def another_thread(path: Path) -> CacheError:
    """Error for a cache that this process is building."""
    return CacheError(f"TeacherCache: {path} is being built by another process or another thread of this process")


def no_locks() -> CacheError:
    """Error for a shared build without POSIX locks."""
    return CacheError("TeacherCache: shared=True requires POSIX locks, which Windows does not support")


def no_cache(path: Path) -> CacheError:
    """Error for a directory without a header."""
    return CacheError(f"TeacherCache: there is no cache at {path}")


def check_source(path: Path, header: Any, wanted: Any, *, building: bool = False) -> None:
    """The header must have the fingerprint `wanted`, a text or a `Fingerprint` with parts."""
    whole = wanted if isinstance(wanted, str) else wanted.whole
    if header.fingerprint == whole:
        return
    which = "" if isinstance(wanted, str) or not header.parts else wanted.difference(header.parts)
    known = f"the difference is {which}; " if which else ""
    another = (
        f"another teacher, preprocessing or data: {known}its fingerprint is {header.fingerprint!r}, expected {whole!r}"
    )
    if building:
        raise CacheError(f"TeacherCache: {path} contains {another}; use another path, or delete it")
    raise CacheError(f"TeacherCache: {path} was computed from {another}")


def check_same_job(path: Path, name: str, stored: object, expected: object) -> None:
    """A resumed build must have the same ids, views and dtype."""
    if stored != expected:
        what = "other samples" if name == "ids" else f"another {name.removesuffix('s')}"
        raise CacheError(
            f"TeacherCache: {path} contains {what}: its {name} is {stored!r}, expected {expected!r}; "
            "use another path, or delete it"
        )


def check_complete(path: Path, complete: bool, rows: int, total: int) -> None:
    """Only a complete cache can be opened."""
    if not complete:
        raise CacheError(
            f"TeacherCache: {path} contains {rows} of {total} rows; run the same build again to complete it"
        )


def no_row(path: Path, sample: int, view: int, layout: Any) -> CacheError:
    """Error for a sample or view that is not in the cache."""
    first = f" from {layout.first}" if layout.dense else ""
    return CacheError(
        f"TeacherCache: {path} has no sample {sample}, view {view}; it has {layout.samples} samples{first}, "
        f"views 0 to {layout.views - 1}"
    )


# Arguments of build and read.


def check_together(teacher: object, fetch: object) -> None:
    """`teacher` and `fetch` must be given together."""
    if (teacher is None) != (fetch is None):
        given = "fetch" if teacher is None else "teacher"
        raise ValueError(f"verify_cache: teacher and fetch must be given together, got only {given}")


def check_build(teacher: object, fetch: object, progress: object, notes: object, **texts: object) -> None:
    """Check the callables of a build and the texts that it writes into the header."""
    check_type("TeacherCache", "teacher", teacher, nn.Module, "a Module")
    check_callable("TeacherCache", "fetch", fetch)
    if progress is not None:
        check_callable("TeacherCache", "progress", progress)
    for name, text in texts.items():
        check_type("TeacherCache", name, text, str, "a str")
    check_type("TeacherCache", "notes", notes, Mapping, "a mapping of names to texts")
    for key, text in dict(notes).items():  # type: ignore[call-overload]  # checked in the line before
        check_type("TeacherCache", "a name in notes", key, str, "a str")
        check_type("TeacherCache", f"notes[{key!r}]", text, str, "a str")


def check_reads(reads: Sequence[str]) -> None:
    """`reads` must have one or two names."""
    if isinstance(reads, str) or len(reads) not in (1, 2):
        raise ValueError(
            f"CachedTeacher: reads must name the targets of sample and view, or only of the sample, got {reads!r}"
        )
    for index, name in enumerate(reads):
        check_type("CachedTeacher", f"reads[{index}]", name, str, "a str")


def check_names(owner: str, features: Collection[str], known: Collection[str]) -> None:
    """`features` must be a collection of known names, not a string."""
    if isinstance(features, str):
        raise TypeError(f"{owner}: features must be a sequence of names, got {features!r}")
    for name in features:
        check_name(owner, "feature", name, known)


def undescribed(preprocess: str) -> ValueError:
    """Error for preprocessing that cannot be identified."""
    return ValueError(f"model_fingerprint: preprocess {preprocess} cannot be identified; describe it by preprocessing=")


def check_whole(name: str, values: NDArray[Any]) -> None:
    """Ids and views must be `(b,)` integers."""
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise ValueError(f"TeacherCache: {name} must be (b,) integers, got {values.dtype} {values.shape}")


def check_distinct(ids: NDArray[np.int64]) -> None:
    """There must be at least one id, and ids must be distinct."""
    if not len(ids):
        raise ValueError("TeacherCache: samples must contain at least one id, got none")
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if len(repeated):
        raise ValueError(f"TeacherCache: samples must be distinct, got {ids[repeated[0]]} twice")


def check_views(views: int, samples: int) -> None:
    """There must be one view per sample."""
    if views != samples:
        raise ValueError(f"TeacherCache: views must be (b,) like samples ({samples},), got ({views},)")


# Teacher outputs.


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
        raise CacheError(f"TeacherCache: features must be {before} as in earlier batches, got {shapes}")


def check_row_bytes(size: int) -> None:
    """A row must be smaller than 2 GiB."""
    if size >= 2**31:
        raise ValueError(f"TeacherCache: features of one sample must take less than 2 GiB, got {size} bytes")


def check_fits(dtype: str, feature: str, largest: Tensor, limit: float, name_row: Callable[[int], str]) -> None:
    """The largest magnitude of each row must be finite and fit the type on disk."""
    bad = (~(largest <= limit)).nonzero().flatten()
    if len(bad):
        value = float(largest[bad[0]])
        remedy = '; use dtype="float32"' if math.isfinite(value) else ""
        raise ValueError(
            f"TeacherCache: feature {feature!r} of {name_row(int(bad[0]))} must fit {dtype}, got {value:.4g}{remedy}"
        )


def other_feature(path: Path, feature: str, shape: tuple[int, ...]) -> CacheError:
    """Error for a feature on disk that the teacher does not return."""
    return CacheError(f"TeacherCache: {path} has a feature {feature!r} {shape}, which the teacher does not return")


def check_close(path: Path, feature: str, sample: int, view: int, *, error: float, allowed: float) -> None:
    """A row on disk must be close to the teacher's output."""
    if not error <= allowed:
        raise CacheError(
            f"TeacherCache: {path} differs from the teacher's output: feature {feature!r} of sample "
            f"{sample}, view {view} has a cosine error of {error:.2g}, allowed is {allowed:.2g}"
        )
