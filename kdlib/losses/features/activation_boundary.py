"""Activation boundaries: the sign of each pre-activation of the student as that of the teacher's, with a margin."""

import torch
from torch import Tensor

from kdlib._checks import check_number, check_pair
from kdlib._maths import Reduction, full_precision, mean_square, promote, reduce
from kdlib.losses._module import FunctionLoss

__all__ = ["ActivationBoundaryLoss", "activation_boundary"]


def activation_boundary(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 1.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the squared distance of the student's pre-activations from a margin on the teacher's side of zero.

    .. math::
        \frac{1}{n} \sum_i \begin{cases}
            \max(0, \mu - s_i)^2 & \text{where } t_i > 0 \\
            \max(0, \mu + s_i)^2 & \text{elsewhere}
        \end{cases}

    over the n values of a sample, with :math:`\mu` the margin. Only the signs of the teacher's values matter. Both
    sides are features before the activation, the output of a convolution or of its BatchNorm, because a ReLU removes
    the negative values. Distances above 1e15 count as 1e15. A float16 student gets no gradient that overflows float16.

    Args:
        student: pre-activations `(b, ...)`, already projected into the teacher's space.
        teacher: pre-activations of the same shape; never receives a gradient.
        margin: required distance from zero, at least 0, in units of the student's features.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `margin` is below 0, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 3.0, -2.0, 1.0]]), torch.tensor([[9.0, 0.1, -0.1, -7.0]])
        >>> activation_boundary(student, teacher).item()  # (0.25 + 0 + 0 + 4) / 4
        1.0625

    References:
        Heo, Lee, Yun, Choi, *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons*,
        arXiv 1811.03233. RepDistiller uses the sum over the values instead of the mean, times 3 / 1000, and halves it
        for each stage before the last: its value is ours times `3 n / 1000` at the last stage. The paper first trains
        with this loss alone and then on the task; here it is a term like any other.
    """
    check_number("activation_boundary", "margin", margin, min=0)
    check_pair("activation_boundary", student, teacher, "b ...")
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        shortfall = (margin - torch.where(teacher > 0, student, -student)).clamp(min=0)
        return reduce("activation_boundary", mean_square(shortfall, origin), reduction, weight)


class ActivationBoundaryLoss(FunctionLoss):
    """`activation_boundary` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> ActivationBoundaryLoss()(torch.zeros(2, 3), torch.randn(2, 3)).item()
        1.0
    """

    _function = staticmethod(activation_boundary)

    def __init__(self, *, margin: float = 1.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        check_number("ActivationBoundaryLoss", "margin", margin, min=0)
        self.margin = margin
