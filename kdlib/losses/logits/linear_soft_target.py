"""Soft targets from hidden states and output matrices, without whole matrices of logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._checks import check_number, check_scheduled
from kdlib._maths import full_precision, promote
from kdlib.losses._checks import check_hidden, check_mask, no_second_derivative
from kdlib.losses._module import ScheduledModule
from kdlib.losses.logits._chunked import chunks
from kdlib.losses.logits._divergence import Divergence, Measured
from kdlib.losses.logits.soft_target import check_options, measure
from kdlib.types import Schedule

__all__ = ["LinearSoftTargetLoss", "linear_soft_target"]

CHUNK = 2**25
"""Logits of a chunk if `chunk_size` is not given: 128 MB in float32 for each side."""


def linear_soft_target(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    skew: float = 0.1,
    standardize: bool = False,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute `soft_target` of the logits `hidden @ weight.T` of both sides, a few positions at a time.

    .. math:: \frac{T^2}{n} \sum_{i=1}^{n} D(p^t_i, p^s_i), \qquad p_i = \mathrm{softmax}(W h_i / T)

    over the n positions that `mask` keeps, with D as in `soft_target`. The gradients are computed in the same pass as
    the value: the logits of a chunk exist once, and none are kept for the backward pass. There is no second derivative.
    The matrix products run in the dtype of their inputs; everything else in float32, or in float64 for float64 inputs.

    Args:
        student_hidden: hidden states before the output matrix, `(b, n, d)` or of any other leading dimensions.
        student_weight: output matrix `(v, d)`, such as `lm_head.weight`; gets a gradient if it requires one.
        teacher_hidden: hidden states with the same leading dimensions; never receive a gradient.
        teacher_weight: output matrix of as many rows; never receives a gradient.
        temperature: T, above 0; larger values give softer probabilities.
        divergence: as in `soft_target`.
        skew: as in `soft_target`.
        standardize: as in `soft_target`; a chunk of positions holds the whole vocabulary, so the value is the same.
        mask: boolean, the leading dimensions of the hidden states; False leaves a position out, such as padding.
        chunk_size: positions per chunk; `None` for about 34 million logits.

    Returns:
        A scalar; 0 with a graph if no position is kept. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes do not fit together, the vocabularies differ in size, a number is out of range, or
            `divergence` is unknown.
        TypeError: An input is not a floating-point tensor, or `mask` is not boolean.

    Examples:
        >>> import torch
        >>> from kdlib.functional import soft_target
        >>> hidden, weight = torch.eye(4)[:3], torch.arange(20.0).reshape(5, 4).sin()
        >>> value = linear_soft_target(hidden, weight, hidden, weight.flip(0), temperature=2.0, chunk_size=2)
        >>> torch.allclose(value, soft_target(hidden @ weight.T, hidden @ weight.flip(0).T, temperature=2.0))
        True

    References:
        See `soft_target`. Computing the gradient in chunks in the forward pass is the idea of the fused linear losses
        of Liger Kernel, Hsu et al., arXiv 2410.10989.
    """
    owner = "linear_soft_target"
    check_number(owner, "temperature", temperature, above=0)
    check_options(owner, divergence, skew, standardize)
    check_hidden(owner, student_hidden, student_weight, teacher_hidden, teacher_weight)
    positions = student_hidden.shape[:-1]
    if mask is not None:
        check_mask(owner, mask, tuple(positions))
    if chunk_size is not None:
        check_number(owner, "chunk_size", chunk_size, min=1, integer=True)
    shared = torch.float64 if torch.float64 in (student_hidden.dtype, teacher_hidden.dtype) else torch.float32
    kept = torch.ones(positions.numel(), device=student_hidden.device) if mask is None else mask.flatten()
    kept = kept.to(shared)
    share = kept * (temperature / kept.sum().clamp(min=1))
    origin = student_hidden.dtype if standardize else None
    with full_precision(student_hidden):
        loss: Tensor = _LinearChunks.apply(  # type: ignore[no-untyped-call]  # torch has no types here
            partial(measure, temperature=temperature, divergence=divergence, skew=skew, origin=origin),
            chunk_size or max(1, CHUNK // max(len(student_weight), 1)),
            share,
            student_hidden.flatten(0, -2),
            student_weight,
            teacher_hidden.detach().flatten(0, -2),
            teacher_weight.detach(),
        )
    return loss


class LinearSoftTargetLoss(ScheduledModule):
    """`linear_soft_target` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    `temperature` may be a schedule, as in `kdlib.schedules`; each call then needs `step=`.

    Examples:
        >>> import torch
        >>> loss = LinearSoftTargetLoss(temperature=2.0)
        >>> hidden, weight = torch.rand(2, 5, 4), torch.rand(9, 4)
        >>> round(loss(hidden, weight, hidden, weight).item(), 6)
        0.0
    """

    _schedulable = ("temperature",)

    def __init__(
        self,
        *,
        temperature: float | Schedule = 1.0,
        divergence: Divergence = "forward_kl",
        skew: float = 0.1,
        standardize: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_scheduled("LinearSoftTargetLoss", "temperature", temperature, above=0)
        check_options("LinearSoftTargetLoss", divergence, skew, standardize)
        if chunk_size is not None:
            check_number("LinearSoftTargetLoss", "chunk_size", chunk_size, min=1, integer=True)
        self.temperature, self.divergence, self.skew = temperature, divergence, skew
        self.standardize, self.chunk_size = standardize, chunk_size

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        mask: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Compare hidden states `(b, n, d)` and output matrices `(v, d)` of student and teacher."""
        return linear_soft_target(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **self._at(step), divergence=self.divergence,
            skew=self.skew, standardize=self.standardize, mask=mask, chunk_size=self.chunk_size,
        )  # fmt: skip


class _LinearChunks(Function):
    @staticmethod
    def forward(
        ctx: Any, measure: Callable[[Tensor, Tensor], Measured], rows: int, share: Tensor, *sides: Tensor
    ) -> Tensor:
        ctx.compute = partial(_in_chunks, measure, rows, ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        ctx.save_for_backward(share, *sides)
        loss: Tensor
        loss, *ctx.gradients = ctx.compute(share, *sides)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            raise no_second_derivative()
        # Scaled in place, because they can take as much memory as the output matrix; another pass computes them again.
        gradients = ctx.gradients or ctx.compute(*ctx.saved_tensors)[1:]
        ctx.gradients = None
        grad_h, grad_w = (None if x is None else x.mul_(gradient.to(x.dtype)) for x in gradients)
        return None, None, None, grad_h, grad_w, None, None


def _in_chunks(
    measure: Callable[[Tensor, Tensor], Measured],
    rows: int,
    needs_h: bool,
    needs_w: bool,
    share: Tensor,
    h_s: Tensor,
    w_s: Tensor,
    h_t: Tensor,
    w_t: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and its gradients by the student's hidden states and output matrix."""
    loss = share.new_zeros(())
    # Sums over chunks need more than half precision.
    grad_h = torch.empty_like(h_s) if needs_h else None
    grad_w = torch.zeros_like(w_s, dtype=share.dtype) if needs_w else None
    # Two buffers hold the logits of every chunk; the slopes replace those of the student.
    logits_s, logits_t = (h.new_empty((min(rows, len(h)), len(w_s))) for h in (h_s, h_t))
    pieces = (torch.split(x, rows) for x in (share, h_s, h_t, *([] if grad_h is None else [grad_h])))
    for portion, s, t, *out in zip(*pieces, strict=True):
        z_s, z_t = torch.mm(s, w_s.T, out=logits_s[: len(s)]), torch.mm(t, w_t.T, out=logits_t[: len(t)])
        for part, each_s, each_t in chunks(z_s, 1, portion, z_s, z_t):
            measured = measure(*promote(each_s, each_t))
            loss += (measured.value * part).sum()
            if needs_h or needs_w:
                each_s.copy_(measured.slope().mul_(part.unsqueeze(1)))
        if out:
            torch.mm(z_s, w_s, out=out[0])
        if grad_w is not None:
            _add_product(grad_w, z_s, s)
    return loss, grad_h, None if grad_w is None else grad_w.to(w_s.dtype)


def _add_product(total: Tensor, slopes: Tensor, hidden: Tensor) -> None:
    """Add `slopes.T @ hidden` to `total` `(v, d)` in place."""
    if total.dtype == slopes.dtype == hidden.dtype:
        total.addmm_(slopes.T, hidden)
    else:
        total.add_(slopes.T @ hidden)
