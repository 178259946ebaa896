"""Backbones room, private: the last layers in the precision of their weights. Touches tensors only."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_precision_of"]


def in_precision_of(weight: Tensor, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`layers(x)`, outside autocast: a sum over a whole grid of 25,088 products loses too much in half precision."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return layers(x)
    with torch.autocast(device, enabled=False):
        return layers(x.to(weight.dtype))
