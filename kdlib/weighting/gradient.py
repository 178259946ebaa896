"""Weights that minimize the norm of the combined gradient of the teachers (MGDA, AE-KD)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kdlib._checks import check_number, readable
from kdlib._maths import full_precision, safe_divisor
from kdlib._repr import CallRepr
from kdlib.types import Side, Targets
from kdlib.weighting._checks import check_max_weight, check_teachers

__all__ = ["GradientWeighting"]

RIDGE = 1e-6
"""Added to the Gram diagonal, relative to its mean: equal gradients get equal weights, and every pair has curvature."""

TOLERANCE = 1e-12
"""Difference in slope, relative to the trace of the Gram matrix, below which a pair of weights stays."""


class GradientWeighting(CallRepr):
    r"""Computes the weights that minimize the norm of the combined gradient, the same for every sample.

    With :math:`g_k = \partial \sum_i L_{k,i} / \partial s` the gradient of teacher k's losses with respect to the
    student's feature s, before any projection, over the whole batch,

    .. math:: w = \arg\min_a \tfrac{1}{2} \Bigl\| \sum_k a_k g_k \Bigr\|^2, \qquad \sum_k a_k = 1, \quad 0 \le a_k \le C

    A step against the combined gradient lowers the losses of all teachers with a weight strictly between the bounds at
    the same rate; for C = 1 no loss rises. If its norm is 0, no step lowers all losses. Two teachers have a closed
    form, :math:`a_1 = \mathrm{clip}((g_2 - g_1) \cdot g_2 / \|g_1 - g_2\|^2, 1 - C, C)`; more teachers are solved
    exactly by an active-set method.

    A single teacher has weight 1. Equal teachers have equal weights. A useless teacher has a large gradient while the
    student is far from it, and so a small weight. The smallest gradient gets the largest weight: a teacher that the
    student already matches gets all of it, and the student stops learning. C < 1 prevents this. Gradients that are all
    0 or not all finite give uniform weights, as does a call without a graph (under `no_grad`, or with a frozen
    student). Masked samples, whose losses are 0, have no effect. The weights carry no gradient. Each process of a
    distributed run solves for its own part of the batch.

    The cost is K backward passes from the losses to the feature, through projections and losses only, and a few
    operations on matrices `(K, K)`. No value is read from an accelerator, which never waits for the host.

    Args:
        max_weight: C, above 0 and at most 1; below 1 it must be at least 1 / K. AE-KD proposes such a bound.

    Examples:
        >>> import torch
        >>> weighting = GradientWeighting()
        >>> student = torch.zeros(1, 2, requires_grad=True)
        >>> near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> losses = torch.stack([(student - each).square().sum(1) for each in (near, far)])
        >>> weighting(losses, student=student, teachers=[near, far], targets={})
        tensor([[0.8000],
                [0.2000]])

    References:
        Sener, Koltun, *Multi-Task Learning as Multi-Objective Optimization*, arXiv 1810.04650 (C = 1). Du et al.,
        *Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space*, NeurIPS 2020, take the gradient
        at the logits and solve by a one-class SVM, with nu = 1 / (C K) for our C.
    """

    cross_layer: ClassVar[bool] = True
    needs_graph: ClassVar[bool] = True

    def __init__(self, *, max_weight: float = 1.0) -> None:
        super().__init__()
        check_number("GradientWeighting", "max_weight", max_weight, above=0, max=1)
        self.max_weight = max_weight

    def forward(self, losses: Tensor, *, student: Side, teachers: Sequence[Side], targets: Targets) -> Tensor:
        """Return weights `(k, b)` and keep the graph of the losses; `teachers` and `targets` are ignored.

        Args:
            losses: `(k, b)`, with their graph.
            student: the feature `(b, ...)` from which the losses were computed; or a list of features, whose gradients
                count as one.

        Raises:
            ValueError: `max_weight` is below 1 / k.
        """
        check_teachers("GradientWeighting", losses)
        k = losses.shape[0]
        check_max_weight("GradientWeighting", self.max_weight, k)
        uniform = torch.full_like(losses, 1 / max(k, 1), requires_grad=False)
        features = [each for each in ([student] if isinstance(student, Tensor) else student) if each.requires_grad]
        if k < 2 or not (losses.requires_grad and features):
            return uniform
        partials = [
            torch.autograd.grad(each, features, retain_graph=True, materialize_grads=True) for each in losses.sum(1)
        ]
        with torch.no_grad(), full_precision(losses):
            dtype = torch.float64 if any(each.dtype == torch.float64 for each in features) else torch.float32
            gradients = torch.stack([torch.cat([each.to(dtype).flatten() for each in row]) for row in partials])
            # Squares of the raw values could overflow or underflow; the weights do not depend on a common scale.
            largest = gradients.abs().amax() if gradients.numel() else gradients.sum()
            gradients = gradients / safe_divisor(largest)
            # A float32 matrix product would round equal rows differently.
            wide = torch.float32 if gradients.device.type == "mps" else torch.float64
            products = torch.stack([(each * gradients).sum(1, dtype=wide) for each in gradients])
            solve = _pair if k == 2 else _min_norm
            return solve(products, self.max_weight).to(losses).unsqueeze(1).expand_as(losses)


def _pair(gram: Tensor, max_weight: float) -> Tensor:
    """Return the weights `(2,)` of two teachers by the closed form, without reading a value."""
    trace = gram.diagonal().sum()
    ridge = RIDGE * trace / 2
    first, both, second = gram[0, 0] + ridge, gram[0, 1], gram[1, 1] + ridge
    gap = (second - first) / 2  # of the slopes at equal weights
    curvature = first + second - 2 * both
    uneven = (gap.abs() > 1e-12 * trace) & gram.isfinite().all()
    move = torch.where(uneven, gap / torch.where(curvature > 0, curvature, 1.0), 0.0)
    weight = (0.5 + move).clamp(1 - max_weight, max_weight)
    return torch.stack([weight, 1 - weight])


def _min_norm(gram: Tensor, max_weight: float) -> Tensor:
    """Return the weights a `(k,)`, from 0 to `max_weight` and of sum 1, that minimize `a G a` for a Gram matrix `(k, k)`.

    A primal active-set method. Each step moves the free weights to their minimizer, or up to the first bound, which is
    then fixed. After a move to the minimizer, the pair with the largest difference in slope is free. On a CPU the steps
    end at the minimum; on other devices their number is fixed, and further steps change nothing.

    Examples:
        >>> _min_norm(torch.diag(torch.tensor([1.0, 4.0, 4.0])), 1.0)
        tensor([0.6667, 0.1667, 0.1667])
        >>> _min_norm(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), 0.75)
        tensor([0.7500, 0.2500])
    """
    k = len(gram)
    one = torch.eye(k, dtype=gram.dtype, device=gram.device)
    index = torch.arange(k, device=gram.device)
    trace = gram.diagonal().sum()
    eps = torch.finfo(gram.dtype).eps
    matrix = gram / trace + max(RIDGE, 64 * eps) / k * one
    matrix = torch.where(matrix.isfinite().all(), matrix, one)  # equal weights
    top = gram.new_full((k,), max_weight)
    a, free, full = gram.new_full((k,), 1 / k), index >= 0, index[0] >= 0
    for _ in range(5 * k + 10):
        slope = matrix @ a
        rising, falling = slope.masked_fill(a >= top, torch.inf), slope.masked_fill(a <= 0, -torch.inf)
        solved = falling.amax() - rising.amin() <= max(TOLERANCE, eps)
        if readable(solved) and bool(solved):
            break
        free = free | (full & ((index == rising.argmin()) | (index == falling.argmax())))
        part = torch.where(free & free.unsqueeze(1), matrix, one)
        # The free weights move against their slopes, less the multiple that keeps their sum.
        sides = torch.stack([slope, torch.ones_like(slope)], 1) * free.unsqueeze(1)
        down, even = torch.cholesky_solve(sides, torch.linalg.cholesky_ex(part)[0]).unbind(1)
        move = even * (down.sum() / even.sum()) - down
        to_bound = torch.where(move > 0, top - a, a) / move.abs()
        length, nearest = to_bound.masked_fill(move == 0, torch.inf).min(0)
        full = length >= 1
        stopped = ~full & (index == nearest)
        end = torch.where(move > 0, top, 0.0)
        moved = torch.where(stopped, end, (a + length.clamp(max=1) * move).clamp(0, max_weight))
        a, free = torch.where(solved, a, moved), free & ~stopped
    return a
