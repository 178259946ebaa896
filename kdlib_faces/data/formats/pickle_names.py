"""The names that a pickled set of images may use, and the values that calls of them stand for."""

import re
from dataclasses import dataclass

__all__ = ["NAMES", "Name", "PickledArray", "Refused", "call", "fill"]

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|\?|[bBhHiIlLqQ]|O[48]?)")
_ORDERS = ("<", ">", "|", "=")
_LATIN = ("latin1", "latin-1", "iso-8859-1")


@dataclass
class PickledArray:
    """A NumPy array as a pickle describes it; only the types of its parts have been checked.

    Attributes:
        dtype: Such as `|u1` or `<i8`; empty until the file fills the array.
        shape: Lengths as stated by the file.
        data: Raw bytes; for an array of objects, the list of them.
    """

    dtype: str = ""
    shape: tuple[int, ...] = (0,)
    data: bytes | list[object] = b""


@dataclass
class _Dtype:
    """A NumPy dtype: its letters, and its byte order."""

    code: str
    order: str

    @property
    def text(self) -> str:
        return (self.order or "|") + self.code


@dataclass(frozen=True)
class Name:
    """One of the known names."""

    kind: str


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


class Refused(Exception):
    """Reason why a call or a state is refused, without the position."""


def _is_shape(shape: tuple[object, ...]) -> bool:
    return len(shape) <= 4 and all(isinstance(side, int) and side >= 0 for side in shape)


def _text(word: str | bytes) -> str:
    return word.decode("latin-1") if isinstance(word, bytes) else word


def call(name: Name, arguments: tuple[object, ...]) -> object:
    """The bytes, dtype or array that `name(*arguments)` stands for."""
    match name.kind, arguments:
        case "bytes", ():
            return b""
        case "bytes", (bytes(data),):
            return data
        case "encode" | "bytes", (str(text), str(encoding)) if encoding in _LATIN:
            try:
                return text.encode("latin-1")
            except UnicodeError:
                raise Refused("text that does not encode to bytes") from None
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
    raise Refused(f"{name.kind} is called with unsupported arguments")


def fill(target: object, state: object) -> None:
    """Set the byte order of a dtype, or the dtype, shape and bytes of an array."""
    match target, state:
        case _Dtype() as dtype, (int(), (str() | bytes()) as order, None, None, None, *_) if _text(order) in _ORDERS:
            dtype.order = _text(order)
        case PickledArray() as array, (int(), tuple(shape), _Dtype() as dtype, _, (bytes() | list()) as data) if (
            _is_shape(shape)
        ):
            array.dtype, array.shape, array.data = dtype.text, shape, data
        case _:
            raise Refused("a state for an object without one, or of another form than an array's")
