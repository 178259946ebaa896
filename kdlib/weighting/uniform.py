"""Equal weights for all teachers."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlib.types import Side, Targets
from kdlib.weighting._checks import check_teachers

__all__ = ["UniformWeighting"]


class UniformWeighting(nn.Module):
    """Assigns weight 1 / k to each of k teachers, for every sample.

    Examples:
        >>> import torch
        >>> UniformWeighting()(torch.rand(2, 3), student=torch.rand(3, 4), teachers=[], targets={})
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    cross_layer: ClassVar[bool] = True

    def forward(self, losses: Tensor, *, student: Side, teachers: Sequence[Side], targets: Targets) -> Tensor:
        """Return weights `(k, b)` for losses `(k, b)`; the other arguments are ignored."""
        check_teachers("UniformWeighting", losses)
        return torch.full_like(losses, 1 / max(losses.shape[0], 1))
