"""Losses: activation boundaries, the student's neurons on or off where the teacher's are. Touches two tensors only.

Heo et al., 2019: before the activation, only on which side of zero a value lies is to be the teacher's.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_number, check_pair
from kdlib._maths import REDUCTIONS, full_precision, promote, reduce
from kdlib.losses._squares import mean_square

__all__ = ["ActivationBoundaryLoss", "activation_boundary"]


def activation_boundary(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""How far the student's pre-activations are from the teacher's side of zero, and from a margin beyond it.

    .. math::
        \frac{1}{n} \sum_i \begin{cases}
            \max(0, \mu - s_i)^2 & \text{where } t_i > 0 \\
            \max(0, \mu + s_i)^2 & \text{elsewhere}
        \end{cases}

    over the n values of one sample, with :math:`\mu` the margin. How large the teacher's values are does not matter.
    Both sides are features before the activation, the output of a convolution or its BatchNorm: after a ReLU nothing
    is below zero. A value further than 1e15 from its margin counts as that far. A float16 student gets no gradient that
    float16 cannot hold.

    Args:
        student: pre-activations `(b, ...)`, already projected into the teacher's space.
        teacher: pre-activations of the same shape; never receives a gradient. Only their signs are read.
        margin: how far beyond zero the student is to go, at least 0, in units of its features.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, `margin` below 0, or an unknown `reduction`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 3.0, -2.0, 1.0]]), torch.tensor([[9.0, 0.1, -0.1, -7.0]])
        >>> activation_boundary(student, teacher).item()  # (0.25 + 0 + 0 + 4) / 4
        1.0625

    References:
        Heo, Lee, Yun, Choi, *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons*,
        arXiv 1811.03233. RepDistiller takes the sum over the values where we take the mean, times 3 / 1000, and halves
        it for each stage before the last: its number is ours times `3 n / 1000` at the last stage. The paper trains on
        this loss alone first, and on the task after; here it is a term like any other.
    """
    check_number("activation_boundary", "margin", margin, min=0)
    check_pair("activation_boundary", student, teacher, "b ...")
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        gap = (margin - torch.where(teacher > 0, student, -student)).clamp(min=0)
        return reduce("activation_boundary", mean_square(gap, origin), reduction, weight)


class ActivationBoundaryLoss(nn.Module):
    """`activation_boundary` as a Module; the formula and the arguments are there.

    Args:
        margin: how far beyond zero the student is to go, at least 0.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: `margin` below 0, or an unknown `reduction`.

    Examples:
        >>> import torch
        >>> loss = ActivationBoundaryLoss()
        >>> loss
        ActivationBoundaryLoss(margin=1.0, reduction='mean')
        >>> loss(torch.zeros(2, 3), torch.randn(2, 3)).item()
        1.0
    """

    per_sample: ClassVar[bool] = True

    def __init__(self, *, margin: float = 1.0, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        check_number("ActivationBoundaryLoss", "margin", margin, min=0)
        check_choice("ActivationBoundaryLoss", "reduction", reduction, REDUCTIONS)
        self.margin = margin
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, ...)` against `teacher`; `reduction=None` means the constructor's."""
        return activation_boundary(
            student, teacher, margin=self.margin, reduction=reduction or self.reduction, weight=weight
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"margin={self.margin!r}, reduction={self.reduction!r}"
