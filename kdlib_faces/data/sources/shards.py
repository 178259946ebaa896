"""Images in tar shards named as WebDataset names them: `key.jpg`, with `key.cls` or `key.json` for the labels."""

import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from kdlib_faces._checks import InputError, show_name
from kdlib_faces.data.formats.files import opened
from kdlib_faces.data.image_files import image_suffixes
from kdlib_faces.data.sources.base import MAX_IMAGE, ImageSource
from kdlib_faces.data.sources.files import parse_age
from kdlib_faces.data.sources.maps import FileMaps

__all__ = ["ShardImages", "ShardRow", "find_shards", "scan_shard"]

MAX_MEMBERS = 100_000_000
MAX_HEADER = 1 << 20
MAX_LABEL = 1 << 16
MAX_SHARDS = 100_000
MAX_OPEN = 64
"""Memory maps that a process keeps open."""
_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def find_shards(entry: str) -> list[Path]:
    """Return the shards of an entry: a `.tar` file, a folder that holds some directly, or a pattern `train-{00..15}.tar`.

    The result is empty for an entry of another kind.

    Raises:
        InputError: The numbers of a pattern do not rise, or it names more than 100,000 shards.

    Examples:
        >>> [path.name for path in find_shards("set/train-{008..010}.tar")]
        ['train-008.tar', 'train-009.tar', 'train-010.tar']
    """
    path = Path(entry)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix == ".tar" and not file.name.startswith("."))
    if path.suffix != ".tar":
        return []
    found = _BRACES.search(entry)
    if path.exists() or found is None:
        return [path]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise InputError(f"{entry}: the numbers in braces must rise, to at most {MAX_SHARDS:,} shards")
    names = (
        f"{entry[: found.start()]}{number:0{len(found[1])}}{entry[found.end() :]}" for number in range(first, last + 1)
    )
    return [shard for name in names for shard in find_shards(name)]


@dataclass(frozen=True)
class ShardRow:
    """Where an image is in its shard, and its labels; identity and group are empty where unknown."""

    header: int
    start: int
    size: int
    identity: str
    age: float
    group: str


