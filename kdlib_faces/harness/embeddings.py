"""Model files and files of embeddings; embeddings of image sets, kept on disk so that an interrupted run continues.

Rows are written in order, and the file is renamed when it is complete. Its name contains a fingerprint of the model, of
its settings and of the images, so that outdated embeddings are never used.
"""

import hashlib
import io
import json
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdlib._atomic import atomic_write
from kdlib._modes import eval_mode
from kdlib_faces._checks import InputError, NotFiniteError
from kdlib_faces._hardware import CPU, Amp, Hardware, autocast, share
from kdlib_faces.data.dataset import decode_batches
from kdlib_faces.data.image_files import describe_far_sizes
from kdlib_faces.data.lists import warn
from kdlib_faces.evaluation.embedding import embed_batch
from kdlib_faces.evaluation.summary import ModelEntry
from kdlib_faces.harness.image_sets import Embeddings, ImageSet, check_embeddings, file_name
from kdlib_faces.progress import progress as show
from kdlib_faces.progress import say

if TYPE_CHECKING:
    from kdlib_faces.teachers.input_options import InputOptions

__all__ = ["OpenedModel", "embed_set", "open_model", "read_embeddings"]

FORMAT = 1
KEPT_EVERY = 256
POLL_SECONDS = 0.1
NOT_FINITE = "NaN or infinity"


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """An opened model file.

    Attributes:
        path: The file.
        module: The network in eval mode.
        size: Side of its images, pixels.
        entry: Description of the model for the report.
        fingerprint: Digest of its weights and of its input conventions.
    """

    path: Path
    module: nn.Module
    size: int
    entry: ModelEntry
    fingerprint: str


def open_model(
    path: str | os.PathLike[str],
    size: int | None = None,
    input_options: "InputOptions | None" = None,
    *,
    device: torch.device = CPU,
    compile: bool = False,
    quiet: bool = False,
) -> OpenedModel:
    """Open a model file: `.onnx` as an ONNX graph, anything else as the weights of a backbone or a teacher.

    Args:
        path: The file.
        size: Side of its images in pixels; None for the model's own, or 112 if the file leaves it open.
        input_options: Input options, which override what the file implies; None for none.
        device: Device of the model.
        compile: Compile it by `torch.compile`; a graph stays as it is, and a line says so.
        quiet: Print no such line.

    Returns:
        The network in eval mode on the device, with its image size and its description.

    Raises:
        InputError: The file is missing, corrupt, or of no known layout.
    """
    from kdlib_faces.teachers.input_options import InputOptions

    label, input_options = Path(path).stem, input_options or InputOptions()
    module: nn.Module
    own: int | tuple[int, int] | None
    if Path(path).suffix.lower() == ".onnx":
        from kdlib_faces.teachers.onnx.inspect import describe_graph
        from kdlib_faces.teachers.open import open_onnx

        described = describe_graph(path, input_options.layout)
        own = described["input_size"]
        # As for checkpoints, the square crop is cut to the rectangle that the network takes.
        teacher = open_onnx(path, input_options=input_options, resize=isinstance(own, tuple), device=device)
        images = "" if teacher.image_format is None else teacher.image_format.describe()
        entry = ModelEntry("teacher", label, "ONNX", images, parameters=described["parameters"], macs=described["macs"])
        fingerprint = f"{teacher.fingerprint} None"
        module = teacher
    else:
        from kdlib_faces.teachers.open import load_network

        network = load_network(path, input_options)
        # The input spec of a network cuts the square crop to the rectangle that it takes.
        entry = ModelEntry(
            "student", label, repr(network).split("(", 1)[0], network.input_spec.describe(),
            parameters=sum(each.numel() for each in network.parameters()),
        )  # fmt: skip
        with open(path, "rb") as stream:
            fingerprint = f"{hashlib.file_digest(stream, 'sha256').hexdigest()} {network.input_spec!r}"
        module, own = network, network.input_size
    side = size or (112 if own is None else max(own) if isinstance(own, tuple) else int(own))
    module.eval().to(device)
    if compile and entry.backbone == "ONNX":
        say(f"{Path(path).name}: not compiled, since onnxruntime runs it", quiet=quiet)
    elif compile:
        module.compile()
    return OpenedModel(Path(path), module, side, replace(entry, input_size=side), fingerprint)


def embed_set(
    model: OpenedModel,
    images: ImageSet,
    folder: Path,
    *,
    batch_size: int = 64,
    flip: bool = True,
    progress: bool = False,
    hardware: Hardware | None = None,
    amp: Amp = "none",
    workers: int = 2,
) -> NDArray[np.float32]:
    """Embeddings (n, d) of an image set as the model returns them, not normalized; from `folder`, or computed and kept there.

    Several processes embed a part of the rows each; all of them return the whole.

    Args:
        model: From `open_model`.
        images: The image set.
        folder: Folder of the embeddings; created if absent.
        batch_size: Images in one forward.
        flip: Add the embedding of the mirrored image.
        progress: Show progress.
        hardware: Device of the model, and the processes that share the work; None for this process on the CPU.
        amp: Precision of the forward pass.
        workers: Threads that decode images.

    Returns:
        A read-only memory map.

    Raises:
        InputError: An image is not readable, or an embedding is not finite or zero (the message gives the image).
    """
    hardware = hardware or Hardware()
    parts = [str(FORMAT), model.fingerprint, str(model.size), str(flip), images.fingerprint]
    parts += [amp] if amp != "none" else []
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    target = folder / f"{file_name(model.path.stem)}-{file_name(images.name)}-{key}.npy"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        warn(describe_far_sizes(images.sources, model.size))
        try:
            _embed_shared(
                target, _Job(model, images, batch_size, flip, hardware.device, amp, workers, progress), hardware
            )
        except InputError:
            if (read := images.read) is not None and images.count is not None:
                # If images cannot be read, this lists all of them.
                for _ in decode_batches(lambda row: read(row, model.size), images.count, batch_size, workers, None):
                    pass
            raise
    array: NDArray[np.float32] = _load(target)
    check_embeddings(str(target), array, images.count)
    return array


