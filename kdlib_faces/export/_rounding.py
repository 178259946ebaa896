"""Rounding of weights to int8 by the inputs that they are multiplied with."""

import torch
from torch import Tensor

__all__ = ["round_weights"]

LEVELS = 127
DAMPING = 1e-2
"""Part of the mean second moment that is added to each: inputs that never vary leave the moments singular."""
MAX_INPUTS = 2048
"""A product with more inputs for each output is rounded to the nearest: its second moments would be too large."""


def round_weights(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Round weights so that the variance of the error of the outputs is small.

    The weights of an output are rounded one after the other, and the error of each is passed on to those that follow, in
    proportion to the inverse second moments `H` of the inputs: `w_j -= (w_i - q_i) [H^-1]_ij / [H^-1]_ii`, with `H` reduced to
    the weights that are not rounded yet.

    Args:
        weight: `(g, o, k)`: `o` outputs and `k` inputs in each of `g` groups.
        inputs: `(g, k, n)`: samples of the inputs.

    Returns:
        The int8 weights `(g, o, k)`, and the step of each output `(g, o)`.

    References:
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.
    """
    left = weight.to(torch.float64, copy=True)
    steps = left.abs().amax(2).clamp_min(1e-12) / LEVELS
    rounded = torch.empty_like(left)
    if left.shape[2] > MAX_INPUTS:
        rounded = (left / steps[..., None]).round()
    else:
        centered = inputs.double() - inputs.double().mean(2, keepdim=True)
        moments = centered @ centered.mT / max(1, centered.shape[2])
        mean = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        moments += DAMPING * mean[:, None, None] * torch.eye(left.shape[2], dtype=left.dtype)
        # Row i of the factor is row i of the inverse of the moments of the inputs from i on, over the root of its first entry.
        factor = torch.linalg.cholesky(torch.linalg.inv(moments)).mT
        for at in range(left.shape[2]):
            rounded[..., at] = (left[..., at] / steps).round().clamp(-LEVELS, LEVELS)
            error = (left[..., at] - steps * rounded[..., at]) / factor[:, at, at, None]
            left[..., at:] -= error[..., None] * factor[:, None, at, at:]
    return rounded.clamp(-LEVELS, LEVELS).to(torch.int8), steps.float()
