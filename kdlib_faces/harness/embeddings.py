"""Recipe: models and files of embeddings, and the embeddings of a set of images, kept on disk as they are made.

A run that was killed goes on where it was: rows are written in their order, and the file takes its name when it is whole.
The name holds a fingerprint of the model, of how it is used and of the images, so that nothing stale is ever read.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdlib_faces._checks import InputError
from kdlib_faces.data.images import load_images
from kdlib_faces.data.lists import FaceList
from kdlib_faces.evaluation.embedding import embed_batch, embed_images, eval_mode
from kdlib_faces.harness.image_sets import ImageSet, check_array
from kdlib_faces.progress import progress as show

__all__ = ["Judged", "embed", "embed_faces", "embed_set", "load_model", "open_model", "read_embeddings"]

FORMAT = 1
KEPT_EVERY = 256


def load_model(path: str | os.PathLike[str]) -> tuple[nn.Module, int]:
    """A model file as a module in eval mode, and the side of its images in pixels (112 where the file leaves it free).

    `.onnx` is read as an ONNX graph, anything else as a backbone's weights.

    Raises:
        InputError: the file is missing, corrupt, of no known layout, or takes images that are not square.
    """
    model: nn.Module
    if Path(path).suffix.lower() == ".onnx":
        from kdlib_faces.teachers.onnx.session import OnnxTeacher

        model = OnnxTeacher(path)
    else:
        from kdlib_faces.teachers import load_teacher

        model = load_teacher(path)
    size: Any = getattr(model, "input_size", None)
    if isinstance(size, (tuple, list)):
        # A backbone's `input_spec` cuts the square crop to what it wants; a graph says itself what it takes.
        if len(set(size)) != 1 and getattr(model, "input_spec", None) is None:
            raise InputError(f"{path}: the model takes images of {size[0]} x {size[1]}, only square ones are evaluated")
        size = max(size)
    return model.eval(), 112 if size is None else int(size)


def embed(
    model: Callable[[Tensor], Any],
    images: Tensor,
    *,
    batch_size: int = 64,
    flip: bool = True,
    normalize: bool = True,
) -> Tensor:
    """Unit embeddings of images; with `flip`, of the sum of the plain and the mirrored image's embeddings.

    `kdlib_faces.evaluation.embed_images` for tensors.

    Args:
        model: `(b, 3, s, s)` in `[-1, 1]` to `(b, d)`, or to named features with one `"embedding"`.
        images: `(n, 3, s, s)` uint8.
        batch_size: images in one forward.
        flip: whether to add the mirrored image.
        normalize: whether to divide by the length in the end; templates want it kept.

    Returns:
        `(n, d)` float32.

    Examples:
        >>> pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        >>> embed(lambda x: x.flatten(1), pixels, batch_size=2).norm(dim=1).round(decimals=3)
        tensor([1., 1., 1., 1., 1.])
    """
    rows = embed_images(model, images, batch_size=batch_size, flip=flip, normalize=normalize, device=images.device)
    return torch.from_numpy(rows)


def embed_faces(
    model: Callable[[Tensor], Any],
    faces: FaceList,
    size: int,
    *,
    batch_size: int = 64,
    flip: bool = True,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Unit embeddings `(n, d)` of a face list, decoded as they are needed, so that memory does not grow with the list."""
    starts = range(0, len(faces), max(batch_size, 64))
    label = f"embeddings of {len(faces)} images, batches"
    batches = (
        load_images(faces.paths[start : start + starts.step], size) for start in show(starts, label, quiet=not progress)
    )
    return embed_images(model, batches, batch_size=batch_size, flip=flip)


@dataclass(frozen=True, eq=False)
class Judged:
    """A model file, opened: what is said of it, and what its embeddings depend on.

    Attributes:
        path: the file.
        module: in eval mode.
        size: side of its images, pixels.
        facts: of the report: `role`, `label`, `backbone`, `input_size`, `parameters`, `macs`.
        fingerprint: of its weights and of how it takes images.
    """

    path: Path
    module: nn.Module
    size: int
    facts: dict[str, Any]
    fingerprint: str


