"""Losses: probabilistic knowledge transfer, each sample's neighbors as the teacher's. Touches two tensors only.

Passalis and Tefas, 2018: match the probabilities with which each sample of a batch picks the others as neighbors.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_relation_reduction
from kdlib._maths import full_precision
from kdlib.losses._pairs import (
    chord_gradient,
    one_batch,
    one_minus_cosines,
    shortest_length,
    unit_gradient_,
    with_gradient,
)

__all__ = ["PKTLoss", "pkt"]

EPS = 1e-7
"""Added to both probabilities in the logarithm, as in the authors' code."""


def pkt(
    student: Tensor,
    teacher: Tensor,
    *,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Divergence between the student's and the teacher's probabilities that one sample is another's neighbor.

    .. math::
        \frac{1}{b^2} \sum_{i,j} p^t_{ij} \log \frac{p^t_{ij} + \epsilon}{p^s_{ij} + \epsilon}, \qquad
        p_{ij} = \frac{k_{ij}}{\sum_l k_{il}}, \qquad k_{ij} = \frac{1 + \cos(x_i, x_j)}{2}

    with :math:`\epsilon = 10^{-7}`; i = j is included. The loss does not depend on the length of any sample, but does
    on a common offset. The numbers of features may differ. A sample of zeros has cosine 0 to all, itself too.

    With weights, let :math:`q = w / \sum w` and :math:`n = 1 / \sum q^2`, the effective number of samples (b where all
    weights are equal). Then :math:`p_{ij} = k_{ij} / (n \sum_l q_l k_{il})`, and the loss is
    :math:`\sum_{i,j} q_i q_j (\cdot)`. A sample of weight 0 is as if absent.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, likewise; never receives a gradient.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number, none too. Every process gets the same value; the gradients are such that their mean over
            the processes, as `DistributedDataParallel` takes it, is that of the one batch.
        reduction: `"mean"` only: a relation has no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where no sample has a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: batch sizes differ, or a `reduction` other than `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> round(pkt(student, teacher).item(), 4)
        0.0294
        >>> pkt(3 * student, student).item()
        0.0

    References:
        Passalis, Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, arXiv 1803.10837, with
        the cosine kernel. Values are those of the authors' code: the mean is over b * b pairs, so it is a divergence
        of each row over b. There is a gradient, but no second derivative, and no rule for `torch.func.vmap`.
    """
    check_floating("pkt", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("pkt", student, teacher, reduction, weight, gather)
        if student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        asked = student.requires_grad and torch.is_grad_enabled()
        value, gradient = _with_gradient(student, teacher, share, shortest_length(origin), asked)
        return with_gradient(student, value, gradient)


def _with_gradient(
    student: Tensor, teacher: Tensor, share: Tensor, shortest: float, asked: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient `(b, d)` if asked for."""
    even = share.square().sum()  # the probability of each neighbor where all are as near
    apart, centerd, unit, length = one_minus_cosines(student, share)
    above_s, factor = _above_even_(apart, share, even)
    above_t, _ = _above_even_(one_minus_cosines(teacher, share)[0], share, even)
    # Over a row the differences of the two sum to zero. Taken off each term they leave it no less than zero but for EPS,
    # and nothing cancels: p^t log(1 + r) - (p^t - p^s) = p^t (log(1 + r) - r) + r (p^t - p^s - EPS).
    change = above_t - above_s
    p_s, p_t = above_s.add_(even).clamp_(min=0), above_t.add_(even).clamp_(min=0)
    below = p_s + EPS
    ratio = (change / below).clamp_(min=-1 + torch.finfo(below.dtype).eps)
    value = share @ (_log1p_less(ratio).mul_(p_t).addcmul_(ratio, change.sub_(EPS)) @ share)
    if not asked:
        return value, value
    # d / d p_s of the terms, then through the sum of a row, then through (1 + cos) / 2 where it is not cut off at 0.
    slope = below.reciprocal_().mul_(EPS).sub_(ratio).mul_(share.unsqueeze(1)).mul_(share)
    pull = torch.linalg.vecdot(slope, p_s).div_(even.clamp(min=torch.finfo(share.dtype).tiny))
    slope.addcmul_(pull.unsqueeze(1), share, value=-1).mul_(factor / 2).masked_fill_(p_s == 0, 0)
    return value, unit_gradient_(chord_gradient(slope, centerd), unit, length, shortest)


def _above_even_(apart: Tensor, share: Tensor, even: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities `(b, b)` less the even one, in place of one minus the cosines, and the kernel's factor in them.

    Directly, as they may differ by less than what rounding leaves of either.
    """
    mean = (apart @ share).unsqueeze(1)  # of twice one minus the kernel
    factor = even / torch.where(mean < 2, 1 - mean / 2, 1.0)
    return apart.sub_(mean).mul_(factor / -2), factor


def _log1p_less(x: Tensor) -> Tensor:
    """`log(1 + x) - x`, near 0 by its series, as far as that is the more exact of the two."""
    size, log = x.abs(), x.log1p().sub_(x)
    near = size < torch.finfo(x.dtype).eps ** 0.25
    series = torch.mul(x, -0.25, out=size).add_(1 / 3).mul_(x).sub_(0.5).mul_(x).mul_(x)
    return log.lerp_(series, near.to(x.dtype))  # `torch.where`, four times as fast on a CPU; both are finite


class PKTLoss(nn.Module):
    """`pkt` as a Module; the formula and the arguments are there.

    Args:
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = PKTLoss()
        >>> loss
        PKTLoss(gather=False, reduction='mean')
        >>> features = torch.rand(4, 8)
        >>> loss(features, features).item()
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(self, *, gather: bool = False, reduction: Literal["mean"] = "mean") -> None:
        super().__init__()
        check_relation_reduction("PKTLoss", reduction)
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
        return pkt(student, teacher, gather=self.gather, reduction=reduction or self.reduction, weight=weight)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"gather={self.gather!r}, reduction={self.reduction!r}"
