"""Data room: a pickle reader that can do nothing but build lists of bytes, numbers and flat arrays.

`pickle.load` runs what the file tells it to. This machine knows the opcodes of protocols 0 to 5 that byte strings, whole
numbers, lists, tuples and NumPy arrays are written with, and the few names of `_pickle_names`; it imports nothing and calls
nothing that the file names. Any other opcode or name ends the reading. Touches memory only.
"""

import mmap
import re
from collections.abc import Callable
from typing import Any, NoReturn

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
    """A stack, a memo and a position; one method a kind of opcode."""

    def __init__(self, data: bytes | mmap.mmap, name: str) -> None:
        self.data, self.name, self.size = data, name, len(data)
        self.at = self.start = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.name}: byte {self.start}: {what}")

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self.size:
            self.fail(f"the file ends early: {count} bytes were announced, {self.size - self.at} are left")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, width: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self, most: int) -> bytes:
        end = self.data.find(b"\n", self.at, min(self.size, self.at + most + 1))
        if end < 0:
            self.fail(f"no line end within {most} bytes")
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("the stack is empty where a value is needed")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            self.fail("no mark on the stack where one is needed")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def run(self) -> Any:
        operations = 0
        while True:
            self.start = self.at
            code = self.take(1)
            operations += 1
            if operations > MAX_OPERATIONS:
                self.fail(f"more than {MAX_OPERATIONS:,} operations; no set of images needs them")
            if code == b".":
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                known = _REFUSED.get(code)
                self.fail(
                    f"the pickle operation {known} is refused: a set of images needs none"
                    if known
                    else f"0x{code[0]:02x} is no pickle operation"
                )
            step(self)

    # Values

    def whole(self, text: bytes) -> int:
        digits = text[:-1] if text.endswith(b"L") else text
        if not re.fullmatch(rb"[+-]?[0-9]+", digits) or len(digits) > MAX_DIGITS:
            self.fail("not a whole number of at most 20 digits")
        return int(digits)

    def integer_line(self) -> None:
        text = self.line(MAX_DIGITS + 2)
        self.stack.append({b"00": False, b"01": True}[text] if text in (b"00", b"01") else self.whole(text))

    def long_line(self) -> None:
        self.stack.append(self.whole(self.line(MAX_DIGITS + 2)))

    def long(self, width: int) -> None:
        count = self.number(width)
        if count > 8:
            self.fail(f"a whole number of {count} bytes; at most 8 are read")
        self.stack.append(self.number(count, signed=True))

    def text(self, raw: bytes, encoding: str) -> None:
        try:
            text = raw.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
            if len(text) > MAX_TEXT:
                text.encode("latin-1")  # long text is the bytes of an image, a byte a character; other text takes four
        except UnicodeError:
            self.fail("text that does not decode, or is long and stands for no bytes")
        self.stack.append(text)

    def string_line(self) -> None:
        raw = self.line(self.size)
        if len(raw) < 2 or raw[:1] not in (b"'", b'"') or raw[-1:] != raw[:1]:
            self.fail("a string without its quotes")
        raw = raw[1:-1]
        if b"\\" in _ESCAPE.sub(b"", raw):
            self.fail("a string with an escape that is none")
        self.stack.append(
            _ESCAPE.sub(
                lambda found: _ESCAPED[found[1]] if found[1][:1] != b"x" else bytes([int(found[1][1:], 16)]), raw
            )
        )

    # Containers and the memo

    def append(self, items: list[Any]) -> None:
        if not self.stack or not isinstance(self.stack[-1], list):
            self.fail("items for something that is no list")
        self.stack[-1].extend(items)

    def pack(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def drop(self) -> None:
        if not self.stack:
            self.fail("the stack is empty where a value is needed")
        self.stack.pop()

    def twice(self) -> None:
        value = self.pop()
        self.stack += [value, value]

    def put(self, key: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("nothing on the stack to remember")
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        if key not in self.memo:
            self.fail(f"memo entry {key} is not there")
        self.stack.append(self.memo[key])

    def protocol(self) -> None:
        if (version := self.number(1)) > 5:
            self.fail(f"pickle protocol {version}; 0 to 5 are read")

    def frame(self) -> None:
        if (count := self.number(8)) > self.size - self.at:
            self.fail(f"the file ends early: a frame of {count} bytes was announced, {self.size - self.at} are left")

    # Names, calls and states

    def named(self, module: Any, name: Any) -> None:
        known = NAMES.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            shown = f"{str(module)[:60]}.{str(name)[:60]}" if isinstance(module, str) else "of no text"
            self.fail(f"the name {shown} is refused: a set of images needs bytes and arrays only")
        self.stack.append(known)

    def named_by_lines(self) -> None:
        module, name = (self.line(MAX_NAME).decode("utf-8", "replace") for _ in range(2))
        self.named(module, name)

    def named_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.named(module, name)

    def reduce(self) -> None:
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            self.fail("a call of something that is no known name")
        # A memo lets a short file ask for one long string many times.
        self.made += sum(len(each) for each in arguments if isinstance(each, str))
        if self.made > self.size:
            self.fail("more bytes from text than the file is long")
        try:
            self.stack.append(call(called, arguments))
        except Refused as error:
            self.fail(str(error))

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        try:
            fill(target, state)
        except Refused as error:
            self.fail(str(error))
        self.stack.append(target)


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _push(lambda m: _MARK),
    b"0": _Machine.drop,
    b"1": _Machine.pop_mark,
    b"2": _Machine.twice,
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"I": _Machine.integer_line,
    b"L": _Machine.long_line,
    b"J": _push(lambda m: m.number(4, signed=True)),
    b"K": _push(lambda m: m.number(1)),
    b"M": _push(lambda m: m.number(2)),
    b"\x8a": lambda m: m.long(1),
    b"\x8b": lambda m: m.long(4),
    b"S": _Machine.string_line,
    b"V": lambda m: m.text(m.line(m.size), "raw-unicode-escape"),
    b"]": _push(lambda m: []),
    b"l": _push(lambda m: m.pop_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b")": _push(lambda m: ()),
    b"t": _push(lambda m: tuple(m.pop_mark())),
    b"\x85": lambda m: m.pack(1),
    b"\x86": lambda m: m.pack(2),
    b"\x87": lambda m: m.pack(3),
    b"p": lambda m: m.put(m.whole(m.line(MAX_DIGITS))),
    b"q": lambda m: m.put(m.number(1)),
    b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: m.get(m.whole(m.line(MAX_DIGITS))),
    b"h": lambda m: m.get(m.number(1)),
    b"j": lambda m: m.get(m.number(4)),
    b"c": _Machine.named_by_lines,
    b"\x93": _Machine.named_by_stack,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
# Byte strings (those of Python 2 among them) and text, by the width of their length.
for _code, _width in ((b"T", 4), (b"U", 1), (b"B", 4), (b"C", 1), (b"\x8e", 8), (b"\x96", 8)):
    _STEPS[_code] = _push(lambda m, width=_width: m.take(m.number(width)))  # type: ignore[misc]  # a default binds it
for _code, _width in ((b"X", 4), (b"\x8c", 1), (b"\x8d", 8)):
    _STEPS[_code] = lambda m, width=_width: m.text(m.take(m.number(width)), "utf-8")  # type: ignore[misc]  # likewise


def parse_pickle(data: bytes | mmap.mmap, name: str = "pickle") -> Any:
    """The value of a pickle of byte strings, whole numbers, text, lists, tuples and NumPy arrays, nothing executed.

    Byte strings of Python 2 come as `bytes`. Memory is bounded by a small multiple of the file's size, time by
    4,000,000 operations. What follows the end of the pickle is not read.

    Args:
        data: the whole file.
        name: what to call it in messages.

    Returns:
        None, bool, int, bytes, str, list, tuple or `PickledArray`; a hostile file may nest them as it likes.

    Raises:
        InputError: an operation or a name that such a set does not need, or a broken file, with the byte where it is.

    Examples:
        >>> parse_pickle(b"\\x80\\x02]q\\x00(K\\x07U\\x03abcq\\x01e.")
        [7, b'abc']
        >>> parse_pickle(b"cos\\nsystem\\n(S'ls'\\ntR.")
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: pickle: byte 0: the name os.system is refused: ...
    """
    return _Machine(data, name).run()
