"""Precision, normalization and reduction of losses: a private module that kdlib and kdlib_faces share on purpose."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kdlib._checks import check_choice, check_weight

__all__ = ["REDUCTIONS", "full_precision", "hold_short", "promote", "reduce", "rescale", "unit_rows"]

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


def rescale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each sample by its largest magnitude, so that squares neither overflow nor vanish.

    For use where a result does not depend on the scale of `x`: the divisor is then a constant to autograd, and the
    gradient is still exact.

    Returns:
        The samples `(b, ...)`, a zero one unchanged, and their largest magnitudes `(b,)`.
    """
    rows = x.detach().flatten(1)
    largest = torch.maximum(rows.amax(1), -rows.amin(1))  # on a CPU ten times as fast as the maximum norm
    divisor = torch.where(largest == 0, 1.0, largest)
    return x / divisor.reshape(-1, *[1] * (x.dim() - 1)), largest


def unit_rows(x_bd: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by its Euclidean length, safe for any finite row; a zero row stays zero.

    Returns:
        The rows `(b, d)` and their largest magnitudes `(b,)` before.
    """
    x_bd, largest = rescale(x_bd)
    length = torch.linalg.vector_norm(x_bd, dim=1, keepdim=True)
    return x_bd / torch.where(length == 0, 1.0, length), largest


def hold_short(losses: Tensor, largest: Tensor, origin: torch.dtype) -> Tensor:
    """Keep the value but drop the gradient of samples too short for it.

    The gradient of a direction grows as 1 / length; it must stay a number in the dtype of the student, `origin`. So
    samples below 1e-12 (5e-4 in float16), zero ones with them, pass none on.

    Args:
        losses: `(b,)`.
        largest: `(b,)`, the largest magnitude of each sample of the student.
        origin: dtype that the student came in.
    """
    shortest = max(1e-12, 8 * torch.finfo(origin).tiny)
    return torch.where(largest < shortest, losses.detach(), losses)


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
