"""The safetensors format, read and written without its package: a JSON header and the bytes it points to.

    u64 little endian n | n bytes of JSON, {"name": {"dtype", "shape", "data_offsets": [begin, end]}} | bytes

A file is foreign input: the header is capped, no name comes twice, the offsets fill the bytes without a gap or an
overlap, and every length is that of its shape. Nothing is allocated on the word of the header: tensors are views of the
mapped file.
"""

import json
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kdlib_faces._checks import InputError, show_name

__all__ = ["is_safetensors", "read_safetensors", "write_safetensors"]

LARGEST_HEADER = 8 * 2**20  # a network of a thousand layers has 200 kB
LARGEST_SIZE = 2**63 - 1
MOST_DIMENSIONS = 8
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"


def is_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file are those of this format, and not those of a zip archive or an old pickle."""
    return head[8:9] == b"{" and not head.startswith((b"PK\x03\x04", b"\x80\x02\x8a"))


def read_safetensors(owner: str, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Args:
        owner: who asks, for the error's first words.
        path: the file.

    Returns:
        Tensors on the CPU that view the file (private to this process: writing to one does not change the file), and
        the strings of `__metadata__`.

    Raises:
        InputError: not of the format, cut short, or with a header that does not fit the bytes.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > LARGEST_HEADER:
            raise InputError(f"{owner} has a header of {length} bytes, more than the {LARGEST_HEADER} that are read")
        if not 2 <= length <= size - 8:
            raise InputError(f"{owner} is cut short: its header of {length} bytes does not fit in {size}")
        header = _header(owner, file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{owner}: {METADATA} must be a dict of strings")
    entries = [(name, *_entry(owner, name, entry)) for name, entry in header.items()]
    begin = 0
    for name, _, _, first, last in sorted(entries, key=lambda entry: entry[3:]):
        if first != begin:
            what = "overlaps the tensor before it" if first < begin else f"leaves a gap of {first - begin} bytes"
            raise InputError(f"{owner}: {show_name(name)} {what}")
        begin = last
    there = size - 8 - length
    if begin != there:
        what = "is cut short" if begin > there else "has bytes that belong to no tensor"
        raise InputError(f"{owner} {what}: its header tells {begin} bytes of tensors, it holds {there}")
    base = 8 + length
    return {name: _view(data, dtype, shape, base + first) for name, dtype, shape, first, _ in entries}, metadata


def _header(owner: str, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise InputError(f"{owner}: a name comes twice in the header")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{owner} has a header that is no JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise InputError(f"{owner}: the header must be a JSON object, got {type(header).__name__}")
    return header


def _entry(owner: str, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of one tensor."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{owner}: {show_name(name)} must have a dtype, a shape and data_offsets")
    name = show_name(name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{owner}: {name} is of dtype {show_name(dtype)!r}; read are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MOST_DIMENSIONS:
        raise InputError(f"{owner}: {name} must have a shape of at most {MOST_DIMENSIONS} whole numbers")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{owner}: {name} must have two data_offsets, the first not above the second")
    needed = prod(shape) * DTYPES[dtype].itemsize
    if needed != offsets[1] - offsets[0]:
        raise InputError(
            f"{owner}: {name} of {dtype} {tuple(shape)} needs {needed} bytes, its data_offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    # bool is an int to Python, and JSON has both
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST_SIZE for value in values)


def _view(data: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
    if dtype == torch.bool:
        return (raw != 0).reshape(shape)  # another byte than 0 and 1 is no bool
    if offset % dtype.itemsize:
        raw = raw.clone()  # the format does not promise aligned tensors
    if sys.byteorder == "big":
        raw = raw.view(-1, dtype.itemsize).flip(1).flatten()
    return raw.view(dtype).reshape(shape)


def write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors by name, and metadata, to an open file.

    Args:
        file: open for writing bytes.
        tensors: of the dtypes that the format has; written from the CPU.
        metadata: strings by name.

    Raises:
        InputError: a tensor of a dtype that the format has not.
    """
    # Widest first, so that every tensor begins at a multiple of its item's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name, value in ordered:
        if value.dtype not in NAMES:
            raise InputError(f"safetensors: {name} must be of a dtype that the format has, got {value.dtype}")
        end = begin + value.numel() * value.dtype.itemsize
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, value in ordered:
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        if sys.byteorder == "big":
            raw = raw.view(-1, value.dtype.itemsize).flip(1).flatten()
        file.write(raw.numpy().tobytes())
