"""Argument checks that only losses use."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kdlib._checks import check_choice, check_finite, check_floating, check_number, check_rank, readable, show_shape
from kdlib._layouts import grid_of, prefix_candidates, shown_layout

__all__ = [
    "check_affine", "check_gathered_reduction", "check_layout", "check_levels", "check_margin", "check_prefix",
    "check_square", "no_second_derivative",
]  # fmt: skip


def check_gathered_reduction(owner: str, gather: bool, reduction: str) -> None:
    """With `gather` all processes return the same single value, so `reduction` must be `"mean"`."""
    if gather and reduction != "mean":
        raise ValueError(
            f"{owner}: reduction must be 'mean' with gather: the processes share one value, got {reduction!r}"
        )


def check_layout(owner: str, name: str, x: Tensor, layout: str | None, argument: str, choices: Sequence[str]) -> str:
    """Return the layout of `x`, one of `choices`: the given one, or `"bchw"` if its shape shows it."""
    if layout is not None:
        check_choice(owner, argument, layout, choices)
        check_rank(owner, name, x, " ".join(layout))
        return layout
    shown = shown_layout(x)
    if shown == "bchw":
        return shown
    if x.dim() not in (3, 4):
        wanted = ", ".join(f"({', '.join(choice)})" for choice in choices[:-1])
        raise ValueError(f"{owner}: {name} must be {wanted} or ({', '.join(choices[-1])}), got {show_shape(x)}")
    which = "'bnd' for tokens (b, n, d)" + (" or 'bhw' for attention maps (b, h, w)" if "bhw" in choices else "")
    which = which if x.dim() == 3 else "'bhwc' for channels last or 'bchw' for channels first"
    raise ValueError(f"{owner}: the layout of {name} {show_shape(x)} is ambiguous; give {argument}={which}")


def check_prefix(owner: str, name: str, x: Tensor, given: int | None, argument: str, grid: Sequence[int] | None) -> int:
    """Return how many leading tokens of `x` (b, n, d) are not on the grid: `given`, or the only possible number."""
    if given is not None:
        check_number(owner, argument, given, min=0, below=max(x.shape[1], 1), integer=True)
        return given
    candidates = prefix_candidates(x.shape[1], grid)
    if len(candidates) != 1:
        few = " or ".join(map(str, candidates)) or "an unknown number of"
        raise ValueError(
            f"{owner}: {name} {show_shape(x)} may have {few} tokens (class token, registers) before those of the grid; "
            f"give {argument}= (0 if all are on the grid)"
        )
    return candidates[0]


def check_square(owner: str, name: str, tokens: int) -> tuple[int, int]:
    """Return the grid of that many tokens, which must be square."""
    grid = grid_of(tokens)
    if grid is None:
        raise ValueError(
            f"{owner}: {name} must hold the tokens of a square grid or of the other side's grid, got {tokens}; reshape "
            "other grids to (b, h, w, c), layout 'bhwc'"
        )
    return grid


def check_levels(owner: str, levels: object) -> tuple[int, ...]:
    """Return `levels`, which must be a sequence or an array of whole numbers of at least 1."""
    levels = levels.tolist() if isinstance(levels, (np.ndarray, Tensor)) else levels
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"{owner}: levels must be a sequence of whole numbers, got {type(levels).__name__}")
    return tuple(check_number(owner, f"levels[{k}]", level, min=1, integer=True) for k, level in enumerate(levels))


def check_affine(owner: str, norm: object) -> None:
    """`norm` must have a weight and a bias of the same length, as BatchNorm with `affine=True`."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    good = isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dim() == 1 and weight.shape == bias.shape
    if not good:
        raise TypeError(f"{owner}: norm must have a weight and a bias (c,), as BatchNorm2d(c), got {norm!r}")


def check_margin(owner: str, margin: object, channels: int | None) -> None:
    """`margin` must be a number of at most 0, or a tensor `(c,)` of such numbers."""
    if not isinstance(margin, Tensor):
        check_number(owner, "margin", margin, max=0)
        return
    check_floating(owner, margin=margin)
    if margin.dim() > 1 or (margin.dim() == 1 and channels is not None and margin.shape[0] != channels):
        expected = "(c,)" if channels is None else f"(c,) = ({channels},)"
        raise ValueError(f"{owner}: margin must be {expected} or a number, got {show_shape(margin)}")
    if margin.numel() == 0 or not readable(margin):
        return
    check_finite(owner, margin=margin)
    if margin.amax() > 0:
        raise ValueError(f"{owner}: margin must be <= 0, got {margin.amax().item():g}")


def no_second_derivative() -> RuntimeError:
    """Return the error of a gradient that is differentiated again."""
    return RuntimeError("this relation loss has a gradient, but no second derivative")
