"""Losses: the energy of a feature map by place and by channel, without a copy of the map. Touches tensors only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._maths import rescale

__all__ = ["scaled_energy"]


def scaled_energy(features: Tensor, dtype: torch.dtype, *, channels: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squares of each sample after division by its largest magnitude, for losses that do not depend on scale.

    Args:
        features: `(b, c, h, w)`, of any floating-point dtype.
        dtype: of the arithmetic and of the result.
        channels: whether the means over places are wanted too.

    Returns:
        Means over the channels `(b, h, w)`; means over the places `(b, c)`, or `(b, 0)` if not wanted; the largest
        magnitudes `(b,)`, a constant to autograd.
    """
    if features.numel() and not torch.compiler.is_compiling():
        spatial, channel, largest = _ScaledEnergy.apply(features, dtype, channels)  # type: ignore[no-untyped-call]  # torch has no types here
        return spatial, channel, largest
    # A compiler fuses these steps by itself.
    return _plain(features, dtype, channels)


def _plain(features: Tensor, dtype: torch.dtype, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
    scaled, largest = rescale(features.to(dtype))
    squares = scaled.square()
    return squares.mean(1), squares.mean((2, 3)) if channels else squares.new_zeros(len(squares), 0), largest


def _parts(features: Tensor) -> int:
    """How many samples to take at a time: what fits a processor's cache, or an eighth of the batch elsewhere."""
    batch = features.shape[0]
    return max(1, 2**18 * batch // features.numel()) if features.device.type == "cpu" else -(-batch // 8)


class _ScaledEnergy(Function):
    r"""A few samples at a time, so that what is made on the way stays in the cache; keeps the features, which live anyway.

    With m the largest magnitude, a constant to autograd, the gradient of a mean of :math:`(F / m)^2` over n values is
    :math:`\frac{2}{n} \frac{F}{m} \frac{g}{m}`, taken in two factors: neither the square of m nor its inverse need be
    a number in float32.
    """

    @staticmethod
    def forward(features: Tensor, dtype: torch.dtype, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
        parts = [_plain(part, dtype, channels) for part in torch.split(features, _parts(features))]
        spatial, channel, largest = (torch.cat(each) for each in zip(*parts, strict=True))
        return spatial, channel, largest

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, torch.dtype, bool], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        features, _, ctx.channels = inputs
        largest = output[2]
        ctx.mark_non_differentiable(largest)
        ctx.save_for_backward(features, largest)

    @staticmethod
    def backward(ctx: Any, by_place: Tensor, by_channel: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        features, largest = ctx.saved_tensors
        divisor = torch.where(largest == 0, 1.0, largest).reshape(-1, 1, 1, 1)
        factor = by_place[:, None] * (2 / features.shape[1]) / divisor
        more = by_channel[:, :, None, None] * (2 / (features.shape[2] * features.shape[3])) / divisor
        if torch.is_grad_enabled():  # the gradient is to have a graph itself
            both = factor + more if ctx.channels else factor
            return (features / divisor * both).to(features.dtype), None, None
        gradient = torch.empty_like(features)
        split = zip(
            *(torch.split(x, _parts(features)) for x in (gradient, features, divisor, factor, more)), strict=True
        )
        for to, part, over, times, plus in split:
            both = times + plus if ctx.channels else times
            if part.dtype == both.dtype:
                torch.div(part, over, out=to).mul_(both)
            else:
                to.copy_((part / over).mul_(both))
        return gradient, None, None
