"""Recipe: the images that a protocol is measured on, wherever they lie: files, `.bin` entries, crops by landmarks.

A set has an order of rows, knows what it depends on, and decodes any rows at any size, so that memory does not grow with it.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.data.alignment import align_face
from kdlib_faces.data.images import decode_image, fingerprint_files, read_image, read_pixels

__all__ = ["ImageSet", "aligned_images", "check_array", "images_of_bytes", "images_of_files", "rows_only"]

WORKERS = 2


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in the order of a protocol's rows.

    Attributes:
        name: what the set is called; embeddings of several sets are told apart by it.
        count: how many rows there are; None where only a file of embeddings tells.
        fingerprint: changes when an image does.
        read: one row at a size, `(3, size, size)` uint8; None where only embeddings are known.
        label: what a row is called.
    """

    name: str
    count: int | None
    fingerprint: str
    read: Callable[[int, int], NDArray[np.uint8]] | None
    label: Callable[[int], str]

    def decode(self, rows: Sequence[int], size: int) -> Tensor:
        """`(b, 3, size, size)` uint8, RGB.

        Raises:
            InputError: the set has no images, or one of them is not readable (it is named).
        """
        read = self.read
        if read is None:
            raise InputError(f"{self.name}: no images are known, only embeddings can be judged; give images=FOLDER")
        with ThreadPoolExecutor(WORKERS) as pool:
            return torch.from_numpy(np.stack(list(pool.map(lambda row: read(row, size), rows))))

    def picture(self, row: int, size: int = 112) -> NDArray[np.uint8] | None:
        """One row as `(size, size, 3)`; None where the set has no images."""
        return None if self.read is None else np.ascontiguousarray(self.read(row, size).transpose(1, 2, 0))


def images_of_files(name: str, paths: Sequence[str | os.PathLike[str]]) -> ImageSet:
    """A set of image files; its fingerprint is of their names, sizes and times.

    Raises:
        InputError: a file is missing.
    """
    files = [Path(path) for path in paths]
    short = _short_names(files)
    return ImageSet(
        name, len(files), fingerprint_files(files), lambda row, size: read_image(files[row], size), short.__getitem__
    )


def aligned_images(name: str, paths: Sequence[str | os.PathLike[str]], points: NDArray[np.float32]) -> ImageSet:
    """A set of image files, each aligned by its five points.

    Args:
        name: of the set.
        paths: n files.
        points: (n, 5, 2) x and y in pixels.
    """
    plain = images_of_files(name, paths)
    digest = hashlib.sha256(plain.fingerprint.encode() + np.ascontiguousarray(points, "<f4").tobytes())

    def read(row: int, size: int) -> NDArray[np.uint8]:
        pixels = read_pixels(paths[row])
        return np.ascontiguousarray(align_face(pixels, points[row], size).transpose(2, 0, 1))

    return ImageSet(name, plain.count, digest.hexdigest(), read, plain.label)


def images_of_bytes(name: str, images: Sequence[bytes]) -> ImageSet:
    """A set of encoded images in memory, as a `.bin` file holds them."""
    digest = hashlib.sha256(f"bytes {len(images)}".encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return ImageSet(
        name,
        len(images),
        digest.hexdigest(),
        lambda row, size: decode_image(images[row], size, name=f"{name}: image {row}"),
        lambda row: f"image {row}",
    )


def rows_only(name: str, count: int | None, label: Callable[[int], str] = str) -> ImageSet:
    """A set without images: only files of embeddings can be judged on it."""
    return ImageSet(name, count, f"rows {count}", None, label)


def _short_names(files: Sequence[Path]) -> list[str]:
    """Paths without what all have in common."""
    if not files:
        return []
    shared = os.path.commonpath([str(path.absolute().parent) for path in files])
    return [os.path.relpath(path.absolute(), shared) for path in files]


def check_array(where: str, array: Any, count: int | None) -> None:
    """Rows of numbers, `count` of them where that is known.

    Raises:
        InputError: another shape, another number of rows, or no numbers.
    """
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        shown = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{where}: embeddings must be (n, d) numbers, got {shown}")
    if count is not None and len(array) != count:
        raise InputError(f"{where}: embeddings must have one row for each of the {count} images, got {len(array)}")
