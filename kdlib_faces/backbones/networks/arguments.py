"""Argument checks and sizes shared by the face networks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdlib._checks import check_number, show_shape

__all__ = ["channels", "check_blocks", "check_images", "final_grid"]

MAX_BLOCKS = 256  # a deeper stage is a corrupt file, not a network


def final_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid after four convolutions of stride 2, kernel 3 and padding 1, each of which halves and rounds up."""
    return math.ceil(size[0] / 16), math.ceil(size[1] / 16)


def channels(owner: str, width: float) -> int:
    """Return the channels of the first stage, 64 at width 1; later stages are integer multiples of it."""
    check_number(owner, "width", width, above=0)
    return max(8, 8 * round(8 * width))


def check_blocks(owner: str, name: str, blocks: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the number of blocks of the four stages; each stage must have at least one."""
    if not isinstance(blocks, list | tuple) or len(blocks) != 4:
        raise ValueError(f"{owner}: {name} must be four block counts, got {blocks!r}")
    for count in blocks:
        check_number(owner, name, count, min=1, max=MAX_BLOCKS, integer=True)
    return blocks[0], blocks[1], blocks[2], blocks[3]


def check_images(owner: str, images: Tensor, size: tuple[int, int]) -> None:
    """`images` must be (b, 3, h, w) of the network's size, because its last layer has one weight per cell of the grid."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # missing in torch's stubs
        return  # a traced size is a tensor, and comparing it would warn
    if images.dim() != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != size:
        wanted = f"(b, 3, {size[0]}, {size[1]})"
        raise ValueError(f"{owner}: images must be {wanted}, got {show_shape(images)}; set input_size to change it")
