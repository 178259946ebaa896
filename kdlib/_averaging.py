"""Exponential running means of tensors, shared by the average of the student and by running-mean teachers."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["average_into"]


@torch.no_grad()
def average_into(pairs: Iterable[tuple[Tensor, Tensor]], decay: float) -> None:
    """Update running means in place: `mean <- decay * mean + (1 - decay) * value`.

    Whole numbers and bools, such as the number of batches that BatchNorm counts, are copied.

    Args:
        pairs: each running mean with its new value, of the same shape; a value may be of another dtype or on another
            device.
        decay: from 0 (the new values) to 1 (no change).
    """
    groups: dict[type[Tensor], tuple[list[Tensor], list[Tensor]]] = {}  # sharded and plain tensors do not mix
    for mean, value in pairs:
        if not (mean.is_floating_point() or mean.is_complex()):
            mean.copy_(value)
            continue
        means, values = groups.setdefault(type(mean.detach()), ([], []))
        means.append(mean)
        values.append(value.detach().to(mean.device, mean.dtype))
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for means, values in groups.values():  # one fused call for all tensors of a dtype and device
        average(means, values, None)