@dataclass(frozen=True, eq=False)
class _Job:
    """A model, the images that it embeds, and how."""

    model: OpenedModel
    images: ImageSet
    batch_size: int
    flip: bool
    device: torch.device
    amp: Amp
    workers: int
    progress: bool


def _embed_shared(target: Path, job: _Job, hardware: Hardware) -> None:
    """Write the rows of all processes; the first process joins their files."""
    count = job.images.count
    assert count is not None  # a set with images has rows
    if hardware.count == 1:
        _embed_to(target, job, range(count))
        return
    parts = [target.with_name(f"{target.name}.{each}-of-{hardware.count}") for each in range(hardware.count)]
    own = parts[hardware.rank]
    rows = share(count, hardware)
    if rows and not own.exists():
        _embed_to(own, job, rows)
    if not hardware.first:
        _wait_for(target)
        return
    written = [path for each, path in enumerate(parts) if share(count, replace(hardware, rank=each))]
    for path in written:
        _wait_for(path)
    arrays = [_load(path) for path in written]
    with atomic_write(target) as stream:
        stream.write(_header(arrays[0].shape[1], count))
        for array in arrays:
            stream.write(array.tobytes())
    for path in parts:
        path.unlink(missing_ok=True)


def _wait_for(path: Path) -> None:
    """Wait for a file of another process; `torchrun` ends this process when that one ends with an error."""
    while not path.exists():
        time.sleep(POLL_SECONDS)


def _embed_to(target: Path, job: _Job, rows: range) -> None:
    """Write rows in order to a part file; the note beside it holds the number of rows that are safe on disk."""
    model, images = job.model, job.images
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".json")
    count = len(rows)
    done, width = _rows_kept(note, part)
    batch = max(1, min(job.batch_size, KEPT_EVERY))
    starts = range(done, count, batch)
    label = f"{model.path.name} on {images.name}, {count:,} images from {done:,}, batches of {batch}"
    last, begin = done, time.monotonic()
    with part.open("r+b" if done else "wb") as stream, eval_mode(model.module), autocast(job.device, job.amp):
        if done:
            stream.seek(len(_header(width, count)) + done * width * 4)
            stream.truncate()
        for start in show(starts, label, quiet=not job.progress):
            stop = min(start + batch, count)
            pixels = images.decode(rows[start:stop], model.size, workers=job.workers).to(job.device)
            try:
                array = embed_batch(model.module, pixels, flip=job.flip).astype("<f4", copy=False)
                bad = _unusable_row(array)
            except NotFiniteError as error:
                bad = error.row, NOT_FINITE
            if bad is not None:
                where = f"{images.label(rows[start + bad[0]])} of {images.name}"
                raise InputError(f"{model.path}: the model returns {bad[1]} for {where}")
            if not start:
                width = array.shape[1]
                stream.write(_header(width, count))
            stream.write(array.tobytes())
            if stop - last >= KEPT_EVERY or time.monotonic() - begin > 10 or stop == count:
                stream.flush()
                os.fsync(stream.fileno())
                with atomic_write(note) as file:
                    file.write(json.dumps({"format": FORMAT, "done": stop, "width": width}).encode())
                last, begin = stop, time.monotonic()
    os.replace(part, target)
    note.unlink(missing_ok=True)


def _unusable_row(rows: NDArray[Any]) -> tuple[int, str] | None:
    """The first row without a direction, and what it holds."""
    for what, good in ((NOT_FINITE, np.isfinite(rows).all(axis=1)), ("zero", rows.any(axis=1))):
        if not good.all():
            return int(good.argmin()), what
    return None


def _header(width: int, count: int) -> bytes:
    """Header of a `.npy` file of float32 rows."""
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def _rows_kept(note: Path, part: Path) -> tuple[int, int]:
    """Number and width of the rows of a part file that are safe on disk; (0, 0) without such a file."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        done, width = int(content["done"]), int(content["width"])
        enough = content["format"] == FORMAT and part.stat().st_size >= done * width * 4
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    return (done, width) if enough and done > 0 and width > 0 else (0, 0)


def _load(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of a `.npy` file as a memory map."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers written by Python 2, and of sizes that overflow
            return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"embeddings not found: {path}") from None
    # For a damaged header, NumPy raises the errors of Python's tokenizer, parser and integers.
    except Exception as error:
        known = isinstance(error, (ValueError, EOFError, OSError)) and not isinstance(error, SyntaxError)
        reason = str(error).splitlines()[0][:160] if known and str(error) else "its header is damaged"
        raise InputError(f"{path}: not a .npy file of numbers ({reason})") from None


def read_embeddings(path: str | os.PathLike[str], count: int | None) -> Embeddings:
    """Embeddings (n, d) from a `.npy` file, in the order of the images, as a memory map.

    Raises:
        InputError: There is no such file, it holds no array of numbers, pickled objects or another number of rows, or a
            row is not finite or zero.
    """
    array = _load(path)
    check_embeddings(str(path), array, count)
    for start in range(0, len(array), 4096):
        if (bad := _unusable_row(array[start : start + 4096])) is not None:
            raise InputError(f"{path}: embeddings must be finite and not zero, row {start + bad[0]} is {bad[1]}")
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    elif array.dtype not in (np.float16, np.float32, np.float64):  # another byte order, or more than 64 bits
        array = array.astype(np.float64)
    embeddings: Embeddings = array
    return embeddings
