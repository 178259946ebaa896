"""Decoupled distillation: soft targets in two parts, target class against the rest and within the rest."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib._checks import check_number, check_scheduled
from kdlib._maths import Reduction, full_precision, promote
from kdlib.losses._checks import check_classes, check_logits
from kdlib.losses._module import LossModule
from kdlib.losses.logits._chunked import by_rows
from kdlib.losses.logits._divergence import MIN_LOG, Measured, centered, divergence, probability_gap, soften
from kdlib.losses.logits._positions import as_positions, reduce_positions
from kdlib.types import Schedule

__all__ = ["DecoupledKDLoss", "decoupled_kd"]


def decoupled_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    dim: int = 1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the divergence of target class against the rest, plus the divergence within the rest.

    .. math:: T^2 \left[ \alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s) \right]

    at each position of target class y, with :math:`p = \mathrm{softmax}(z / T)`, :math:`b = (p_y, 1 - p_y)`, and
    :math:`\hat p` the softmax over all classes except y. With :math:`\alpha = 1` and :math:`\beta = 1 - p^t_y` this is
    `soft_target`. With a constant :math:`\beta`, the second part does not vanish where the teacher is confident.

    :math:`1 - p_y` is never computed. With :math:`u = z_y / T - \log \sum_{c \ne y} e^{z_c / T}` the logarithms are
    those of the sigmoid of u and of -u, so the loss is exact where the target's probability rounds to 1. With two
    classes the second part is 0; with one class the loss is 0. Large logits are processed a chunk at a time: only the
    gradient takes memory of their size.

    Args:
        student: logits `(b, c)`, or of any shape with the classes at `dim`: tokens `(b, n, c)` with `dim=-1`, pixels
            `(b, c, h, w)`.
        teacher: logits of the same shape; never receives a gradient.
        target: class of each position, of the shape of the logits without `dim`: whole numbers from 0 to c - 1, and
            any number where `mask` is False. For an ignore index, pass `mask=target != ignore_index`.
        alpha: weight of target against rest, at least 0.
        beta: weight of the divergence within the rest, at least 0.
        temperature: T, above 0; larger values give softer probabilities.
        dim: dimension of the classes; not 0.
        mask: boolean, of the shape of the logits without `dim`; False leaves a position out, such as padding.
        reduction: `"mean"` over all positions that are not masked, or `"none"`, the mean of each sample.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)` over positions, or 0 if all weights are 0. `(b,)` for
        `"none"`, multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, a target is not a class, a number is out of range, or `reduction` is unknown.
            On an accelerator and inside `torch.compile` the values of the targets are not read.
        TypeError: The logits are not floating-point tensors, the targets are not whole numbers, or `mask` is not
            boolean.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0, 0.0]])
        >>> teacher = torch.tensor([[2.0, 1.0, 1.0]]).log()
        >>> target = torch.tensor([0])
        >>> round(decoupled_kd(student, teacher, target=target, temperature=1.0).item(), 4)
        0.0589
        >>> teacher = torch.tensor([[2.0, 3.0, 1.0]]).log()
        >>> round(decoupled_kd(student, teacher, target=target, temperature=1.0, alpha=0.0, beta=1.0).item(), 4)
        0.1308
        >>> pixels, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
        >>> target[:, 0] = 255  # unlabeled
        >>> decoupled_kd(pixels, pixels, target=target, mask=target != 255).item()
        0.0

    References:
        Zhao, Cui, Song, Qiu, Liang, *Decoupled Knowledge Distillation*, arXiv 2203.08679, equation 7. The authors' code
        takes the logarithm of a softmax, which is infinite from a difference of about 100 on, and lowers the logit of
        the target by 1000 to exclude it. Their training raises the weight of the loss from 0 over the first 20 epochs;
        here the weight of a term can be a schedule. They use beta between 1 and 10 for up to 1000 classes; with many
        more classes it may have to be smaller.
    """
    owner = "decoupled_kd"
    check_number(owner, "alpha", alpha, min=0)
    check_number(owner, "beta", beta, min=0)
    check_number(owner, "temperature", temperature, above=0)
    check_number(owner, "dim", dim, integer=True)
    check_logits(owner, student, teacher, dim, mask)
    student, teacher, shape = as_positions(student, teacher, dim)
    check_classes(owner, target, tuple(shape), student.shape[1], mask)
    target = target.long() if mask is None else torch.where(mask, target.long(), 0)
    target = target.reshape(student.shape[0], 1, *student.shape[2:])
    with full_precision(student):
        if student.shape[1] < 2:
            losses = (0 * promote(student, teacher)[0]).sum(1)
        else:
            measure = partial(_measure, alpha=alpha, beta=beta, temperature=temperature)
            losses = by_rows(measure, student, teacher, target, steps=4) * temperature
        return reduce_positions(owner, losses, shape, mask, reduction, weight)


