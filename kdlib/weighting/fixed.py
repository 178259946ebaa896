"""Constant weights chosen by the user."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kdlib._checks import check_shape, check_shares
from kdlib._repr import CallRepr
from kdlib.types import Side, Targets
from kdlib.weighting._checks import check_teachers

__all__ = ["FixedWeighting"]


class FixedWeighting(CallRepr):
    """Assigns weight `weights[k] / sum(weights)` to teacher k, for every sample.

    Args:
        weights: one number >= 0 per teacher, in the order of the teachers; at least one must be above 0.

    Raises:
        ValueError: no weight, a negative weight, or all weights 0.
        TypeError: `weights` is not a sequence of finite numbers.

    Examples:
        >>> import torch
        >>> weighting = FixedWeighting([3, 1])
        >>> weighting(torch.rand(2, 2), student=torch.rand(2, 4), teachers=[], targets={})
        tensor([[0.7500, 0.7500],
                [0.2500, 0.2500]])
    """

    cross_layer: ClassVar[bool] = True

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = check_shares("FixedWeighting", "weights", weights)

    def forward(self, losses: Tensor, *, student: Side, teachers: Sequence[Side], targets: Targets) -> Tensor:
        """Return weights `(k, b)` for losses `(k, b)`; the other arguments are ignored."""
        check_teachers("FixedWeighting", losses)
        check_shape("FixedWeighting", "losses", losses, "k b", k=len(self.weights))
        shares = torch.tensor(self.weights, dtype=torch.float64) / sum(self.weights)
        return shares.to(losses).unsqueeze(1).expand_as(losses)
