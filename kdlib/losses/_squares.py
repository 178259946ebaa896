"""Losses: squares of gaps between features that stay within float32, and their gradients within float16."""

import torch
from torch import Tensor

__all__ = ["FAR", "hold_steep", "mean_square"]

FAR = 1e15
"""A larger gap counts as this one, without gradient: its square would leave float32."""


def hold_steep(gap: Tensor, count: float, origin: torch.dtype) -> Tensor:
    """The gap within plus and minus `FAR`; where float16 could not hold the gradient of its square, it passes none on.

    Args:
        gap: student minus teacher, of any shape.
        count: the number of values that the mean of the squares is taken over.
        origin: dtype that the student came in.
    """
    gap = gap.clamp(-FAR, FAR)
    if origin == torch.float16:
        steep = gap.abs() > torch.finfo(origin).max / 4 * count
        gap = torch.where(steep, gap.detach(), gap)
    return gap


def mean_square(gap: Tensor, origin: torch.dtype) -> Tensor:
    """The mean of the squares of each sample's values: `(b, ...)` to `(b,)`; 0 for a sample without values."""
    rows = gap.unsqueeze(-1).flatten(1)
    count = max(rows.shape[1], 1)
    return hold_steep(rows, count, origin).square().sum(1) / count
