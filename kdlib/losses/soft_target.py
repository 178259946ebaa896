"""Losses: soft targets, the student's class probabilities equal to the teacher's. Touches two tensors only.

Hinton, Vinyals and Dean, 2015: match the outputs at a raised temperature.
"""

from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from kdlib._checks import check_choice, check_number, check_pair
from kdlib._maths import REDUCTIONS, full_precision, reduce
from kdlib.losses._chunked import LEAST_LOG, by_rows, soften

__all__ = ["SoftTargetLoss", "soft_target"]


def soft_target(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from the student's softened probabilities to the teacher's.

    .. math:: T^2 \sum_c p^t_c \, (\log p^t_c - \log p^s_c), \qquad p = \mathrm{softmax}(z / T)

    summed over the classes of one sample. The factor :math:`T^2` keeps the size of the gradient when T changes.

    Args:
        student: logits `(b, c)`.
        teacher: logits of the same shape; never receives a gradient.
        temperature: T, above 0; larger is softer.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, `temperature` not above 0, or an unknown `reduction`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log()
        >>> round(soft_target(student, teacher, temperature=1.0).item(), 4)
        0.6931
        >>> soft_target(teacher.exp(), teacher.exp()).item()
        0.0

    References:
        Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531, section 2. This is
        `torch.nn.KLDivLoss(reduction="batchmean")` times T squared; its `"mean"` is smaller by the number of classes.
    """
    check_number("soft_target", "temperature", temperature, above=0)
    check_pair("soft_target", student, teacher, "b c")
    with full_precision(student):
        value, slope = partial(_divergence, temperature=temperature), partial(_slope, temperature=temperature)
        losses = by_rows(value, slope, student, teacher)
        return reduce("soft_target", losses, reduction, weight)


class SoftTargetLoss(nn.Module):
    """`soft_target` as a Module; the formula and the arguments are there.

    Args:
        temperature: above 0; larger is softer.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: `temperature` not above 0, or an unknown `reduction`.

    Examples:
        >>> import torch
        >>> loss = SoftTargetLoss(temperature=2.0)
        >>> loss
        SoftTargetLoss(temperature=2.0, reduction='mean')
        >>> loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        0.0
    """

    per_sample: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 4.0, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        check_number("SoftTargetLoss", "temperature", temperature, above=0)
        check_choice("SoftTargetLoss", "reduction", reduction, REDUCTIONS)
        self.temperature = temperature
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` logits `(b, c)` against `teacher`; `reduction=None` means the constructor's."""
        return soft_target(
            student, teacher, temperature=self.temperature, reduction=reduction or self.reduction, weight=weight
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"temperature={self.temperature!r}, reduction={self.reduction!r}"


def _divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """The loss of each row, `(n, c)` and `(n, c)` to `(n,)`."""
    # In place wherever nothing is kept for the backward: three matrices at a time rather than five.
    log_t = soften(teacher, temperature).log_softmax(1).clamp_(min=LEAST_LOG)
    gap = log_t - soften(student, temperature).log_softmax(1).clamp(min=LEAST_LOG)
    return temperature**2 * gap.mul_(log_t.exp_()).sum(1)


def _slope(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Its derivative: T (p^s - p^t)."""
    p_t = soften(teacher, temperature).softmax(1)
    return p_t.sub_(soften(student, temperature).softmax(1)).mul_(-temperature)
