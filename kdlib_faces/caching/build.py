"""Build, describe and verify caches of teacher outputs for face lists."""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from kdlib._checks import check_number
from kdlib.cache import CacheCheck, CacheError, TeacherCache, read_header, verify_cache
from kdlib_faces._checks import InputError, counted, show_name
from kdlib_faces._hardware import CPU, DTYPES, Amp, Hardware, autocast
from kdlib_faces._output import check_output
from kdlib_faces._processes import end_with_parent, sigterm_exits
from kdlib_faces.caching.source import CacheSource, describe_views, parse_taps
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.progress import progress_to, say
from kdlib_faces.teachers.input_options import InputOptions

__all__ = ["CacheConfig", "build", "info", "describe_check", "verify"]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Configuration of `kdlib-faces cache build`.

    Attributes:
        dtype: type on disk: `"float16"`, `"int8"` or `"float32"`.
        views: views per image: 1 plain, 2 plain and mirrored; with `augment`, the number of random views.
        view_seed: seed of the random views.
        augment: random augmentation; off by default.
        size: side of the images in pixels, if the teacher accepts any size.
        batch_size: images per forward pass, also the rows per block and checksum.
        decoders: threads that decode images.
        shard_bytes: maximum size of a file.
        sync_seconds: seconds between flushes to disk.
        input: input options of the teacher, which override what its file implies.
        amp: precision of the forward pass: `"none"`, `"bfloat16"` or `"float16"`.
        compile: compile the teacher by `torch.compile`; not for ONNX graphs.
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
    input: InputOptions = field(default_factory=InputOptions)
    amp: Amp = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        check_number("CacheConfig", "size", self.size, min=1, max=4096, integer=True)
        for name in ("views", "batch_size", "decoders", "shard_bytes"):
            check_number("CacheConfig", name, getattr(self, name), min=1, integer=True)
        check_number("CacheConfig", "sync_seconds", self.sync_seconds, min=0)
        self.seeded()

    def seeded(self) -> SeededViews:
        """Return the views as a function of sample id and view number."""
        plain = self.augment == AugmentConfig.none()
        if plain and self.views > 2:
            raise ValueError(
                f"CacheConfig: views must be 1 (plain) or 2 (plain and mirrored) if augment is off, got {self.views}"
            )
        return SeededViews(self.views, self.view_seed, None if plain else self.augment)


