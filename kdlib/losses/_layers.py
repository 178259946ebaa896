"""Layers of losses with learned parts, applied in the dtype of their input and without masked samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from kdlib._checks import readable
from kdlib._maths import FAR, finite_weight

__all__ = [
    "affine",
    "channels_last",
    "convolve",
    "kept",
    "limit",
    "mean_square_error",
    "normalize",
    "pool_to_smaller",
    "promote_layers",
]


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a square convolution with stride 1 whose output has the grid of its input."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.conv2d(x, layer.weight.to(x.dtype), bias, padding=layer.kernel_size[0] // 2)


def channels_last(x: Tensor) -> Tensor:
    """Return maps `(b, c, h, w)` in the memory format in which a CPU runs chains of 1x1 convolutions and norms fastest."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not readable(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def kept(weight: Tensor | None) -> Tensor | None:
    """Return which samples take part, `(b,)`, or None for all."""
    return None if weight is None else finite_weight(weight) != 0


def normalize(norm: nn.BatchNorm2d, x: Tensor, keep: Tensor | None) -> Tensor:
    """Apply BatchNorm to `(b, c, h, w)`; samples outside of `keep` take no part in its statistics.

    Unlike `torch.nn.BatchNorm2d`, it accepts parameters of another dtype than that of `x`, an empty batch and a single
    value per channel, which becomes the bias.
    """
    if keep is None and norm.weight.dtype == x.dtype and x.numel() > x.shape[1]:
        normalized: Tensor = norm(x)
        return normalized
    if norm.training or norm.running_mean is None or norm.running_var is None:
        part = torch.ones_like(x[:, :1, :1, :1]) if keep is None else keep.to(x.dtype).reshape(-1, 1, 1, 1)
        count = part.sum() * (x.shape[2] * x.shape[3])
        divisor = count.clamp(min=1)
        mean = (part * x).sum((0, 2, 3)) / divisor
        centered = x - mean[:, None, None]
        variance = (part * centered).square().sum((0, 2, 3)) / divisor
        _update(norm, mean, variance, count)
    else:
        mean, variance = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
        centered = x - mean[:, None, None]
    scale = norm.weight.to(x.dtype) * (variance + norm.eps).rsqrt()
    return centered * scale[:, None, None] + norm.bias.to(x.dtype)[:, None, None]


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Update the running statistics as `torch.nn.BatchNorm2d` does; without samples they stay."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    unbiased = variance * (count / (count - 1).clamp(min=1))
    norm.num_batches_tracked.add_((count > 0).to(norm.num_batches_tracked.dtype))
    momentum = 1 / norm.num_batches_tracked.clamp(min=1) if norm.momentum is None else norm.momentum
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        new = running + momentum * (value.to(running.dtype) - running)
        running.copy_(torch.where(count > 0, new, running))


def limit(x: Tensor, origin: torch.dtype, *, fresh: bool = False) -> Tensor:
    """Clamp to plus and minus `FAR`, because sums of larger values could overflow; the gradient passes unchanged.

    `fresh` states that nothing else reads `x`. If the user passed float16, the gradient is clamped to its numbers: convolutions may enlarge it on its way.
    """
    if not x.requires_grad:
        return x.clamp(-FAR, FAR)
    limited = _clamped(x if fresh else x.clone())
    if origin == torch.float16 and limited.requires_grad:
        limited.register_hook(_clamp_to_half)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return limited


def _clamped(x: Tensor) -> Tensor:
    """Clamp a tensor that nothing else reads to plus and minus `FAR`."""
    if not readable(x):  # a compiler fuses it, and torch.func.vmap has no rule for the other way
        return x.clamp(-FAR, FAR)
    with torch.no_grad():  # in place and without a gradient of its own, which saves three passes over the values
        x.clamp_(-FAR, FAR)
    return x


def _clamp_to_half(gradient: Tensor) -> Tensor:
    end = torch.finfo(torch.float16).max
    return gradient.clamp(-end, end)


def mean_square_error(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean square of the difference of each sample, `(b, ...)` to `(b,)`; 0 for samples without values.

    Differences above `FAR` count as `FAR`, with the gradient of `FAR`.
    """
    difference = _clamped(x - y).flatten(1)
    return _squares(difference) / max(difference.shape[1], 1)


def _squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each row, `(b, n)` to `(b,)`."""
    if torch.compiler.is_compiling():  # it fuses the steps itself
        squares: Tensor = torch.linalg.vecdot(x, x)
        return squares
    squares = _Squares.apply(x)  # type: ignore[no-untyped-call]  # torch has no types here
    return squares


class _Squares(Function):
    """`_squares` with a gradient that takes one pass over the values instead of three.

    The backward pass consists of differentiable operations, so second derivatives and `torch.func.vmap` work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        squares: Tensor = torch.linalg.vecdot(x, x)
        return squares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = x * (2 * slope).unsqueeze(1)
        return gradient


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps `(b, c, h, w)` of values up to `FAR` to the smaller height and the smaller width."""
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))

    def pool(x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) == grid:
            return x
        down, across = (max(1, n // m) for n, m in zip(x.shape[2:], grid, strict=True))
        if tuple(x.shape[2:]) == (down * grid[0], across * grid[1]):  # the same cells, with a faster gradient
            return F.avg_pool2d(x, (down, across))
        return F.adaptive_avg_pool2d(x, grid)

    return pool(student), pool(teacher)


def promote_layers(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Convert both sides to maps `(b, c, h, w)` of one dtype with values up to `FAR`, and detach the teacher's."""
    dtype = torch.float32
    for x in (*students, *teachers):
        dtype = torch.promote_types(dtype, x.dtype)

    def convert(x: Tensor) -> Tensor:
        maps = x[:, :, None, None] if x.dim() == 2 else x
        return limit(maps.to(dtype), x.dtype)

    return [convert(x) for x in students], [convert(x.detach()) for x in teachers]
