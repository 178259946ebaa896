"""Losses: DIST, probabilities that correlate with the teacher's, by sample and by class. Touches two tensors only.

Huang et al., 2022: match the relations between the classes of a sample, and between the samples for a class.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, check_pair, check_relation_reduction
from kdlib._maths import full_precision
from kdlib.losses._chunked import soften
from kdlib.losses._pairs import one_batch

__all__ = ["DISTLoss", "dist"]


def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""One minus the correlation of the probabilities, over the classes of each sample and over the samples for each class.

    .. math::
        T^2 \left[ \frac{\beta}{b} \sum_i \bigl(1 - \rho(p^s_{i \cdot}, p^t_{i \cdot})\bigr)
        + \frac{\gamma}{c} \sum_j \bigl(1 - \rho(p^s_{\cdot j}, p^t_{\cdot j})\bigr) \right], \qquad
        p = \mathrm{softmax}(z / T)

    with :math:`\rho` Pearson's correlation. Where one side has no spread at all, as with one class, one sample or equal
    logits, there is nothing to correlate: the two count as correlated by 0, or by 1 where neither has any, and no
    gradient comes from there.

    With weights, the first mean and the correlations over samples are weighted by :math:`w / \sum w`. A sample of
    weight 0 is as if absent.

    Args:
        student: logits `(b, c)`.
        teacher: logits of the same shape; never receives a gradient.
        beta: weight of the relations between classes, at least 0.
        gamma: weight of the relations between samples, at least 0.
        temperature: T, above 0; larger is softer.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number, none too. Every process gets the same value; the gradients are such that their mean over
            the processes, as `DistributedDataParallel` takes it, is that of the one batch.
        reduction: `"mean"` only: the relations between samples have no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where no sample has a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, `temperature` not above 0, `beta` or `gamma` below 0, or a `reduction` other than
            `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
        >>> abs(round(dist(logits, logits).item(), 6))
        0.0
        >>> round(dist(logits, logits.flip(0)).item(), 4)
        3.648

    References:
        Huang et al., *Knowledge Distillation from A Stronger Teacher*, arXiv 2205.10536. The factor T squared is in
        public code that takes a temperature and 1 at the default.
    """
    check_number("dist", "temperature", temperature, above=0)
    check_number("dist", "beta", beta, min=0)
    check_number("dist", "gamma", gamma, min=0)
    check_pair("dist", student, teacher, "b c")
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("dist", student, teacher, reduction, weight, gather)
        if student.numel() == 0:
            return student.sum() * 0.0
        # A masked sample has no place in a softmax: nothing of it may reach the others, an overflow neither.
        masked = (share == 0).unsqueeze(1)
        p_s, p_t = (soften(x.masked_fill(masked, 0.0), temperature).softmax(1) for x in (student, teacher))
        even = torch.full_like(p_s[:1], 1 / p_s.shape[1])
        least = temperature * torch.finfo(origin).tiny
        between_classes = share @ _apart(p_s, p_t, even, least)
        between_samples = _apart(p_s.T, p_t.T, share.unsqueeze(0), least).mean()
        value = temperature**2 * (beta * between_classes + gamma * between_samples)
        return torch.where(share.sum() > 0, value, value * 0.0)


def _apart(x: Tensor, y: Tensor, share: Tensor, least: float) -> Tensor:
    """One minus the weighted correlation of each row of `x` `(n, d)` with that of `y`; the shares sum to one."""
    x, x_flat = _standard(x, share, least)
    y, y_flat = _standard(y, share, least)
    correlation = torch.where(x_flat & y_flat, 1.0, (share * x * y).sum(1))
    return 1 - correlation


def _standard(x: Tensor, share: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Rows of weighted mean 0 and variance 1, and which have no spread: these become zero, without a gradient.

    Nor have rows whose spread is below `least` of their size a gradient: it grows as one over the spread.
    """
    centerd = x - (share * x).sum(1, keepdim=True)
    held = torch.where(share > 0, centerd, 0.0)
    largest, size = (each.detach().abs().amax(1, keepdim=True) for each in (held, x))
    # What rounding leaves of equal numbers is no spread.
    flat = largest <= 8 * torch.finfo(x.dtype).eps * size
    scaled = held / torch.where(flat, 1.0, largest)
    spread = (share * torch.where(flat, 1.0, scaled).square()).sum(1, keepdim=True).sqrt()
    standard = torch.where(flat, 0.0, scaled / torch.where(spread == 0, 1.0, spread))
    return torch.where(largest < least * size, standard.detach(), standard), flat.squeeze(1)


class DISTLoss(nn.Module):
    """`dist` as a Module; the formula and the arguments are there.

    Args:
        beta: weight of the relations between classes, at least 0.
        gamma: weight of the relations between samples, at least 0.
        temperature: above 0; larger is softer.
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: a number out of range, or a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = DISTLoss(temperature=2.0)
        >>> loss
        DISTLoss(beta=1.0, gamma=1.0, temperature=2.0, gather=False, reduction='mean')
        >>> loss(torch.eye(3), torch.eye(3)).abs().item() < 1e-5
        True
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        gather: bool = False,
        reduction: Literal["mean"] = "mean",
    ) -> None:
        super().__init__()
        check_number("DISTLoss", "temperature", temperature, above=0)
        check_number("DISTLoss", "beta", beta, min=0)
        check_number("DISTLoss", "gamma", gamma, min=0)
        check_relation_reduction("DISTLoss", reduction)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.gather = gather
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean"] | None = None,
    ) -> Tensor:
        """The loss of `student` logits `(b, c)` against `teacher`; `reduction=None` means the constructor's."""
        return dist(
            student,
            teacher,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            gather=self.gather,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return (
            f"beta={self.beta!r}, gamma={self.gamma!r}, temperature={self.temperature!r}, gather={self.gather!r}, "
            f"reduction={self.reduction!r}"
        )
