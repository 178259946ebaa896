"""Decoding of image files to uint8 tensors."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdlib._atomic import atomic_write
from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import Progress, with_progress
from kdlib_faces.data.image_files import describe_far_sizes, open_rgb
from kdlib_faces.data.lists import FaceList, warn

__all__ = [
    "check_pixels", "decode_batches", "decode_image", "fingerprint_files", "load_images", "read_image", "read_pixels",
    "to_float",
]  # fmt: skip

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

    Gray becomes three equal channels, and the EXIF orientation is applied. The format is recognized from the bytes, whatever
    the suffix: any that Pillow reads, except those for which it starts another program (EPS).

    Args:
        path: The file.

    Returns:
        `(h, w, 3)` uint8.

    Raises:
        InputError: The file is missing, not an image, truncated, or above 64 million pixels.
    """
    return np.asarray(open_rgb(path, str(path)))


def read_image(path: str | PathLike[str], size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Read an image file as `read_pixels` does, to `(3, h, w)` uint8 as `decode_image` does."""
    return _fit(open_rgb(path, str(path)), size)


def decode_image(data: bytes, size: int | tuple[int, int], *, name: str = "image") -> NDArray[np.uint8]:
    """Decode an image to RGB as `read_pixels` does, and resize it with antialiasing.

    An image that already has the size is returned unchanged. Another aspect ratio is kept, and the image is centered on
    black, as crops of other shapes relate to the template of `align_face`: a crop of 112 x 96 pixels (height x width)
    gets eight black columns on each side to make 112 x 112. Where `size` is not square, the height alone sets the scale, and
    columns that do not fit are cut.

    Args:
        data: The bytes of an image file.
        size: Side of the result, pixels, or (height, width).
        name: Name of the image in messages.

    Returns:
        `(3, h, w)` uint8.

    Raises:
        InputError: The data is not an image, truncated, or above 64 million pixels.

    Examples:
        >>> import io
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (2, 4), (255, 0, 7)).save(stream, "GIF")
        >>> decode_image(stream.getvalue(), 4)[0, 0].tolist()
        [0, 255, 255, 0]
    """
    return _fit(open_rgb(data, name), size)


def _fit(image: Image.Image, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    rows, columns = size if isinstance(size, tuple) else (size, size)
    scale = rows / image.height if rows != columns else min(rows / image.height, columns / image.width)
    inner = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    if inner != image.size:
        image = image.resize(inner, Image.Resampling.BILINEAR)
    left, top = (columns - inner[0]) // 2, (rows - inner[1]) // 2
    # A crop beyond the image is black.
    image = image.crop((-left, -top, columns - left, rows - top))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


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
        face_list: The images, a `FaceList` or plain paths. For a list, images far from `size` give a `FaceDataWarning`.
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
        InputError: Images are unreadable (the message lists all of them), the images exceed `memory_limit`, or the memory map
            holds something else.
    """
    check_number("load_images", "size", size, min=1, max=4096, integer=True)
    check_number("load_images", "workers", workers, min=1, integer=True)
    paths = [Path(path) for path in (face_list.paths if isinstance(face_list, FaceList) else face_list)]
    if isinstance(face_list, FaceList):
        warn(describe_far_sizes(paths, size))
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
    """Yield the images `read(0)` to `read(count - 1)` in stacked batches, decoded by `workers` threads.

    Raises:
        InputError: Images cannot be read. The others are decoded first, so that the message lists all of them.
    """

    def attempt(row: int) -> NDArray[np.uint8] | InputError:
        try:
            return read(row)
        except InputError as error:
            return error

    errors: list[InputError] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in with_progress(range(0, count, batch_size), f"images ({count})", progress):
            found = list(pool.map(attempt, range(start, min(start + batch_size, count))))
            errors += [each for each in found if isinstance(each, InputError)]
            if not errors:
                yield np.stack([each for each in found if not isinstance(each, InputError)])
    if errors:
        raise InputError(list_errors(errors, count))


def list_errors(errors: Sequence[InputError], count: int) -> str:
    """Return one line that lists the images that cannot be read, the first hundred of them in words."""
    if len(errors) == 1:
        return str(errors[0])
    more = f"; and {len(errors) - 100:,} more" if len(errors) > 100 else ""
    return f"{len(errors):,} of {count:,} images cannot be read: {'; '.join(map(str, errors[:100]))}{more}"


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
