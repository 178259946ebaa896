"""A restricted pickle reader, which builds only lists of bytes, numbers and flat arrays.

`pickle.load` executes what the file names. This machine knows the operations of protocols 0 to 5 that byte strings, whole
numbers, lists, tuples and NumPy arrays are written with, and the few names of `NAMES`. It imports nothing and calls nothing
that the file names: a name is only a word. Any other operation or name raises an error. `pickletools` of the standard
library parses the operations and their arguments.
"""

import codecs
import io
import mmap
import pickletools
import re
import warnings
from dataclasses import dataclass
from typing import IO, Any, NoReturn, cast

from kdlib_faces._checks import InputError, show_name

__all__ = ["PickledArray", "parse_pickle"]

MAX_OPERATIONS = 4_000_000
MAX_TEXT = 4096
_OPERATIONS = {operation.code.encode("latin-1"): operation for operation in pickletools.opcodes}
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-3]?[0-7]{1,2}|[\\'\"abfnrtv])")
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|\?|[bBhHiIlLqQ]|O[48]?)")
_ORDERS = ("<", ">", "|", "=")
_LATIN = ("latin1", "latin-1", "iso-8859-1")
_MARK = object()


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
class _Name:
    """One of the known names."""

    kind: str


NAMES = {
    ("_codecs", "encode"): _Name("encode"),
    ("numpy", "ndarray"): _Name("ndarray"),
    ("numpy", "dtype"): _Name("dtype"),
}
NAMES |= {(module, name): _Name("bytes") for module in ("__builtin__", "builtins") for name in ("bytes", "bytearray")}
NAMES |= {
    (f"numpy.{core}.{module}", name): _Name(name.lstrip("_"))
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


def _is_shape(shape: tuple[object, ...]) -> bool:
    return len(shape) <= 4 and all(isinstance(side, int) and side >= 0 for side in shape)


def _text(word: str | bytes) -> str:
    return word.decode("latin-1") if isinstance(word, bytes) else word


def _string(stream: IO[bytes]) -> bytes:
    """The argument of STRING, which Python 2 writes for bytes and `pickletools` reads as ASCII only."""
    line = stream.readline()
    raw = line[1:-2]
    if not (len(line) > 2 and line[:1] in b"'\"" and line[-2:] == line[:1] + b"\n"):
        raise ValueError("a string without its quotes")
    if b"\\" in _ESCAPE.sub(b"", raw):
        raise ValueError("a string with an invalid escape")
    return codecs.escape_decode(raw)[0]


class _Machine:
    """A stack and a memo."""

    def __init__(self, data: bytes | mmap.mmap, name: str) -> None:
        self.stream = io.BytesIO(data) if isinstance(data, bytes) else cast(IO[bytes], data)
        self.name, self.size, self.start = name, len(data), 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.text_bytes = 0

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.name}: byte {self.start}: {what}")

    def run(self) -> object:
        for _ in range(MAX_OPERATIONS):
            self.start = self.stream.tell()
            code = self.stream.read(1)
            operation = _OPERATIONS.get(code)
            if operation is None:
                self.fail(f"0x{code.hex()} is not a pickle operation" if code else "the file is truncated")
            try:
                reader = _string if operation.name == "STRING" else operation.arg.reader if operation.arg else None
                argument = reader(self.stream) if reader else None
            except ValueError as error:
                self.fail(f"the argument of {operation.name} is truncated or invalid: {str(error)[:80]}")
            if operation.name == "STOP":
                return self.pop()
            self.step(operation.name, argument)
        return self.fail(f"more than {MAX_OPERATIONS:,} operations; no set of images needs them")

    def step(self, operation: str, argument: Any) -> None:
        push = self.stack.append
        match operation:
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8" | "STRING":
                push(bytes(argument))
            case "SHORT_BINSTRING" | "BINSTRING":
                push(argument.encode("latin-1"))
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4":
                if argument.bit_length() > 64:
                    self.fail("a whole number of more than 64 bits")
                push(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                # Long text must be the bytes of an image: a character of other text can take four bytes of memory.
                if len(argument) > MAX_TEXT:
                    self.encode(argument)
                push(argument)
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(operation == "NEWTRUE")
            case "MARK":
                push(_MARK)
            case "EMPTY_LIST":
                push([])
            case "LIST":
                push(self.pop_mark())
            case "APPEND":
                self.append([self.pop()])
            case "APPENDS":
                self.append(self.pop_mark())
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([self.pop() for _ in range(int(operation[-1]))])))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    self.fail(f"no memo entry {argument}")
                push(self.memo[argument])
            case "POP" if self.stack:
                self.stack.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                push(self.top())
            case "GLOBAL":
                push(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                push(self.find(module, name))
            case "REDUCE":
                arguments, name = self.pop(), self.pop()
                push(self.call(name, arguments))
            case "BUILD":
                state = self.pop()
                self.fill(self.top(), state)
            case "PROTO" if argument > 5:
                self.fail(f"pickle protocol {argument}; 0 to 5 are read")
            case "PROTO" | "FRAME":
                pass
            case _:
                self.fail(f"the pickle operation {operation} is refused: a set of images needs none")

    def top(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("the stack is empty where a value is needed")
        return self.stack[-1]

    def pop(self) -> object:
        value = self.top()
        self.stack.pop()
        return value

    def pop_mark(self) -> list[object]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            self.fail("no mark on the stack where one is needed")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def append(self, items: list[object]) -> None:
        target = self.top()
        if not isinstance(target, list):
            self.fail("items for an object that is not a list")
        target.extend(items)

    def encode(self, text: str) -> bytes:
        try:
            return text.encode("latin-1")
        except UnicodeError:
            self.fail("text that does not encode to bytes")

    def find(self, module: object, name: object) -> _Name:
        known = NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            shown = f"{module}.{name}" if isinstance(module, str) else "that is not text"
            self.fail(f"the name {show_name(shown)} is refused: a set of images needs bytes and arrays only")
        return known

    def call(self, name: object, arguments: object) -> object:
        """The bytes, dtype or array that `name(*arguments)` stands for."""
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            self.fail("a call of an object that is not a known name")
        # The memo lets a short file encode one long string many times.
        self.text_bytes += sum(len(each) for each in arguments if isinstance(each, str))
        if self.text_bytes > self.size:
            self.fail("more bytes from text than the file is long")
        match name.kind, arguments:
            case "bytes", ():
                return b""
            case "bytes", (bytes(data),):
                return data
            case "encode" | "bytes", (str(text), str(encoding)) if encoding in _LATIN:
                return self.encode(text)
            case "reconstruct", (_Name("ndarray"), tuple(), bytes() | str()):
                return PickledArray()
            case "dtype", (bytes() | str() as code, *_):
                word = _text(code)
                if not _DTYPE.fullmatch(word):
                    self.fail(f"the dtype {word[:20]!r} is refused: images are bytes, labels whole numbers or bools")
                order = word[0] if word[0] in _ORDERS else ""
                return _Dtype(word[len(order) :], order)
            case "scalar", (_Dtype() as dtype, bytes(data)):
                return PickledArray(dtype.text, (), data)
            case "frombuffer", (bytes(data), _Dtype() as dtype, tuple(shape), str()) if _is_shape(shape):
                return PickledArray(dtype.text, shape, data)
        return self.fail(f"{name.kind} is called with unsupported arguments")

    def fill(self, target: object, state: object) -> None:
        """Set the byte order of a dtype, or the dtype, shape and bytes of an array."""
        match target, state:
            case _Dtype() as dtype, (int(), (str() | bytes()) as order, None, None, None, *_) if (
                _text(order) in _ORDERS
            ):
                dtype.order = _text(order)
            case PickledArray() as array, (int(), tuple(shape), _Dtype() as dtype, _, (bytes() | list()) as data) if (
                _is_shape(shape)
            ):
                array.dtype, array.shape, array.data = dtype.text, shape, data
            case _:
                self.fail("a state for an object without one, or of another form than an array's")


def parse_pickle(data: bytes | mmap.mmap, name: str = "pickle") -> object:
    """Parse a pickle of byte strings, whole numbers, text, lists, tuples and NumPy arrays; nothing is executed.

    The result is None, bool, int, bytes, str, list, tuple or `PickledArray`; a hostile file can nest them arbitrarily. Byte
    strings of Python 2 become `bytes`. Memory is bounded by a small multiple of the file's size, time by 4,000,000
    operations. Data after the end of the pickle is ignored.

    Raises:
        InputError: The file uses an operation or a name that such a set does not need, or it is broken; the message names
            the byte.

    Examples:
        >>> parse_pickle(b"\\x80\\x02]q\\x00(K\\x07U\\x03abcq\\x01e.")
        [7, b'abc']
        >>> parse_pickle(b"cos\\nsystem\\n(S'ls'\\ntR.")
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: pickle: byte 0: the name os.system is refused: ...
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of an escape in a damaged name, which is refused
        return _Machine(data, name).run()
