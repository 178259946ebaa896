"""Variational information distillation: likelihood of the teacher's features under a predicted Gaussian."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_pair, check_rank, check_same_batch, check_shape
from kdlib._maths import FAR, Reduction, full_precision, promote, reduce
from kdlib.losses._layers import pool_to_smaller
from kdlib.losses._module import LossModule

__all__ = ["VariationalInformationLoss", "variational_information"]

MAX_DEVIATIONS = 1e12
"""More standard deviations count as this many and get no gradient, because that of the variance could overflow."""

MIN_VARIANCE = 1e-12
"""Smaller variances count as this one; with the other limits, value and gradient are finite in float32."""


def variational_information(
    mean: Tensor,
    teacher: Tensor,
    *,
    variance: float | Tensor = 1.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the negative log-likelihood of the teacher's features under a Gaussian predicted by the student.

    .. math:: \frac{1}{n} \sum_i \frac{1}{2} \left( \frac{(t_i - \mu_i)^2}{\sigma_i^2} + \log \sigma_i^2 \right)

    over the n values of a sample, with :math:`\mu` the student's prediction and :math:`\sigma^2` its variance. The
    constant :math:`\frac{1}{2} \log 2 \pi` is omitted. The loss can be negative for variances below 1. Differences above
    1e15, or above 1e12 standard deviations, count as these limits and get no gradient. Variances below 1e-12 count as
    1e-12. A float16 mean gets no gradient that overflows float16.

    Args:
        mean: the student's prediction, `(b, c, ...)`.
        teacher: features of the same shape; never receives a gradient.
        variance: above 0; a number or a tensor `()` for all channels, or `(c,)`. A tensor gets a gradient.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `variance` has another shape or is a number not above 0, or `reduction` is
            unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> mean, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
        >>> variational_information(mean, teacher).item()
        1.0
        >>> round(variational_information(mean, teacher, variance=torch.tensor([1.0, 4.0])).item(), 4)
        0.5966

    References:
        Ahn, Hu, Damianou, Lawrence, Dai, *Variational Information Distillation for Knowledge Transfer*, arXiv
        1904.05835, equations 3 to 5. Like public code, we use the mean over values instead of their sum.
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
        spread = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device).clamp(min=MIN_VARIANCE)
        if spread.dim():
            spread = spread.reshape(-1, *[1] * (mean.dim() - 2))
        if origin == torch.float16:
            steep = (teacher - mean).abs() > spread * (torch.finfo(origin).max / 4 * mean[:1].numel())
            mean = torch.where(steep, mean.detach(), mean)
        deviation = ((teacher - mean).clamp(-FAR, FAR) / spread.sqrt()).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        losses = 0.5 * (deviation.square() + spread.log()).flatten(1).mean(1)
        return reduce("variational_information", losses, reduction, weight)


class VariationalInformationLoss(LossModule):
    r"""`variational_information` with a learned mean and variance.

    The mean is a network of three linear maps over the channels with ReLU between them and without bias: 1x1
    convolutions for feature maps. Each channel of the teacher has a variance
    :math:`\sigma^2_c = \mathrm{softplus}(\rho_c) + \epsilon`. Both have parameters, which the optimizer must receive;
    they are not part of the deployed student. If the grids differ, the larger feature is average-pooled to the smaller
    height and the smaller width. Computations use float32 even if the parameters have half precision.

    Args:
        student_channels: c of the student's features `(b, c, h, w)`, or d of its embeddings `(b, d)`.
        teacher_channels: the same of the teacher.
        hidden: channels between the linear maps; `None` uses `teacher_channels`.
        initial_variance: variance of every channel at the start, above `min_variance`.
        min_variance: epsilon, above 0, the lower bound of the variances.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Examples:
        >>> import torch
        >>> loss = VariationalInformationLoss(16, 64)
        >>> loss
        VariationalInformationLoss(16, 64, hidden=None, initial_variance=5.0, min_variance=1e-05, reduction='mean')
        >>> round(loss.variance()[0].item(), 4)
        5.0
        >>> loss(torch.rand(2, 16, 14, 14), torch.rand(2, 64, 7, 7)).shape
        torch.Size([])
        >>> loss(torch.rand(2, 16), torch.rand(2, 64), reduction="none").shape
        torch.Size([2])

    References:
        See `variational_information`. Public code initializes the variance by `log(exp(v) - 1)`, which is infinite from
        v = 710 on; ours is exact for all v.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        hidden: int | None = None,
        initial_variance: float = 5.0,
        min_variance: float = 1e-5,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "VariationalInformationLoss"
        check_number(owner, "student_channels", student_channels, min=1, integer=True)
        check_number(owner, "teacher_channels", teacher_channels, min=1, integer=True)
        if hidden is not None:
            check_number(owner, "hidden", hidden, min=1, integer=True)
        check_number(owner, "min_variance", min_variance, above=0)
        check_number(owner, "initial_variance", initial_variance, above=min_variance)
        self.student_channels, self.teacher_channels, self.hidden = student_channels, teacher_channels, hidden
        self.initial_variance, self.min_variance = initial_variance, min_variance
        width = teacher_channels if hidden is None else hidden
        self.first = nn.Linear(student_channels, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, teacher_channels, bias=False)
        above = initial_variance - min_variance
        # The inverse of softplus in a form that neither overflows nor cancels.
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), above + math.log(-math.expm1(-above))))

    def variance(self) -> Tensor:
        """Return the variance of each channel of the teacher, `(teacher_channels,)`, with its graph."""
        raw = self.raw_variance
        return F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32))) + self.min_variance

    def mean(self, student: Tensor) -> Tensor:
        """Predict the teacher's features: `(b, student_channels, ...)` to `(b, teacher_channels, ...)`."""
        x_bcn = student.unsqueeze(-1).flatten(2)
        x_bcn = (self.first.weight.to(student.dtype) @ x_bcn).relu()
        x_bcn = (self.second.weight.to(student.dtype) @ x_bcn).relu()
        x_bcn = self.third.weight.to(student.dtype) @ x_bcn
        return x_bcn.reshape(student.shape[0], self.teacher_channels, *student.shape[2:])

    def forward(
        self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: Reduction | None = None
    ) -> Tensor:
        """Compare `student` `(b, c, h, w)` or `(b, d)` with `teacher`, of as many dimensions.

        `reduction=None` uses the constructor's.
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
                student, teacher = pool_to_smaller(student, teacher)
            return variational_information(
                self.mean(student),
                teacher,
                variance=self.variance(),
                reduction=reduction or self.reduction,
                weight=weight,
            )