def build(
    config: CacheConfig,
    *,
    output: Path,
    data: Sequence[str],
    teacher: Path,
    taps: Sequence[str] = (),
    workers: int = 1,
    progress: bool = True,
    on_error: Literal["stop", "skip"] = "stop",
    hardware: Hardware | None = None,
) -> TeacherCache:
    """Compute the missing rows of a cache; an interrupted build resumes, and several processes share the work.

    Args:
        config: configuration of the build.
        output: folder of the cache.
        data: entries of `read_faces`; the id of an image is its row, counted over all of them.
        teacher: a checkpoint or an ONNX file.
        taps: `FEATURE=NAME` of a module or tensor to store in addition to the embedding, or `stage0` to `stage3`; `NAME`
            alone means the feature `map`.
        workers: number of processes.
        progress: show progress.
        on_error: what to do about images that cannot be read: `"stop"` is an error that lists those of a batch, `"skip"` stores
            the outputs for a black image with a warning, so that rows keep their numbers.
        hardware: device of the teacher, and the processes that share the work; None for the CPU.

    Returns:
        The complete cache. Its notes describe the build.

    Raises:
        InputError: the lists, the teacher or the output cannot be used.
        CacheError: the folder contains another cache, or cannot be written.
    """
    check_number("cache", "workers", workers, min=1, integer=True)
    check_output(output)
    if config.compile and teacher.suffix.lower() == ".onnx":
        raise InputError(f"cache: --compile applies to networks of torch, got {teacher}, which onnxruntime runs")
    hardware = hardware or Hardware()
    if workers * hardware.count > 1 and sys.platform == "win32":
        raise InputError("cache: workers must be 1 on Windows, which does not support POSIX locks")
    before = torch.get_num_threads()
    threads = max(1, before // workers)
    faces = read_faces(data, on_error="stop" if on_error == "stop" else "keep", unlabeled=True)
    work = partial(_build, config, output, faces, teacher, tuple(taps), on_error, hardware.device)
    torch.set_num_threads(threads)
    try:
        with sigterm_exits(), _workers(workers - 1, work, threads, quiet=not progress):
            return work(quiet=not progress)
    finally:
        torch.set_num_threads(before)


def _build(
    config: CacheConfig,
    output: Path,
    faces: FaceList,
    teacher: Path,
    taps: Sequence[str],
    on_error: Literal["stop", "skip"],
    device: torch.device,
    *,
    quiet: bool,
) -> TeacherCache:
    views, size, decoders = config.seeded(), config.size, config.decoders
    source = CacheSource(
        faces,
        teacher,
        parse_taps(taps),
        views,
        size=size,
        decoders=decoders,
        input_options=config.input,
        on_error=on_error,
        device=device,
        amp=config.amp,
    )
    if config.compile:
        source.model.compile()
    with progress_to(f"outputs of {teacher.stem}", quiet=quiet) as show, autocast(device, config.amp):
        return TeacherCache.build(
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
            prefetch=2,
            notes=source.notes,
        )


def verify(
    path: Path,
    *,
    data: Sequence[str] = (),
    teacher: Path | None = None,
    rows: int = 64,
    decoders: int = 2,
    progress: bool = True,
    device: torch.device = CPU,
) -> CacheCheck:
    """Check every byte of a cache; with lists and teacher, also its fingerprint and some recomputed rows.

    Args:
        path: folder of the cache.
        data: the entries that it was built from.
        teacher: the file that it was built from.
        rows: number of rows to recompute.
        decoders: threads that decode images.
        progress: show progress.
        device: device of the teacher.

    Raises:
        InputError: the lists or the teacher cannot be used, or only one of them is given.
        CacheError: the cache is incomplete, damaged, or belongs to something else.
    """
    if bool(data) != (teacher is not None):
        raise InputError("cache verify: --data and --teacher must be given together, to recompute some rows")
    cache = TeacherCache.open(path)
    with progress_to("checking", quiet=not progress) as show:
        if teacher is None:
            return verify_cache(cache, progress=show)
        views, taps, size, input_options, amp = _build_options(cache)
        views.check_version(f"cache verify: {path}")
        source = CacheSource(
            read_faces(data, on_error="keep", unlabeled=True),
            teacher,
            taps,
            views,
            size=size,
            decoders=decoders,
            input_options=input_options,
            on_error="skip",
            device=device,
            amp=amp,
        )
        TeacherCache.open(path, fingerprint=source.fingerprint)
        with autocast(device, amp):
            return verify_cache(cache, teacher=source.model, fetch=source.fetch, recompute=rows, progress=show)


def info(path: Path) -> str:
    """Describe a cache, complete or not, in plain text.

    Raises:
        CacheError: there is no cache, or its header is damaged.
    """
    layout = read_header(path)
    if layout is None:
        raise CacheError(f"TeacherCache: there is no cache at {path}")
    views = str(layout.views)
    with suppress(InputError, KeyError):  # another builder may leave other notes
        views = describe_views(SeededViews.from_text(layout.notes["views"]))
    state = f"{layout.rows:,} of {layout.total:,} rows; run the same build again to complete it"
    ids = f"ids {layout.first} to {layout.first + layout.samples - 1}" if layout.dense else "arbitrary ids"
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    rows = [
        ("cache", str(path)),
        ("state", f"complete, {layout.rows:,} rows" if layout.complete else state),
        ("samples", f"{layout.samples:,}, {ids}"),
        ("views", views),
        *(("feature", f"{name!r} {shape}") for name, shape in layout.features.items()),
        ("on disk", f"{layout.dtype}, {layout.row_bytes:,} bytes per row, {counted(layout.shards, 'file')}, {size / 1e6:,.1f} MB"),
        *(
            ("error", f"{name!r}: 1 - cos mean {each['mean_cosine']:.2g}, max {each['max_cosine']:.2g}; "
                      f"relative max {each['max_relative']:.2g}")
            for name, each in layout.error.items()
        ),
        ("fingerprint", layout.fingerprint),
        *((f"- {name}", text) for name, text in layout.parts.items()),
        *((f"note {name}", text) for name, text in layout.notes.items()),
    ]  # fmt: skip
    return "\n".join(f"{show_name(name):<16}{show_name(text, 400)}" for name, text in rows)


def describe_check(check: CacheCheck) -> str:
    """Describe the result of `verify` on one line.

    Examples:
        >>> describe_check(CacheCheck(100, 2, 64, {"embedding": 2e-8}))
        'good: 100 rows in 2 files have correct checksums and finite values; 64 rows recomputed, maximum 1 - cos 2e-08'
    """
    again = ""
    if check.recomputed:
        again = f"; {check.recomputed} rows recomputed, maximum 1 - cos {max(check.max_cosine.values()):.2g}"
    return (
        f"good: {check.rows:,} rows in {counted(check.shards, 'file')} have correct checksums and finite values{again}"
    )


def _build_options(cache: TeacherCache) -> tuple[SeededViews, dict[str, str], int, InputOptions, Amp]:
    """Return views, taps, image size, the images of the teacher and the precision from the notes of a cache."""
    notes = cache.notes
    try:
        taps, size = json.loads(notes["taps"]), int(notes["size"])
        named = isinstance(taps, dict) and all(isinstance(tap, str) for tap in taps.values())
        if not named or not 1 <= size <= 4096:
            raise ValueError("taps or size have a wrong type")
        amp = next(each for each in DTYPES if each == notes.get("amp", "none"))
        return SeededViews.from_text(notes["views"]), taps, size, InputOptions.parse(notes.get("input", "")), amp
    except (KeyError, ValueError, RecursionError, StopIteration) as error:
        raise InputError(
            f"cache: the notes of {cache.path} do not describe the build ({error}); verify it without --teacher"
        ) from error


@contextmanager
def _workers(count: int, work: Callable[..., object], threads: int, *, quiet: bool) -> Iterator[None]:
    """Run other processes that build the same cache within the block; the work of a failed process is done by the others.

    When the block ends, the cache is complete or an error was raised, so running processes can be terminated.
    """
    context = multiprocessing.get_context("spawn")
    running = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(theirs, work, threads), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
        yield
        for process, ours in running:
            if process.exitcode:
                reason = f"terminated (exit code {process.exitcode})"
                with suppress(EOFError):
                    reason = ours.recv_bytes(1 << 16).decode()
                say(f"cache: a worker failed and the others did its work: {reason}", quiet=quiet)
    finally:
        for process, ours in running:
            process.terminate()
            process.join()
            ours.close()


def _worker(connection: Connection, work: Callable[..., object], threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        with sigterm_exits():
            work(quiet=True)
    except Exception as error:
        connection.send_bytes(f"{type(error).__name__}: {error}".encode()[:4096])
        sys.exit(1)
