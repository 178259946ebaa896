"""Losses: variational information distillation, the student can tell the teacher's features. Touches tensors only.

Ahn et al., VID, 2019: maximize a lower bound of the mutual information, a Gaussian with a learned mean and variance.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import (
    check_choice,
    check_floating,
    check_number,
    check_pair,
    check_rank,
    check_same_batch,
    check_shape,
)
from kdlib._maths import REDUCTIONS, full_precision, promote, reduce

__all__ = ["VariationalInformationLoss", "variational_information"]

FAR = 1e15
"""A larger difference, or value before the maps, counts as this one, without gradient: its square would leave float32."""

FAR_DEVIATIONS = 1e12
"""So many standard deviations count as more do, without gradient: the gradient of the variance would leave float32."""

LEAST_VARIANCE = 1e-12
"""A smaller variance counts as this one: with the limits above, value and gradient are numbers in float32."""


def variational_information(
    mean: Tensor,
    teacher: Tensor,
    *,
    variance: float | Tensor = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Negative log-likelihood, up to a constant, of the teacher's features under a Gaussian that the student predicts.

    .. math:: \frac{1}{n} \sum_i \frac{1}{2} \left( \frac{(t_i - \mu_i)^2}{\sigma_i^2} + \log \sigma_i^2 \right)

    over the n values of one sample, with :math:`\mu` the student's prediction and :math:`\sigma^2` its variance.
    The constant :math:`\frac{1}{2} \log 2 \pi` is left out. The loss falls below 0 where a variance below 1 is
    earned. Differences above 1e15, or above 1e12 standard deviations, count as that without gradient; variances below
    1e-12 count as 1e-12. A float16 mean gets no gradient that float16 cannot hold.

    Args:
        mean: the student's prediction, `(b, c, ...)`.
        teacher: features of the same shape; never receives a gradient.
        variance: above 0; a number, or a tensor: `()` for all, or `(c,)` for each channel. A tensor gets a gradient.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, a `variance` of another shape or a number not above 0, or an unknown `reduction`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> mean, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
        >>> variational_information(mean, teacher).item()
        1.0
        >>> round(variational_information(mean, teacher, variance=torch.tensor([1.0, 4.0])).item(), 4)
        0.5966

    References:
        Ahn, Hu, Damianou, Lawrence, Dai, *Variational Information Distillation for Knowledge Transfer*, arXiv
        1904.05835, equations 3 to 5. The mean over values rather than their sum is that of public code.
    """
    check_pair("variational_information", mean, teacher, "b c ...")
    if isinstance(variance, Tensor):
        check_floating("variational_information", variance=variance)
        if variance.dim():
            check_shape("variational_information", "variance", variance, "c", c=mean.shape[1])
    else:
        check_number("variational_information", "variance", variance, above=0)
    origin = mean.dtype
    with full_precision(mean):
        mean, teacher = promote(mean, teacher)
        spread = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device).clamp(min=LEAST_VARIANCE)
        if spread.dim():
            spread = spread.reshape(-1, *[1] * (mean.dim() - 2))
        if origin == torch.float16:
            steep = (teacher - mean).abs() > spread * (torch.finfo(origin).max / 4 * mean[:1].numel())
            mean = torch.where(steep, mean.detach(), mean)
        deviation = ((teacher - mean).clamp(-FAR, FAR) / spread.sqrt()).clamp(-FAR_DEVIATIONS, FAR_DEVIATIONS)
        losses = 0.5 * (deviation.square() + spread.log()).flatten(1).mean(1)
        return reduce("variational_information", losses, reduction, weight)


