"""Image sets of protocols: image files, encoded images, tensors, crops by landmarks, or embeddings alone."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.data.alignment import align_face
from kdlib_faces.data.images import decode_image, read_pixels
from kdlib_faces.data.sources.base import FileImages, ImageSource

__all__ = [
    "OF_EMBEDDINGS", "Embeddings", "ImageSet", "aligned_images", "check_embeddings", "file_name", "images_of_bytes",
    "images_of_files", "images_of_source", "images_of_tensor", "rows_only",
]  # fmt: skip

WORKERS = 2
Embeddings: TypeAlias = NDArray[np.floating[Any]]
"""(n, d)"""
AS_THEY_ARE = "none: images as they are"
OF_EMBEDDINGS = "that of the embeddings"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in the order of a protocol's rows, decoded when they are needed.

    Attributes:
        name: Name of the set, to distinguish the embeddings of several sets.
        count: Number of rows; None if only a file of embeddings determines it.
        fingerprint: Digest that changes with the images.
        read: Row and size to the image (3, size, size) uint8; None if only embeddings are known.
        label: Row to the name of the image.
        alignment: How the faces are aligned, for the report.
        sources: Encoded images that are resized as they are, so that their sizes can be checked.
    """

    name: str
    count: int | None
    fingerprint: str
    read: Callable[[int, int], NDArray[np.uint8]] | None
    label: Callable[[int], str]
    alignment: str = AS_THEY_ARE
    sources: ImageSource | Sequence[bytes] = ()

    def check_images(self) -> None:
        """Raise an `InputError` if the set has no images."""
        if self.read is None:
            raise InputError(f"{self.name}: no images are known, only embeddings can be evaluated; give images=FOLDER")

    def decode(self, rows: Sequence[int], size: int, *, workers: int = WORKERS) -> Tensor:
        """Images (b, 3, size, size) uint8, RGB, decoded by `workers` threads.

        Raises:
            InputError: The set has no images, or one of them is not readable (the message gives it).
        """
        self.check_images()
        read = self.read
        assert read is not None
        with ThreadPoolExecutor(workers) as pool:
            return torch.from_numpy(np.stack(list(pool.map(lambda row: read(row, size), rows))))

    def picture(self, row: int, size: int = 112) -> NDArray[np.uint8] | None:
        """One image as (size, size, 3); None if the set has no images."""
        return None if self.read is None else np.ascontiguousarray(self.read(row, size).transpose(1, 2, 0))


def images_of_source(name: str, images: ImageSource) -> ImageSet:
    """A set of encoded images; its fingerprint depends on their names, sizes and modification times."""
    digest = hashlib.sha256(f"images {len(images)}".encode())
    for part in images.layout(np.arange(len(images)), modified=True):
        digest.update(part)

    def read(row: int, size: int) -> NDArray[np.uint8]:
        return decode_image(images[row], size, name=images.name(row))

    label = _short_names(images.paths).__getitem__ if isinstance(images, FileImages) else images.name
    return ImageSet(name, len(images), digest.hexdigest(), read, label, sources=images)


def images_of_files(name: str, paths: Sequence[str | os.PathLike[str]]) -> ImageSet:
    """A set of image files; see `images_of_source`.

    Raises:
        InputError: A file is missing.
    """
    images = FileImages(paths)
    if (missing := next((path for path in images.paths if not path.is_file()), None)) is not None:
        raise InputError(f"{missing}: image file not found")
    return images_of_source(name, images)


def aligned_images(
    name: str, paths: Sequence[str | os.PathLike[str]], points: NDArray[np.float32], source: str
) -> ImageSet:
    """A set of n image files, each aligned by five of `points` (n, 5, 2), x and y in pixels, from `source`."""
    plain = images_of_files(name, paths)
    digest = hashlib.sha256(plain.fingerprint.encode() + np.ascontiguousarray(points, "<f4").tobytes())

    def read(row: int, size: int) -> NDArray[np.uint8]:
        pixels = read_pixels(paths[row])
        return np.ascontiguousarray(align_face(pixels, points[row], size).transpose(2, 0, 1))

    return ImageSet(name, plain.count, digest.hexdigest(), read, plain.label, f"by five points from {source}")


def images_of_bytes(name: str, images: Sequence[bytes]) -> ImageSet:
    """A set of encoded images in memory, as in a `.bin` file."""
    digest = hashlib.sha256(f"bytes {len(images)}".encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return ImageSet(
        name,
        len(images),
        digest.hexdigest(),
        lambda row, size: decode_image(images[row], size, name=f"{name}: image {row}"),
        lambda row: f"image {row}",
        "that of the file: its images as they are",
        images,
    )


def images_of_tensor(
    name: str, images: Tensor, labels: Sequence[str] = (), *, alignment: str = AS_THEY_ARE
) -> ImageSet:
    """An image set in memory.

    Args:
        name: Name of the set.
        images: (n, 3, h, w) uint8, RGB.
        labels: Name of each image; by default its row number.
        alignment: How the faces are aligned, for the report.

    Examples:
        >>> images_of_tensor("test", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).decode([1], 8).shape
        torch.Size([1, 3, 8, 8])
    """
    pixels = images.cpu().numpy()

    def read(row: int, size: int) -> NDArray[np.uint8]:
        if pixels.shape[2:] == (size, size):
            return np.ascontiguousarray(pixels[row])
        image = Image.fromarray(np.ascontiguousarray(pixels[row].transpose(1, 2, 0)))
        return np.ascontiguousarray(np.asarray(image.resize((size, size))).transpose(2, 0, 1))

    fingerprint = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return ImageSet(name, len(pixels), fingerprint, read, labels.__getitem__ if labels else str, alignment)


def rows_only(name: str, count: int | None, label: Callable[[int], str] = str) -> ImageSet:
    """A set without images: only files of embeddings can be evaluated on it."""
    return ImageSet(name, count, f"rows {count}", None, label, OF_EMBEDDINGS)


def file_name(text: str) -> str:
    """A name as part of a file name: at most 60 letters, digits and `_.-`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:60]


def _short_names(files: Sequence[Path]) -> list[str]:
    """Paths without their common parent."""
    if not files:
        return []
    shared = os.path.commonpath([str(path.absolute().parent) for path in files])
    return [os.path.relpath(path.absolute(), shared) for path in files]


def check_embeddings(where: str, array: object, count: int | None) -> None:
    """Embeddings must be (n, d) numbers, with `count` rows if that is known.

    Raises:
        InputError: The array has another shape, another number of rows, or no numbers.
    """
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
        shown = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{where}: embeddings must be (n, d) numbers, got {shown}")
    if count is not None and len(array) != count:
        raise InputError(f"{where}: embeddings must have one row for each of the {count} images, got {len(array)}")
