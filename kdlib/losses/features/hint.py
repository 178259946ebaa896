"""Hint loss of FitNets: mean squared error of features."""

from torch import Tensor

from kdlib._checks import check_pair
from kdlib._maths import Reduction, full_precision, mean_square, promote, reduce
from kdlib.losses._module import FunctionLoss

__all__ = ["HintLoss", "hint"]


def hint(student: Tensor, teacher: Tensor, *, reduction: Reduction = "mean", weight: Tensor | None = None) -> Tensor:
    r"""Compute the mean squared error :math:`\frac{1}{n} \sum_i (s_i - t_i)^2` over the n values of a sample.

    Without weights, the batch mean is the mean over all values. Differences above 1e15 count as 1e15. A float16 student
    gets no gradient that overflows float16.

    Args:
        student: features `(b, ...)`, already projected into the teacher's space.
        teacher: features of the same shape; never receives a gradient.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [3.0, 1.0]])
        >>> hint(student, teacher, reduction="none")
        tensor([2., 5.])
        >>> hint(student, teacher).item()
        3.5

    References:
        Romero et al., *FitNets: Hints for Thin Deep Nets*, arXiv 1412.6550, equation 3, which is half the sum of
        squares. The mean is the convention of public code and does not grow with the size of the feature.
    """
    check_pair("hint", student, teacher, "b ...")
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        return reduce("hint", mean_square(student - teacher, origin), reduction, weight)


class HintLoss(FunctionLoss):
    """`hint` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> HintLoss()(torch.zeros(2, 3), torch.ones(2, 3)).item()
        1.0
    """

    _function = staticmethod(hint)
