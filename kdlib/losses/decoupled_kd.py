"""Losses: decoupled distillation, soft targets in two parts of their own weight. Touches tensors only.

Zhao et al., 2022: what the teacher says of the target class, and how it spreads the rest over the other classes.
"""

from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_choice, check_number, check_pair, check_target
from kdlib._maths import REDUCTIONS, full_precision, promote, reduce
from kdlib.losses._chunked import LEAST_LOG, by_rows, soften

__all__ = ["DecoupledKDLoss", "decoupled_kd"]


def decoupled_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Divergence of target against rest, plus the divergence within the rest.

    .. math:: T^2 \left[ \alpha \, \mathrm{KL}(b^t \,\|\, b^s) + \beta \, \mathrm{KL}(\hat p^t \,\|\, \hat p^s) \right]

    of one sample with target class y: :math:`p = \mathrm{softmax}(z / T)`, :math:`b = (p_y, 1 - p_y)`, and
    :math:`\hat p` the softmax over all classes but y. With :math:`\alpha = 1` and :math:`\beta = 1 - p^t_y` this is
    `soft_target`; the second part no longer vanishes where the teacher is sure.

    :math:`1 - p_y` is never computed: with :math:`u = z_y / T - \log \sum_{c \ne y} e^{z_c / T}` the logarithms are
    those of the sigmoid of u and of -u, so the loss is exact where the target's probability rounds to 1. With two
    classes the rest is one class, and the second part 0. With one class there is no rest, and the loss is 0.

    Args:
        student: logits `(b, c)`.
        teacher: logits of the same shape; never receives a gradient.
        target: class `(b,)`, whole numbers from 0 to c - 1.
        alpha: weight of target against rest, at least 0.
        beta: weight of the divergence within the rest, at least 0.
        temperature: T, above 0; larger is softer.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, a target is not a class, a number is out of its range, or an unknown `reduction`.
            Inside `torch.compile` targets are not looked at.
        TypeError: logits that are not floating-point tensors, or targets that are not whole numbers.

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

    References:
        Zhao, Cui, Song, Qiu, Liang, *Decoupled Knowledge Distillation*, arXiv 2203.08679, equation 7. The authors' code
        takes the logarithm of a softmax, infinite from a gap of about 100 on, and hides the target behind a logit
        lowered by 1000. Their training raises the weight of the loss from 0 over the first 20 epochs; a schedule of
        the weight of a term does that here. They choose beta between 1 and 10 on up to 1000 classes; with many more it
        may have to be smaller.
    """
    owner = "decoupled_kd"
    check_number(owner, "alpha", alpha, min=0)
    check_number(owner, "beta", beta, min=0)
    check_number(owner, "temperature", temperature, above=0)
    check_pair(owner, student, teacher, "b c")
    check_target(owner, target, *student.shape)
    with full_precision(student):
        if student.shape[1] < 2:
            return reduce(owner, (0 * promote(student, teacher)[0]).sum(1), reduction, weight)
        value = partial(_divergence, alpha=alpha, beta=beta, temperature=temperature)
        slope = partial(_slope, alpha=alpha, beta=beta, temperature=temperature)
        losses = by_rows(value, slope, student, teacher, target.long().unsqueeze(1))
        return reduce(owner, losses, reduction, weight)


class DecoupledKDLoss(nn.Module):
    """`decoupled_kd` as a Module; the formula and the arguments are there.

    Args:
        alpha: weight of target against rest, at least 0.
        beta: weight of the divergence within the rest, at least 0.
        temperature: above 0; larger is softer.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: a number out of its range, or an unknown `reduction`.

    Examples:
        >>> import torch
        >>> loss = DecoupledKDLoss(beta=2.0)
        >>> loss
        DecoupledKDLoss(alpha=1.0, beta=2.0, temperature=4.0, reduction='mean')
        >>> loss(torch.zeros(2, 3), torch.ones(2, 3), target=torch.tensor([0, 2])).item()
        0.0
    """

    per_sample: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_number("DecoupledKDLoss", "alpha", alpha, min=0)
        check_number("DecoupledKDLoss", "beta", beta, min=0)
        check_number("DecoupledKDLoss", "temperature", temperature, above=0)
        check_choice("DecoupledKDLoss", "reduction", reduction, REDUCTIONS)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` logits `(b, c)` against `teacher`, `target` `(b,)`; `reduction=None`: the constructor's."""
        return decoupled_kd(
            student,
            teacher,
            target=target,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return (
            f"alpha={self.alpha!r}, beta={self.beta!r}, temperature={self.temperature!r}, reduction={self.reduction!r}"
        )


def _parted(logits: Tensor, target_n1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The log-odds u of the target `(n, 1)`, and the log-probabilities of the rest `(n, c)`, minus infinity at y."""
    softened = soften(logits, temperature)
    own = softened.gather(1, target_n1)
    rest = softened.scatter(1, target_n1, -torch.inf)
    log_rest = rest.log_softmax(1)
    # log sum exp of the rest, read off its largest entry rather than summed again.
    odds = (own - rest.amax(1, keepdim=True)) + log_rest.amax(1, keepdim=True)
    return odds.clamp(LEAST_LOG, -LEAST_LOG), log_rest


def _divergence(
    student: Tensor, teacher: Tensor, target_n1: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """The loss of each row, `(n, c)` and `(n, c)` to `(n,)`."""
    u_s, log_s = _parted(student, target_n1, temperature)
    u_t, log_t = _parted(teacher, target_n1, temperature)
    binary = u_t.sigmoid() * (F.logsigmoid(u_t) - F.logsigmoid(u_s))
    binary = binary + (-u_t).sigmoid() * (F.logsigmoid(-u_t) - F.logsigmoid(-u_s))
    # In place wherever nothing is kept for the backward, so that fewer matrices are held at a time.
    log_t = log_t.clamp_(min=LEAST_LOG)
    within = (log_t - log_s.clamp(min=LEAST_LOG)).mul_(log_t.exp_()).sum(1)
    return temperature**2 * (alpha * binary.squeeze(1) + beta * within)


def _slope(
    student: Tensor, teacher: Tensor, target_n1: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Its derivative: T alpha d at the target, T (beta (q^s - q^t) - alpha d q^s) at the rest, with d = p^s_y - p^t_y."""
    u_s, log_s = _parted(student, target_n1, temperature)
    u_t, log_t = _parted(teacher, target_n1, temperature)
    # Of two probabilities near 1 take the distance of their complements.
    d = torch.where(u_s > 0, (-u_t).sigmoid() - (-u_s).sigmoid(), u_s.sigmoid() - u_t.sigmoid())
    q_t = log_t.exp_().mul_(-temperature * beta)
    rest = q_t.addcmul_(log_s.exp(), temperature * (beta - alpha * d))
    return rest.scatter_(1, target_n1, temperature * alpha * d)
