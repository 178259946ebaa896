"""Weighting: learn one uncertainty for each teacher. Touches the losses only.

Kendall, Gal and Cipolla, 2018: a loss that stays large is one to be less sure of, and so weighs less.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, check_shape
from kdlib._maths import full_precision
from kdlib.weighting._checks import check_teachers

__all__ = ["UncertaintyWeighting"]

LEAST = -16.0
"""The smallest log-variance that counts, that of a loss of 1e-7: below, a loss of 0 would draw it on for ever."""


class UncertaintyWeighting(nn.Module):
    r"""Weights from a learned log-variance :math:`s_k` for each teacher, the same for every sample.

    .. math:: w_k = \frac{e^{-s_k}}{\sum_j e^{-s_j}}, \qquad J(s, L) = \sum_k e^{-s_k} L_k + s_k

    with :math:`L_k` the batch mean of teacher k's losses. The weights alone would drive s to the teacher that is
    easiest to follow, so they carry no gradient; `s` learns from J, which is `penalty(losses)`. An `Objective` adds it
    to its total with the losses cut from the graph, once for each time that it asks for weights. So s moves exactly as
    in Kendall's objective, whose minimum is :math:`e^{-s_k} = 1 / L_k`, and cannot run away: J is convex and grows in
    either direction. At the minimum the weights are inverse to the losses. The student follows
    :math:`\sum_k w_k L_k`, Kendall's gradient divided by :math:`\sum_j e^{-s_j}`: the sizes of terms still compare.

    In a loop of one's own, `weighting.penalty(losses)` on losses with their graph is Kendall's whole objective, for the
    student too; then no weights are needed.

    One teacher weighs 1. Equal losses weigh 1 / K from the start on (s begins at 0). A useless teacher, whose loss
    stays large, weighs little: 1/L against the others. A loss of 0 does not take everything: log-variances count
    from -16 upwards, where J turns back. J is steep where a loss is far above :math:`e^{s_k}`: use an optimizer that
    bounds its steps (Adam), clip gradients, or scale losses to about 1.

    Args:
        num_teachers: K, at least 1; every call must have as many. Terms with fewer need an objective's `weigh_by`.

    Raises:
        ValueError: `num_teachers` below 1.

    Examples:
        >>> import torch
        >>> weighting = UncertaintyWeighting(2)
        >>> weighting
        UncertaintyWeighting(num_teachers=2)
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
        arXiv 1705.07115, weigh tasks so; here the teachers of a term, and without their factor 1/2 of a regression.
    """

    def __init__(self, num_teachers: int) -> None:
        super().__init__()
        check_number("UncertaintyWeighting", "num_teachers", num_teachers, min=1, integer=True)
        self.num_teachers = num_teachers
        self.log_variances = nn.Parameter(torch.zeros(num_teachers))

    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`, without a gradient; nothing else is looked at."""
        self._check(losses)
        with full_precision(losses):
            share = (-self.log_variances.detach().clamp(min=LEAST)).softmax(0)
            return share.to(losses).unsqueeze(1).expand_as(losses)

    def penalty(self, losses: Tensor) -> Tensor:
        """The scalar J of these losses `(k, b)`, Kendall's objective; losses without a graph train s alone."""
        self._check(losses)
        with full_precision(losses):
            dtype = torch.promote_types(losses.dtype, torch.float32)
            s = self.log_variances.to(device=losses.device, dtype=dtype)
            held = s.clamp(min=LEAST)
            mean = losses.to(dtype).sum(1) / max(losses.shape[1], 1)
            # Below the least, where `held` passes no gradient, the distance to it leads back.
            return ((-held).exp() * mean + held + (held - s).relu()).sum()

    def _check(self, losses: Tensor) -> None:
        check_teachers("UncertaintyWeighting", losses)
        check_shape("UncertaintyWeighting", "losses", losses, "k b", k=self.num_teachers)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the weighting."""
        return f"num_teachers={self.num_teachers}"
