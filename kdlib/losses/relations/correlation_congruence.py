"""Correlation congruence: the Gaussian kernel matrix of a batch as the teacher's."""

import math

import torch
from torch import Tensor

from kdlib._checks import check_floating, check_number
from kdlib._maths import MeanOnly, full_precision, shortest_length
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import cosine_distances, cosine_gradient, one_batch, with_gradient

__all__ = ["CorrelationCongruenceLoss", "correlation_congruence"]


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 0.4,
    order: int | None = 2,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the mean squared difference of the student's and the teacher's Gaussian kernels between samples.

    .. math::
        \frac{1}{b^2} \sum_{i,j} \left(K^s_{ij} - K^t_{ij}\right)^2, \qquad
        K_{ij} = e^{-2 \gamma} \sum_{p=0}^{P} \frac{(2 \gamma)^p}{p!} \cos(x_i, x_j)^p

    which is the Taylor series to order P of the Gaussian kernel :math:`e^{-\gamma \|u_i - u_j\|^2}` between the samples
    divided by their lengths. `order=None` uses the kernel itself, :math:`K = e^{-2 \gamma (1 - \cos)}`. The loss does
    not depend on the length of any sample, but it depends on a common offset. The numbers of features may differ. A
    zero sample has cosine 0 to all, including itself.

    With weights, a pair has the weight :math:`w_i w_j`, and the mean is :math:`\sum w_i w_j (\cdot) / (\sum w)^2`. A
    sample of weight 0 has no influence.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, the same; never receives a gradient.
        gamma: above 0; a larger one restricts the kernel to nearer samples.
        order: P, at least 1, or `None` for the Gaussian kernel without expansion.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because a relation has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if all weights are 0. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The batch sizes differ, `gamma` is not above 0, `order` is below 1, or `reduction` is not `"mean"`.
        TypeError: An input is not a floating-point tensor.

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
        `gamma=0.4` and `order=2` is the default of public code with a kernel, which computes it row by row; other code
        under this name compares only neighbors in the batch. The gradient is hand-written, which saves time. Second
        derivatives and `torch.func.vmap` raise an error.
    """
    _check_kernel("correlation_congruence", gamma, order)
    check_floating("correlation_congruence", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("correlation_congruence", student, teacher, reduction, weight, gather)
        if student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        distances, centered, unit, length = cosine_distances(student, share)
        difference = _kernel(distances, gamma, order)
        difference -= _kernel(cosine_distances(teacher, share)[0], gamma, order)
        value = share @ (difference.square() @ share)
        if not (student.requires_grad and torch.is_grad_enabled()):
            return value
        slope = _slope(distances, gamma, order).mul_(difference).mul_(2 * share.unsqueeze(1)).mul_(share)
        gradient = cosine_gradient(slope, centered, unit, length, shortest_length(origin))
        return with_gradient(student, value, gradient)


def _kernel(distances: Tensor, gamma: float, order: int | None) -> Tensor:
    r"""Return the kernel minus its value for equal samples, `(b, b)`, from the cosine distances.

    The subtracted value is the same on both sides, and rounding it would hide small differences. The series is
    :math:`\sum_p a_p (c^p - 1) = -(1 - c) \sum_{m<P} c^m \sum_{p>m} a_p`.
    """
    if order is None:
        return torch.expm1(-2 * gamma * distances)
    terms = _terms(gamma, order)
    kernel, rest = torch.full_like(distances, terms[-1]), terms[-1]
    for term in reversed(terms[:-1]):
        rest += term
        kernel.addcmul_(kernel, distances, value=-1).add_(rest)
    return kernel.mul_(distances).neg_()


def _slope(distances: Tensor, gamma: float, order: int | None) -> Tensor:
    """Return the derivative of the kernel by the cosine."""
    if order is None:
        return torch.exp(-2 * gamma * distances).mul_(2 * gamma)
    terms = _terms(gamma, order)
    slope = torch.full_like(distances, order * terms[-1])
    for p, term in reversed(list(enumerate(terms[:-1], 1))):
        slope.addcmul_(slope, distances, value=-1).add_(p * term)
    return slope


def _terms(gamma: float, order: int) -> list[float]:
    """Return the coefficients of the powers from 1 on, by logarithms, because powers and factorials may overflow."""
    return [math.exp(p * math.log(2 * gamma) - math.lgamma(p + 1) - 2 * gamma) for p in range(1, order + 1)]


def _check_kernel(owner: str, gamma: float, order: int | None) -> None:
    check_number(owner, "gamma", gamma, above=0)
    if order is not None:
        check_number(owner, "order", order, min=1, integer=True)


class CorrelationCongruenceLoss(RelationLoss):
    """`correlation_congruence` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.rand(4, 8)
        >>> CorrelationCongruenceLoss()(features, features).item()
        0.0
    """

    _function = staticmethod(correlation_congruence)

    def __init__(
        self, *, gamma: float = 0.4, order: int | None = 2, gather: bool = False, reduction: MeanOnly = "mean"
    ) -> None:
        super().__init__(gather=gather, reduction=reduction)
        _check_kernel("CorrelationCongruenceLoss", gamma, order)
        self.gamma, self.order = gamma, order
