"""Random numbers that are a function of a seed and a counter."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["normal_numbers", "process_rank"]

BITS = 2**32 - 1


def normal_numbers(count: int, counter: Tensor, seed: int) -> Tensor:
    """Return `(count,)` independent standard normal numbers in float32.

    They depend on `seed` and on `counter`, a scalar tensor of int64, alone, and are the same on every device up to
    rounding. Unlike a `torch.Generator`, a counter is part of a state dict, is copied with its module, is compiled
    without a graph break, and needs no synchronization with the host.
    """
    rows = torch.arange(count, device=counter.device)
    key = _mix(_mix(counter & BITS) ^ _mix_number(seed))
    bits = _mix((_mix(rows ^ key) + key) & BITS)
    uniform = ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23  # never 0 or 1
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def process_rank() -> int:
    """Return the rank of this process, 0 without distributed training."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _mix(x: Tensor) -> Tensor:
    """Map integers below 2^32 to others one to one, such that each bit of the result depends on all bits.

    The second multiplier of the hash is given minus 2^32, so that products fit into int64; the low 32 bits are the same.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & BITS
    x = ((x ^ (x >> 15)) * (0xD35A2D97 - 2**32)) & BITS
    return x ^ (x >> 15)


def _mix_number(x: int) -> int:
    return (x * 0x9E3779B1 ^ (x >> 32) * 0x85EBCA6B) & BITS
