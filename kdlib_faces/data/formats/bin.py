"""Reading and writing of `.bin` verification sets: pickles of encoded images and pair labels."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdlib._atomic import atomic_write
from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.dataset import decode_batches
from kdlib_faces.data.formats.files import Progress, mapped
from kdlib_faces.data.formats.pickle import PickledArray, parse_pickle
from kdlib_faces.data.image_files import describe_far_sizes
from kdlib_faces.data.images import decode_image
from kdlib_faces.data.lists import warn

__all__ = ["BinSet", "load_bin", "save_bin"]

MAX_FILE = 8 * 2**30
MAX_IMAGES = 1_000_000
MAX_IMAGE = 64 * 2**20


@dataclass(frozen=True, eq=False)
class BinSet:
    """A verification set: pair k is images 2k and 2k + 1, as `PairProtocol.interleaved` expects them.

    Attributes:
        images: `2n` encoded images, in any codec that Pillow reads.
        same: `(n,)` bool, whether a pair is genuine.
        source: The file.
    """

    images: list[bytes]
    same: NDArray[np.bool_]
    source: str = ""

    def __len__(self) -> int:
        return len(self.same)

    def __repr__(self) -> str:
        return f"<BinSet: {len(self)} pairs, {int(self.same.sum())} genuine>"

    def batches(
        self, size: int = 112, *, batch_size: int = 256, workers: int = 2, progress: Progress | None = None
    ) -> Iterator[Tensor]:
        """Decode the images in order, one batch at a time; memory does not grow with the set.

        Images of another size are resized as by `kdlib_faces.data.images.decode_image`; those far from `size` give a
        `FaceDataWarning`. The last batch may be smaller.

        Args:
            size: Side of the images, pixels.
            batch_size: Images per batch.
            workers: Decoding threads.
            progress: Wraps an iterable and a label, as `kdlib_faces.progress.progress` does.

        Returns:
            Iterator of `(b, 3, size, size)` uint8, RGB.

        Raises:
            InputError: Images do not decode; the message gives their numbers.
        """
        check_number("BinSet.batches", "size", size, min=1, max=4096, integer=True)
        check_number("BinSet.batches", "batch_size", batch_size, min=1, integer=True)
        check_number("BinSet.batches", "workers", workers, min=1, integer=True)

        warn(describe_far_sizes(self.images, size))

        def read(row: int) -> NDArray[np.uint8]:
            return decode_image(self.images[row], size, name=f"{self.source or 'set'}: image {row}")

        batches = decode_batches(read, len(self.images), batch_size, workers, progress)
        return (torch.from_numpy(batch) for batch in batches)


def load_bin(path: str | PathLike[str]) -> BinSet:
    """Read a `.bin` verification set as insightface publishes and writes them.

    The file is a pickle of `(images, same)`: 2n encoded images, as byte strings or flat uint8 arrays, and n labels. Files
    of Python 2 and 3, of protocols 0 to 5 and with arrays of old and new NumPy are read. Nothing that the file names is
    imported or called, and anything that such a set does not need is refused.

    Args:
        path: The file.

    Returns:
        BinSet. Its `same` may hold only one kind of pair; an evaluation then raises an error.

    Raises:
        InputError: The file is missing, truncated or above 8 GiB; it uses an operation or a name that such a set does not
            need (the message gives the byte); there are not two images per label, no pair or more than 1,000,000 images; a
            label is neither 0 nor 1; or an image is empty or above 64 MiB.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.bin"
        >>> save_bin(file, [b"a", b"b", b"c", b"d"], [True, False])
        >>> load_bin(file).same.tolist()
        [True, False]
    """
    name = str(path)
    with mapped(path, ".bin set", MAX_FILE) as data:
        value = parse_pickle(data, name)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"{name}: must hold two items, images and labels, got {_kind(value)}")
    images, same = _images(name, value[0]), _same(name, value[1])
    if len(images) != 2 * len(same):
        raise InputError(
            f"{name}: {len(same)} labels need {2 * len(same)} images, got {len(images)}; the file is incomplete"
        )
    if not images:
        raise InputError(f"{name}: the set holds no pair")
    return BinSet(images, same, name)


def _kind(value: object) -> str:
    count = f" of {len(value)}" if isinstance(value, (list, tuple, bytes, str)) else ""
    return ("array" if isinstance(value, PickledArray) else type(value).__name__) + count


def _items(name: str, what: str, value: object) -> Sequence[object]:
    """The items of a list, a tuple or an array of objects."""
    items = value.data if isinstance(value, PickledArray) and isinstance(value.data, list) else value
    if not isinstance(items, (list, tuple)):
        raise InputError(f"{name}: the {what} must be a list, got {_kind(items)}")
    return items


def _images(name: str, value: object) -> list[bytes]:
    entries = _items(name, "images", value)
    if len(entries) > MAX_IMAGES:
        raise InputError(f"{name}: {len(entries):,} images; sets above {MAX_IMAGES:,} are refused")
    images = []
    for number, entry in enumerate(entries):
        where = f"{name}: image {number}"
        if isinstance(entry, PickledArray):
            if (
                _numbers(where, entry).dtype != np.uint8
                or not entry.shape
                or sum(side != 1 for side in entry.shape) > 1
            ):
                raise InputError(f"{where} must be bytes or (n,) uint8, got an array {entry.shape} of {entry.dtype!r}")
            entry = entry.data
        if not isinstance(entry, bytes):
            raise InputError(f"{where} must be bytes or (n,) uint8, got {_kind(entry)}")
        if not 0 < len(entry) <= MAX_IMAGE:
            raise InputError(f"{where} must have 1 to {MAX_IMAGE:,} bytes, got {len(entry):,}")
        images.append(entry)
    return images


def _same(name: str, value: object) -> NDArray[np.bool_]:
    labels: Sequence[object]
    if isinstance(value, PickledArray) and isinstance(value.data, bytes):
        labels = _numbers(f"{name}: the labels", value).tolist()
    else:
        labels = _items(name, "labels", value)
    same = np.zeros(len(labels), dtype=bool)
    for number, label in enumerate(labels):
        if isinstance(label, PickledArray):
            numbers = _numbers(f"{name}: label {number}", label)
            label = int(numbers[0]) if len(numbers) == 1 else label
        if not isinstance(label, int) or label not in (0, 1):
            shown = str(label) if isinstance(label, int) else _kind(label)
            raise InputError(f"{name}: label {number} must be True or False, got {shown}")
        same[number] = bool(label)
    return same


def _numbers(what: str, array: PickledArray) -> NDArray[Any]:
    """The flat array of numbers that a pickle describes."""
    if not isinstance(array.data, bytes) or not array.dtype or "O" in array.dtype:
        raise InputError(f"{what} must be numbers, got an array of {array.dtype!r}")
    dtype = np.dtype(array.dtype)
    if math.prod(array.shape) * dtype.itemsize != len(array.data):
        raise InputError(f"{what}: an array {array.shape} of {array.dtype!r} holds {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype)


def save_bin(path: str | PathLike[str], images: Sequence[bytes], same: ArrayLike) -> None:
    """Write a set that `load_bin` and every reader of such files accept (pickle protocol 3, bytes and bools).

    The file appears under its name only when it is complete.

    Args:
        path: The file.
        images: `2n` encoded images.
        same: `(n,)` bools.

    Raises:
        ValueError: There are not two images per label, no pair, or an image is not bytes.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.bin"
        >>> save_bin(file, [b"a", b"b", b"c", b"d"], [True, False])
        >>> load_bin(file)
        <BinSet: 2 pairs, 1 genuine>
    """
    flags = np.asarray(same)
    if flags.ndim != 1 or not np.isin(flags, (0, 1)).all():
        raise ValueError(f"save_bin: same must be (n,) bools, got shape {flags.shape} of {flags.dtype}")
    if not len(flags) or len(images) != 2 * len(flags):
        raise ValueError(
            f"save_bin: images must be two per label, at least 2, got {len(images)} for {len(flags)} labels"
        )
    for number, image in enumerate(images):
        if not isinstance(image, bytes) or not 0 < len(image) <= MAX_IMAGE:
            raise ValueError(f"save_bin: image {number} must be 1 to {MAX_IMAGE:,} bytes, got {type(image).__name__}")
    with atomic_write(path) as stream:
        stream.write(b"\x80\x03](")
        for image in images:
            stream.write(b"B" + len(image).to_bytes(4, "little") + image)
        stream.write(b"e](" + b"".join(b"\x88" if flag else b"\x89" for flag in flags.tolist()) + b"e\x86.")
