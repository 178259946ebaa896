"""The index and the files of sharded tensors on disk."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from kdlib.training._checks import check_content

__all__ = ["Entry", "Index", "Key", "Keys", "Part", "check_files", "checksum", "meta_tensors", "remove_shards"]

_FOLDER = re.compile(r"shards-(\d{9})-\d+")
_FILE = re.compile(r"__\d+_\d+\.distcp")

Key = str | int
Keys = tuple[Key, ...]


class Part(TypedDict):
    """A part of a tensor in a file: where it lies in the tensor, and in the file."""

    offsets: list[int]
    sizes: list[int]
    file: str
    offset: int
    length: int


class Entry(TypedDict):
    """A sharded tensor."""

    keys: list[Key]
    shape: list[int]
    dtype: torch.dtype
    parts: list[Part]


class Index(TypedDict):
    """The content of a folder of shards: plain values that the checkpoint itself contains.

    torch keeps it in a pickle, which is not read: it could run code.
    """

    folder: str
    sums: dict[str, str]
    tensors: list[Entry]


def meta_tensors(index: Index) -> dict[Keys, Tensor]:
    """Return tensors of the shapes and dtypes of the shards, without values."""
    return {
        tuple(entry["keys"]): torch.empty(entry["shape"], dtype=entry["dtype"], device="meta")
        for entry in index["tensors"]
    }


def check_files(directory: Path, index: Index, rank: int, count: int) -> None:
    """Compare the files of a folder with their checksums; each of `count` processes compares some of them."""
    check_content(bool(_FOLDER.fullmatch(index["folder"])), f"its shards are in {index['folder']!r}")
    used = {part["file"] for entry in index["tensors"] for part in entry["parts"]}
    for number, name in enumerate(sorted(used)):
        path = directory / index["folder"] / name
        check_content(bool(_FILE.fullmatch(name)) and name in index["sums"], f"it names the file {name!r}")
        check_content(path.is_file(), f"{path} is missing")
        if number % count == rank:
            check_content(checksum(path) == index["sums"][name], f"the checksum of {path} does not match")


def remove_shards(directory: Path, step: int, kept: set[int], current: str) -> None:
    """Remove the folders up to `step` of no kept checkpoint; of those of `step` itself, `current` is kept."""
    for path in directory.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if (
            match
            and int(match[1]) <= step
            and (int(match[1]) not in kept or (int(match[1]) == step and path.name != current))
        ):
            shutil.rmtree(path, ignore_errors=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