def open_model(path: str | os.PathLike[str], size: int | None = None) -> Judged:
    """Open a model file; `size` is the side of its images where not its own.

    Raises:
        InputError: as `load_model`.
    """
    module, own_size = load_model(path)
    side = own_size if size is None else size
    onnx = Path(path).suffix.lower() == ".onnx"
    spec: Any = getattr(module, "input_spec", None)
    described: dict[str, Any] = module.describe() if onnx else {}  # type: ignore[operator]  # an OnnxTeacher
    facts: dict[str, Any] = {
        "role": "teacher" if onnx else "student",
        "label": Path(path).stem,
        "backbone": "ONNX" if onnx else repr(module).split("(", 1)[0],
        "input_size": side,
        "parameters": described.get("parameters") if onnx else sum(p.numel() for p in module.parameters()),
        "macs": described.get("macs"),
    }
    if spec is not None:
        facts["input"] = spec.describe()
    known = module.fingerprint if onnx else _file_digest(Path(path))
    return Judged(Path(path), module, side, facts, f"{known} {spec!r}")


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def embed_set(
    model: Judged, images: ImageSet, folder: Path, *, batch_size: int = 64, flip: bool = True, progress: bool = False
) -> NDArray[np.float32]:
    """Embeddings `(n, d)` of a set as the model gives them (not normalized), from the folder or made and kept there.

    Args:
        model: opened by `open_model`.
        images: the set.
        folder: where embeddings are kept; made if absent.
        batch_size: images in one forward.
        flip: add the embedding of the mirrored image.
        progress: show how far it is.

    Returns:
        A read-only memory map.

    Raises:
        InputError: an image is not readable, or the model gives NaN, infinity or zero for one (it is named).
    """
    parts = [str(FORMAT), model.fingerprint, str(model.size), str(flip), images.fingerprint]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    target = folder / f"{_file_name(model.path.stem)}-{_file_name(images.name)}-{key}.npy"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _embed_to(target, model, images, batch_size, flip, progress)
    array: NDArray[np.float32] = np.load(target, mmap_mode="r", allow_pickle=False)
    check_array(str(target), array, images.count)
    return array


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:60]


def _embed_to(target: Path, model: Judged, images: ImageSet, batch_size: int, flip: bool, progress: bool) -> None:
    """Rows in their order into a part file; the note beside it says how many of them are safe."""
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".json")
    count = images.count
    assert count is not None  # a set with images has a number of them
    done, width = _kept(note, part)
    batch = max(1, min(batch_size, KEPT_EVERY))
    starts = range(done, count, batch)
    label = f"{model.path.name} on {images.name}, {count:,} images from {done:,}, batches of {batch}"
    last, begin = done, time.monotonic()
    with part.open("r+b" if done else "wb") as stream, eval_mode(model.module):
        if done:
            stream.seek(_header(width, count)[1] + done * width * 4)
            stream.truncate()
        for start in show(starts, label, quiet=not progress):
            rows = range(start, min(start + batch, count))
            found = embed_batch(model.module, images.decode(rows, model.size), flip=flip)
            array = found.astype("<f4", copy=False)
            for what, good in (("NaN or infinity", np.isfinite(array).all(axis=1)), ("zero", array.any(axis=1))):
                if not good.all():
                    name = images.label(rows[int(good.argmin())])
                    raise InputError(f"{model.path}: the model gives {what} for {name} of {images.name}")
            if not start:
                width = array.shape[1]
                stream.write(_header(width, count)[0])
            stream.write(array.tobytes())
            if rows.stop - last >= KEPT_EVERY or time.monotonic() - begin > 10 or rows.stop == count:
                stream.flush()
                os.fsync(stream.fileno())
                _write_note(note, {"format": FORMAT, "done": rows.stop, "width": width})
                last, begin = rows.stop, time.monotonic()
    os.replace(part, target)
    note.unlink(missing_ok=True)


def _header(width: int, count: int) -> tuple[bytes, int]:
    """The head of a `.npy` file and its length."""
    import io

    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue(), stream.tell()


def _kept(note: Path, part: Path) -> tuple[int, int]:
    """How many rows of a part file are safe, and how wide they are; (0, 0) where there is none."""
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        done, width = int(said["done"]), int(said["width"])
        enough = said["format"] == FORMAT and part.stat().st_size >= done * width * 4
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    return (done, width) if enough and done > 0 and width > 0 else (0, 0)


def _write_note(note: Path, content: dict[str, Any]) -> None:
    part = note.with_name(note.name + ".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, note)


def read_embeddings(path: str | os.PathLike[str], count: int | None) -> NDArray[Any]:
    """Embeddings `(n, d)` from a `.npy` file, in the order of the images; a memory map, read as it is needed.

    Raises:
        InputError: no such file, no array of numbers, pickled objects, another number of rows, or a row that is not
            finite or zero.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"embeddings not found: {path}") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a .npy file of numbers ({str(error).splitlines()[0]})") from None
    check_array(str(path), array, count)
    for start in range(0, len(array), 4096):
        rows = array[start : start + 4096]
        for what, good in (("finite", np.isfinite(rows).all(axis=1)), ("non-zero in every row", rows.any(axis=1))):
            if not good.all():
                raise InputError(f"{path}: embeddings must be {what}, row {start + int(good.argmin())} is not")
    found: NDArray[Any] = array if array.dtype.kind == "f" else array.astype(np.float32)
    return found
