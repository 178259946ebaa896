"""The log-sum of the differences of normalized features (simple recipe distillation, SRD)."""

import torch
from torch import Tensor

from kdlib._checks import check_number, check_pair
from kdlib._maths import MeanOnly, full_precision, safe_divisor
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import one_batch

__all__ = ["LogSumLoss", "log_sum"]

EPS = 1e-4
"""Added to the variances."""


def log_sum(
    student: Tensor,
    teacher: Tensor,
    *,
    exponent: float = 4.0,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the logarithm of the summed differences of features, each normalized over the batch.

    .. math:: \log \Bigl( \frac{1}{b} \sum_i \sum_k \bigl| \hat s_{ik} - \hat t_{ik} \bigr|^\alpha \Bigr), \qquad
        \hat x_{ik} = \frac{x_{ik} - \mu_k}{\sqrt{\sigma_k^2 + 10^{-4}}}

    with the mean :math:`\mu_k` and the variance :math:`\sigma_k^2` of feature k over the batch, of each side by itself,
    as BatchNorm without learned parameters computes them. The logarithm keeps the size of the gradient where student
    and teacher agree, and a large exponent puts the weight on the largest differences. Use it behind a linear
    projection, `project=LinearProjection(...)`: without one, the student can only follow by its own features.

    The sum over k has the smallest positive number as its lower limit, so that equal sides give about -87 (-708 in
    float64) rather than minus infinity. Where the mean difference is so small that the gradient would not fit the dtype
    of the student, there is none.

    With weights, all means over the batch are weighted by :math:`w / \sum w`. A sample of weight 0 has no influence.

    Args:
        student: `(b, ...)`, flattened after the first dimension.
        teacher: of the same shape; never receives a gradient.
        exponent: :math:`\alpha`, at least 1 and at most 8. The paper uses 4 on ImageNet.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because the logarithm of a sum has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if all weights are 0. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `exponent` is out of range, or `reduction` is not `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[1.0], [-1.0]])
        >>> round(log_sum(features, -features).item(), 3)  # the difference is 2: log 2^4
        2.772

    References:
        Miles, Mikolajczyk, *Understanding the Role of the Projector in Knowledge Distillation*, AAAI 2024, arXiv
        2303.11098. There the sum over the batch is not divided by b, which adds the constant log b, and the
        normalization is a BatchNorm layer with running statistics for evaluation.
    """
    _check_exponent("log_sum", exponent)
    check_pair("log_sum", student, teacher)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("log_sum", student, teacher, reduction, weight, gather)
        if student.numel() == 0:
            return student.sum() * 0.0
        difference = (_normalize(student, share) - _normalize(teacher, share)).abs()
        total = share @ difference.pow(exponent).sum(1)
        # The gradient by a normalized feature is at most exponent / total^(1 / exponent), and that of the feature 1e2
        # times as large.
        shortest = 1e-6 if origin != torch.float16 else 0.05
        value = total.clamp(min=torch.finfo(total.dtype).tiny).log()
        value = torch.where(total < shortest**exponent, value.detach(), value)
        return torch.where(share.sum() > 0, value, total * 0.0)


def _normalize(x: Tensor, share: Tensor) -> Tensor:
    """Return the features with weighted mean 0 and variance 1; a sample of weight 0 becomes zero."""
    x = torch.where(share.unsqueeze(1) > 0, x, 0.0)
    # Division by the largest magnitude, where it is above 1, keeps the squares finite.
    size = x.detach().abs().amax(0).clamp(min=1)
    x = x / size
    centered = torch.where(share.unsqueeze(1) > 0, x - share @ x, 0.0)
    variance = share @ centered.square() + (EPS**0.5 / size).square()
    return centered / safe_divisor(variance).sqrt()


def _check_exponent(owner: str, exponent: float) -> None:
    check_number(owner, "exponent", exponent, min=1, max=8)


class LogSumLoss(RelationLoss):
    """`log_sum` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[1.0], [-1.0]])
        >>> round(LogSumLoss(exponent=2.0)(features, -features).item(), 3)
        1.386
    """

    _function = staticmethod(log_sum)

    def __init__(self, *, exponent: float = 4.0, gather: bool = False, reduction: MeanOnly = "mean") -> None:
        super().__init__(gather=gather, reduction=reduction)
        _check_exponent("LogSumLoss", exponent)
        self.exponent = exponent
