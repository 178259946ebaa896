"""Soft targets: Kullback-Leibler divergence of the softened class probabilities."""

from functools import partial

from torch import Tensor

from kdlib._checks import check_number, check_pair
from kdlib._maths import Reduction, full_precision, reduce
from kdlib.losses._module import FunctionLoss
from kdlib.losses.logits._chunked import by_rows
from kdlib.losses.logits._divergence import MIN_LOG, centered, divergence, probability_gap, soften

__all__ = ["SoftTargetLoss", "soft_target"]


def soft_target(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the Kullback-Leibler divergence from the student's softened probabilities to the teacher's.

    .. math:: T^2 \sum_c p^t_c \, (\log p^t_c - \log p^s_c), \qquad p = \mathrm{softmax}(z / T)

    summed over the classes of a sample. The factor :math:`T^2` keeps the size of the gradient when T changes. Logits of
    many classes are processed a few rows at a time: only the gradient takes memory of their size.

    Args:
        student: logits `(b, c)`.
        teacher: logits of the same shape; never receives a gradient.
        temperature: T, above 0; larger values give softer probabilities.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `temperature` is not above 0, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log()
        >>> round(soft_target(student, teacher, temperature=1.0).item(), 4)
        0.6931
        >>> soft_target(teacher.exp(), teacher.exp()).item()
        0.0

    References:
        Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531, section 2. This is
        `torch.nn.KLDivLoss(reduction="batchmean")` times T squared; its `"mean"` also divides by the number of classes.
    """
    check_number("soft_target", "temperature", temperature, above=0)
    check_pair("soft_target", student, teacher, "b c")
    with full_precision(student):
        value, slope = partial(_divergence, temperature=temperature), partial(_slope, temperature=temperature)
        losses = by_rows(value, slope, student, teacher)
        return reduce("soft_target", losses, reduction, weight)


class SoftTargetLoss(FunctionLoss):
    """`soft_target` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> SoftTargetLoss(temperature=2.0)(torch.zeros(2, 3), torch.ones(2, 3)).item()
        0.0
    """

    _function = staticmethod(soft_target)

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        check_number("SoftTargetLoss", "temperature", temperature, above=0)
        self.temperature = temperature


def _compare(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return both log-probabilities `(n, c)`, the divergences `(n,)` and the log-ratios `(n, c)`."""
    log_s, log_t = (soften(x, temperature).log_softmax(1).clamp(min=MIN_LOG) for x in (student, teacher))
    difference = lambda: centered(student, temperature) - centered(teacher, temperature)  # noqa: E731
    return log_s, log_t, *divergence(log_s, log_t, difference)


def _divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return the loss of each row, `(n, c)` and `(n, c)` to `(n,)`."""
    return _compare(student, teacher, temperature)[2] * temperature * temperature


def _slope(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Return the derivative of `_divergence` by the student's logits: T (p^s - p^t)."""
    log_s, log_t, _, ratio = _compare(student, teacher, temperature)
    return probability_gap(log_s, log_t, ratio) * temperature
