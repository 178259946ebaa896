"""Last layers of a network in the precision of their weights."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_precision_of"]


def in_precision_of(weight: Tensor, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply layers without autocast, because a sum of 25,088 products is too inaccurate in half precision."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return layers(x)
    with torch.autocast(device, enabled=False):
        return layers(x.to(weight.dtype))
