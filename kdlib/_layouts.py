"""Layouts of features that their shape shows: channels first or last, and tokens that are not on the grid."""

from collections.abc import Sequence
from math import isqrt

from torch import Tensor

__all__ = ["grid_of", "possible_positions", "prefix_candidates", "shown_layout", "shown_prefix"]

MAX_PREFIX = 8
"""More tokens than these (a class token, a distillation token, registers) before those of the grid are not expected."""


def shown_layout(x: Tensor) -> str | None:
    """Return `"bd"`, or `"bchw"` unless the shape looks like `(b, h, w, c)`; `None` for shapes with several readings."""
    if x.dim() != 4:
        return "bd" if x.dim() == 2 else None
    first, second, third = x.shape[1:]
    short, long = min(first, second), max(first, second)
    square = 1 < first == second != third
    nearly_square = third > long > 1 and 4 * long <= 5 * short
    return None if square or nearly_square or third >= 4 * long else "bchw"


def grid_of(tokens: int) -> tuple[int, int] | None:
    """Return the sides of a square grid of that many tokens, if there is one."""
    side = isqrt(max(tokens, 0))
    return (side, side) if side and side * side == tokens else None


def prefix_candidates(tokens: int, positions: Sequence[int] = ()) -> list[int]:
    """Return the possible numbers of leading tokens, which leave a square grid or one of `positions`.

    Args:
        tokens: number of all tokens.
        positions: possible numbers of positions of the other side's grid.
    """
    if tokens and [tokens] == list(positions):
        return [0]
    return [k for k in range(MAX_PREFIX + 1) if tokens > k and (grid_of(tokens - k) or tokens - k in positions)]


def shown_prefix(tokens: int, positions: Sequence[int] = ()) -> int | None:
    """Return the number of leading tokens if it is the only possible one and either 0 or confirmed by the other side."""
    candidates = prefix_candidates(tokens, positions)
    shown = len(candidates) == 1 and (candidates == [0] or tokens - candidates[0] in positions)
    return candidates[0] if shown else None


def possible_positions(tokens: int, prefix: int | None) -> list[int]:
    """Return the possible numbers of positions of the grid of tokens, of which `prefix` (or an unknown number) lead."""
    return [tokens - k for k in (prefix_candidates(tokens) if prefix is None else [prefix])]
