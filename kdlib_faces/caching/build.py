"""Recipes room: a teacher's outputs on a list of faces, computed once, by one process or several; looked at and checked."""

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from kdlib._checks import check_number
from kdlib.cache import CacheCheck, CacheError, Layout, TeacherCache, read_header, verify_cache
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.caching.source import CacheSource, parse_taps
from kdlib_faces.data.lists import read_faces
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.progress import progress_to, say

__all__ = ["CacheConfig", "build", "info", "verified", "verify"]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How `kdlib-faces cache build` computes and keeps the outputs.

    Attributes:
        dtype: type on disk: `"float16"`, `"int8"` or `"float32"`.
        views: views of each image: 1 plain, 2 plain and mirrored; with `augment` so many random ones.
        view_seed: what random views are drawn from.
        augment: random views; all off by default.
        size: side of the images in pixels, where the teacher leaves it free.
        batch_size: images in a forward; also the rows that a process takes and that a checksum covers.
        decoders: threads that read images ahead of the teacher.
        shard_bytes: largest size of a file.
        sync_seconds: how often progress is made certain on disk.
    """

    dtype: Literal["float16", "int8", "float32"] = "float16"
    views: int = 2
    view_seed: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig.none)
    size: int = 112
    batch_size: int = 64
    decoders: int = 2
    shard_bytes: int = 1 << 28
    sync_seconds: float = 5.0

    def __post_init__(self) -> None:
        check_number("CacheConfig", "size", self.size, min=1, max=4096, integer=True)
        for name in ("views", "batch_size", "decoders", "shard_bytes"):
            check_number("CacheConfig", name, getattr(self, name), min=1, integer=True)
        check_number("CacheConfig", "sync_seconds", self.sync_seconds, min=0)
        self.seeded()

    def seeded(self) -> SeededViews:
        """The views as a function of sample id and number."""
        plain = self.augment == AugmentConfig.none()
        if plain and self.views > 2:
            raise ValueError(
                f"CacheConfig: views must be 1 (plain) or 2 (plain and mirrored) where augment is off, got {self.views}"
            )
        return SeededViews(self.views, self.view_seed, None if plain else self.augment)


def build(
    config: CacheConfig,
    *,
    output: Path,
    faces: Sequence[str],
    teacher: Path,
    taps: Sequence[str] = (),
    workers: int = 1,
    progress: bool = True,
) -> TeacherCache:
    """Compute what is missing of a cache; the same call after a kill goes on where it was, several at once share the work.

    Args:
        config: how.
        output: folder of the cache.
        faces: lists or folders; an image's id is its row, counted over all of them.
        teacher: a checkpoint or an ONNX file.
        taps: `FEATURE=NAME` of a module or tensor to keep beside the embedding, or `stage0` to `stage3`; `NAME` alone is
            the feature `map`.
        workers: processes.
        progress: show progress.

    Returns:
        The complete cache, open. Its notes say how it was made.

    Raises:
        InputError: lists, teacher or output that cannot be used.
        CacheError: the folder holds another cache, or cannot be written to.
    """
    check_number("cache", "workers", workers, min=1, integer=True)
    check_output(output)
    if workers > 1 and sys.platform == "win32":
        raise InputError("cache: workers must be 1 on Windows, which has no POSIX locks")
    threads = max(1, torch.get_num_threads() // workers)
    work = (config, output, list(faces), teacher, list(taps), threads)
    with _threads(threads), _helpers(workers - 1, work, quiet=not progress):
        return _build(config, output, faces, teacher, taps, quiet=not progress)


def _build(
    config: CacheConfig, output: Path, faces: Sequence[str], teacher: Path, taps: Sequence[str], *, quiet: bool
) -> TeacherCache:
    views = config.seeded()
    listed = read_faces(faces)
    source = CacheSource(
        listed, teacher, parse_taps(taps), views, size=config.size, decoders=config.decoders, quiet=quiet
    )
    with progress_to(f"outputs of {teacher.stem}", quiet=quiet) as show:
        cache = TeacherCache.build(
            output,
            source.model,
            source.fetch,
            samples=len(source.faces),
            views=config.views,
            fingerprint=source.fingerprint,
            dtype=config.dtype,
            batch_size=config.batch_size,
            shard_bytes=config.shard_bytes,
            sync_seconds=config.sync_seconds,
            progress=show,
            shared=sys.platform != "win32",
            prefetch=2,
            notes=source.notes,
        )
    return cache


def verify(
    path: Path,
    *,
    faces: Sequence[str] = (),
    teacher: Path | None = None,
    rows: int = 64,
    decoders: int = 2,
    progress: bool = True,
) -> CacheCheck:
    """Check every byte of a cache; with lists and teacher also that it is theirs, and some rows against the teacher.

    Args:
        path: folder of the cache.
        faces: the lists it was built from.
        teacher: the file it was built from.
        rows: how many rows to compute again.
        decoders: threads that read images.
        progress: show progress.

    Raises:
        InputError: lists or teacher that cannot be used, or one without the other.
        CacheError: the cache is not complete, is damaged, or is of something else; the message says what.
    """
    if bool(faces) != (teacher is not None):
        raise InputError("cache verify: --faces and --teacher go together, to compute some rows again")
    cache = TeacherCache.open(path)
    source = None
    if teacher is not None:
        views, taps, size = _told(cache)
        source = CacheSource(read_faces(faces), teacher, taps, views, size=size, decoders=decoders, quiet=not progress)
        TeacherCache.open(path, fingerprint=source.fingerprint)
    with progress_to("checking", quiet=not progress) as show:
        return verify_cache(
            cache,
            teacher=None if source is None else source.model,
            fetch=None if source is None else source.fetch,
            recompute=rows,
            progress=show,
        )


def info(path: Path) -> str:
    """What a cache is, in plain text; also one that is not complete.

    Raises:
        CacheError: there is none, or its header is damaged.
    """
    layout = read_header(path)
    if layout is None:
        raise CacheError(f"TeacherCache: there is no cache at {path}")
    kept = f"{layout.rows:,} of {layout.total:,} rows"
    ids = f"ids {layout.first} to {layout.first + layout.samples - 1}" if layout.dense else "ids of their own"
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    rows = [
        ("cache", str(path)),
        ("state", f"complete, {layout.rows:,} rows" if layout.complete else f"{kept}; the same build completes it"),
        ("samples", f"{layout.samples:,}, {ids}"),
        ("views", f"{layout.views}{_views_in_words(layout)}"),
        *(("feature", f"{name!r} {shape}") for name, shape in layout.features.items()),
        ("on disk", f"{layout.dtype}, {layout.row_bytes:,} bytes a row, {layout.shards} files, {size / 1e6:,.1f} MB"),
        *(
            ("error", f"{name!r}: 1 - cos {each['mean_cosine']:.2g} in the mean, {each['max_cosine']:.2g} at most; "
                      f"relative {each['max_relative']:.2g} at most")
            for name, each in layout.error.items()
        ),
        ("fingerprint", layout.fingerprint),
        *((f"- {name}", text) for name, text in layout.parts.items()),
        *((f"note {name}", text) for name, text in layout.notes.items()),
    ]  # fmt: skip
    return "\n".join(f"{_plain(name):<16}{_plain(text)}" for name, text in rows)


def verified(found: CacheCheck) -> str:
    """What `verify` has found good, on one line.

    Examples:
        >>> verified(CacheCheck(100, 2, 64, {"embedding": 2e-8}))
        'good: 100 rows in 2 files have correct checksums and finite values; 64 rows computed again, 1 - cos at most 2e-08'
    """
    again = ""
    if found.recomputed:
        again = f"; {found.recomputed} rows computed again, 1 - cos at most {max(found.max_cosine.values()):.2g}"
    return f"good: {found.rows:,} rows in {found.shards:,} files have correct checksums and finite values{again}"


def _told(cache: TeacherCache) -> tuple[SeededViews, dict[str, str], int]:
    """What the notes of a cache say of how it was made."""
    notes = cache.notes
    try:
        taps, size = json.loads(notes["taps"]), int(notes["size"])
        if (
            not isinstance(taps, dict)
            or not all(isinstance(tap, str) for tap in taps.values())
            or not 1 <= size <= 4096
        ):
            raise ValueError("taps or size are of another kind")
        return SeededViews.from_text(notes["views"]), taps, size
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"cache: the notes of {cache.path} do not tell how it was made ({error}); check it without --teacher"
        ) from error


def _views_in_words(layout: Layout) -> str:
    with suppress(InputError, KeyError):
        views = SeededViews.from_text(layout.notes["views"])
        if views.augment is not None:
            return f", random by seed {views.seed}"
        return ": plain and mirrored" if views.count == 2 else ": plain"
    return ""


def _plain(text: str) -> str:
    """Text from a header that cannot steer a terminal."""
    shown = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text[:400])
    return shown + ("..." if len(text) > 400 else "")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Threads of torch for one of several processes, and of those runtimes that ask torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _helpers(count: int, work: tuple[Any, ...], *, quiet: bool) -> Iterator[None]:
    """Other processes at the same work. One that fails or is killed leaves its part to the others.

    When the block ends the cache is complete, or there was an error here: nothing is lost with those that still run.
    """
    context = multiprocessing.get_context("spawn")
    running = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_help, args=(theirs, *work), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
        yield
        for process, ours in running:
            if process.exitcode:
                said = f"it was killed (exit code {process.exitcode})"
                with suppress(EOFError):
                    said = ours.recv_bytes(1 << 16).decode()
                say(f"cache: a worker ended early, the others did its part: {said}", quiet=quiet)
    finally:
        for process, ours in running:
            process.terminate()
            process.join()
            ours.close()


def _help(
    answer: Connection,
    config: CacheConfig,
    output: Path,
    faces: Sequence[str],
    teacher: Path,
    taps: Sequence[str],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    try:
        _build(config, output, faces, teacher, taps, quiet=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        answer.send_bytes(f"{type(error).__name__}: {error}".encode()[:4096])
        sys.exit(1)
