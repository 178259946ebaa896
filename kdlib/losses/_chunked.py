"""Losses: a few rows of two big matrices at a time, so that no third matrix of their size is held. Touches tensors only.

Logits of a million classes are large: every step of a formula that is written for the whole batch, and kept for the
backward, costs another matrix of their size. Here the loss and its gradient are both computed a few rows at a time;
between forward and backward only the two inputs are kept, and the only new matrix is the gradient itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["LEAST_LOG", "by_rows", "soften"]

LEAST_LOG = -1e30
"""A smaller log-probability counts as this one: gaps near the end of float32 would make it -inf, and 0 * -inf NaN."""

CACHED = 2**17
"""Numbers of one matrix to work on at a time: what fits the cache of a processor's core, with what is made of them."""


def by_rows(
    value: Callable[..., Tensor], slope: Callable[..., Tensor], student: Tensor, teacher: Tensor, *others: Tensor
) -> Tensor:
    """`value(student, teacher, *others)`, computed and differentiated a few rows at a time.

    Neither function sees a half-precision number: rows come to them in float32, or float64 if either matrix is. What
    is small is left to autograd whole, without `slope`; and so is all inside `torch.compile`, which fuses the steps
    itself. The gradient of the gradient works, and takes the memory of the formula as written. Where there are parts,
    `torch.func.grad` works and `torch.func.vmap` says that it has no rule.

    Args:
        value: `(n, c)`, `(n, c)` and n rows of each of `others` to the losses `(n,)`.
        slope: of the same arguments, the derivative of each loss with respect to its row of the student, `(n, c)`.
            Both functions are written in operations that autograd can differentiate.
        student: `(b, c)`.
        teacher: `(b, c)`; receives no gradient.
        others: tensors `(b, ...)` that need no gradient either.

    Returns:
        `(b,)`, float32 or float64.
    """
    if torch.compiler.is_compiling() or student.numel() <= CACHED:
        return value(*_promoted(student, teacher.detach()), *others)
    losses: Tensor = _ByRows.apply(value, slope, student, teacher.detach(), *others)  # type: ignore[no-untyped-call]  # torch has no types here
    return losses


def soften(logits: Tensor, temperature: float) -> Tensor:
    """`logits / temperature` `(n, c)`, up to a constant of each row where the quotient could leave the float range."""
    if temperature >= 1:
        return logits / temperature
    shifted = (logits - logits.amax(1, keepdim=True)) / temperature
    return shifted.clamp(min=torch.finfo(logits.dtype).min)


class _ByRows(Function):
    @staticmethod
    def forward(
        value: Callable[..., Tensor], slope: Callable[..., Tensor], student: Tensor, teacher: Tensor, *others: Tensor
    ) -> Tensor:
        # Not a list of small results: among the big ones they would leave gaps that the allocator cannot use again.
        out = student.new_empty(student.shape[0], dtype=_dtype(student, teacher))
        for to, s, t, *rest in _split(student, out, student, teacher, *others):
            to.copy_(value(*_promoted(s, t), *rest))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.slope, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, *others = ctx.saved_tensors
        none = (None,) * (1 + len(others))
        scale = gradient.unsqueeze(1)
        if torch.is_grad_enabled():  # the graph of the gradient is asked for
            slope = ctx.slope(*_promoted(student, teacher), *others)
            return None, None, (slope * scale).to(student.dtype), *none
        out = torch.empty_like(student)
        for to, by, s, t, *rest in _split(student, out, scale, student, teacher, *others):
            torch.mul(ctx.slope(*_promoted(s, t), *rest), by, out=to)
        return None, None, out, *none


def _dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Float32, or float64 if either is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _promoted(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def _rows_at_once(x_bc: Tensor) -> int:
    """As many rows as fit the caches of the cores at work; elsewhere, enough to keep an accelerator busy."""
    cores = torch.get_num_threads() if x_bc.device.type == "cpu" else 32
    return max(1, cores * CACHED // max(x_bc.shape[1], 1))


def _split(x_bc: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors `(b, ...)` in parts of as many rows as `x_bc` may be worked on at once."""
    rows = _rows_at_once(x_bc)
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)
