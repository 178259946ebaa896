"""Shape checks of projections."""

from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from kdlib._checks import check_choice, check_rank, show_shape
from kdlib._layouts import grid_of, shown_layout

LAYOUTS = ("bd", "bchw", "bhwc", "bnd")


def check_grid(owner: str, name: str, size: object) -> tuple[int, int]:
    """Return `size`, which must be the height and width of a feature map."""
    sides: Any = size.tolist() if isinstance(size, (np.ndarray, Tensor)) else size
    whole = isinstance(sides, (tuple, list)) and len(sides) == 2
    if not whole or any(isinstance(side, bool) or not isinstance(side, Integral) for side in sides):
        raise TypeError(f"{owner}: {name} must be two whole numbers (h, w), got {sides!r}")
    if min(sides) < 1:
        raise ValueError(f"{owner}: {name} must be (h, w) with sides >= 1, got {sides!r}")
    return int(sides[0]), int(sides[1])


def check_layout(owner: str, name: str, x: Tensor, layout: str | None) -> str:
    """Return the layout of `x`: the given one, or the one that its shape shows."""
    if layout is not None:
        check_choice(owner, f"{name}_layout", layout, LAYOUTS)
        check_rank(owner, name, x, " ".join(layout))
        return layout
    if x.dim() not in (2, 3, 4):
        raise ValueError(
            f"{owner}: {name} must be (b, d), (b, n, d), (b, c, h, w) or (b, h, w, c), got {show_shape(x)}"
        )
    shown = "bnd" if x.dim() == 3 else shown_layout(x)
    if shown is None:
        raise ValueError(
            f"{owner}: {name} {show_shape(x)} looks like (b, h, w, c); give {name}_layout='bhwc', or 'bchw' if it is "
            "(b, c, h, w)"
        )
    return shown


def check_projectable(owner: str, layouts: tuple[str, str], student: Tensor, teacher: Tensor) -> None:
    """Features must be two vectors, a map and a vector, or any two of maps and tokens."""
    if layouts != ("bd", "bd") and (layouts[0] == "bd" or layouts == ("bnd", "bd")):
        raise ValueError(
            f"{owner}: student and teacher must be vectors (b, d), tokens (b, n, d) or maps (b, c, h, w): both of the "
            f"same kind, a map and tokens, or a student map and a teacher vector; got {show_shape(student)} and "
            f"{show_shape(teacher)}; give a projection of your own"
        )


def check_counterparts(owner: str, student: int, teacher: int) -> None:
    """Each prefix token of the teacher needs one of the student; a single one may be the mean."""
    if teacher > max(student, 1):
        raise ValueError(
            f"{owner}: the teacher has {teacher} tokens before those of the grid and the student {student}; leave those "
            "without a counterpart out of the teacher's feature"
        )


def check_token_grid(
    owner: str, name: str, x: Tensor, leading: int, grid: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the grid of the tokens of `x` (b, n, d) after `leading` ones: `grid`, or a square one."""
    tokens = x.shape[1] - leading
    found = grid_of(tokens) if grid is None else grid
    if found is None or found[0] * found[1] != tokens:
        wanted = "a square number" if grid is None else f"{grid[0]} x {grid[1]}"
        more = f" and {leading} before the grid" if leading else ""
        remedy = "; give a TokenProjection with grid=(h, w)" if grid is None else ""
        raise ValueError(f"{owner}: {name} must be (b, n, d) with n = {wanted}{more}, got {show_shape(x)}{remedy}")
    return found
