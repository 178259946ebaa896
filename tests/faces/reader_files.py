"""Helpers of the tests that read files: write a file, create empty ones, flip bits of one."""

from pathlib import Path

from hypothesis import strategies as st

__all__ = ["bit_flips", "put", "touch"]


def put(folder: Path, content: str | bytes, name: str = "list.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        put(folder, b"", name)
    return folder


def bit_flips(blob: bytes) -> st.SearchStrategy[bytes]:
    """`blob` with one to four flipped bits."""

    def flip(places: list[tuple[int, int]]) -> bytes:
        broken = bytearray(blob)
        for at, bit in places:
            broken[at] ^= 1 << bit
        return bytes(broken)

    places = st.tuples(st.integers(0, len(blob) - 1), st.integers(0, 7))
    return st.lists(places, min_size=1, max_size=4).map(flip)
