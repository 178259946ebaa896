"""Probabilistic knowledge transfer: the probabilities that samples are neighbors as the teacher's."""

import torch
from torch import Tensor

from kdlib._checks import check_floating
from kdlib._maths import MeanOnly, full_precision, shortest_length
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import cosine_distances, cosine_gradient, one_batch, with_gradient

__all__ = ["PKTLoss", "pkt"]

EPS = 1e-7
"""Added to both probabilities in the logarithm, as in the authors' code."""


def pkt(
    student: Tensor,
    teacher: Tensor,
    *,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the divergence of the student's from the teacher's probabilities that one sample is another's neighbor.

    .. math::
        \frac{1}{b^2} \sum_{i,j} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \qquad
        p_{ij} = \frac{k_{ij}}{\sum_l k_{il}}, \qquad k_{ij} = \frac{1 + \cos(x_i, x_j)}{2}

    with :math:`\epsilon = 10^{-7}`; i = j is included. The loss does not depend on the length of any sample, but it
    depends on a common offset. The numbers of features may differ. A zero sample has cosine 0 to all, including itself.

    With weights, let :math:`q = w / \sum w` and :math:`n = 1 / \sum q^2`, the effective number of samples (b where all
    weights are equal). Then :math:`p_{ij} = k_{ij} / (n \sum_l q_l k_{il})`, and the loss is
    :math:`\sum_{i,j} q_i q_j (\cdot)`. A sample of weight 0 has no influence.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, the same; never receives a gradient.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because a relation has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if all weights are 0. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The batch sizes differ, or `reduction` is not `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> round(pkt(student, teacher).item(), 4)
        0.0294
        >>> pkt(3 * student, student).item()
        0.0

    References:
        Passalis, Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, arXiv 1803.10837, with
        the cosine kernel. Values equal those of the authors' code: the mean is over b * b pairs, so it is the
        divergence of each row divided by b. The gradient is hand-written, which halves the time. Second derivatives and
        `torch.func.vmap` raise an error.
    """
    check_floating("pkt", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("pkt", student, teacher, reduction, weight, gather)
        if student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        needs_grad = student.requires_grad and torch.is_grad_enabled()
        value, gradient = _value_and_gradient(student, teacher, share, shortest_length(origin), needs_grad)
        return with_gradient(student, value, gradient)


def _value_and_gradient(
    student: Tensor, teacher: Tensor, share: Tensor, shortest: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss and, if needed, its gradient `(b, d)`."""
    even = share.square().sum()  # the probability of each neighbor if all are equally near
    distances, centered, unit, length = cosine_distances(student, share)
    above_s, factor = _above_even_(distances, share, even)
    above_t, _ = _above_even_(cosine_distances(teacher, share)[0], share, even)
    # The differences p^t - p^s of a row sum to zero. Subtracting them from the terms avoids cancellation:
    # p^t log(1 + r) - (p^t - p^s) = p^t (log(1 + r) - r) + r (p^t - p^s - EPS).
    change = above_t - above_s
    p_s, p_t = above_s.add_(even).clamp_(min=0), above_t.add_(even).clamp_(min=0)
    below = p_s + EPS
    ratio = (change / below).clamp_(min=-1 + torch.finfo(below.dtype).eps)
    value = share @ (_log1p_less(ratio).mul_(p_t).addcmul_(ratio, change.sub_(EPS)) @ share)
    if not needs_grad:
        return value, value
    # Derivatives by p_s, then through the normalization of a row, then through (1 + cos) / 2 where it is above 0.
    slope = below.reciprocal_().mul_(EPS).sub_(ratio).mul_(share.unsqueeze(1)).mul_(share)
    row_slope = torch.linalg.vecdot(slope, p_s).div_(even.clamp(min=torch.finfo(share.dtype).tiny))
    slope.addcmul_(row_slope.unsqueeze(1), share, value=-1).mul_(factor / 2).masked_fill_(p_s == 0, 0)
    return value, cosine_gradient(slope, centered, unit, length, shortest)


def _above_even_(distances: Tensor, share: Tensor, even: Tensor) -> tuple[Tensor, Tensor]:
    """Replace cosine distances by probabilities `(b, b)` minus the even one; also return the factor of the kernel.

    The difference is computed directly, because it may be smaller than the rounding error of the probabilities.
    """
    mean = (distances @ share).unsqueeze(1)  # of twice one minus the kernel
    factor = even / torch.where(mean < 2, 1 - mean / 2, 1.0)
    return distances.sub_(mean).mul_(factor / -2), factor


def _log1p_less(x: Tensor) -> Tensor:
    """Return `log(1 + x) - x`, near 0 by its series, where that is more exact."""
    size, log = x.abs(), x.log1p().sub_(x)
    near = size < torch.finfo(x.dtype).eps ** 0.25
    series = torch.mul(x, -0.25, out=size).add_(1 / 3).mul_(x).sub_(0.5).mul_(x).mul_(x)
    return log.lerp_(series, near.to(x.dtype))  # as `torch.where`, but four times as fast on a CPU


class PKTLoss(RelationLoss):
    """`pkt` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.rand(4, 8)
        >>> PKTLoss()(features, features).item()
        0.0
    """

    _function = staticmethod(pkt)
