"""Logits of several positions per sample, as tokens or pixels: layout, mask and reduction."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdlib._checks import check_weight
from kdlib._maths import reduce

__all__ = ["Positions", "as_positions", "reduce_positions"]


class Positions(NamedTuple):
    """Logits `(n, c)` or `(b, c, p)` of both sides, and the shape of the positions, `(b, ...)`."""

    student: Tensor
    teacher: Tensor
    shape: torch.Size


def as_positions(student: Tensor, teacher: Tensor, dim: int) -> Positions:
    """Arrange logits with the classes at `dim` so that they are dimension 1; a view where the layout permits it."""
    shape = torch.Size(size for index, size in enumerate(student.shape) if index != dim % student.dim())
    if dim % student.dim() == student.dim() - 1:
        return Positions(student.flatten(0, -2), teacher.flatten(0, -2), shape)
    return Positions(student.movedim(dim, 1).flatten(2), teacher.movedim(dim, 1).flatten(2), shape)


def reduce_positions(
    owner: str, losses: Tensor, shape: torch.Size, mask: Tensor | None, reduction: str, weight: Tensor | None
) -> Tensor:
    """Reduce the losses of all positions.

    `"mean"` is the mean over the unmasked positions of all samples, each with the weight of its sample. `"none"` is the
    mean over the unmasked positions of each sample, `(b,)`, times its weight; 0 for a sample without any.
    """
    if mask is None and len(shape) == 1:
        return reduce(owner, losses, reduction, weight)
    batch, positions = shape[0], math.prod(shape[1:])
    check_weight(owner, weight, batch)
    losses = losses.reshape(batch, positions)
    kept = torch.ones_like(losses) if mask is None else mask.reshape(batch, positions).to(losses)
    if reduction == "none":
        means = (torch.where(kept > 0, losses, 0.0)).sum(1) / kept.sum(1).clamp(min=1)
        return reduce(owner, means, reduction, weight)
    share = kept if weight is None else kept * weight.to(kept).unsqueeze(1)
    return reduce(owner, losses.flatten(), reduction, share.flatten())
