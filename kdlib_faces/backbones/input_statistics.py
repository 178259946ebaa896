"""Mean and variance of the inputs of layers, by channel."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdlib._modes import eval_mode

__all__ = ["input_statistics"]

M = TypeVar("M", bound=nn.Module)


def input_statistics(
    network: nn.Module, layers: Sequence[M], batches: Iterable[Tensor]
) -> dict[M, tuple[Tensor, Tensor]]:
    """Measure the mean and the variance of the inputs of layers, by channel, with the network in eval mode.

    Args:
        network: The network; not changed.
        layers: Modules of the network whose input is `(b, c, ...)`.
        batches: Inputs of the network.

    Returns:
        Each layer that the network calls to its mean and variance `(c,)`, float64, over the samples and positions of all
        batches and calls.
    """
    sums: dict[M, tuple[int, Tensor, Tensor]] = {}

    def add(layer: M, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        count, total, squares = sums.get(layer, (0, 0, 0))
        sums[layer] = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)

    hooks = [layer.register_forward_pre_hook(partial(add, layer)) for layer in layers]
    try:
        with eval_mode(network), torch.no_grad():
            for batch in batches:
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for layer, (count, total, squares) in sums.items():
        mean = total / count
        found[layer] = mean, (squares / count - mean.square()).clamp(min=0)
    return found
