"""Shape checks of projections."""

from math import isqrt

from torch import Tensor

from kdlib._checks import show_shape


def check_grid(owner: str, name: str, size: object) -> None:
    """`size` must be the height and width of a feature map."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(type(side) is int for side in size):
        raise TypeError(f"{owner}: {name} must be two whole numbers (h, w), got {size!r}")
    if min(size) < 1:
        raise ValueError(f"{owner}: {name} must be (h, w) with sides >= 1, got {size!r}")


def check_projectable(owner: str, student: Tensor, teacher: Tensor) -> None:
    """Features must be of the same kind, a map and tokens in either order, or a map and a vector."""
    known = {(2, 2), (3, 3), (4, 4), (3, 4), (4, 3), (4, 2)}
    if (student.dim(), teacher.dim()) not in known:
        raise ValueError(
            f"{owner}: student and teacher must be vectors (b, d), tokens (b, n, d) or maps (b, c, h, w): both of the "
            f"same kind, a map and tokens, or a map and a vector; got {show_shape(student)} and {show_shape(teacher)}; "
            "give a projection of your own"
        )


def check_square_tokens(owner: str, name: str, x: Tensor) -> tuple[int, bool]:
    """`x` (b, n, d) must hold a square grid of tokens, optionally after a class token; returns side and class token."""
    for leading in (0, 1):
        side = isqrt(max(x.shape[1] - leading, 0))
        if side and side * side == x.shape[1] - leading:
            return side, leading == 1
    raise ValueError(
        f"{owner}: {name} must hold the tokens (b, n, d) of a square grid, with or without a class token, because the "
        f"numbers of tokens differ, got {show_shape(x)}; give a TokenProjection with size= and grid="
    )


def check_token_grid(owner: str, x: Tensor, leading: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """`x` (b, n, d) must hold `leading` tokens and those of `grid` (a square grid if None); returns the grid."""
    tokens = x.shape[1] - leading
    side = isqrt(max(tokens, 0))
    height, width = (side, side) if grid is None else grid
    if tokens < 1 or height * width != tokens:
        wanted = "a square number" if grid is None else f"{height} x {width}"
        more = " and a class token" if leading else ""
        remedy = "; give grid=(h, w)" if grid is None else ""
        raise ValueError(f"{owner}: student must be (b, n, d) with n = {wanted}{more}, got {show_shape(x)}{remedy}")
    return height, width
