"""Exponential moving average of the student's weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kdlib.training._checks import check_argument

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
        # One fused call per dtype and device avoids one kernel launch per tensor.
        self._floats: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        self._others: list[tuple[Tensor, Tensor]] = []
        for name, value in live.items():
            if value.is_floating_point():
                averages, weights = self._floats.setdefault((value.dtype, value.device), ([], []))
                averages.append(self._average[name])
                weights.append(value)
            else:
                self._others.append((self._average[name], value))

    @torch.no_grad()
    def update(self, *, step: int) -> None:
        """Update the averages after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for averages, weights in self._floats.values():
            average(averages, weights, None)
        for copy, value in self._others:
            copy.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under the names of the module's state dict."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the averages of a checkpoint."""
        different = sorted({*state} ^ {*self._average})
        check_argument(
            not different,
            f"the averages of a checkpoint must have the names of the student's state dict, got {different[:4]} in one of "
            "them only",
        )
        for name, value in state.items():
            self._average[name].copy_(value)
