"""Standardization of logits over the classes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Standardized", "standardized"]


class Standardized(NamedTuple):
    """Standard scores of logits `(n, c, ...)`, and a function that converts their gradient to that of the logits."""

    scores: Tensor
    pull: Callable[[Tensor], Tensor]


def standardized(logits: Tensor, shortest: float) -> Standardized:
    r"""Return :math:`(z - \bar z) / \sigma` over the classes, with the standard deviation of the population.

    Rows of equal logits become zero. Rows with a deviation below `shortest` get no gradient, because it grows as
    :math:`1 / \sigma`.
    """
    # Subtracted before the mean, the largest logit keeps small deviations exact; halves cannot overflow.
    half = logits / 2
    below = half - half.detach().amax(1, keepdim=True)
    depth = -below.detach().amin(1, keepdim=True)
    flat = depth == 0
    scaled = below / torch.where(flat, 1.0, depth)
    apart = scaled - scaled.mean(1, keepdim=True)
    spread = torch.where(flat, 1.0, apart.square().mean(1, keepdim=True)).sqrt()
    scores = apart / spread
    deviation = 2 * depth * spread
    steep = deviation < shortest
    inverse = torch.where(steep, 0.0, 1 / deviation.clamp(min=shortest))

    def pull(gradient: Tensor) -> Tensor:
        along = (gradient * scores).mean(1, keepdim=True)
        return (gradient - gradient.mean(1, keepdim=True) - along * scores) * inverse

    if logits.requires_grad and torch.is_grad_enabled():
        return Standardized(torch.where(steep, scores.detach(), scores), pull)
    return Standardized(scores, pull)
