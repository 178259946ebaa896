"""DIST: correlation of the class probabilities of student and teacher, by sample and by class."""

import torch
from torch import Tensor

from kdlib._checks import check_number, check_pair, check_scheduled
from kdlib._maths import MeanOnly, full_precision
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import one_batch
from kdlib.losses.logits._divergence import centered
from kdlib.types import Schedule

__all__ = ["DISTLoss", "dist"]


def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute one minus the correlation of the probabilities over the classes of a sample and the samples of a class.

    .. math::
        T^2 \left[ \frac{\beta}{b} \sum_i \bigl(1 - \rho(p^s_{i \cdot}, p^t_{i \cdot})\bigr)
        + \frac{\gamma}{c} \sum_j \bigl(1 - \rho(p^s_{\cdot j}, p^t_{\cdot j})\bigr) \right], \qquad
        p = \mathrm{softmax}(z / T)

    with :math:`\rho` Pearson's correlation. If one side has no spread, as with one class, one sample or equal logits,
    the correlation counts as 0, or as 1 if neither side has any, and there is no gradient.

    With weights, the first mean and the correlations over samples are weighted by :math:`w / \sum w`. A sample of
    weight 0 has no influence.

    Args:
        student: logits `(b, c)`.
        teacher: logits of the same shape; never receives a gradient.
        beta: weight of the relations between classes, at least 0.
        gamma: weight of the relations between samples, at least 0.
        temperature: T, above 0; larger values give softer probabilities.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because the relations between samples have no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if all weights are 0. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `temperature` is not above 0, `beta` or `gamma` is below 0, or `reduction` is not
            `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
        >>> abs(round(dist(logits, logits).item(), 6))
        0.0
        >>> round(dist(logits, logits.flip(0)).item(), 4)
        3.648

    References:
        Huang et al., *Knowledge Distillation from A Stronger Teacher*, arXiv 2205.10536. The factor T squared is that
        of public code with a temperature, and 1 at the default.
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
        # An overflow in the softmax of a masked sample must not reach the others.
        masked = (share == 0).unsqueeze(1)
        sides = [_Side(x.masked_fill(masked, 0.0), temperature) for x in (student, teacher)]
        even = torch.full_like(student[:1], 1 / student.shape[1])
        min_spread = temperature * torch.finfo(origin).tiny
        rows = [_standardize(x.softened, x.softened, x.size, even, min_spread) for x in sides]
        size = [torch.where(masked, 0.0, x.size).amax() for x in sides]
        columns = [
            _standardize(x.log_p.T, (x.softened.abs() + x.log_sum.abs()).T, most, share.unsqueeze(0), min_spread)
            for x, most in zip(sides, size, strict=True)
        ]
        between_classes = share @ _one_minus_correlation(rows, even)
        between_samples = _one_minus_correlation(columns, share.unsqueeze(0)).mean()
        value = (beta * between_classes + gamma * between_samples) * temperature * temperature
        return torch.where(share.sum() > 0, value, value * 0.0)


class _Side:
    """Log-probabilities of one side `(b, c)`, up to a constant, without the rounding error of their size."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.softened = centered(logits, temperature)
        self.log_sum = self.softened.expm1().mean(1, keepdim=True).log1p()
        self.log_p = self.softened - self.log_sum
        self.size = logits.detach().abs().amax(1, keepdim=True) / temperature


def _standardize(logs: Tensor, error: Tensor, size: Tensor, share: Tensor, min_spread: float) -> tuple[Tensor, Tensor]:
    """Scale rows of exp(logs) `(n, d)` to weighted mean 0 and variance 1; also return which have no spread.

    These become zero; rounding differences, of `error` times the precision, do not count as spread. Rows with a
    relative spread below `min_spread`, or within the precision of logits of `size`, get no gradient, because it grows
    as 1 / spread.
    """
    eps = 8 * torch.finfo(logs.dtype).eps
    top = torch.where(share > 0, logs.detach(), torch.finfo(logs.dtype).min).amax(1, keepdim=True)
    below = torch.where(share > 0, logs, top) - top
    x = below.expm1()
    centered = torch.where(share > 0, x - (share * x).sum(1, keepdim=True), 0.0)
    largest = centered.detach().abs().amax(1, keepdim=True)
    size_of_error = torch.where(share > 0, error, 0.0).detach().abs().amax(1, keepdim=True)
    flat = -below.detach().amin(1, keepdim=True) <= eps * size_of_error
    scaled = centered / torch.where(flat, 1.0, largest)
    spread = (share * torch.where(flat, 1.0, scaled).square()).sum(1, keepdim=True).sqrt()
    standard = torch.where(flat, 0.0, scaled / torch.where(spread == 0, 1.0, spread))
    steep = largest < torch.clamp(eps * size.clamp(max=100), min=min_spread)
    return torch.where(steep, standard.detach(), standard), flat.squeeze(1)


def _one_minus_correlation(sides: list[tuple[Tensor, Tensor]], share: Tensor) -> Tensor:
    """Return one minus the weighted correlation of the rows `(n,)`, as half the squared distance: it cannot cancel."""
    (x, x_flat), (y, y_flat) = sides
    apart = (share * (x - y).square()).sum(1) / 2
    return torch.where(x_flat | y_flat, (x_flat != y_flat).to(apart.dtype), apart)


class DISTLoss(RelationLoss):
    """`dist` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    `temperature` may be a schedule, as in `kdlib.schedules`; each call then needs `step=`.

    Examples:
        >>> import torch
        >>> DISTLoss(temperature=2.0)(torch.eye(3), torch.eye(3)).abs().item() < 1e-5
        True
    """

    _function = staticmethod(dist)
    _schedulable = ("temperature",)

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float | Schedule = 1.0,
        gather: bool = False,
        reduction: MeanOnly = "mean",
    ) -> None:
        super().__init__(gather=gather, reduction=reduction)
        check_scheduled("DISTLoss", "temperature", temperature, above=0)
        check_number("DISTLoss", "beta", beta, min=0)
        check_number("DISTLoss", "gamma", gamma, min=0)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: MeanOnly | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Compare `student` with `teacher`; `reduction=None` uses the constructor's."""
        return self._call(student, teacher, weight, reduction, step)
