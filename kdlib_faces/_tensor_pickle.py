"""Reading of the tensors of a PyTorch file that also contains objects of other classes.

The reader interprets the pickle itself: it builds dicts, lists, tuples, numbers, text and tensors, imports nothing, and
calls nothing that the file names. An object of any other class becomes a `Foreign`.
"""

import io
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["BlockedName", "Foreign", "read_tensors"]

MAX_OPERATIONS = 5_000_000
DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
DICTS = {"builtins.dict", "collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
UTILS = "torch._utils."
# Modules and functions that no checkpoint needs. They would not be called, but a file that names them is an attack.
BLOCKED = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "ctypes", "importlib", "runpy", "pty", "code",
    "builtins.exec", "builtins.eval", "builtins.compile", "builtins.open", "builtins.__import__",
}  # fmt: skip
Key = str | bytes | int | float | None
Storage = Callable[[str, torch.dtype, int], Tensor | None]


class BlockedName(Exception):
    """The file names a function that runs code."""


class Foreign(dict[Any, Any]):
    """Stand-in for an object of a class that is not built, with the entries that the file sets on it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class _Name(str):
    """Name of a class or function."""


def read_tensors(path: Path, *, archive: bool) -> Any:
    """Read the object of a file of `torch.save`: a zip archive, or a sequence of pickles followed by the storages.

    Raises:
        BlockedName: The file names a function that runs code.
        Exception: The file is damaged or of another format.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def view(start: int, dtype: torch.dtype, count: int) -> Tensor:
        size = count * dtype.itemsize
        if not 0 <= start <= start + size <= len(data):
            raise ValueError("a storage outside of the file")
        if not count:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize:
            return torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=start)

    if archive:
        with zipfile.ZipFile(path) as entries:
            pickled = next(name for name in entries.namelist() if name.endswith("data.pkl"))
            folder, content = pickled.removesuffix("data.pkl"), entries.read(pickled)
            if f"{folder}byteorder" in entries.namelist() and entries.read(f"{folder}byteorder") != b"little":
                raise ValueError("big-endian numbers")

            def stored(key: str, dtype: torch.dtype, count: int) -> Tensor:
                entry = entries.getinfo(f"{folder}data/{key}")
                if count * dtype.itemsize > entry.file_size:
                    raise ValueError("a storage outside of its entry")
                names = struct.unpack_from("<HH", data, entry.header_offset + 26)
                return view(entry.header_offset + 30 + sum(names), dtype, count)

            return _parse(io.BytesIO(content), stored)

    # The positions of the storages follow from their sizes, which are in the pickle: it is read twice.
    sizes, starts = dict[str, tuple[int, int]](), dict[str, int]()
    _magic, _protocol, system = (_parse(data, lambda *_: None) for _ in range(3))
    if not system["little_endian"]:
        raise ValueError("big-endian numbers")
    beginning = data.tell()
    _parse(data, lambda key, dtype, count: sizes.update({key: (count, dtype.itemsize)}))
    keys = _parse(data, lambda *_: None)
    at = data.tell()
    for key in keys:
        _check_text(key)
        count, width = sizes[key]
        if struct.unpack_from("<q", data, at) != (count,):
            raise ValueError("a storage of another size")
        starts[key] = at + 8
        at += 8 + count * width
    data.seek(beginning)
    return _parse(data, lambda key, dtype, count: view(starts[key], dtype, count))


def _parse(stream: Any, storage: Storage) -> Any:
    """Interpret one pickle."""
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[Any, Any] = {}

    def items_above_mark() -> list[Any]:
        nonlocal stack
        above, stack = stack, marked.pop()
        return above

    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_OPERATIONS:
            raise ValueError("more operations than a checkpoint needs")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marked.append(stack)
                stack = []
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(module, name))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if opcode.name == "NEWOBJ_EX":
                    stack.pop()  # keyword arguments
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD" | "POP":
                stack.pop()
            case "POP_MARK":
                items_above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "BINPERSID":
                kind, name, *place = stack.pop()
                dtype = DTYPES.get(name.rpartition(".")[2].removesuffix("Storage"))
                if kind == "storage" and dtype is not None and not any(place[3:]):
                    key, _location, count = place[:3]
                    _check_text(key)
                    stack.append(storage(key, dtype, count))
                else:  # the class of a module with its source code, or a storage of another kind
                    stack.append(name)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_DICT": {}}.get(opcode.name, []))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE" | "LIST" | "FROZENSET":
                above = items_above_mark()
                stack.append(tuple(above) if opcode.name == "TUPLE" else above)
            case "DICT":
                above = items_above_mark()
                stack.append(_dict(zip(above[::2], above[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                above = [stack.pop()] if opcode.name == "APPEND" else items_above_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(above)
            case "SETITEM" | "SETITEMS":
                above = [stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else items_above_mark()
                if isinstance(stack[-1], dict):
                    stack[-1].update(_dict(zip(above[::2], above[1::2], strict=True)))
            case "OBJ" | "INST" | "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"the operation {opcode.name}")
            case _:  # numbers, text and bytes
                stack.append(argument)
    raise ValueError("no end")


def _check_text(*values: object) -> None:
    """Refuse keys and names that are not text: hashing or printing nested tuples can take exponential time."""
    if not all(isinstance(value, str) for value in values):
        raise TypeError("a key or name that is not text")


def _name(module: str, text: str) -> _Name:
    _check_text(module, text)
    name = f"{'builtins' if module == '__builtin__' else module}.{text}"
    if name in BLOCKED or name.partition(".")[0] in BLOCKED:
        raise BlockedName(name)
    return _Name(name)


def _dict(pairs: Iterable[tuple[Any, Any]]) -> dict[Key, Any]:
    """Return the entries with plain keys."""
    return {key: value for key, value in pairs if isinstance(key, Key)}


def _call(function: Any, arguments: Any) -> Any:
    """Return the dict or tensor that a call stands for; a `Foreign` for any other function."""
    name = function if isinstance(function, _Name) else ""
    if name in DICTS:
        pairs = next((each for each in arguments if isinstance(each, list)), [])
        entries = _dict((key, value) for key, value in pairs)
        pairs.clear()  # a hostile file could have it copied many times
        return entries
    if name in (f"{UTILS}_rebuild_tensor", f"{UTILS}_rebuild_tensor_v2"):
        base, offset, size, stride = arguments[:4]
        return base.as_strided(size, stride, offset) if isinstance(base, Tensor) else Foreign(name)
    if name in (f"{UTILS}_rebuild_parameter", f"{UTILS}_rebuild_parameter_with_state"):
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        return _call(arguments[0], arguments[2])
    if name == "torch.Size":
        return arguments[0]
    return Foreign(name or type(function).__name__)
