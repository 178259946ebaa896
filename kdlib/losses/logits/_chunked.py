"""Losses of large logits, computed a few rows at a time so that no further matrix of their size is held.

With a million classes, each step of a formula that is applied to the whole batch and saved for the backward pass takes
the memory of another matrix of logits. Here the loss and its gradient are computed a few rows at a time; only the two
inputs are saved, and the only new matrix is the gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._maths import promote, promoted_dtype

__all__ = ["by_rows"]

CHUNK = 2**17
"""Values of a matrix per chunk and core: with the intermediate results they fit the cache of a processor's core."""


def by_rows(
    value: Callable[..., Tensor], slope: Callable[..., Tensor], student: Tensor, teacher: Tensor, *others: Tensor
) -> Tensor:
    """Compute `value(student, teacher, *others)` and its gradient a few rows at a time.

    Both functions receive float32 rows, or float64 if either matrix is float64. Small matrices use plain autograd on
    `value`, as does `torch.compile`, which fuses the steps itself. Second derivatives work and take the memory of the
    plain formula. For large matrices `torch.func.grad` works and `torch.func.vmap` raises an error.

    Args:
        value: maps `(n, c)`, `(n, c)` and n rows of each of `others` to the losses `(n,)`.
        slope: maps the same arguments to the derivative of each loss by its row of the student, `(n, c)`. Both
            functions must consist of differentiable operations.
        student: `(b, c)`, or `(b, c, p)` with p positions. The functions then receive and return p as last dimension.
        teacher: of the same shape; receives no gradient.
        others: tensors `(b, ...)`, or `(b, ..., p)`, that need no gradient.

    Returns:
        `(b,)` or `(b, p)`, float32 or float64.
    """
    if torch.compiler.is_compiling() or student.numel() <= CHUNK:
        return value(*promote(student, teacher), *others)
    losses: Tensor = _ByRows.apply(value, slope, student, teacher.detach(), *others)  # type: ignore[no-untyped-call]  # torch has no types here
    return losses


class _ByRows(Function):
    @staticmethod
    def forward(
        value: Callable[..., Tensor], slope: Callable[..., Tensor], student: Tensor, teacher: Tensor, *others: Tensor
    ) -> Tensor:
        # Allocated first: small results between large ones would fragment the memory of the allocator.
        shape = (student.shape[0], *student.shape[2:])
        losses = student.new_empty(shape, dtype=promoted_dtype(student, teacher))
        for out, s, t, *rest in _chunks(student, losses, student, teacher, *others):
            out.copy_(value(*promote(s, t), *rest))
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.slope, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, *others = ctx.saved_tensors
        none = (None,) * (1 + len(others))
        scale = gradient.unsqueeze(1)
        if torch.is_grad_enabled():  # with create_graph=True
            slope = ctx.slope(*promote(student, teacher), *others)
            return None, None, (slope * scale).to(student.dtype), *none
        result = torch.empty_like(student)
        for out, factor, s, t, *rest in _chunks(student, result, scale, student, teacher, *others):
            torch.mul(ctx.slope(*promote(s, t), *rest), factor, out=out)
        return None, None, result, *none


def _chunks(x: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors `(b, ...)` or `(b, ..., p)` into chunks that fit the caches of all cores or fill an accelerator."""
    cores = torch.get_num_threads() if x.device.type == "cpu" else 32
    columns = max(1, cores * CHUNK // max(x.shape[1], 1))
    positions = x.shape[2] if x.dim() == 3 else 1
    for rows in zip(*(torch.split(t, max(1, columns // max(positions, 1))) for t in tensors), strict=True):
        yield from [rows] if positions <= columns else zip(*(torch.split(t, columns, -1) for t in rows), strict=True)
