"""Arithmetic shared by losses, weightings and heads: precision, unit rows, safe squares, reduction."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdlib._checks import check_choice, check_weight

__all__ = [
    "FAR", "REDUCTIONS", "MeanOnly", "Reduction", "directions", "finite_weight", "full_precision", "hold_short", "hold_steep",
    "mean_square", "promote", "promoted_dtype", "reduce", "relative_weight", "rescale", "safe_divisor", "shortest_length",
    "unit_rows",
]  # fmt: skip

Reduction: TypeAlias = Literal["mean", "none"]
MeanOnly: TypeAlias = Literal["mean"]
REDUCTIONS = ("mean", "none")

FAR = 1e15
"""Larger differences count as this one and get no gradient, because their square would overflow float32."""


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of `x`, so that each operation runs in the dtype of its arguments."""
    kind = x.device.type
    # The names first, since older compilers of torch do not trace the function.
    if kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def promoted_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return float32, or float64 if either tensor is float64."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def promote(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both tensors to float32, or to float64 if either is float64, and detach the teacher."""
    dtype = promoted_dtype(student, teacher)
    return student.to(dtype), teacher.detach().to(dtype)


def safe_divisor(x: Tensor) -> Tensor:
    """Return `x` with zeros replaced by 1, so that zeros divided by zeros are 0."""
    return torch.where(x == 0, 1.0, x)


def rescale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each sample by its largest magnitude, so that squares neither overflow nor vanish.

    Only for results that do not depend on the scale of `x`: there the gradient is exact although autograd treats the
    divisor as a constant.

    Returns:
        The samples `(b, ...)`, with zero samples unchanged, and their largest magnitudes `(b,)`.
    """
    rows = x.detach().flatten(1)
    largest = torch.maximum(rows.amax(1), -rows.amin(1))  # ten times as fast as the maximum norm on a CPU
    return x / safe_divisor(largest).reshape(-1, *[1] * (x.dim() - 1)), largest


def unit_rows(x_bd: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its Euclidean length; safe for all finite rows, and zero rows stay zero.

    Returns:
        The rows `(b, d)` and their largest magnitudes `(b,)` before the division.
    """
    x_bd, largest = rescale(x_bd)
    length = torch.linalg.vector_norm(x_bd, dim=1, keepdim=True)
    return x_bd / safe_divisor(length), largest


def shortest_length(origin: torch.dtype) -> float:
    """Return the length below which a sample gets no gradient: 1e-12, or 5e-4 for a student in float16."""
    return max(1e-12, 8 * torch.finfo(origin).tiny)


def hold_short(values: Tensor, largest: Tensor, origin: torch.dtype) -> Tensor:
    """Keep the values but drop the gradient of samples shorter than `shortest_length`, which includes zero samples.

    The gradient of a direction grows as 1 / length and must not overflow the dtype of the student.

    Args:
        values: `(b, ...)`.
        largest: `(b,)` or `(b, 1)`, the largest magnitude of each sample of the student; broadcast to `values`.
        origin: dtype of the student as the user passed it.
    """
    return torch.where(largest < shortest_length(origin), values.detach(), values)


def directions(x_bd: Tensor, origin: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `unit_rows(x_bd)`; rows that are too short for a gradient in the dtype `origin` get none."""
    unit, largest = unit_rows(x_bd)
    return hold_short(unit, largest.unsqueeze(1), origin), largest


def hold_steep(difference: Tensor, count: float, origin: torch.dtype) -> Tensor:
    """Clamp to plus and minus `FAR`, and drop the gradient where that of the square would overflow float16.

    Args:
        difference: student minus teacher, of any shape.
        count: number of values over which the mean of the squares is taken.
        origin: dtype of the student as the user passed it.
    """
    difference = difference.clamp(-FAR, FAR)
    if origin == torch.float16:
        steep = difference.abs() > torch.finfo(origin).max / 4 * count
        difference = torch.where(steep, difference.detach(), difference)
    return difference


def mean_square(difference: Tensor, origin: torch.dtype) -> Tensor:
    """Return the mean square of each sample, `(b, ...)` to `(b,)`; 0 for samples without values."""
    rows = difference.unsqueeze(-1).flatten(1)
    count = max(rows.shape[1], 1)
    return hold_steep(rows, count, origin).square().sum(1) / count


def reduce(owner: str, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    """Reduce losses `(b,)` to `sum(w * l) / sum(w)`, or to `w * l` for `"none"`; without `weight` all weights are 1.

    For an empty batch, or if all weights are zero, the result is 0 with a graph, so that `backward()` works and every
    process of a distributed run takes part.
    """
    check_choice(owner, "reduction", reduction, REDUCTIONS)
    check_weight(owner, weight, losses.shape[0])
    if weight is None:
        return losses if reduction == "none" else losses.sum() / max(losses.shape[0], 1)
    limit = torch.finfo(losses.dtype).max
    weight = finite_weight(weight)
    if reduction == "none":
        wide = torch.promote_types(weight.dtype, losses.dtype)  # the limit may not fit the type of the weights
        return (weight.to(wide).clamp(max=limit).to(losses.dtype) * losses).clamp(max=limit)
    weight = relative_weight(weight, losses)
    return (weight * losses).sum() / safe_divisor(weight.sum())


def finite_weight(weight: Tensor) -> Tensor:
    """Return the weights, where negative, infinite and NaN ones count as 0: not all can be read to raise an error."""
    return torch.where((weight >= 0) & (weight < torch.inf), weight, 0)


def relative_weight(weight: Tensor, like: Tensor) -> Tensor:
    """Divide weights by the largest, so that sums do not overflow and products do not vanish; convert to `like`."""
    largest = weight.detach().amax() if len(weight) else weight.sum()
    return (weight / torch.where(largest == 0, 1, largest)).to(like)
