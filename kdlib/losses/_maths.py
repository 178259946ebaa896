"""Losses: the three steps that every loss shares (precision, direction, reduction). Touches tensors only."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kdlib._checks import check_choice, check_weight

__all__ = ["REDUCTIONS", "full_precision", "promote", "reduce", "rescale", "unit_rows"]

REDUCTIONS = ("mean", "none")


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the device of `x`: inside, an operation runs in the dtype of its arguments."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def promote(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 if either is; the teacher cut from the graph."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _shortest(dtype: torch.dtype) -> float:
    """The shortest row that still gets a gradient: it grows as 1 / length and must stay a number in `dtype`."""
    return max(1e-12, torch.finfo(dtype).tiny)


def rescale(x: Tensor, origin: torch.dtype) -> Tensor:
    """Divide each sample by its largest magnitude, so that squares neither overflow nor vanish.

    For use where a result does not depend on the scale of `x`: the divisor is then a constant to autograd, and the
    gradient is still exact. A zero sample stays zero. A sample shorter than a gradient in `origin` can express
    (1e-12; 6e-5 in float16) keeps its value and passes no gradient on.

    Args:
        x: `(b, ...)`.
        origin: dtype of the tensor that the gradient will end in.

    Returns:
        `(b, ...)`, the largest magnitude of each sample 1, or 0.
    """
    largest = torch.linalg.vector_norm(x.detach().flatten(1), ord=math.inf, dim=1)
    largest = largest.reshape(-1, *[1] * (x.dim() - 1))
    x = torch.where(largest < _shortest(origin), x.detach(), x)
    return x / torch.where(largest == 0, 1.0, largest)


def unit_rows(x_bd: Tensor, origin: torch.dtype) -> Tensor:
    """Each row divided by its Euclidean length; a zero row stays zero and gets a zero gradient.

    Args:
        x_bd: `(b, d)`, any finite values.
        origin: dtype of the tensor that the gradient will end in, see `rescale`.
    """
    x_bd = rescale(x_bd, origin)
    length = torch.linalg.vector_norm(x_bd, dim=1, keepdim=True)
    return x_bd / torch.where(length == 0, 1.0, length)


def reduce(owner: str, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    """Per-sample losses `(b,)` to `sum(w * l) / sum(w)`, or to `w * l` for `"none"`; no weight counts as all ones.

    A batch that is empty, or whose weights are all zero, gives 0 that still hangs on the graph, so that `backward()`
    works and every process of a distributed run takes part.
    """
    check_choice(owner, "reduction", reduction, REDUCTIONS)
    check_weight(owner, weight, losses.shape[0])
    if weight is None:
        return losses if reduction == "none" else losses.sum() / max(losses.shape[0], 1)
    weight = weight.to(losses.dtype)
    if reduction == "none":
        return weight * losses
    total = weight.sum()
    return (weight * losses).sum() / torch.where(total == 0, 1.0, total)
