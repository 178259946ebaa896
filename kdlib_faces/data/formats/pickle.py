"""A restricted pickle reader, which builds only lists of bytes, numbers and flat arrays.

`pickle.load` executes what the file names. This machine knows the opcodes of protocols 0 to 5 that byte strings, whole
numbers, lists, tuples and NumPy arrays are written with, and the few names of `NAMES`. It imports nothing and calls nothing
that the file names: a name is only a word. Any other opcode or name raises an error.
"""

import mmap
import re
from collections.abc import Callable
from typing import NoReturn

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.pickle_names import NAMES, Name, PickledArray, Refused, call, fill

__all__ = ["PickledArray", "parse_pickle"]

MAX_OPERATIONS = 4_000_000
MAX_DIGITS = 20
MAX_NAME = 256
MAX_TEXT = 4096

_REFUSED = {b"F": "FLOAT", b"G": "BINFLOAT", b"P": "PERSID", b"Q": "BINPERSID", b"i": "INST", b"o": "OBJ", b"d": "DICT"}
_REFUSED |= {b"}": "EMPTY_DICT", b"s": "SETITEM", b"u": "SETITEMS", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX"}
_REFUSED |= {b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x8f": "EMPTY_SET", b"\x90": "ADDITEMS"}
_REFUSED |= {b"\x91": "FROZENSET", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER"}
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[\\'\"abfnrtv0])", re.DOTALL)
_ESCAPED = {b"\\": b"\\", b"'": b"'", b'"': b'"', b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r"}
_ESCAPED |= {b"t": b"\t", b"v": b"\v", b"0": b"\0"}
_MARK = object()


class _Machine:
    """A stack, a memo and a position; one method for each kind of opcode."""

    def __init__(self, data: bytes | mmap.mmap, name: str) -> None:
        self.data, self.name, self.size = data, name, len(data)
        self.at = self.start = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.text_bytes = 0

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.name}: byte {self.start}: {what}")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self.size:
            self.fail(f"the file is truncated: {count} bytes were announced, {self.size - self.at} are left")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self, limit: int) -> bytes:
        end = self.data.find(b"\n", self.at, min(self.size, self.at + limit + 1))
        if end < 0:
            self.fail(f"no line end within {limit} bytes")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken

    def pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("the stack is empty where a value is needed")
        return self.stack.pop()

    def pop_mark(self) -> list[object]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            self.fail("no mark on the stack where one is needed")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def run(self) -> object:
        for _ in range(MAX_OPERATIONS):
            self.start = self.at
            code = self.take(1)
            if code == b".":
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                known = _REFUSED.get(code)
                self.fail(
                    f"the pickle operation {known} is refused: a set of images needs none"
                    if known
                    else f"0x{code[0]:02x} is not a pickle operation"
                )
            step(self)
        return self.fail(f"more than {MAX_OPERATIONS:,} operations; no set of images needs them")

    def integer(self, text: bytes) -> int:
        digits = text.removesuffix(b"L")
        if not re.fullmatch(rb"[+-]?[0-9]+", digits) or len(digits) > MAX_DIGITS:
            self.fail("not a whole number of at most 20 digits")
        return int(digits)

    def integer_line(self) -> int:
        text = self.line(MAX_DIGITS + 2)
        return text == b"01" if text in (b"00", b"01") else self.integer(text)

    def long(self, width: int) -> int:
        count = self.number(width)
        if count > 8:
            self.fail(f"a whole number of {count} bytes; at most 8 are read")
        return self.number(count, signed=True)

    def text(self, raw: bytes, encoding: str) -> str:
        try:
            text = raw.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
            if len(text) > MAX_TEXT:
                # Long text is accepted as the bytes of an image, one per character; other text takes four bytes each.
                text.encode("latin-1")
        except UnicodeError:
            self.fail("text that does not decode, or is long and does not encode to bytes")
        return text

    def string_line(self) -> bytes:
        raw = self.line(self.size)
        if len(raw) < 2 or raw[:1] not in (b"'", b'"') or raw[-1:] != raw[:1]:
            self.fail("a string without its quotes")
        raw = raw[1:-1]
        if b"\\" in _ESCAPE.sub(b"", raw):
            self.fail("a string with an invalid escape")
        return _ESCAPE.sub(lambda m: bytes([int(m[1][1:], 16)]) if m[1][:1] == b"x" else _ESCAPED[m[1]], raw)

    def append(self, items: list[object]) -> None:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, list):
            self.fail("items for an object that is not a list")
        target.extend(items)

    def pop_tuple(self, count: int) -> tuple[object, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def drop(self) -> None:
        if not self.stack:
            self.fail("the stack is empty where a value is needed")
        self.stack.pop()

    def duplicate(self) -> object:
        value = self.pop()
        self.stack.append(value)
        return value

    def put(self, key: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("nothing on the stack to store in the memo")
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> object:
        if key not in self.memo:
            self.fail(f"no memo entry {key}")
        return self.memo[key]

    def protocol(self) -> None:
        if (version := self.number(1)) > 5:
            self.fail(f"pickle protocol {version}; 0 to 5 are read")

    def frame(self) -> None:
        if (count := self.number(8)) > self.size - self.at:
            self.fail(f"the file is truncated: a frame of {count} bytes was announced, {self.size - self.at} are left")

    def find(self, module: object, name: object) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            self.fail("a name that is not text is refused: a set of images needs bytes and arrays only")
        if (module, name) not in NAMES:
            shown = f"{module[:60]}.{name[:60]}"
            self.fail(f"the name {shown} is refused: a set of images needs bytes and arrays only")
        return NAMES[module, name]

    def find_by_lines(self) -> Name:
        module, name = (self.line(MAX_NAME).decode("utf-8", "replace") for _ in range(2))
        return self.find(module, name)

    def find_by_stack(self) -> Name:
        name, module = self.pop(), self.pop()
        return self.find(module, name)

    def reduce(self) -> object:
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            self.fail("a call of an object that is not a known name")
        # The memo lets a short file encode one long string many times.
        self.text_bytes += sum(len(each) for each in arguments if isinstance(each, str))
        if self.text_bytes > self.size:
            self.fail("more bytes from text than the file is long")
        try:
            return call(name, arguments)
        except Refused as error:
            self.fail(str(error))

    def build(self) -> object:
        state, target = self.pop(), self.pop()
        try:
            fill(target, state)
        except Refused as error:
            self.fail(str(error))
        return target


_Step = Callable[[_Machine], None]


def _push(value: Callable[[_Machine], object]) -> _Step:
    return lambda machine: machine.stack.append(value(machine))


def _push_bytes(width: int) -> _Step:
    return _push(lambda m: m.take(m.number(width)))


def _push_text(width: int) -> _Step:
    return _push(lambda m: m.text(m.take(m.number(width)), "utf-8"))


_STEPS: dict[bytes, _Step] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _push(lambda m: _MARK),
    b"0": _Machine.drop,
    b"1": lambda m: m.pop_mark().clear(),
    b"2": _push(_Machine.duplicate),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"I": _push(_Machine.integer_line),
    b"L": _push(lambda m: m.integer(m.line(MAX_DIGITS + 2))),
    b"J": _push(lambda m: m.number(4, signed=True)),
    b"K": _push(lambda m: m.number(1)),
    b"M": _push(lambda m: m.number(2)),
    b"\x8a": _push(lambda m: m.long(1)),
    b"\x8b": _push(lambda m: m.long(4)),
    b"S": _push(_Machine.string_line),
    b"V": _push(lambda m: m.text(m.line(m.size), "raw-unicode-escape")),
    b"T": _push_bytes(4),
    b"U": _push_bytes(1),
    b"B": _push_bytes(4),
    b"C": _push_bytes(1),
    b"\x8e": _push_bytes(8),
    b"\x96": _push_bytes(8),
    b"X": _push_text(4),
    b"\x8c": _push_text(1),
    b"\x8d": _push_text(8),
    b"]": _push(lambda m: []),
    b"l": _push(_Machine.pop_mark),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b")": _push(lambda m: ()),
    b"t": _push(lambda m: tuple(m.pop_mark())),
    b"\x85": _push(lambda m: m.pop_tuple(1)),
    b"\x86": _push(lambda m: m.pop_tuple(2)),
    b"\x87": _push(lambda m: m.pop_tuple(3)),
    b"p": lambda m: m.put(m.integer(m.line(MAX_DIGITS))),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": _push(lambda m: m.get(m.integer(m.line(MAX_DIGITS)))),
    b"h": _push(lambda m: m.get(m.number(1))),
    b"j": _push(lambda m: m.get(m.number(4))),
    b"c": _push(_Machine.find_by_lines),
    b"\x93": _push(_Machine.find_by_stack),
    b"R": _push(_Machine.reduce),
    b"b": _push(_Machine.build),
}


def parse_pickle(data: bytes | mmap.mmap, name: str = "pickle") -> object:
    """Parse a pickle of byte strings, whole numbers, text, lists, tuples and NumPy arrays; nothing is executed.

    Byte strings of Python 2 become `bytes`. Memory is bounded by a small multiple of the file's size, time by 4,000,000
    operations. Data after the end of the pickle is ignored.

    Args:
        data: The whole file.
        name: Name of the file in messages.

    Returns:
        None, bool, int, bytes, str, list, tuple or `PickledArray`; a hostile file can nest them arbitrarily.

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
    return _Machine(data, name).run()
