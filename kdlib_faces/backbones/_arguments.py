"""Backbones room, private: the argument checks that the three families share. Touches nothing but numbers."""

import math
from typing import Any

import torch
from torch import Tensor

from kdlib._checks import check_number, show_shape

__all__ = ["InputSize", "channels", "check_blocks", "check_images", "final_grid", "height_width", "show_size"]

InputSize = int | tuple[int, int]
"""A side in pixels, or (height, width)."""

MOST_BLOCKS = 256  # a stage deeper than this is a corrupt file, not a network


def height_width(owner: str, input_size: Any) -> tuple[int, int]:
    """`112` or `(112, 96)` to `(h, w)`, both at least one pixel."""
    pair = tuple(input_size) if isinstance(input_size, list | tuple) else (input_size, input_size)
    if len(pair) != 2:
        raise ValueError(f"{owner}: input_size must be a side or (height, width) in pixels, got {input_size!r}")
    for side in pair:
        check_number(owner, "input_size", side, min=1, integer=True)
    return pair[0], pair[1]


def show_size(size: tuple[int, int]) -> InputSize:
    """The shortest spelling of a size: the side of a square, or the pair."""
    return size[0] if size[0] == size[1] else size


def final_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after four convolutions of stride 2, kernel 3 and padding 1: each halves and rounds up."""
    return math.ceil(size[0] / 16), math.ceil(size[1] / 16)


def channels(owner: str, width: float) -> int:
    """Channels of the first stage, 64 at width 1; the later stages are whole multiples of it."""
    check_number(owner, "width", width, above=0)
    return max(8, 8 * round(8 * width))


def check_blocks(owner: str, name: str, blocks: Any) -> tuple[int, int, int, int]:
    """Four stages, one block at least in each."""
    if not isinstance(blocks, list | tuple) or len(blocks) != 4:
        raise ValueError(f"{owner}: {name} must be four block counts, got {blocks!r}")
    for count in blocks:
        check_number(owner, name, count, min=1, max=MOST_BLOCKS, integer=True)
    return blocks[0], blocks[1], blocks[2], blocks[3]


def check_images(owner: str, images: Tensor, size: tuple[int, int]) -> None:
    """`images` must be (b, 3, h, w) of the size the network was built for: its last layer has one weight a cell."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch's stubs leave it out
        return  # a traced size is a tensor; comparing it would warn
    if images.dim() != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != size:
        wanted = f"(b, 3, {size[0]}, {size[1]})"
        raise ValueError(f"{owner}: images must be {wanted}, got {show_shape(images)}; set input_size to change it")
