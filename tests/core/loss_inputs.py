"""Inputs that the tests of losses share: noise and numerical edge cases."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_mode = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss: Callable[..., Tensor], student: Tensor, *rest: Tensor, **kwargs: Any) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **kwargs), leaf)[0]


def few_edge_cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Students and teachers `(4, 12)` in float64, to be converted to `dtype`."""
    s, t = noise(4, 12), noise(4, 12, seed=1)
    largest = min(1e30, torch.finfo(dtype).max / 4)
    return {
        "noise": (s, t),
        "zero student rows": (torch.cat([torch.zeros(2, 12), s[2:]]), t),
        "zero teacher rows": (s, torch.cat([torch.zeros(2, 12), t[2:]])),
        "all zero": (torch.zeros(4, 12), torch.zeros(4, 12)),
        "equal": (s, s.clone()),
        "opposite": (s, -s),
        "equal up to length": (s, 3 * s),
        "nearly equal": (s, s + 1e-3 * t),
        "dead units": (s.clamp(min=0) * (torch.arange(12) % 3 == 0), t.clamp(min=0)),
        "three hundred": (300 * s.sign(), 300 * t),
        "large": (largest * s / s.abs().max(), largest * t / t.abs().max()),
        "large and small": (largest * s / s.abs().max(), 1e-6 * t),
        "smallest": (torch.finfo(dtype).smallest_normal * s, t),
        "both smallest": (torch.finfo(dtype).smallest_normal * s, torch.finfo(dtype).smallest_normal * t),
        "offset of a thousand": (s + 1000, t + 1000),
        "difference of 120": (120 * torch.eye(4, 12), 120 * torch.eye(4, 12).flip(0)),
        "one row": (s[:1], t[:1]),
        "one row of zeros": (torch.zeros(1, 12), t[:1]),
        "constant": (torch.ones(4, 12), torch.ones(4, 12)),
    }


def many_edge_cases(width: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Students and teachers `(8, width)` in float64, to be converted to `dtype`."""
    s, t = noise(8, width), noise(8, width, seed=1)
    limits = torch.finfo(dtype)
    large = min(1e30, limits.max / 4)
    first = torch.arange(8).unsqueeze(1) == 0
    return {
        "noise": (s, t),
        "zero rows": (s * (torch.arange(8) > 3).unsqueeze(1), t * (torch.arange(8) > 1).unsqueeze(1)),
        "all zero": (0 * s, 0 * t),
        "student all equal": (torch.ones(8, width), t),
        "teacher all equal": (s, torch.ones(8, width)),
        "equal pairs": (s[[0, 0, 1, 1, 2, 2, 3, 3]], t),
        "equal pairs of both": (s[[0, 0, 1, 1, 2, 2, 3, 3]], t[[0, 0, 1, 1, 2, 2, 3, 3]]),
        "equal to the teacher": (s, s),
        "opposite": (s, -s),
        "three hundred": (300 * s.sign(), 300 * t.sign()),
        "large": (large * s / s.abs().max(), large * t / t.abs().max()),
        "at the end": (limits.max * s.sign(), limits.max * t.sign()),
        "at both ends": (limits.max * t.sign(), -limits.max * t.sign()),
        "smallest": (limits.smallest_normal * s, limits.smallest_normal * t),
        "one large row": (torch.where(first, large * s / s.abs().max(), s), t),
        "one tiny row": (torch.where(first, limits.smallest_normal * s, s), t),
        "offset of 1000": (s + 1000, t + 1000),
        "near": (s[[0, 0, 1, 1, 2, 2, 3, 3]] + limits.eps * t, t),
        "dead units": (s.clamp(min=0), t.clamp(min=0)),
        "one row": (s[:1], t[:1]),
        "negative zeros": (-0.0 * s, t),
    }
