"""Data room: MegaFace's feature files and its lists of images and distractors. Touches the file system and NumPy."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import opened, read_whole, written

__all__ = ["FeatureSet", "TemplateList", "read_feature_file", "read_template_list", "write_feature_file"]

MAX_LIST = 512 * 2**20
MAX_DIM = 1 << 20
FLOAT32 = 5
_HEADER = struct.Struct("<4i")


def read_feature_file(path: str | PathLike[str]) -> NDArray[np.float32]:
    """Read one image's feature: four int32 (rows, columns, bytes a row, 5 for float32), then the numbers.

    Args:
        path: the file.

    Returns:
        `(d,)` float32.

    Raises:
        InputError: another header, more or fewer numbers than it says, a number that is not finite.
    """
    with opened(path, "feature file") as stream:
        head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise InputError(f"{path}: a feature file has at least {_HEADER.size} bytes, got {len(head)}")
        rows, columns, stride, kind = _HEADER.unpack(head)
        if kind != FLOAT32 or rows < 1 or columns < 1 or stride != 4 * columns or rows * columns > MAX_DIM:
            raise InputError(
                f"{path}: the header must be (d, 1, 4, 5) for d float32 numbers, got ({rows}, {columns}, {stride}, {kind})"
            )
        body = stream.read(4 * rows * columns + 1)
    if len(body) != 4 * rows * columns:
        raise InputError(f"{path}: {rows * columns} numbers need {4 * rows * columns} bytes, the file has {len(body)}")
    feature = np.frombuffer(body, "<f4").astype(np.float32)
    if not np.isfinite(feature).all():
        raise InputError(f"{path}: number {int((~np.isfinite(feature)).argmax())} is not finite")
    return feature


def write_feature_file(path: str | PathLike[str], feature: ArrayLike) -> None:
    """Write one image's feature as the development kit reads it. It compares by distance, so normalize features first.

    Raises:
        ValueError: not (d,), or not finite.
    """
    array = np.asarray(feature, dtype="<f4")
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"write_feature_file: feature must be (d,) finite numbers, got {array.shape}")
    with written(path) as stream:
        stream.write(_HEADER.pack(len(array), 1, 4, FLOAT32) + array.tobytes())


@dataclass(frozen=True)
class TemplateList:
    """A list of MegaFace: images, and an identity each where the list is of probes.

    Attributes:
        paths: relative paths of the images.
        ids: as many names of identities, or None.
    """

    paths: tuple[str, ...]
    ids: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        people = "" if self.ids is None else f", {len(set(self.ids))} identities"
        return f"<TemplateList: {len(self)} images{people}>"


def read_template_list(path: str | PathLike[str]) -> TemplateList:
    """Read a list such as `fgnet_features_list.json`: an object with `path` and, for probes, `id`, arrays of one length.

    Raises:
        InputError: no such object, above 512 MiB, a path twice or outside the set, or arrays of different lengths.
    """
    raw = read_whole(path, "template list", MAX_LIST)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not a JSON file") from None
    paths = content.get("path") if isinstance(content, dict) else None
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) for each in paths):
        raise InputError(f"{path}: must be an object with 'path', a list of texts")
    seen: set[str] = set()
    for row, each in enumerate(paths):
        place = PurePosixPath(each)
        if not place.parts or place.is_absolute() or ".." in place.parts or not each.isprintable() or "\\" in each:
            raise InputError(f"{path}: path {row} must lie inside the set, got {each[:80]!r}")
        if each in seen:
            raise InputError(f"{path}: path {row} stands there twice: {each[:80]!r}")
        seen.add(each)
    ids = content.get("id")
    if ids is None:
        return TemplateList(tuple(paths))
    if not isinstance(ids, list) or not all(
        isinstance(each, (str, int)) and not isinstance(each, bool) for each in ids
    ):
        raise InputError(f"{path}: 'id' must be a list of texts or whole numbers")
    if len(ids) != len(paths):
        raise InputError(f"{path}: {len(paths)} paths and {len(ids)} ids; there must be one each")
    return TemplateList(tuple(paths), tuple(str(each) for each in ids))


@dataclass(frozen=True)
class FeatureSet:
    """Features of a list, one file an image, given in shards: iterate it, again and again.

    Attributes:
        folder: where the files are, `folder/path + suffix`.
        images: the list.
        suffix: what the tool put behind each image's path, such as `_r100.bin`.
        rows: features a shard.
        missing: `"error"` stops at the first file that is not there; `"skip"` leaves it out, and `present()` says which are
            there: report their number, copies of the distractors are often not whole.
        progress: wraps an iterable and a label, as `kdlib_faces.progress.progress` does.
    """

    folder: Path
    images: TemplateList
    suffix: str = ".bin"
    rows: int = 4096
    missing: Literal["error", "skip"] = "error"
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        check_number("FeatureSet", "rows", self.rows, min=1, integer=True)
        check_choice("FeatureSet", "missing", self.missing, ("error", "skip"))

    def file(self, image: str) -> Path:
        """The feature file of an image."""
        return self.folder / f"{image}{self.suffix}"

    def present(self) -> NDArray[np.bool_]:
        """`(n,)` bool, which images of the list have a file."""
        return np.array([self.file(image).is_file() for image in self.images.paths], dtype=bool)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Shards of `(m, d)` float32, in the order of the list.

        Raises:
            InputError: a file that is missing (unless skipped), broken, or of another length than the first.
        """
        shard: list[NDArray[np.float32]] = []
        dim = 0
        work: Iterable[str] = self.images.paths
        for image in work if self.progress is None else self.progress(work, "features"):
            file = self.file(image)
            if self.missing == "skip" and not file.is_file():
                continue
            feature = read_feature_file(file)
            dim = dim or len(feature)
            if len(feature) != dim:
                raise InputError(f"{file}: {len(feature)} numbers, those before have {dim}")
            shard.append(feature)
            if len(shard) == self.rows:
                yield np.stack(shard)
                shard = []
        if shard:
            yield np.stack(shard)
