"""The images of a list as a tensor that is decoded when it is read."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from typing_extensions import override

from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import Progress, with_progress
from kdlib_faces.data.image_files import describe_far_sizes
from kdlib_faces.data.images import decode_rows
from kdlib_faces.data.lists import FaceList, warn
from kdlib_faces.data.sources.base import FileImages, ImageSource

__all__ = ["FaceImages", "decode_batches", "list_errors", "load_images"]

CHUNK = 256


class FaceImages(Dataset[Tensor]):
    """Images that are indexed as a tensor `(n, 3, size, size)` uint8 and decoded when they are read.

    It can be read by the workers of a loader: each process opens the files itself, and only the rows that are read are
    decoded. A small set can be decoded once and held in memory by `preload`.

    Args:
        images: Encoded images, such as `FaceList.images`.
        size: Side of the images, pixels; images of other sizes are fitted as by `decode_image`.
        threads: Threads that decode several rows; one in a worker of a loader.
        on_error: What to do about an image that cannot be read: `"stop"` raises an `InputError`, `"skip"` gives a black image
            with a `FaceDataWarning`; `FaceBatches` puts another image in its place.

    Examples:
        >>> import io
        >>> from PIL import Image
        >>> from kdlib_faces.data import RecordReader, save_records
        >>> from kdlib_faces.data.sources.records import RecordImages
        >>> import pathlib, tempfile
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (4, 4), (255, 0, 7)).save(stream, "PNG")
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.rec"
        >>> save_records(file, [stream.getvalue()] * 3, [0, 0, 1])
        >>> images = FaceImages(RecordImages(RecordReader(file)), 4)
        >>> images.shape, images[2].shape, images[torch.tensor([0, 2])].shape
        (torch.Size([3, 3, 4, 4]), torch.Size([3, 4, 4]), torch.Size([2, 3, 4, 4]))
    """

    def __init__(
        self, images: ImageSource, size: int, *, threads: int = 1, on_error: Literal["stop", "skip"] = "stop"
    ) -> None:
        check_choice("FaceImages", "on_error", on_error, ("stop", "skip"))
        self.images, self.on_error = images, on_error
        self.size = check_number("FaceImages", "size", size, min=1, max=4096, integer=True)
        self.threads = check_number("FaceImages", "threads", threads, min=1, integer=True)
        self._held: Tensor | None = None
        self._errors: dict[int, str] = {}

    def __repr__(self) -> str:
        return f"FaceImages(<{len(self)} images>, {self.size}, threads={self.threads}, on_error={self.on_error!r})"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def preloaded(self) -> bool:
        """Whether all images are decoded and held in memory."""
        return self._held is not None

    @property
    def shape(self) -> torch.Size:
        """`(n, 3, size, size)`."""
        return torch.Size((len(self), 3, self.size, self.size))

    @override
    def __getitem__(self, rows: int | Tensor) -> Tensor:
        """Return one image `(3, size, size)` for a number, or `(b, 3, size, size)` for `(b,)` rows.

        Raises:
            InputError: Images cannot be read, and they are not skipped; the message lists them.
        """
        numbers = [rows] if isinstance(rows, int) else rows.tolist()
        pixels, errors = self.read(numbers)
        self._report(list(errors.values()), len(numbers))
        return pixels[0] if isinstance(rows, int) else pixels

    def read(self, rows: Sequence[int]) -> tuple[Tensor, dict[int, str]]:
        """Decode some rows, whether or not all can be read.

        Returns:
            `(b, 3, size, size)` uint8 in channels-last memory format, black where an image cannot be read, and the message of
            each such position.
        """
        if self._held is not None:
            return self._held[list(rows)], {at: self._errors[row] for at, row in enumerate(rows) if row in self._errors}
        pixels = np.empty((len(rows), self.size, self.size, 3), dtype=np.uint8)
        errors: dict[int, str] = {}

        def decode(at: int) -> None:
            row = rows[at]
            try:
                decode_rows(self.images[row], self.size, name=self.images.name(row), out=pixels[at])
            except InputError as error:
                errors[at], pixels[at] = str(error), 0

        if self.threads == 1 or len(rows) == 1 or get_worker_info() is not None:
            for at in range(len(rows)):
                decode(at)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(decode, range(len(rows))))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), dict(sorted(errors.items()))

    def _report(self, errors: Sequence[str], count: int) -> None:
        if errors and self.on_error == "stop":
            raise InputError(list_errors(errors, count))
        if errors:
            warn(f"skipped what cannot be read: {list_errors(errors, count)}")

    def preload(self, *, progress: Progress | None = None) -> Tensor:
        """Decode all images once and hold them in memory.

        Args:
            progress: Wraps an iterable and a label, as `kdlib_faces.progress.progress` does.

        Returns:
            `(n, 3, size, size)` uint8, black where an image cannot be read.

        Raises:
            InputError: Images cannot be read, and they are not skipped; the message lists all of them.
        """
        if self._held is not None:
            return self._held
        held = torch.empty(self.shape, dtype=torch.uint8, memory_format=torch.channels_last)
        errors = dict[int, str]()
        for start in with_progress(range(0, len(self), CHUNK), f"images ({len(self)})", progress):
            rows = range(start, min(start + CHUNK, len(self)))
            held[start : rows.stop], found = self.read(rows)
            errors |= {start + at: error for at, error in found.items()}
        self._report(list(errors.values()), len(self))
        self._held, self._errors = held, errors
        return held


def load_images(
    images: FaceList | Sequence[str | PathLike[str]], size: int, *, progress: Progress | None = None, threads: int = 2
) -> Tensor:
    """Decode every image of a list to one tensor in memory.

    Args:
        images: A `FaceList`, or paths. For a list, images far from `size` give a `FaceDataWarning`.
        size: Side of the result, pixels.
        progress: Wraps an iterable and a label, as `kdlib_faces.progress.progress` does.
        threads: Decoding threads.

    Returns:
        `(n, 3, size, size)` uint8, in the order of the list.

    Raises:
        InputError: Images are unreadable (the message lists all of them).
    """
    source = images.images if isinstance(images, FaceList) else FileImages([Path(path) for path in images])
    if isinstance(images, FaceList):
        warn(describe_far_sizes(source, size))
    return FaceImages(source, size, threads=threads).preload(progress=progress)


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

    errors: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in with_progress(range(0, count, batch_size), f"images ({count})", progress):
            found = list(pool.map(attempt, range(start, min(start + batch_size, count))))
            errors += [str(each) for each in found if isinstance(each, InputError)]
            if not errors:
                yield np.stack([each for each in found if not isinstance(each, InputError)])
    if errors:
        raise InputError(list_errors(errors, count))


def list_errors(errors: Sequence[str], count: int) -> str:
    """Return one line that lists the images that cannot be read, the first hundred of them in words."""
    if len(errors) == 1:
        return errors[0]
    more = f"; and {len(errors) - 100:,} more" if len(errors) > 100 else ""
    return f"{len(errors):,} of {count:,} images cannot be read: {'; '.join(errors[:100])}{more}"
