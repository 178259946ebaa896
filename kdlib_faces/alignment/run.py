"""A folder of photographs to a folder of aligned crops with a face list."""

import multiprocessing
import re
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Literal

import torch

from kdlib._atomic import atomic_write
from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError, show_name
from kdlib_faces._hardware import CPU
from kdlib_faces._output import check_output, locked
from kdlib_faces._processes import end_with_parent, sigterm_exits
from kdlib_faces.alignment.manifest import MANIFEST, Manifest, PhotographState, open_manifest
from kdlib_faces.alignment.photographs import AlignConfig, AlignedPhotograph, PhotographAligner
from kdlib_faces.alignment.tables import DOUBTFUL, FACES, SHEET, Photograph, write_tables
from kdlib_faces.config import walk_settings
from kdlib_faces.data.image_files import describe_skipped, describe_suffixes, scan_folder
from kdlib_faces.data.lists import warn
from kdlib_faces.progress import progress as show_progress
from kdlib_faces.progress import say

__all__ = ["AlignResult", "align_photos"]

SHARED = ("low_score", "max_scale", "max_misfit", "max_rival")
"""Settings that only decide which crops are listed as doubtful, and may change."""

QUEUED = 4
"""Photographs in work per process."""


@dataclass(frozen=True)
class AlignResult:
    """Counts of a finished alignment, and its face list.

    Attributes:
        photographs: Number of photographs.
        crops: Number of crops.
        without_face: Number of photographs in which no face was found.
        doubtful: Number of rows of `doubtful.csv`.
        faces: The face list of the crops.
    """

    photographs: int
    crops: int
    without_face: int
    doubtful: int
    faces: Path


def align_photos(
    photographs: str | PathLike[str],
    detector: str | PathLike[str],
    output: str | PathLike[str],
    *,
    config: AlignConfig | None = None,
    workers: int = 1,
    progress: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    device: torch.device = CPU,
) -> AlignResult:
    """Detect the faces of a folder of photographs and write aligned crops, in the same folders.

    `output` then contains the crops; `faces.csv`, a face list with a row for each crop: path, identity (the first folder below
    `photographs`), source, score, number of faces found, box and five points; `doubtful.csv`, the photographs and crops that
    need a look, with the reason; `doubtful.png`, the first of them as pictures; and `manifest.jsonl`, from which an interrupted
    run continues. Files that are not images are counted and named in a warning. Another run with the same settings only processes
    photographs that are new, changed, or lack their crop.

    With `several="all"`, only the largest face of a photograph has the identity of the folder; that of the others is empty.

    Args:
        photographs: The folder; images at any depth, turned as their EXIF orientation states.
        detector: The `.onnx` file of the detector; see `FaceDetector`.
        output: Folder of the crops.
        config: The settings; the defaults if None.
        workers: Number of processes. With more than one, a script needs `if __name__ == "__main__":` around the call.
        progress: Show progress.
        on_error: `"skip"` leaves out files that cannot be read, and lists them in `doubtful.csv`; `"stop"` is an error after
            all others are done.
        device: Device of the detector; each process has a session of its own on it.

    Returns:
        Counts, and the path of `faces.csv`.

    Raises:
        InputError: The folder has no images, the detector or the output cannot be used, the output holds crops of other
            settings, a file cannot be read (`on_error="stop"`), or there is no face (in a photograph with `no_face="stop"`,
            else in all of them).
        OSError: The output cannot be written.

    Examples:
        With a detector at hand::

            result = align_photos("photographs", "face_detection_yunet_2023mar.onnx", "crops", workers=4)
            faces = read_faces(result.faces)
    """
    config = AlignConfig() if config is None else config
    check_number("align", "workers", workers, min=1, integer=True)
    check_choice("align", "on_error", on_error, ("stop", "skip"))
    source, target = Path(photographs), Path(output)
    plan = _plan(source, target, config)
    # A wrong file is an error before anything is written.
    aligner = PhotographAligner(Path(detector), config, device=device)
    check_output(target, FACES, DOUBTFUL, SHEET, MANIFEST)
    _check_folders(plan, target)
    settings = {name: repr(value) for name, value in walk_settings(config) if name not in SHARED}
    settings = {"detector": aligner.detector.sha256[:16], **settings}
    with sigterm_exits(), locked(target), open_manifest(target, settings) as manifest:
        missing = [photograph for photograph in plan if not _is_done(photograph, manifest, target)]
        if len(missing) < len(plan):
            say(f"align: {len(plan) - len(missing):,} of {len(plan):,} photographs are done", quiet=not progress)
        results = _align(missing, aligner) if workers == 1 else _align_in_processes(missing, aligner, workers, device)
        with closing(results):
            shown = show_progress(results, "photographs", total=len(missing), quiet=not progress)
            for photograph, state, found, images in shown:
                if config.no_face == "stop" and not found.error and not found.faces:
                    raise InputError(f"{photograph.path}: no face found; --no-face skip leaves such photographs out")
                _write(photograph, state, found, images, manifest, target)
        return _finish(plan, manifest, target, config, on_error)


