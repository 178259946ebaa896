"""Weights from one learned uncertainty per teacher (Kendall et al.)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, check_shape
from kdlib._maths import full_precision
from kdlib._repr import CallRepr
from kdlib.types import Side, Targets
from kdlib.weighting._checks import check_teachers

__all__ = ["UncertaintyWeighting"]

MIN_LOG_VARIANCE = -16.0
"""Smaller log-variances are clamped to this one (a loss of 1e-7): a loss of 0 would otherwise lower them forever."""


class UncertaintyWeighting(CallRepr):
    r"""Computes weights from a learned log-variance :math:`s_k` per teacher, the same for every sample.

    .. math:: w_k = \frac{e^{-s_k}}{\sum_j e^{-s_j}}, \qquad J(s, L) = \sum_k e^{-s_k} L_k + s_k

    with :math:`L_k` the batch mean of teacher k's losses. Gradients through the weights would favor the easiest
    teacher, so the weights carry none; `s` is trained by J, which is `penalty(losses)`. An `Objective` adds J to its
    total each time it computes weights, with detached losses. So s is trained exactly as in Kendall's objective, whose
    minimum is :math:`e^{-s_k} = 1 / L_k`, and cannot diverge, because J is convex and grows in either direction. At the
    minimum the weights are inversely proportional to the losses. The student minimizes :math:`\sum_k w_k L_k`, which is
    Kendall's objective divided by :math:`\sum_j e^{-s_j}`, so the scales of terms stay comparable.

    In your own loop, `weighting.penalty(losses)` on losses with their graph is Kendall's whole objective, for the
    student too; no weights are needed then.

    A single teacher has weight 1. Equal losses have weight 1 / K from the start (s is initialized to 0). A useless
    teacher, whose loss stays large, gets a small weight, proportional to 1/L. A loss of 0 does not get all the weight:
    log-variances are clamped at -16, where J increases again. J is steep where a loss is far above :math:`e^{s_k}`: use
    an optimizer with bounded steps (Adam), clip gradients, or scale losses to about 1.

    Args:
        num_teachers: K, at least 1, the same in every call. Terms with fewer teachers need `weigh_by` in the objective.

    Examples:
        >>> import torch
        >>> weighting = UncertaintyWeighting(2)
        >>> losses = torch.tensor([[1.0, 3.0], [0.5, 0.5]])
        >>> weighting.penalty(losses).item()
        2.5
        >>> optimizer = torch.optim.Adam(weighting.parameters(), 0.05)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     weighting.penalty(losses).backward()
        ...     optimizer.step()
        >>> weighting(losses, student=torch.ones(2, 4), teachers=[], targets={})
        tensor([[0.2000, 0.2000],
                [0.8000, 0.8000]])

    References:
        Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics*,
        arXiv 1705.07115, weight tasks; here the teachers of a term are weighted, without their factor 1/2 for
        regression.
    """

    cross_layer: ClassVar[bool] = True

    def __init__(self, num_teachers: int) -> None:
        super().__init__()
        check_number("UncertaintyWeighting", "num_teachers", num_teachers, min=1, integer=True)
        self.num_teachers = num_teachers
        self.log_variances = nn.Parameter(torch.zeros(num_teachers))

    def forward(self, losses: Tensor, *, student: Side, teachers: Sequence[Side], targets: Targets) -> Tensor:
        """Return weights `(k, b)` for losses `(k, b)`, without gradient; the other arguments are ignored."""
        self._check(losses)
        with full_precision(losses):
            share = (-self.log_variances.detach().clamp(min=MIN_LOG_VARIANCE)).softmax(0)
            return share.to(losses).unsqueeze(1).expand_as(losses)

    def penalty(self, losses: Tensor) -> Tensor:
        """Return the scalar J of losses `(k, b)`, Kendall's objective; detached losses train s alone."""
        self._check(losses)
        with full_precision(losses):
            dtype = torch.promote_types(losses.dtype, torch.float32)
            s = self.log_variances.to(device=losses.device, dtype=dtype)
            clamped = s.clamp(min=MIN_LOG_VARIANCE)
            mean = losses.to(dtype).sum(1) / max(losses.shape[1], 1)
            # Below the minimum, where the clamp passes no gradient, the last term pulls s back.
            return ((-clamped).exp() * mean + clamped + (clamped - s).relu()).sum()

    def _check(self, losses: Tensor) -> None:
        check_teachers("UncertaintyWeighting", losses)
        check_shape("UncertaintyWeighting", "losses", losses, "k b", k=self.num_teachers)
