"""Exponential moving average of the student's weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdlib._averaging import average_into

__all__ = ["EMA"]


class EMA:
    """Exponential moving average of a module's weights and floating-point buffers.

    At step n (from 0), e <- d e + (1 - d) w with d = min(decay, (1 + n) / (10 + n)), so that the random initial values
    have little influence. Integer buffers are copied.

    Args:
        module: The module to average. Its tensors must not be replaced (load in place, no `.to()`).
        decay: From 0 (the weights themselves) to 1.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> ema = EMA(layer, decay=0.5)
        >>> _ = layer.weight.data.fill_(2.0)
        >>> ema.update(step=0)  # d = 1/10
        >>> start = ema.state_dict()["weight"]
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        live = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        self._average = {name: value.detach().clone() for name, value in live.items()}
        self._pairs = [(self._average[name], value) for name, value in live.items()]

    def update(self, *, step: int) -> None:
        """Update the averages after step `step`, counted from 0."""
        average_into(self._pairs, min(self.decay, (1 + step) / (10 + step)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the module's values and the averages within the block."""
        _exchange(self._pairs)
        try:
            yield
        finally:
            _exchange(reversed(self._pairs))  # in reverse order, because tied weights are exchanged several times

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under the names of the module's state dict."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the averages of a checkpoint."""
        for name, value in state.items():
            self._average[name].copy_(value)


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