class DecoupledKDLoss(LossModule):
    """`decoupled_kd` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    `temperature` may be a schedule, as in `kdlib.schedules`; each call then needs `step=`.

    Examples:
        >>> import torch
        >>> loss = DecoupledKDLoss(beta=2.0)
        >>> loss(torch.zeros(2, 3), torch.ones(2, 3), target=torch.tensor([0, 2])).item()
        0.0
    """

    _function = staticmethod(decoupled_kd)
    _schedulable = ("temperature",)

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float | Schedule = 4.0,
        dim: int = 1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_number("DecoupledKDLoss", "alpha", alpha, min=0)
        check_number("DecoupledKDLoss", "beta", beta, min=0)
        check_scheduled("DecoupledKDLoss", "temperature", temperature, above=0)
        check_number("DecoupledKDLoss", "dim", dim, integer=True)
        self.alpha, self.beta, self.temperature, self.dim = alpha, beta, temperature, dim

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Compare `student` logits `(b, c)` with `teacher`, `target` `(b,)`; `reduction=None` uses the constructor's."""
        return self._call(student, teacher, weight, reduction, step, target=target, mask=mask)


@dataclass
class _Parts:
    """Target against rest `(n, 2, ...)`, and the rest `(n, c, ...)`, where the target has probability 0."""

    log_s: Tensor
    log_t: Tensor
    value: Tensor
    ratio: Tensor | None


def _compare(student: Tensor, teacher: Tensor, target_n1: Tensor, temperature: float) -> tuple[_Parts, _Parts]:
    """Return the log-probabilities, divergences and log-ratios of both parts."""
    (u_s, log_s), (u_t, log_t) = (_split_target(soften(x, temperature), target_n1) for x in (student, teacher))
    difference = lambda: centered(student, temperature) - centered(teacher, temperature)  # noqa: E731
    rest = _Parts(log_s, log_t, *divergence(log_s, log_t, difference))
    # The log-ratio at the target, where the rest's does not include it, is the difference of the log-odds u.
    odds = u_s - u_t if rest.ratio is None else rest.ratio.gather(1, target_n1)
    log_s, log_t = (F.logsigmoid(torch.cat([u, -u], 1)) for u in (u_s, u_t))
    return _Parts(log_s, log_t, *divergence(log_s, log_t, lambda: torch.cat([odds, torch.zeros_like(odds)], 1))), rest


def _split_target(softened: Tensor, target_n1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-odds u of the target `(n, 1)` and the log-probabilities of the rest `(n, c)`."""
    own = softened.gather(1, target_n1)
    rest = softened.scatter(1, target_n1, -torch.inf)
    log_rest = rest.log_softmax(1)
    # log sum exp of the rest follows from its largest entry, without a second sum. Autograd needs one and the same entry
    # of both, where rounding may leave several equal ones.
    if softened.requires_grad:
        largest = rest.detach().max(1, keepdim=True).indices
        odds = (own - rest.gather(1, largest)) + log_rest.gather(1, largest)
    else:
        odds = (own - rest.amax(1, keepdim=True)) + log_rest.amax(1, keepdim=True)
    return odds.clamp(MIN_LOG, -MIN_LOG), log_rest.clamp(min=MIN_LOG)


def _measure(
    student: Tensor, teacher: Tensor, target_n1: Tensor, *, alpha: float, beta: float, temperature: float
) -> Measured:
    """Return the loss of each row of logits `(n, c, ...)` divided by T, and its derivative by the student's logits.

    The derivative is alpha d at y and beta (q^s - q^t) - alpha d q^s elsewhere, with d = p^s_y - p^t_y.
    """
    binary, rest = _compare(student, teacher, target_n1, temperature)

    def slope() -> Tensor:
        gap = probability_gap(binary.log_s, binary.log_t.exp(), binary.ratio)
        # For two probabilities near 1, the difference of their complements is exact.
        d = torch.where(binary.log_s[:, :1] > binary.log_s[:, 1:], -gap[:, 1:], gap[:, :1]) * alpha
        slope = probability_gap(rest.log_s, rest.log_t.exp(), rest.ratio).mul_(beta)
        return slope.sub_(d * rest.log_s.exp()).scatter_(1, target_n1, d)

    return Measured((alpha * binary.value + beta * rest.value) * temperature, slope)
