"""DIST: correlation of the class probabilities of student and teacher, by sample and by class."""

import torch
from torch import Tensor
from typing_extensions import override

from kdlib._checks import check_number, check_relation_reduction, check_scheduled, check_weight
from kdlib._gather import gather_rows
from kdlib._maths import MeanOnly, finite_weight, full_precision, promote, promoted_dtype, relative_weight, safe_divisor
from kdlib.losses._checks import check_logits
from kdlib.losses._module import RelationLoss
from kdlib.losses.logits._correlation import Options, correlation_distances
from kdlib.losses.logits._positions import as_positions
from kdlib.types import Schedule

__all__ = ["DISTLoss", "dist"]


def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    dim: int = 1,
    mask: Tensor | None = None,
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

    For logits of tokens or pixels, each position counts as a sample: the first part compares the classes of a position,
    the second the positions of a class, over the whole batch. Large logits are processed a chunk at a time: only the
    gradient takes memory of their size.

    Args:
        student: logits `(b, c)`, or of any shape with the classes at `dim`: tokens `(b, n, c)` with `dim=-1`, pixels
            `(b, c, h, w)`.
        teacher: logits of the same shape; never receives a gradient.
        beta: weight of the relations between classes, at least 0.
        gamma: weight of the relations between samples, at least 0.
        temperature: T, above 0; larger values give softer probabilities.
        dim: dimension of the classes; not 0.
        mask: boolean, of the shape of the logits without `dim`; False leaves a position out, such as padding.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because the relations between samples have no per-sample form.
        weight: `(b,)`, at least 0, weight of all positions of a sample; only the ratios matter.

    Returns:
        A scalar, 0 if all weights are 0 or all positions are masked. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `temperature` is not above 0, `beta` or `gamma` is below 0, or `reduction` is not
            `"mean"`.
        TypeError: An input is not a floating-point tensor, or `mask` is not boolean.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
        >>> abs(round(dist(logits, logits).item(), 6))
        0.0
        >>> round(dist(logits, logits.flip(0)).item(), 4)
        3.648
        >>> pixels = logits[:, :, None, None].expand(2, 3, 4, 4)  # (b, c, h, w)
        >>> round(dist(pixels, pixels.flip(0)).item(), 4)
        3.648

    References:
        Huang et al., *Knowledge Distillation from A Stronger Teacher*, arXiv 2205.10536. For segmentation, the authors'
        code also takes all pixels of the batch as samples. The factor T squared is that
        of public code with a temperature, and 1 at the default.
    """
    check_number("dist", "temperature", temperature, above=0)
    check_number("dist", "beta", beta, min=0)
    check_number("dist", "gamma", gamma, min=0)
    check_number("dist", "dim", dim, integer=True)
    check_relation_reduction("dist", reduction)
    check_logits("dist", student, teacher, dim, mask)
    check_weight("dist", weight, student.shape[0])
    dtype = promoted_dtype(student, teacher)
    options = Options(beta, gamma, temperature, temperature * torch.finfo(student.dtype).tiny)
    with full_precision(student):
        student, teacher, shape = as_positions(student, teacher, dim)
        share = _weights(weight, mask, shape, student).reshape(student.shape[0], *student.shape[2:])
        if gather:
            student, teacher = (x if x.dim() == 2 else x.movedim(1, 2).flatten(0, 1) for x in promote(student, teacher))
            student, teacher = gather_rows(student, grad=True), gather_rows(teacher, grad=False)
            share = gather_rows(share.flatten().clamp(max=torch.finfo(dtype).max).to(dtype), grad=False)
        if student.numel() == 0:
            return student.to(dtype).sum() * 0.0
        share = relative_weight(share, torch.empty((), dtype=dtype, device=student.device))
        share = share / safe_divisor(share.sum())
        value = correlation_distances(student, teacher, share, options) * temperature * temperature
        return torch.where(share.sum() > 0, value, value * 0.0)


def _weights(weight: Tensor | None, mask: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the weight of each position, of the given shape."""
    each = like.new_ones(shape[0]) if weight is None else finite_weight(weight.detach())
    each = each.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    return each if mask is None else torch.where(mask, each, 0)


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
        dim: int = 1,
        gather: bool = False,
        reduction: MeanOnly = "mean",
    ) -> None:
        super().__init__(gather=gather, reduction=reduction)
        check_scheduled("DISTLoss", "temperature", temperature, above=0)
        check_number("DISTLoss", "beta", beta, min=0)
        check_number("DISTLoss", "gamma", gamma, min=0)
        check_number("DISTLoss", "dim", dim, integer=True)
        self.beta, self.gamma, self.temperature, self.dim = beta, gamma, temperature, dim

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: MeanOnly | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Compare `student` with `teacher`; `reduction=None` uses the constructor's."""
        return self._call(student, teacher, weight, reduction, step, mask=mask)
