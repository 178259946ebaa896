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
from kdlib.losses.logits._divergence import Measured

__all__ = ["by_rows", "chunks"]

CHUNK = 2**15
"""Values of a matrix per chunk and core: with the intermediate results they fit the cache of a processor's core."""


def by_rows(
    measure: Callable[..., Measured], student: Tensor, teacher: Tensor, *others: Tensor, steps: int = 1
) -> Tensor:
    """Compute the value of `measure(student, teacher, *others)` and its gradient a few rows at a time.

    `measure` receives float32 rows, or float64 if either matrix is float64. Small matrices use plain autograd on its
    value, as does `torch.compile`, which fuses the steps itself. Second derivatives work and take the memory of the
    plain formula. For large matrices `torch.func.grad` works and `torch.func.vmap` raises an error.

    Args:
        measure: maps `(n, c)`, `(n, c)` and n rows of each of `others` to the losses `(n,)` and a function that returns
            the derivative of each loss by its row of the student, `(n, c)`. Both consist of differentiable operations.
        student: `(b, c)`, or `(b, c, p)` with p positions. The function then receives and returns p as last dimension.
        teacher: of the same shape; receives no gradient.
        others: tensors `(b, ...)`, or `(b, ..., p)`, that need no gradient.
        steps: multiple of the usual chunk; larger for a function of many small steps.

    Returns:
        `(b,)` or `(b, p)`, float32 or float64.
    """
    if torch.compiler.is_compiling() or student.numel() <= CHUNK:
        return measure(*promote(student, teacher), *others).value
    # The gradient of a half student waits for the factor of the loss, because small values would vanish in its dtype.
    at_once = student.requires_grad and torch.is_grad_enabled() and student.dtype == promoted_dtype(student, teacher)
    losses: Tensor = _ByRows.apply(measure, at_once, steps, student, teacher.detach(), *others)[0]  # type: ignore[no-untyped-call]  # torch has no types here
    return losses


class _ByRows(Function):
    @staticmethod
    def forward(
        measure: Callable[..., Measured], at_once: bool, steps: int, student: Tensor, teacher: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        # Allocated first: small results between large ones would fragment the memory of the allocator.
        shape = (student.shape[0], *student.shape[2:])
        losses = student.new_empty(shape, dtype=promoted_dtype(student, teacher))
        if not at_once:
            for out, s, t, *rest in chunks(student, steps, losses, student, teacher, *others):
                out.copy_(measure(*promote(s, t), *rest).value)
            return losses, None
        slopes = torch.empty_like(student)
        for out, slope, s, t, *rest in chunks(student, steps, losses, slopes, student, teacher, *others):
            measured = measure(*promote(s, t), *rest)
            out.copy_(measured.value)
            slope.copy_(measured.slope())
        return losses, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.measure, _, ctx.steps, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.slopes = output[1]
        if ctx.slopes is not None:
            ctx.mark_non_differentiable(ctx.slopes)
        ctx.set_materialize_grads(False)  # zeros of the size of the slopes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        student, teacher, *others = ctx.saved_tensors
        before, after = (None,) * 3, (None,) * (1 + len(others))
        if gradient is None:
            return *before, None, *after
        scale = gradient.unsqueeze(1)
        if torch.is_grad_enabled():  # with create_graph=True
            slope = ctx.measure(*promote(student, teacher), *others).slope()
            return *before, (slope * scale).to(student.dtype), *after
        if ctx.slopes is not None:
            # The matrix becomes the gradient; another backward pass computes it again.
            result, ctx.slopes = ctx.slopes.mul_(scale), None
            return *before, result, *after
        result = torch.empty_like(student)
        for out, factor, s, t, *rest in chunks(student, ctx.steps, result, scale, student, teacher, *others):
            torch.mul(ctx.measure(*promote(s, t), *rest).slope(), factor, out=out)
        return *before, result, *after


def chunks(x: Tensor, steps: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors `(b, ...)` or `(b, ..., p)` into chunks that fit the caches of all cores or fill an accelerator."""
    cores = steps * torch.get_num_threads() if x.device.type == "cpu" else 128
    columns = max(1, cores * CHUNK // max(x.shape[1], 1))
    positions = x.shape[2] if x.dim() == 3 else 1
    for rows in zip(*(torch.split(t, max(1, columns // max(positions, 1))) for t in tensors), strict=True):
        yield from [rows] if positions <= columns else zip(*(torch.split(t, columns, -1) for t in rows), strict=True)
