"""Weighting: shares that the user sets. Touches the shape of the losses only."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib._checks import check_shape, check_shares
from kdlib.weighting._checks import check_teachers

__all__ = ["FixedWeighting"]


class FixedWeighting(nn.Module):
    """Teacher k weighs `weights[k] / sum(weights)` for every sample.

    Args:
        weights: one number of at least 0 for each teacher, in the order of the teachers; not all 0.

    Raises:
        ValueError: no weight, one below 0, or all 0.
        TypeError: not a sequence of finite numbers.

    Examples:
        >>> import torch
        >>> weighting = FixedWeighting([3, 1])
        >>> weighting
        FixedWeighting(weights=(3, 1))
        >>> weighting(torch.rand(2, 2), student=torch.rand(2, 4), teachers=[], targets={})
        tensor([[0.7500, 0.7500],
                [0.2500, 0.2500]])
    """

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        check_shares("FixedWeighting", "weights", weights)
        self.weights = tuple(weights)

    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`; nothing else is looked at."""
        check_teachers("FixedWeighting", losses)
        check_shape("FixedWeighting", "losses", losses, "k b", k=len(self.weights))
        shares = torch.tensor(self.weights, dtype=torch.float64) / sum(self.weights)
        return shares.to(losses).unsqueeze(1).expand_as(losses)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the weighting."""
        return f"weights={self.weights}"
