"""Data room: `.bin` verification sets, pickles of encoded images and of whether each pair is one person.

The file is read by `kdlib_faces.data.formats.pickle`, which executes nothing. Touches the file system, NumPy and, where images are
decoded, Pillow and torch tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import mapped, written
from kdlib_faces.data.formats.pickle import PickledArray, parse_pickle

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BinSet", "load_bin", "save_bin"]

MAX_FILE = 8 * 2**30
MAX_ENTRIES = 1_000_000
MAX_ENTRY = 64 * 2**20


@dataclass(frozen=True, eq=False)
class BinSet:
    """A verification set: pair k is images 2k and 2k + 1, as `PairProtocol.interleaved` takes them.

    Attributes:
        images: `2n` encoded images, in any codec that Pillow reads.
        same: `(n,)` bool, whether both images of a pair are of one person.
        source: the file that was read.
    """

    images: list[bytes]
    same: NDArray[np.bool_]
    source: str = ""

    def __len__(self) -> int:
        return len(self.same)

    def __repr__(self) -> str:
        return f"<BinSet: {len(self)} pairs, {int(self.same.sum())} of one person>"

    def batches(
        self,
        size: int = 112,
        *,
        batch_size: int = 256,
        workers: int = 2,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
    ) -> "Iterator[Tensor]":
        """Decode the images in their order, a batch at a time: memory does not grow with the set.

        An image of `size` x `size` is given pixel for pixel. Any other is cropped to its central square and resized with
        antialiasing (bilinear); sets of another size are therefore judged, not refused. The last batch may be smaller.

        Args:
            size: side of the images, pixels.
            batch_size: images a batch.
            workers: decoding threads.
            progress: wraps an iterable and a label, as `kdlib_faces.progress.progress` does.

        Returns:
            Iterator of `(b, 3, size, size)` uint8, RGB.

        Raises:
            InputError: an image that does not decode, named by its number.
        """
        check_number("BinSet.batches", "size", size, min=1, max=4096, integer=True)
        check_number("BinSet.batches", "batch_size", batch_size, min=1, integer=True)
        check_number("BinSet.batches", "workers", workers, min=1, integer=True)
        starts: Iterable[int] = range(0, len(self.images), batch_size)
        if progress is not None:
            starts = progress(starts, f"images ({len(self.images)})")
        return self._decoded(starts, size, batch_size, workers)

    def _decoded(self, starts: Iterable[int], size: int, batch_size: int, workers: int) -> "Iterator[Tensor]":
        import torch

        from kdlib_faces.data.images import decode_image

        with ThreadPoolExecutor(workers) as pool:
            for start in starts:
                rows = range(start, min(start + batch_size, len(self.images)))
                names = [f"{self.source or 'set'}: image {row}" for row in rows]
                decoded = pool.map(lambda row, name: decode_image(self.images[row], size, name=name), rows, names)
                yield torch.from_numpy(np.stack(list(decoded)))


def load_bin(path: str | PathLike[str]) -> BinSet:
    """Read a `.bin` verification set as insightface publishes and writes them.

    The file is a pickle of `(images, same)`: 2n encoded images, as byte strings or flat uint8 arrays, and n labels. Files of
    Python 2 and 3, of protocols 0 to 5, with arrays of old and new NumPy are read; nothing that the file names is imported or
    called, and anything that such a set does not need is refused.

    Args:
        path: the file.

    Returns:
        BinSet. Its `same` may hold one kind of pair only: an evaluation says so.

    Raises:
        InputError: a missing or cut file, other content than such a set (an operation or a name that could run code, with
            its byte), not two images a label, a label that is neither 0 nor 1, no pair, a file above 8 GiB, more
            than 1,000,000 images, an image of no bytes or above 64 MiB.

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
        raise InputError(f"{name}: must hold two things, images and labels, got {_kind(value)}")
    images, same = _images(name, _items(value[0])), _same(name, value[1])
    if len(images) != 2 * len(same):
        raise InputError(
            f"{name}: {len(same)} labels need {2 * len(same)} images, got {len(images)}; the file is cut or mixed up"
        )
    if not images:
        raise InputError(f"{name}: the set holds no pair")
    return BinSet(images, same, name)


def _kind(value: Any) -> str:
    count = f" of {len(value)}" if isinstance(value, (list, tuple, bytes, str)) else ""
    return ("array" if isinstance(value, PickledArray) else type(value).__name__) + count


