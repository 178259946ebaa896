"""Losses: hint, the student's features equal to the teacher's. Touches two tensors only.

Romero et al., FitNets, 2015: regress a teacher's intermediate features from the student's.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from kdlib._checks import check_choice, check_pair
from kdlib._maths import REDUCTIONS, full_precision, promote, reduce
from kdlib.losses._squares import mean_square

__all__ = ["HintLoss", "hint"]


def hint(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error: :math:`\frac{1}{n} \sum_i (s_i - t_i)^2` over the n values of one sample.

    Without weights, the batch mean is the mean over all values. Differences above 1e15 count as 1e15. A float16 student
    gets no gradient that float16 cannot hold.

    Args:
        student: features `(b, ...)`, already projected into the teacher's space.
        teacher: features of the same shape; never receives a gradient.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, or an unknown `reduction`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [3.0, 1.0]])
        >>> hint(student, teacher, reduction="none")
        tensor([2., 5.])
        >>> hint(student, teacher).item()
        3.5

    References:
        Romero et al., *FitNets: Hints for Thin Deep Nets*, arXiv 1412.6550, equation 3, which takes half the sum of
        squares; the mean is the custom of public code, and does not grow with the feature.
    """
    check_pair("hint", student, teacher, "b ...")
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        return reduce("hint", mean_square(student - teacher, origin), reduction, weight)


class HintLoss(nn.Module):
    """`hint` as a Module; the formula and the arguments are there.

    Args:
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: an unknown `reduction`.

    Examples:
        >>> import torch
        >>> loss = HintLoss()
        >>> loss
        HintLoss(reduction='mean')
        >>> loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        1.0
    """

    per_sample: ClassVar[bool] = True

    def __init__(self, *, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        check_choice("HintLoss", "reduction", reduction, REDUCTIONS)
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
        return hint(student, teacher, reduction=reduction or self.reduction, weight=weight)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"reduction={self.reduction!r}"
