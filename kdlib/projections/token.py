"""Projection of transformer tokens by a linear map."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from kdlib._checks import check_choice, check_floating, check_number, check_prefix, check_shape
from kdlib._repr import CallRepr
from kdlib.projections._checks import check_grid, check_token_grid
from kdlib.projections._grid import resize

__all__ = ["TokenProjection"]

CLASS_TOKENS = ("none", "keep", "first", "drop", "mean")


class TokenProjection(CallRepr):
    """Maps the student's tokens to the teacher's width and grid: `y = W x` per token, or `y = W x + b` with `bias`.

    With `size`, the grid of tokens is resized first, like a map: adaptive average pooling along a side that shrinks,
    bilinear interpolation along a side that grows. Tokens are in row-major order, as in vision transformers. Prefix
    tokens, such as a class token and registers, are the first ones and not part of the grid.

    Args:
        in_dim: width of the student's tokens.
        out_dim: width of the teacher's tokens.
        size: `(h, w)` of the teacher's grid; None keeps the student's grid.
        grid: `(h, w)` of the student's grid; None for a square grid of any size.
        prefix_tokens: number of the student's prefix tokens. `None` is 1 if `class_token` is `"keep"`, `"first"` or
            `"drop"`, otherwise 0; with `size` and without `grid`, the number of tokens must then leave no other choice.
        class_token: what becomes of the prefix tokens. `"none"` and `"keep"`: all stay first; `"first"`: only the first
            stays; `"drop"`: none stays; `"mean"`: the mean of the tokens on the grid replaces them.
        bias: add a learned offset.

    Examples:
        >>> project = TokenProjection(192, 384, size=(14, 14), class_token="keep")
        >>> project(torch.rand(2, 1 + 7 * 7, 192)).shape
        torch.Size([2, 197, 384])

    References:
        The resampling of the grid is that of position embeddings at another resolution, Dosovitskiy et al., *An Image
        is Worth 16x16 Words*, arXiv 2010.11929, section 3.2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        size: tuple[int, int] | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int | None = None,
        class_token: Literal["none", "keep", "first", "drop", "mean"] = "none",
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_number("TokenProjection", "in_dim", in_dim, min=1, integer=True)
        check_number("TokenProjection", "out_dim", out_dim, min=1, integer=True)
        if prefix_tokens is not None:
            check_number("TokenProjection", "prefix_tokens", prefix_tokens, min=0, integer=True)
        check_choice("TokenProjection", "class_token", class_token, CLASS_TOKENS)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.size = None if size is None else check_grid("TokenProjection", "size", size)
        self.grid = None if grid is None else check_grid("TokenProjection", "grid", grid)
        self.prefix_tokens, self.class_token, self.bias = prefix_tokens, class_token, bias
        self.linear = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, student: Tensor) -> Tensor:
        """Map `(b, n, in_dim)` to `(b, N, out_dim)`."""
        check_floating("TokenProjection", student=student)
        check_shape("TokenProjection", "student", student, "b n d", d=self.in_dim)
        leading = self.prefix_tokens
        if leading is None and self.class_token in ("keep", "first", "drop"):
            leading = 1
        elif leading is None and (self.size is None or self.grid is not None):
            leading = 0
        leading = check_prefix("TokenProjection", "student", student, leading, "prefix_tokens")
        tokens = student[:, leading:]
        kept = {"drop": student[:, :0], "first": student[:, : min(leading, 1)]}.get(
            self.class_token, student[:, :leading]
        )
        prefix = tokens.mean(1, keepdim=True) if self.class_token == "mean" else kept
        if self.size is not None:
            grid = check_token_grid("TokenProjection", "student", student, leading, self.grid)
            if grid != self.size:
                resized = resize(rearrange(tokens, "b (h w) d -> b d h w", h=grid[0]), self.size)
                tokens = rearrange(resized, "b d h w -> b (h w) d")
        projected: Tensor = self.linear(torch.cat([prefix, tokens], 1))
        return projected
