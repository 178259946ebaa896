"""Data room: image files to one uint8 tensor. Touches Pillow, the file system, NumPy and torch tensors."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList

__all__ = ["decode_image", "load_images", "read_image", "to_float"]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
RUN_A_PROGRAM = frozenset({"EPS", "WMF", "EMF"})
MAX_PIXELS = 64_000_000
CHUNK = 256


def to_float(images: Tensor) -> Tensor:
    """Pixels 0..255 to `[-1, 1]`: `(x - 127.5) / 127.5`.

    Args:
        images: `(b, c, h, w)` uint8.

    Returns:
        `(b, c, h, w)` float32.

    Examples:
        >>> to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
        [-1.0, 1.0]
    """
    return images.to(torch.float32).sub_(127.5).div_(127.5)


def read_image(path: str | PathLike[str], size: int) -> NDArray[np.uint8]:
    """One image file as RGB, cropped to its central square and resized with antialiasing.

    Gray becomes three equal channels. EXIF rotation is ignored: aligned crops have none. The file is read as one of
    JPEG, PNG, BMP, WebP, TIFF and PPM, whatever its name says, and refused above 64 million pixels before decoding.

    Args:
        path: the file.
        size: side of the result, pixels.

    Returns:
        `(3, size, size)` uint8.

    Raises:
        InputError: the file is missing, no image, broken off, or too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = _to_rgb(image, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: image file not found") from None
    except Exception as error:
        raise _unreadable(error, str(path)) from None
    return _to_square(pixels, size)


def decode_image(data: bytes, size: int, *, name: str = "image") -> NDArray[np.uint8]:
    """One encoded image as RGB, cropped to its central square and resized with antialiasing; see `read_image`.

    The codec is found from the bytes: any that Pillow reads, except those for which it starts another program (EPS).
    An image that has the size already is returned pixel for pixel.

    Args:
        data: the bytes of an image file.
        size: side of the result, pixels.
        name: what to call the image in messages.

    Returns:
        `(3, size, size)` uint8.

    Raises:
        InputError: no image, broken off, or above 64 million pixels.

    Examples:
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (6, 4), (255, 0, 7)).save(stream, "GIF")
        >>> decode_image(stream.getvalue(), 2)[:, 0, 0].tolist()
        [255, 0, 7]
    """
    try:
        with Image.open(io.BytesIO(data), formats=_every_format()) as image:
            pixels = _to_rgb(image, name)
    except Exception as error:
        raise _unreadable(error, name) from None
    return _to_square(pixels, size)


@cache
def _every_format() -> tuple[str, ...]:
    Image.init()
    return tuple(each for each in Image.ID if each in Image.OPEN and each not in RUN_A_PROGRAM)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels; images above {MAX_PIXELS:,} are refused")
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name}: images of mode {image.mode!r} are not read, convert to 8 bits a channel")
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _unreadable(error: Exception, name: str) -> InputError:
    """A broken file can raise nearly anything inside a decoder."""
    if isinstance(error, InputError):
        return error
    reason = str(error).replace(name, "").strip(" :'\"") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "of no kind that is known here"
    return InputError(f"{name}: not a readable image ({reason})")


def _to_square(pixels: Image.Image, size: int) -> NDArray[np.uint8]:
    width, height = pixels.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if box != (0, 0, size, size) or width != height:
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(pixels, dtype=np.uint8).transpose(2, 0, 1))