def _items(value: Any) -> Any:
    """The list in an array of objects; anything else as it is."""
    if isinstance(value, PickledArray) and isinstance(value.data, list):
        return value.data
    return value


def _images(name: str, entries: Any) -> list[bytes]:
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"{name}: the images must be a list, got {_kind(entries)}")
    if len(entries) > MAX_ENTRIES:
        raise InputError(f"{name}: {len(entries):,} images; sets above {MAX_ENTRIES:,} are refused")
    images = []
    for number, entry in enumerate(entries):
        if isinstance(entry, PickledArray):
            flat = sum(side != 1 for side in entry.shape) <= 1 and len(entry.shape) >= 1
            if entry.dtype.lstrip("<>|=") not in ("u1", "B") or not flat or not isinstance(entry.data, bytes):
                raise InputError(
                    f"{name}: image {number} must be bytes or (n,) uint8, got an array {entry.shape} of {entry.dtype!r}"
                )
            if int(np.prod(entry.shape, dtype=object)) != len(entry.data):
                raise InputError(f"{name}: image {number}: an array {entry.shape} holds {len(entry.data)} bytes")
            entry = entry.data
        if not isinstance(entry, bytes):
            raise InputError(f"{name}: image {number} must be bytes or (n,) uint8, got {_kind(entry)}")
        if not 0 < len(entry) <= MAX_ENTRY:
            raise InputError(f"{name}: image {number} must be of 1 to {MAX_ENTRY:,} bytes, got {len(entry):,}")
        images.append(entry)
    return images


def _same(name: str, labels: Any) -> NDArray[np.bool_]:
    if isinstance(labels, PickledArray) and isinstance(labels.data, bytes):
        flat = _numbers(f"{name}: the labels", labels)
        if not np.isin(flat, (0, 1)).all():
            raise InputError(f"{name}: label {int((~np.isin(flat, (0, 1))).argmax())} must be 0 or 1")
        return flat.astype(bool)
    labels = _items(labels)
    if not isinstance(labels, (list, tuple)):
        raise InputError(f"{name}: the labels must be a list, got {_kind(labels)}")
    same = np.zeros(len(labels), dtype=bool)
    for number, label in enumerate(labels):
        if isinstance(label, PickledArray) and isinstance(label.data, bytes):
            found = _numbers(f"{name}: label {number}", label)
            label = int(found[0]) if found.size == 1 else None
        if not isinstance(label, int) or label not in (0, 1):
            raise InputError(
                f"{name}: label {number} must be True or False, got {label if isinstance(label, int) else _kind(label)}"
            )
        same[number] = bool(label)
    return same


def _numbers(what: str, array: PickledArray) -> NDArray[Any]:
    if array.dtype.lstrip("<>|=").startswith("O") or not array.dtype or not isinstance(array.data, bytes):
        raise InputError(f"{what} must be numbers, got an array of {array.dtype!r}")
    dtype = np.dtype(array.dtype)
    if int(np.prod(array.shape, dtype=object)) * dtype.itemsize != len(array.data):
        raise InputError(f"{what}: an array {array.shape} of {array.dtype!r} holds {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype).reshape(-1)


def save_bin(path: str | PathLike[str], images: Sequence[bytes], same: ArrayLike) -> None:
    """Write a set that `load_bin` and every reader of such files take (pickle protocol 3, bytes and bools).

    The file appears under its name only when it is whole.

    Args:
        path: the file.
        images: 2n encoded images.
        same: (n,) bools.

    Raises:
        ValueError: not two images a label, no pair, or an image that is no bytes.
    """
    flags = np.asarray(same)
    if flags.ndim != 1 or not np.isin(flags, (0, 1)).all():
        raise ValueError(f"save_bin: same must be (n,) bools, got shape {flags.shape} of {flags.dtype}")
    if not len(flags) or len(images) != 2 * len(flags):
        raise ValueError(f"save_bin: images must be two a label, {2 * len(flags)} and some, got {len(images)}")
    for number, image in enumerate(images):
        if not isinstance(image, bytes) or not 0 < len(image) <= MAX_ENTRY:
            raise ValueError(f"save_bin: image {number} must be 1 to {MAX_ENTRY:,} bytes, got {type(image).__name__}")
    with written(path) as stream:
        stream.write(b"\x80\x03](")
        for image in images:
            stream.write(b"B" + len(image).to_bytes(4, "little") + image)
        stream.write(b"e](" + b"".join(b"\x88" if flag else b"\x89" for flag in flags.tolist()) + b"e\x86.")
