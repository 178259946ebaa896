"""Weighting: every teacher the same. Touches the shape of the losses only."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib.weighting._checks import check_teachers

__all__ = ["UniformWeighting"]


class UniformWeighting(nn.Module):
    """Each of k teachers weighs 1 / k for every sample.

    Examples:
        >>> import torch
        >>> UniformWeighting()(torch.rand(2, 3), student=torch.rand(3, 4), teachers=[], targets={})
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`; nothing else is looked at."""
        check_teachers("UniformWeighting", losses)
        return torch.full_like(losses, 1 / max(losses.shape[0], 1), requires_grad=False)