def load_images(
    face_list: FaceList | Sequence[str | PathLike[str]],
    size: int,
    *,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
    workers: int = 2,
    memory_map: str | PathLike[str] | None = None,
    memory_limit: int = 8 * 2**30,
) -> Tensor:
    """Decode every image of a list to one tensor.

    Args:
        face_list: the images, a `FaceList` or plain paths.
        size: side of the result, pixels.
        progress: wraps an iterable and a label, as `kdlib_faces.progress.progress` does.
        workers: decoding threads.
        memory_map: a `.npy` file to keep the pixels in, for lists larger than memory. It appears under this name only
            when it is complete; a run that was stopped goes on where it was; a file made from another list, another
            size or images changed since is refused, not returned.
        memory_limit: bytes that a tensor in memory may take.

    Returns:
        `(n, 3, size, size)` uint8, in the order of the list.

    Raises:
        InputError: an unreadable image (named), too many images for memory, or a memory map of something else.
    """
    check_number("load_images", "size", size, min=1, max=4096, integer=True)
    check_number("load_images", "workers", workers, min=1, integer=True)
    paths = [Path(path) for path in (face_list.paths if isinstance(face_list, FaceList) else face_list)]
    needed = len(paths) * 3 * size * size
    if memory_map is not None:
        return _load_mapped(paths, size, Path(memory_map), progress, workers)
    if needed > memory_limit:
        raise InputError(
            f"load_images: {len(paths):,} images of {size} x {size} need {needed / 2**30:.1f} GiB, more than "
            f"the limit of {memory_limit / 2**30:.1f} GiB; give memory_map= or a smaller size"
        )
    pixels = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    at = 0
    for chunk in _decode(paths, size, progress, workers):
        pixels[at : at + len(chunk)] = chunk
        at += len(chunk)
    return torch.from_numpy(pixels)


def _decode(
    paths: Sequence[Path],
    size: int,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None,
    workers: int,
) -> Iterator[NDArray[np.uint8]]:
    starts: Iterable[int] = range(0, len(paths), CHUNK)
    with ThreadPoolExecutor(workers) as pool:
        for start in progress(starts, f"images ({len(paths)})") if progress is not None else starts:
            yield np.stack(list(pool.map(lambda path: read_image(path, size), paths[start : start + CHUNK])))


def _fingerprint(paths: Sequence[Path], size: int) -> str:
    digest = hashlib.sha256(f"kdlib images 1 {size} {len(paths)}".encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            raise InputError(f"{path}: image file not found") from None
        digest.update(
            f"\n{os.path.abspath(path)}\t{stat.st_size}\t{stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


def _load_mapped(
    paths: Sequence[Path],
    size: int,
    target: Path,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None,
    workers: int,
) -> Tensor:
    """The note beside the file says whose pixels it holds and how many are safe; the name says whether it is whole."""
    note, part = target.with_name(target.name + ".json"), target.with_name(target.name + ".part")
    fingerprint = _fingerprint(paths, size)
    known = _read_note(note)
    if target.exists():
        if known.get("fingerprint") != fingerprint:
            raise InputError(f"{target}: holds other images, or another size; delete it or name another memory map")
        return _open_map(target, len(paths), size)
    done = known.get("done", 0) if known.get("fingerprint") == fingerprint and part.exists() else 0
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written with plain writes: a full disk is then an OSError, where writing through a map would kill the process.
    with part.open("r+b" if done else "wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, size, size)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.seek(stream.tell() + done * 3 * size * size)
        stream.truncate()
        for chunk in _decode(paths[done:], size, progress, workers):
            stream.write(chunk.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
            done += len(chunk)
            _write_note(note, {"format": 1, "fingerprint": fingerprint, "size": size, "done": done})
    os.replace(part, target)
    return _open_map(target, len(paths), size)


def _open_map(target: Path, count: int, size: int) -> Tensor:
    try:
        # Copy on write: torch wants a writable array, and nothing may change the file.
        pixels = np.load(target, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{target}: not a memory map of images ({error})") from None
    if pixels.shape != (count, 3, size, size) or pixels.dtype != np.uint8:
        raise InputError(f"{target}: must hold ({count}, 3, {size}, {size}) uint8, got {pixels.shape} {pixels.dtype}")
    return torch.from_numpy(pixels)


def _read_note(note: Path) -> dict[str, Any]:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("done"), int) else {}


def _write_note(note: Path, content: dict[str, Any]) -> None:
    part = note.with_name(note.name + ".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, note)
