"""Losses: correlation congruence, the kernel matrix of a batch as the teacher's. Touches two tensors only.

Peng et al., 2019: match the correlations between samples, by a Gaussian kernel expanded in a Taylor series.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_relation_reduction
from kdlib._maths import full_precision
from kdlib.losses._pairs import (
    chord_gradient,
    one_batch,
    one_minus_cosines,
    shortest_length,
    unit_gradient_,
    with_gradient,
)

__all__ = ["CorrelationCongruenceLoss", "correlation_congruence"]


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 0.4,
    order: int | None = 2,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared difference of the student's and the teacher's Gaussian kernels between samples.

    .. math::
        \frac{1}{b^2} \sum_{i,j} \left(K^s_{ij} - K^t_{ij}\right)^2, \qquad
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} \cos(x_i, x_j)^p

    which is the Taylor series, to the order P, of the Gaussian kernel :math:`e^{-\gamma \|u_i - u_j\|^2}` between the
    samples divided by their lengths; `order=None` takes that kernel itself, :math:`K = e^{-2 \gamma (1 - \cos)}`. The
    loss does not depend on the length of any sample, but it does on a common offset. The numbers of features may
    differ. A sample of zeros has cosine 0 to all, itself too.

    With weights, a pair counts :math:`w_i w_j`: the mean is :math:`\sum w_i w_j (\cdot) / (\sum w)^2`. A sample of
    weight 0 is as if absent.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, likewise; never receives a gradient.
        gamma: above 0; a larger one looks at nearer samples only.
        order: P, at least 1, or `None` for the Gaussian kernel without expansion.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number, none too. Every process gets the same value; the gradients are such that their mean over
            the processes, as `DistributedDataParallel` takes it, is that of the one batch.
        reduction: `"mean"` only: a relation has no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where no sample has a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: batch sizes differ, `gamma` not above 0, `order` below 1, or a `reduction` other than `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> round(correlation_congruence(student, teacher).item(), 4)
        0.1266
        >>> round(correlation_congruence(student, teacher, order=None).item(), 4)
        0.1516
        >>> correlation_congruence(3 * student, student).item()
        0.0

    References:
        Peng et al., *Correlation Congruence for Knowledge Distillation*, arXiv 1904.01802. The expanded kernel with
        `gamma=0.4` and `order=2` is the default of public code that has the kernel, which makes it row by row; other
        code under this name compares neighbors in the batch only. There is a gradient, but no second derivative, and
        no rule for `torch.func.vmap`.
    """
    _check_kernel("correlation_congruence", gamma, order)
    check_floating("correlation_congruence", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("correlation_congruence", student, teacher, reduction, weight, gather)
        if student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        apart, centerd, unit, length = one_minus_cosines(student, share)
        gap = _kernel(apart, gamma, order)
        gap -= _kernel(one_minus_cosines(teacher, share)[0], gamma, order)
        value = share @ (gap.square() @ share)
        if not (student.requires_grad and torch.is_grad_enabled()):
            return value
        slope = _slope(apart, gamma, order).mul_(gap).mul_(2 * share.unsqueeze(1)).mul_(share)
        gradient = unit_gradient_(chord_gradient(slope, centerd), unit, length, shortest_length(origin))
        return with_gradient(student, value, gradient)


def _kernel(apart: Tensor, gamma: float, order: int | None) -> Tensor:
    r"""The kernel less that of two equal samples, `(b, b)`, of `apart`, one minus the cosine.

    What is left out is the same on both sides, and would drown small differences. The series is
    :math:`\sum_p a_p (c^p - 1) = -(1 - c) \sum_{m<P} c^m \sum_{p>m} a_p`.
    """
    if order is None:
        return torch.expm1(-2 * gamma * apart)
    terms = _terms(gamma, order)
    kernel, rest = torch.full_like(apart, terms[-1]), terms[-1]
    for term in reversed(terms[:-1]):
        rest += term
        kernel.addcmul_(kernel, apart, value=-1).add_(rest)
    return kernel.mul_(apart).neg_()


def _slope(apart: Tensor, gamma: float, order: int | None) -> Tensor:
    """The derivative of the kernel by the cosine."""
    if order is None:
        return torch.exp(-2 * gamma * apart).mul_(2 * gamma)
    terms = _terms(gamma, order)
    slope = torch.full_like(apart, order * terms[-1])
    for p, term in reversed(list(enumerate(terms[:-1], 1))):
        slope.addcmul_(slope, apart, value=-1).add_(p * term)
    return slope


def _terms(gamma: float, order: int) -> list[float]:
    """The factors of the powers from 1 on; by logarithms: a power and a factorial may overflow where their ratio does not."""
    return [math.exp(p * math.log(2 * gamma) - math.lgamma(p + 1) - 2 * gamma) for p in range(1, order + 1)]


def _check_kernel(owner: str, gamma: float, order: int | None) -> None:
    check_number(owner, "gamma", gamma, above=0)
    if order is not None:
        check_number(owner, "order", order, min=1, integer=True)


class CorrelationCongruenceLoss(nn.Module):
    """`correlation_congruence` as a Module; the formula and the arguments are there.

    Args:
        gamma: above 0; a larger one looks at nearer samples only.
        order: of the Taylor series, at least 1, or `None` for the Gaussian kernel itself.
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: `gamma` not above 0, `order` below 1, or a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = CorrelationCongruenceLoss()
        >>> loss
        CorrelationCongruenceLoss(gamma=0.4, order=2, gather=False, reduction='mean')
        >>> features = torch.rand(4, 8)
        >>> loss(features, features).item()
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self, *, gamma: float = 0.4, order: int | None = 2, gather: bool = False, reduction: Literal["mean"] = "mean"
    ) -> None:
        super().__init__()
        _check_kernel("CorrelationCongruenceLoss", gamma, order)
        check_relation_reduction("CorrelationCongruenceLoss", reduction)
        self.gamma = gamma
        self.order = order
        self.gather = gather
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, d, ...)` against `teacher`; `reduction=None` means the constructor's."""
        return correlation_congruence(
            student,
            teacher,
            gamma=self.gamma,
            order=self.order,
            gather=self.gather,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"gamma={self.gamma!r}, order={self.order!r}, gather={self.gather!r}, reduction={self.reduction!r}"