def _plan(source: Path, output: Path, config: AlignConfig) -> list[Photograph]:
    """The photographs with the names of their crops, which keep the name of the photograph where it is unique."""
    if output.resolve().is_relative_to(source.resolve()):
        raise InputError(f"align: the output {output} must not be in the folder of photographs, {source}")
    files, others = scan_folder(source)
    if not files:
        raise InputError(f"{source}: no images found{f' among {describe_suffixes(others)}' if others else ''}")
    warn(describe_skipped(source, others))
    counts: dict[str, int] = {}
    for file in files:
        counts[str(file.with_suffix("")).casefold()] = counts.get(str(file.with_suffix("")).casefold(), 0) + 1
    plan, used = [], {FACES, DOUBTFUL, SHEET}
    for file in files:
        name = file.relative_to(source).as_posix()
        if not name.isprintable() or name != name.strip():
            raise InputError(f"align: {show_name(name)!r} has a name that a list cannot hold; rename it")
        single = counts[str(file.with_suffix("")).casefold()] == 1
        stem = file.stem if single else file.name.replace(".", "_")
        # The name of a second face must not be that of another photograph.
        stem = f"{stem}_" if config.several == "all" and re.search(r"_face\d+$", stem) else stem
        crop = file.relative_to(source).with_name(stem).as_posix()
        if f"{crop}.{config.format}".casefold() in used:
            raise InputError(
                f"align: {name!r} would get the crop of another photograph, {crop}.{config.format}; rename it"
            )
        used.add(f"{crop}.{config.format}".casefold())
        plan.append(Photograph(file, name, crop, config.format))
    return plan


def _check_folders(plan: Sequence[Photograph], output: Path) -> None:
    """Check that the folders of the crops are no links, so that writing stays inside the output."""
    for folder in {parent for photograph in plan for parent in PurePosixPath(photograph.crop).parents}:
        if folder.parts and (output / folder).is_symlink():
            raise InputError(
                f"the output must not contain links that lead elsewhere, {output / folder} is one; remove it"
            )


def _is_done(photograph: Photograph, manifest: Manifest, output: Path) -> bool:
    row = manifest.rows.get(photograph.name)
    if row is None or row[1].error or row[0] != PhotographState.of(photograph.path):
        return False
    return all((output / photograph.crop_path(number)).is_file() for number in range(len(row[1].crops)))


_Result = tuple[Photograph, PhotographState, AlignedPhotograph, list[bytes]]


def _align(photographs: Sequence[Photograph], aligner: PhotographAligner) -> Generator[_Result, None, None]:
    for photograph in photographs:
        state = PhotographState.of(photograph.path)
        yield photograph, state, *aligner(photograph.path)


def _align_in_processes(
    photographs: Sequence[Photograph], aligner: PhotographAligner, workers: int, device: torch.device
) -> Generator[_Result, None, None]:
    arguments = (aligner.detector.path, aligner.config, device)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, arguments)
    try:
        for photograph, state, future in _submit(pool, photographs, QUEUED * workers):
            yield photograph, state, *future.result()
    except BrokenProcessPool:
        raise InputError("align: a worker process was ended, perhaps for lack of memory; use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_Future = Future[tuple[AlignedPhotograph, list[bytes]]]


def _submit(
    pool: ProcessPoolExecutor, photographs: Sequence[Photograph], queued: int
) -> Iterator[tuple[Photograph, PhotographState, _Future]]:
    """Submit photographs so that at most `queued` are in work, and yield them in their order."""
    waiting: deque[tuple[Photograph, PhotographState, _Future]] = deque()
    tasks = iter(photographs)
    while True:
        for photograph in islice(tasks, queued - len(waiting)):
            state = PhotographState.of(photograph.path)
            waiting.append((photograph, state, pool.submit(_work, photograph.path)))
        if not waiting:
            return
        yield waiting.popleft()


_ALIGNERS: list[PhotographAligner] = []
"""The aligner of a worker process."""


def _start_worker(detector: Path, config: AlignConfig, device: torch.device) -> None:
    end_with_parent()
    _ALIGNERS.append(PhotographAligner(detector, config, threads=1, device=device))


def _work(path: Path) -> tuple[AlignedPhotograph, list[bytes]]:
    return _ALIGNERS[0](path)


def _write(
    photograph: Photograph, state: PhotographState, found: AlignedPhotograph, images: Sequence[bytes],
    manifest: Manifest, output: Path,
) -> None:  # fmt: skip
    """Write the crops of a photograph, then its row."""
    before = manifest.rows.get(photograph.name)
    for number, image in enumerate(images):
        with atomic_write(output / photograph.crop_path(number), sole_writer=True) as file:
            file.write(image)
    for number in range(len(images), len(before[1].crops) if before else 0):
        (output / photograph.crop_path(number)).unlink(missing_ok=True)
    if before != (state, found):  # an unreadable file is tried again, mostly with the same result
        manifest.append(photograph.name, state, found)


def _finish(
    plan: Sequence[Photograph], manifest: Manifest, output: Path, config: AlignConfig, on_error: str
) -> AlignResult:
    """Write the lists and the sheet, and raise the errors that were found on the way."""
    found = [(photograph, manifest.rows[photograph.name][1]) for photograph in plan]
    errors = [each.error for _, each in found if each.error]
    if errors and on_error == "stop":
        shown = "; ".join(errors[:5]) + (f"; and {len(errors) - 5:,} more" if len(errors) > 5 else "")
        raise InputError(
            f"{len(errors):,} of {len(plan):,} photographs cannot be read: {shown}; --on-error skip leaves them out"
        )
    crops, doubtful = write_tables(found, output, config)
    if not crops:
        raise InputError(f"align: no crop was made of {len(plan):,} photographs; {output / DOUBTFUL} lists the reasons")
    missing = sum(not each.faces and not each.error for _, each in found)
    return AlignResult(len(plan), crops, missing, doubtful, output / FACES)
