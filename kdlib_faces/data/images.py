"""Decoding of image files to uint8 tensors."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kdlib._atomic import atomic_write
from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import Progress, with_progress
from kdlib_faces.data.lists import FaceList

__all__ = [
    "check_pixels", "decode_batches", "decode_image", "fingerprint_files", "load_images", "read_image", "read_pixels",
    "to_float",
]  # fmt: skip

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
# Pillow starts an external program to decode these.
EXTERNAL_FORMATS = frozenset({"EPS", "WMF", "EMF"})
MAX_PIXELS = 64_000_000
CHUNK = 256


def to_float(images: Tensor) -> Tensor:
    """Map pixels from 0..255 to `[-1, 1]`: `(x - 127.5) / 127.5`.

    Args:
        images: `(b, c, h, w)` uint8.

    Returns:
        `(b, c, h, w)` float32.

    Examples:
        >>> to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
        [-1.0, 1.0]
    """
    return images.to(torch.float32).sub_(127.5).div_(127.5)


def check_pixels(owner: str, images: Tensor) -> None:
    """Check that `images` are `(b, 3, h, w)` uint8."""
    if images.dtype != torch.uint8:
        raise TypeError(f"{owner}: images must be uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{owner}: images must be (b, 3, h, w), got {tuple(images.shape)}")


def read_pixels(path: str | PathLike[str]) -> NDArray[np.uint8]:
    """Read a whole image file as RGB.

    Gray becomes three equal channels. EXIF rotation is ignored, because aligned crops have none. The file is decoded as
    JPEG, PNG, BMP, WebP, TIFF or PPM, whatever its suffix, and rejected above 64 million pixels before it is decoded.

    Args:
        path: The file.

    Returns:
        `(h, w, 3)` uint8.

    Raises:
        InputError: The file is missing, not an image, truncated or too large.
    """
    return np.asarray(_open_file(path))


def read_image(path: str | PathLike[str], size: int) -> NDArray[np.uint8]:
    """Read an image file as `read_pixels` does, to `(3, size, size)` uint8 as `decode_image` does."""
    return _to_square(_open_file(path), size)


def decode_image(data: bytes, size: int, *, name: str = "image") -> NDArray[np.uint8]:
    """Decode an image to RGB, crop it to its central square and resize it with antialiasing.

    The codec is detected from the bytes: any that Pillow reads, except those for which Pillow starts another program
    (EPS). An image that already has the size is returned unchanged.

    Args:
        data: The bytes of an image file.
        size: Side of the result, pixels.
        name: Name of the image in messages.

    Returns:
        `(3, size, size)` uint8.

    Raises:
        InputError: The data is not an image, truncated, or above 64 million pixels.

    Examples:
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (6, 4), (255, 0, 7)).save(stream, "GIF")
        >>> decode_image(stream.getvalue(), 2)[:, 0, 0].tolist()
        [255, 0, 7]
    """
    return _to_square(_to_rgb(io.BytesIO(data), _every_format(), name), size)


@cache
def _every_format() -> tuple[str, ...]:
    Image.init()
    return tuple(each for each in Image.ID if each in Image.OPEN and each not in EXTERNAL_FORMATS)


def _open_file(path: str | PathLike[str]) -> Image.Image:
    return _to_rgb(os.fspath(path), FORMATS, str(path))


def _to_rgb(source: str | io.BytesIO, formats: tuple[str, ...], name: str) -> Image.Image:
    try:
        with Image.open(source, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name}: {width} x {height} pixels; images above {MAX_PIXELS:,} are refused")
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{name}: images of mode {image.mode!r} are not read, convert to 8 bits per channel")
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: image file not found") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a readable image (unknown format)") from None
    except Exception as error:  # A broken file can raise nearly anything inside a decoder.
        reason = str(error).replace(name, "").strip(" :'\"") or type(error).__name__
        raise InputError(f"{name}: not a readable image ({reason})") from None


def _to_square(pixels: Image.Image, size: int) -> NDArray[np.uint8]:
    width, height = pixels.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if box != (0, 0, size, size) or width != height:
        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(pixels, dtype=np.uint8).transpose(2, 0, 1))


def fingerprint_files(paths: Sequence[str | PathLike[str]]) -> str:
    """Compute a fingerprint of the names, sizes and modification times of files; no content is read.

    Args:
        paths: The files. Their order counts, their folders do not.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: A file is missing.
    """
    digest = hashlib.sha256(f"files {len(paths)}".encode())
    for path in map(Path, paths):
        try:
            stat = path.stat()
        except OSError:
            raise InputError(f"{path}: image file not found") from None
        digest.update(f"\n{path.name}\t{stat.st_size}\t{stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def load_images(
    face_list: FaceList | Sequence[str | PathLike[str]],
    size: int,
    *,
    progress: Progress | None = None,
    workers: int = 2,
    memory_map: str | PathLike[str] | None = None,
    memory_limit: int = 8 * 2**30,
) -> Tensor:
    """Decode every image of a list to one tensor.

    Args:
        face_list: The images, a `FaceList` or plain paths.
        size: Side of the result, pixels.
        progress: Wraps an iterable and a label, as `kdlib_faces.progress.progress` does.
        workers: Decoding threads.
        memory_map: A `.npy` file that stores the pixels, for lists larger than memory. The file appears under this name
            only when it is complete, and an interrupted run resumes. A file made from another list, another size or
            images modified since is rejected.
        memory_limit: Maximum bytes of a tensor in memory.

    Returns:
        `(n, 3, size, size)` uint8, in the order of the list.

    Raises:
        InputError: An image is unreadable (the message names it), the images exceed `memory_limit`, or the memory map
            holds something else.
    """
    check_number("load_images", "size", size, min=1, max=4096, integer=True)
    check_number("load_images", "workers", workers, min=1, integer=True)
    paths = [Path(path) for path in (face_list.paths if isinstance(face_list, FaceList) else face_list)]
    if memory_map is not None:
        return _load_mapped(paths, size, Path(memory_map), progress, workers)
    needed = len(paths) * 3 * size * size
    if needed > memory_limit:
        raise InputError(
            f"load_images: {len(paths):,} images of {size} x {size} need {needed / 2**30:.1f} GiB, more than "
            f"the limit of {memory_limit / 2**30:.1f} GiB; give memory_map= or a smaller size"
        )
    pixels = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    done = 0
    for chunk in decode_batches(lambda row: read_image(paths[row], size), len(paths), CHUNK, workers, progress):
        pixels[done : done + len(chunk)] = torch.from_numpy(chunk)
        done += len(chunk)
    return pixels


def decode_batches(
    read: Callable[[int], NDArray[np.uint8]], count: int, batch_size: int, workers: int, progress: Progress | None
) -> Iterator[NDArray[np.uint8]]:
    """Yield the images `read(0)` to `read(count - 1)` in stacked batches, decoded by `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        for start in with_progress(range(0, count, batch_size), f"images ({count})", progress):
            yield np.stack(list(pool.map(read, range(start, min(start + batch_size, count)))))


def _load_mapped(paths: Sequence[Path], size: int, target: Path, progress: Progress | None, workers: int) -> Tensor:
    """Load or complete a memory map; the note beside it holds its fingerprint and the number of images written."""
    note, part = target.with_name(target.name + ".json"), target.with_name(target.name + ".part")
    fingerprint = f"{size} {fingerprint_files(paths)}"
    known, done = _read_note(note)
    if target.exists():
        if known != fingerprint:
            raise InputError(f"{target}: holds other images, or another size; delete it or name another memory map")
        return _open_map(target, len(paths), size)
    done = done if known == fingerprint and part.exists() else 0
    target.parent.mkdir(parents=True, exist_ok=True)
    # Plain writes raise OSError on a full disk; writing through a memory map would crash the process.
    with part.open("r+b" if done else "wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, size, size)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.seek(stream.tell() + done * 3 * size * size)
        stream.truncate()
        left = paths[done:]
        for chunk in decode_batches(lambda row: read_image(left[row], size), len(left), CHUNK, workers, progress):
            stream.write(chunk.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
            done += len(chunk)
            with atomic_write(note) as json_stream:
                json_stream.write(json.dumps({"fingerprint": fingerprint, "done": done}).encode())
    os.replace(part, target)
    return _open_map(target, len(paths), size)


def _open_map(target: Path, count: int, size: int) -> Tensor:
    try:
        # Copy on write: torch requires a writable array, and the file must not change.
        pixels = np.load(target, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{target}: not a memory map of images ({error})") from None
    if pixels.shape != (count, 3, size, size) or pixels.dtype != np.uint8:
        raise InputError(f"{target}: must hold ({count}, 3, {size}, {size}) uint8, got {pixels.shape} {pixels.dtype}")
    return torch.from_numpy(pixels)


def _read_note(note: Path) -> tuple[str, int]:
    """Fingerprint and number of images; an unreadable note counts as none."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        return str(content["fingerprint"]), int(content["done"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", 0
