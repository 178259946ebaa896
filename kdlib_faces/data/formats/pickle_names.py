"""Data room: the few names a pickled set may hold, and what each makes of its arguments. Nothing here is imported by name
or called because a file says so; a name is a word. Touches memory only.
"""

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["NAMES", "Name", "PickledArray", "Refused", "call", "fill"]

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|\?|[bBhHiIlLqQ]|O[48]?)")
_ORDERS = ("<", ">", "|", "=")
_LATIN = ("latin1", "latin-1", "iso-8859-1")


class Refused(Exception):
    """What is wrong with a call or a state, without the place."""


@dataclass(frozen=True)
class Name:
    """One of the names that are known."""

    kind: str


@dataclass
class _Dtype:
    """A NumPy dtype: its letters, and the byte order that its state sets."""

    code: str
    order: str

    @property
    def text(self) -> str:
        return (self.order or "|") + self.code


@dataclass
class PickledArray:
    """What a pickle says of a NumPy array: nothing of it has been checked but its types.

    Attributes:
        dtype: such as `|u1` or `<i8`; empty before the file has filled the array.
        shape: lengths, as the file states them.
        data: raw bytes; for an array of objects, the list of them.
    """

    dtype: str = ""
    shape: tuple[int, ...] = (0,)
    data: bytes | list[Any] = b""


NAMES = {
    ("_codecs", "encode"): Name("encode"),
    ("numpy", "ndarray"): Name("ndarray"),
    ("numpy", "dtype"): Name("dtype"),
}
NAMES |= {(module, name): Name("bytes") for module in ("__builtin__", "builtins") for name in ("bytes", "bytearray")}
NAMES |= {
    (f"numpy.{core}.{module}", name): Name(name.lstrip("_"))
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return len(shape) <= 4 and all(isinstance(side, int) and side >= 0 for side in shape)


def _text(word: str | bytes) -> str:
    return word.decode("latin-1") if isinstance(word, bytes) else word


def call(name: Name, arguments: tuple[Any, ...]) -> Any:
    """What `name(*arguments)` stands for: bytes, a dtype or an array.

    Raises:
        Refused: arguments that no set of images needs.
    """
    match name.kind, arguments:
        case "bytes", ():
            return b""
        case "bytes", (bytes(data),):
            return data
        case "encode" | "bytes", (str(text), str(encoding)) if encoding in _LATIN:
            try:
                return text.encode("latin-1")
            except UnicodeError:
                raise Refused("text that stands for no bytes") from None
        case "reconstruct", (Name("ndarray"), tuple(), bytes() | str()):
            return PickledArray()
        case "dtype", (bytes() | str() as code, *_):
            word = _text(code)
            if not _DTYPE.fullmatch(word):
                raise Refused(
                    f"the dtype {word[:20]!r} is refused: images are bytes, labels are whole numbers or bools"
                )
            order = word[0] if word[0] in _ORDERS else ""
            return _Dtype(word[len(order) :], order)
        case "scalar", (_Dtype() as dtype, bytes(data)):
            return PickledArray(dtype.text, (), data)
        case "frombuffer", (bytes(data), _Dtype() as dtype, tuple(shape), str()) if _is_shape(shape):
            return PickledArray(dtype.text, shape, data)
    raise Refused(f"{name.kind} with arguments that it does not take here")


def fill(target: Any, state: Any) -> None:
    """Give a dtype its byte order, or an array its dtype, shape and bytes.

    Raises:
        Refused: a state for anything else, or of another form.
    """
    match target, state:
        case _Dtype() as dtype, (int(), (str() | bytes()) as order, None, None, None, *_) if _text(order) in _ORDERS:
            dtype.order = _text(order)
        case PickledArray() as array, (int(), tuple(shape), _Dtype() as dtype, _, (bytes() | list()) as data) if (
            _is_shape(shape)
        ):
            array.dtype, array.shape, array.data = dtype.text, shape, data
        case _:
            raise Refused("a state for something that takes none, or of another form than an array's")