class VariationalInformationLoss(nn.Module):
    r"""`variational_information` with a learned mean and variance: the student's features against the teacher's.

    The mean is a network of three linear maps over the channels with ReLU between them, without bias: 1x1
    convolutions for feature maps. The variance is one for each channel of the teacher,
    :math:`\sigma^2_c = \mathrm{softplus}(\rho_c) + \epsilon`. Both are parameters, which the optimizer must be given;
    they are no part of the student that is deployed. Where the grids differ, the larger feature is average-pooled to
    the smaller height and the smaller width. The maths is float32 also where the parameters are half precision.

    Args:
        student_channels: c of the student's features `(b, c, h, w)`, or d of its embeddings `(b, d)`.
        teacher_channels: likewise of the teacher.
        hidden: channels between the linear maps; None takes `teacher_channels`.
        initial_variance: of every channel at the start, above `least_variance`.
        least_variance: epsilon, above 0, which no variance falls below.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: a number of channels below 1, a variance out of range, or an unknown `reduction`.

    Examples:
        >>> import torch
        >>> loss = VariationalInformationLoss(16, 64)
        >>> loss
        VariationalInformationLoss(16, 64, hidden=None, initial_variance=5.0, least_variance=1e-05, reduction='mean')
        >>> round(loss.variance()[0].item(), 4)
        5.0
        >>> loss(torch.rand(2, 16, 14, 14), torch.rand(2, 64, 7, 7)).shape
        torch.Size([])
        >>> loss(torch.rand(2, 16), torch.rand(2, 64), reduction="none").shape
        torch.Size([2])

    References:
        See `variational_information`. Public code starts the variance from `log(exp(v) - 1)`, which is infinite from
        v = 710 on; ours is exact at any.
    """

    per_sample: ClassVar[bool] = True

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        hidden: int | None = None,
        initial_variance: float = 5.0,
        least_variance: float = 1e-5,
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__()
        owner = "VariationalInformationLoss"
        check_number(owner, "student_channels", student_channels, min=1, integer=True)
        check_number(owner, "teacher_channels", teacher_channels, min=1, integer=True)
        if hidden is not None:
            check_number(owner, "hidden", hidden, min=1, integer=True)
        check_number(owner, "least_variance", least_variance, above=0)
        check_number(owner, "initial_variance", initial_variance, above=least_variance)
        check_choice(owner, "reduction", reduction, REDUCTIONS)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.hidden = hidden
        self.initial_variance = initial_variance
        self.least_variance = least_variance
        self.reduction = reduction
        width = teacher_channels if hidden is None else hidden
        self.first = nn.Linear(student_channels, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, teacher_channels, bias=False)
        above = initial_variance - least_variance
        # The inverse of softplus, in a form that neither overflows nor cancels.
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), above + math.log(-math.expm1(-above))))

    def variance(self) -> Tensor:
        """The variance of each channel of the teacher, `(teacher_channels,)`, with its graph."""
        raw = self.raw_variance
        return F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32))) + self.least_variance

    def mean(self, student: Tensor) -> Tensor:
        """The teacher's features as the student tells them: `(b, student_channels, ...)` to `(b, teacher_channels, ...)`."""
        x_bcn = student.unsqueeze(-1).flatten(2)
        x_bcn = (self.first.weight.to(student.dtype) @ x_bcn).relu()
        x_bcn = (self.second.weight.to(student.dtype) @ x_bcn).relu()
        x_bcn = self.third.weight.to(student.dtype) @ x_bcn
        return x_bcn.reshape(student.shape[0], self.teacher_channels, *student.shape[2:])

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, c, h, w)` or `(b, d)` against `teacher`, of as many dimensions.

        `reduction=None` means the constructor's.
        """
        owner = "VariationalInformationLoss"
        check_floating(owner, student=student, teacher=teacher)
        layout = "b d" if student.dim() == 2 else "b c h w"
        channels = layout.split()[1]
        check_rank(owner, "student", student, layout)
        check_shape(owner, "student", student, layout, **{channels: self.student_channels})
        check_shape(owner, "teacher", teacher, layout, **{channels: self.teacher_channels})
        check_same_batch(owner, "student", student, "teacher", teacher)
        with full_precision(student):
            student, teacher = (x.clamp(-FAR, FAR) for x in promote(student, teacher))
            if student.dim() == 4:
                grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
                student, teacher = F.adaptive_avg_pool2d(student, grid), F.adaptive_avg_pool2d(teacher, grid)
            return variational_information(
                self.mean(student),
                teacher,
                variance=self.variance(),
                reduction=reduction or self.reduction,
                weight=weight,
            )

    def __repr__(self) -> str:
        return (
            f"VariationalInformationLoss({self.student_channels}, {self.teacher_channels}, hidden={self.hidden}, "
            f"initial_variance={self.initial_variance!r}, least_variance={self.least_variance!r}, "
            f"reduction={self.reduction!r})"
        )
