"""Random damage to files: bits, numbers, text, slices, and the entries of archives."""

import io
import random
import re
import struct
import zipfile
from collections.abc import Callable

__all__ = ["mutate"]

INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    -(2**63),
)
TEXTS = (
    b"", b"0", b"-1", b"1e999", b"nan", b"inf", b"9" * 400, b"999999999999", b"null", b"true", b"{}", b"[]", b"[" * 500,
    b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\0", b"\\", b"../", b"/", b"\xff", b"\xc3\xa9", b"\xef\xbb\xbf",
    b"\x1b[31m", b"\xe2\x80\xa8", b"x" * 9000, b"%s", b"=1+1",
)  # fmt: skip


def mutate(blob: bytes, rng: random.Random) -> bytes:
    """Return `blob` with one to four changes; an archive is often repacked, so that its checksums are right."""
    if blob.startswith(b"PK\3\4") and rng.random() < 0.7:
        return _mutate_archive(blob, rng)
    shard = blob[257:262] == b"ustar"
    for _ in range(rng.choice((1, 1, 2, 4))):
        blob = rng.choice(CHANGES)(blob, rng)
    return _with_sums(blob) if shard and rng.random() < 0.8 else blob


def _with_sums(blob: bytes) -> bytes:
    """A tar file whose headers have the right checksums."""
    blocks = [blob[at : at + 512] for at in range(0, len(blob), 512)]
    for at, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            total = sum(block[:148]) + 8 * 32 + sum(block[156:])
            blocks[at] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


def _mutate_archive(blob: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    # The pickle holds the structure, so most changes are made there.
    chosen = next((at for at, (name, _) in enumerate(entries) if name.endswith("data.pkl")), 0)
    chosen = rng.randrange(len(entries)) if rng.random() < 0.3 else chosen
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for at, (name, content) in enumerate(entries):
            archive.writestr(name, rng.choice(CHANGES)(content, rng) if at == chosen else content)
    return stream.getvalue()


def _place(blob: bytes, rng: random.Random) -> int:
    """A position, half of the time near the start, where headers are."""
    return rng.randrange(min(len(blob), 64) if rng.random() < 0.5 else len(blob)) if blob else 0


def _flip(blob: bytes, rng: random.Random) -> bytes:
    at = _place(blob, rng)
    return blob[:at] + bytes([blob[at] ^ 1 << rng.randrange(8)]) + blob[at + 1 :] if blob else blob


def _byte(blob: bytes, rng: random.Random) -> bytes:
    at = _place(blob, rng)
    return blob[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + blob[at + 1 :]


def _integer(blob: bytes, rng: random.Random) -> bytes:
    size = rng.choice((2, 4, 8))
    value = rng.choice((*INTEGERS, len(blob), len(blob) + 1)) % (1 << 8 * size)
    at = _place(blob, rng) // size * size if rng.random() < 0.7 else _place(blob, rng)
    packed = struct.pack(rng.choice("<>") + {2: "H", 4: "I", 8: "Q"}[size], value)
    return blob[:at] + packed + blob[at + size :]


def _cut(blob: bytes, rng: random.Random) -> bytes:
    return blob[: rng.randrange(len(blob) + 1)]


def _remove(blob: bytes, rng: random.Random) -> bytes:
    at = _place(blob, rng)
    return blob[:at] + blob[at + rng.choice((1, 2, 4, 8, 100)) :]


def _repeat(blob: bytes, rng: random.Random) -> bytes:
    at, size = _place(blob, rng), rng.choice((1, 4, 16, 200))
    return blob[: at + size] + blob[at : at + size] * rng.choice((1, 2, 50)) + blob[at + size :]


def _swap(blob: bytes, rng: random.Random) -> bytes:
    (a, b), size = sorted((_place(blob, rng), _place(blob, rng))), rng.choice((1, 4, 8, 32))
    size = min(size, b - a)
    return blob[:a] + blob[b : b + size] + blob[a + size : b] + blob[a : a + size] + blob[b + size :]


def _insert(blob: bytes, rng: random.Random) -> bytes:
    at = _place(blob, rng)
    return blob[:at] + rng.choice((rng.randbytes(rng.choice((1, 4, 30))), *rng.sample(TEXTS, 3))) + blob[at:]


def _number(blob: bytes, rng: random.Random) -> bytes:
    """Replace a number in text by another text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", blob[:20_000]))
    if not found:
        return _flip(blob, rng)
    number = rng.choice(found)
    text = rng.choice((*TEXTS, *(b"%d" % value for value in INTEGERS)))
    return blob[: number.start()] + text + blob[number.end() :]


def _field(blob: bytes, rng: random.Random) -> bytes:
    """Replace a word of text by another text, or by another word of the file."""
    found = list(re.finditer(rb"[A-Za-z_][\w./]*", blob[:20_000]))
    if not found:
        return _byte(blob, rng)
    word, other = rng.choice(found), rng.choice(found)
    return blob[: word.start()] + rng.choice((*rng.sample(TEXTS, 3), other[0], other[0])) + blob[word.end() :]


def _line(blob: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or move a line."""
    lines = blob.splitlines(keepends=True)
    if len(lines) < 2:
        return _repeat(blob, rng)
    line = lines.pop(rng.randrange(len(lines)))
    for _ in range(rng.choice((0, 1, 2))):
        lines.insert(rng.randrange(len(lines) + 1), line)
    return b"".join(lines)


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _byte, _integer, _integer, _cut, _remove, _repeat, _swap, _insert, _number, _field, _line,
)  # fmt: skip
