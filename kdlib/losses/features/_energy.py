"""Energy of feature maps by position and by channel, computed without a copy of the map."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._maths import rescale, safe_divisor

__all__ = ["scaled_energy"]


def scaled_energy(features: Tensor, dtype: torch.dtype, *, channels: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean squares after division of each sample by its largest magnitude, for losses independent of scale.

    Args:
        features: `(b, c, h, w)`, of any floating-point dtype.
        dtype: of the arithmetic and of the result.
        channels: whether to compute the means over positions too.

    Returns:
        Means over the channels `(b, h, w)`; means over the positions `(b, c)`, or `(b, 0)` without `channels`; and the
        largest magnitudes `(b,)`, which are constants to autograd.
    """
    if features.numel() and not torch.compiler.is_compiling():
        spatial, channel, largest = _ScaledEnergy.apply(features, dtype, channels)  # type: ignore[no-untyped-call]  # torch has no types here
        return spatial, channel, largest
    # A compiler fuses these steps itself.
    return _plain(features, dtype, channels)


def _plain(features: Tensor, dtype: torch.dtype, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
    scaled, largest = rescale(features.to(dtype))
    squares = scaled.square()
    return squares.mean(1), squares.mean((2, 3)) if channels else squares.new_zeros(len(squares), 0), largest


def _chunk_size(features: Tensor) -> int:
    """Return the samples per chunk: as many as fit a processor's cache, or an eighth of the batch on other devices."""
    batch = features.shape[0]
    return max(1, 2**18 * batch // features.numel()) if features.device.type == "cpu" else -(-batch // 8)


class _ScaledEnergy(Function):
    r"""Works on a few samples at a time, so that intermediate results stay in the cache; saves only the features.

    With m the largest magnitude, a constant to autograd, the gradient of a mean of :math:`(F / m)^2` over n values is
    :math:`\frac{2}{n} \frac{F}{m} \frac{g}{m}`. The two factors avoid the square of m, which may overflow.
    """

    @staticmethod
    def forward(features: Tensor, dtype: torch.dtype, channels: bool) -> tuple[Tensor, Tensor, Tensor]:
        chunks = [_plain(chunk, dtype, channels) for chunk in torch.split(features, _chunk_size(features))]
        spatial, channel, largest = (torch.cat(each) for each in zip(*chunks, strict=True))
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
    def backward(ctx: Any, by_position: Tensor, by_channel: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        features, largest = ctx.saved_tensors
        divisor = safe_divisor(largest).reshape(-1, 1, 1, 1)
        spatial = by_position[:, None] * (2 / features.shape[1]) / divisor
        channel = by_channel[:, :, None, None] * (2 / (features.shape[2] * features.shape[3])) / divisor
        if torch.is_grad_enabled():  # with create_graph=True
            slope = spatial + channel if ctx.channels else spatial
            return (features / divisor * slope).to(features.dtype), None, None
        gradient = torch.empty_like(features)
        tensors = (gradient, features, divisor, spatial, channel)
        for out, f, m, s, c in zip(*(torch.split(x, _chunk_size(features)) for x in tensors), strict=True):
            slope = s + c if ctx.channels else s
            if f.dtype == slope.dtype:
                torch.div(f, m, out=out).mul_(slope)
            else:
                out.copy_((f / m).mul_(slope))
        return gradient, None, None
