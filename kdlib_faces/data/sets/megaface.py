"""MegaFace's feature files and its lists of images and distractors."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib._atomic import atomic_write
from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import Progress, opened, read_whole, with_progress
from kdlib_faces.data.image_pairs import check_images

__all__ = ["FeatureSet", "TemplateList", "read_feature_file", "read_template_list", "write_feature_file"]

MAX_LIST = 512 * 2**20
MAX_DIM = 1 << 20
FLOAT32 = 5
_HEADER = struct.Struct("<4i")


def read_feature_file(path: str | PathLike[str]) -> NDArray[np.float32]:
    """Read the feature of one image: four int32 (rows, columns, bytes per row, 5 for float32), then the numbers.

    Args:
        path: The file.

    Returns:
        `(d,)` float32.

    Raises:
        InputError: The header is another one, the numbers are fewer or more than it announces, or one is not finite.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "001A02.JPG_net.bin"
        >>> write_feature_file(file, [0.6, 0.8])
        >>> read_feature_file(file)
        array([0.6, 0.8], dtype=float32)
    """
    with opened(path, "feature file") as stream:
        head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise InputError(f"{path}: a feature file has at least {_HEADER.size} bytes, got {len(head)}")
        rows, columns, stride, dtype = _HEADER.unpack(head)
        if dtype != FLOAT32 or rows < 1 or columns < 1 or stride != 4 * columns or rows * columns > MAX_DIM:
            raise InputError(
                f"{path}: the header must be (d, 1, 4, 5) for d float32 numbers, got {(rows, columns, stride, dtype)}"
            )
        body = stream.read(4 * rows * columns + 1)
    if len(body) != 4 * rows * columns:
        raise InputError(f"{path}: {rows * columns} numbers need {4 * rows * columns} bytes, the file has {len(body)}")
    feature = np.frombuffer(body, "<f4").astype(np.float32)
    if not np.isfinite(feature).all():
        raise InputError(f"{path}: number {int((~np.isfinite(feature)).argmax())} is not finite")
    return feature


def write_feature_file(path: str | PathLike[str], feature: ArrayLike) -> None:
    """Write the feature of one image for the development kit, which compares by distance: normalize features first.

    Args:
        path: The file, which appears under its name only when it is complete.
        feature: `(d,)` finite numbers, written as float32.

    Raises:
        ValueError: `feature` is not (d,) or not finite.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "001A02.JPG_net.bin"
        >>> write_feature_file(file, [0.6, 0.8])
        >>> file.stat().st_size  # 16 bytes of header and two float32
        24
    """
    array = np.asarray(feature, dtype="<f4")
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"write_feature_file: feature must be (d,) finite numbers, got {array.shape}")
    with atomic_write(path) as stream:
        stream.write(_HEADER.pack(len(array), 1, 4, FLOAT32) + array.tobytes())


@dataclass(frozen=True)
class TemplateList:
    """A list of MegaFace: images, and their identities if it is a list of probes.

    Attributes:
        paths: Relative paths of the images.
        ids: As many names of identities, or None.
    """

    paths: tuple[str, ...]
    ids: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        identities = "" if self.ids is None else f", {len(set(self.ids))} identities"
        return f"<TemplateList: {len(self)} images{identities}>"


def read_template_list(path: str | PathLike[str]) -> TemplateList:
    """Read a list such as `fgnet_features_list.json`: an object with arrays `path` and, for probes, `id`.

    Args:
        path: The JSON file.

    Returns:
        TemplateList; without `id`, as in lists of distractors, its `ids` are None.

    Raises:
        InputError: The file is another one or above 512 MiB, a path occurs twice or lies outside the set, or the arrays
            have different lengths.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "probes.json"
        >>> _ = file.write_text('{"path": ["a/1.jpg", "a/2.jpg", "b/1.jpg"], "id": ["a", "a", "b"]}')
        >>> read_template_list(file)
        <TemplateList: 3 images, 2 identities>
    """
    raw = read_whole(path, "template list", MAX_LIST)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not a JSON file") from None
    paths = content.get("path") if isinstance(content, dict) else None
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) for each in paths):
        raise InputError(f"{path}: must be an object with 'path', a list of texts")
    check_images(path, paths)
    ids = content.get("id")
    if ids is None:
        return TemplateList(tuple(paths))
    if not isinstance(ids, list) or not all(type(each) in (str, int) for each in ids):
        raise InputError(f"{path}: 'id' must be a list of texts or whole numbers")
    if len(ids) != len(paths):
        raise InputError(f"{path}: {len(paths)} paths and {len(ids)} ids; there must be one id per path")
    return TemplateList(tuple(paths), tuple(str(each) for each in ids))


@dataclass(frozen=True)
class FeatureSet:
    """Features of a list, one file per image, yielded in shards; can be iterated repeatedly.

    Attributes:
        folder: Folder of the files `folder/path + suffix`.
        images: The list.
        suffix: Suffix that the tool appended to each image's path, such as `_r100.bin`.
        rows: Features per shard.
        missing: `"error"` stops at the first missing file. `"skip"` omits it, and `present()` returns which files exist:
            report their number, because copies of the distractors are often incomplete.
        progress: Wraps an iterable and a label, as `kdlib_faces.progress.progress` does.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_feature_file(folder / "1.jpg_net.bin", [0.6, 0.8])
        >>> write_feature_file(folder / "2.jpg_net.bin", [1.0, 0.0])
        >>> features = FeatureSet(folder, TemplateList(("1.jpg", "2.jpg", "3.jpg")), suffix="_net.bin", missing="skip")
        >>> [shard.shape for shard in features], features.present().tolist()
        ([(2, 2)], [True, True, False])
    """

    folder: Path
    images: TemplateList
    suffix: str = ".bin"
    rows: int = 4096
    missing: Literal["error", "skip"] = "error"
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_number("FeatureSet", "rows", self.rows, min=1, integer=True)
        check_choice("FeatureSet", "missing", self.missing, ("error", "skip"))

    def file(self, image: str) -> Path:
        """Return the feature file of an image."""
        return Path(self.folder) / f"{image}{self.suffix}"

    def present(self) -> NDArray[np.bool_]:
        """Return `(n,)` bool, whether each image of the list has a file."""
        return np.array([self.file(image).is_file() for image in self.images.paths], dtype=bool)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Yield shards of `(m, d)` float32, in the order of the list.

        Raises:
            InputError: A file is missing (unless skipped), broken, or of another length than the first.
        """
        shard: list[NDArray[np.float32]] = []
        dim = 0
        for image in with_progress(self.images.paths, "features", self.progress):
            file = self.file(image)
            if self.missing == "skip" and not file.is_file():
                continue
            feature = read_feature_file(file)
            dim = dim or len(feature)
            if len(feature) != dim:
                raise InputError(f"{file}: {len(feature)} numbers, the files before have {dim}")
            shard.append(feature)
            if len(shard) == self.rows:
                yield np.stack(shard)
                shard = []
        if shard:
            yield np.stack(shard)