class _Bounded:
    """A file whose reads are limited, so that a hostile header cannot ask for much memory."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise InputError(f"{self.name}: the header of a member has more than {MAX_HEADER:,} bytes")
        return self.stream.read(size)

    def seek(self, at: int) -> int:
        return self.stream.seek(at)

    def tell(self) -> int:
        return self.stream.tell()


@dataclass
class _Sample:
    """The members of one key."""

    key: str
    image: tarfile.TarInfo | None = None
    labels: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def scan_shard(path: Path) -> Iterator[ShardRow]:
    """Find the images of a shard.

    Members of one key follow each other, as WebDataset requires. A label is the text of `key.cls`, or `identity`, `age` and
    `age_group` of the object in `key.json`. Other members are ignored.

    Raises:
        InputError: The file is no tar file without compression, it is truncated, a key has two images or labels without an
            image, or a label cannot be read. The message names the member.
    """
    sample = _Sample("")
    with opened(path, "tar shard") as stream:
        for member in _members(stream, path):
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            key, kind = f"{folder}/{stem}", kind.lower()
            if key != sample.key:
                yield from _row(sample, stream, path)
                sample = _Sample(key)
            if f".{kind}" in image_suffixes():
                if sample.image is not None:
                    raise InputError(f"{path}: {show_name(key[1:] if not folder else key)} has two images")
                sample.image = member
            elif kind in ("cls", "json"):
                sample.labels[kind] = member
        yield from _row(sample, stream, path)


def _members(stream: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a shard, each checked to lie inside of it."""
    end, next_header = os.fstat(stream.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=cast(BinaryIO, _Bounded(stream, str(path))), mode="r:") as archive:
            for number, member in enumerate(archive):
                if number >= MAX_MEMBERS:
                    raise InputError(f"{path}: more than {MAX_MEMBERS:,} members")
                archive.members.clear()  # type: ignore[attr-defined]  # or it holds all members
                next_header = member.offset_data + -(-member.size // 512) * 512
                if not member.isfile():
                    continue
                where = f"{path}: {show_name(member.name)}"
                if member.sparse is not None:
                    raise InputError(f"{where} is a sparse file; write the shard without sparse files")
                if not 0 <= member.size <= min(MAX_IMAGE, end - member.offset_data):
                    raise InputError(
                        f"{where} has {member.size:,} bytes, {end - member.offset_data:,} are left in the shard"
                    )
                yield member
        stream.seek(next_header)
        if stream.read(512).strip(b"\0"):  # tarfile ends at a damaged header
            raise InputError(f"{path}: the header at byte {next_header:,} is damaged or truncated")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a tar file without compression, or truncated ({error})") from None


def _row(sample: _Sample, stream: BinaryIO, path: Path) -> Iterator[ShardRow]:
    """The row of a sample with an image."""
    image = sample.image
    if image is None:
        if sample.labels:
            raise InputError(f"{path}: {show_name(next(iter(sample.labels.values())).name)} belongs to no image")
        return
    before = stream.tell()
    labels: dict[str, object] = {}
    for kind, member in sorted(sample.labels.items()):
        where = f"{path}: {show_name(member.name)}"
        if member.size > MAX_LABEL:
            raise InputError(f"{where} has more than {MAX_LABEL:,} bytes")
        stream.seek(member.offset_data)
        labels |= _labels(stream.read(member.size), kind, where)
    stream.seek(before)
    where = f"{path}: {show_name(image.name)}"
    age = labels.get("age")
    yield ShardRow(
        image.offset,
        image.offset_data,
        image.size,
        _text(labels.get("identity"), "identity", where),
        math.nan if age is None else parse_age(str(age), where),
        _text(labels.get("age_group"), "age_group", where).casefold(),
    )


def _labels(data: bytes, kind: str, where: str) -> dict[str, object]:
    try:
        text = data.decode("utf-8").strip()
        value = json.loads(text) if kind == "json" else {"identity": text}
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as UTF-8 {kind} ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must hold a JSON object with 'identity', got {show_name(text, 60)}")
    return {name: value[name] for name in ("identity", "age", "age_group") if value.get(name) is not None}


def _text(value: object, what: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise InputError(f"{where}: {what} must be a text or a whole number, got {type(value).__name__}")
    return str(value).strip()


class ShardImages(ImageSource):
    """Images in tar shards.

    Args:
        paths: The shards.
        shards: `(n,)` the number of the shard of each image.
        spans: `(n, 3)` byte positions of the header of each image and of its first byte, and its size.
    """

    def __init__(self, paths: Sequence[Path], shards: NDArray[np.int32], spans: NDArray[np.int64]) -> None:
        self.paths, self.shards, self.spans = tuple(paths), shards, spans
        self._maps = FileMaps(MAX_OPEN)

    def __repr__(self) -> str:
        return f"<ShardImages: {len(self)} images of {len(self.paths)} shards>"

    @override
    def __len__(self) -> int:
        return len(self.shards)

    @override
    def __getitem__(self, row: int) -> bytes:
        _, start, size = (int(value) for value in self.spans[row])
        return self._maps.read(self.paths[self.shards[row]], start, size)

    @override
    def name(self, row: int) -> str:
        path = self.paths[self.shards[row]]
        try:
            with path.open("rb") as stream:
                stream.seek(int(self.spans[row, 0]))
                with tarfile.open(fileobj=cast(BinaryIO, _Bounded(stream, str(path))), mode="r:") as archive:
                    member = archive.next()
        except (OSError, tarfile.TarError, ValueError):
            member = None
        return f"{path}/{show_name(member.name) if member else f'byte {self.spans[row, 0]}'}"

    @override
    def layout(self, rows: NDArray[np.int64], *, modified: bool = False) -> Iterator[bytes | memoryview]:
        for path in self.paths:
            yield f"\n{path.name}{f'	{path.stat().st_mtime_ns}' if modified else ''}".encode(
                "utf-8", "surrogateescape"
            )
        for start in range(0, len(rows), 1 << 16):
            part = rows[start : start + (1 << 16)]
            yield self.shards[part].astype("<i4").tobytes()
            yield self.spans[part].astype("<i8").tobytes()
