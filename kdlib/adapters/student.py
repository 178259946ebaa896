"""Stage 1: the student as named features. Holds the user's model as it is and trains it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib.adapters._checks import within_reentrant
from kdlib.adapters.capture import capture, find_module, reentrant_checkpoint
from kdlib.adapters.tap import Tap, parse_taps

__all__ = ["StudentAdapter"]


class StudentAdapter(nn.Module):
    """A model and its taps: a forward returns one tensor a tap.

    The model stays the user's own: no hook is on it outside of a forward, `adapter.model` is the very object given, and
    its paths are those of `model.named_modules()`, also when it is wrapped for DDP. To compile, compile the adapter or
    what holds it, not the model inside. Activation checkpointing may go around the adapter or be inside of the model;
    within a checkpointed block, and around the adapter, it must be the kind without reentry. torch does not compile taps
    within a checkpointed block into one graph.

    Args:
        model: any module.
        taps: feature name to module path (`"layer3"`), to one part of what it returns (`"encoder[0]"`), to one of
            several calls (`"block#1"` is the second), or to the model's return value (`kdlib.OUTPUT`,
            `OUTPUT["logits"]`).

    Raises:
        ValueError: a path does not exist; the nearest ones are named.

    Examples:
        >>> import torch
        >>> from kdlib.adapters import OUTPUT
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
        >>> adapter = StudentAdapter(model, {"map": "1", "embedding": OUTPUT})
        >>> {name: tuple(x.shape) for name, x in adapter(torch.zeros(2, 3, 8, 8)).items()}
        {'map': (2, 8, 6, 6), 'embedding': (2, 4)}
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, str | Tap]) -> None:
        super().__init__()
        check_type("StudentAdapter", "model", model, nn.Module, "a Module")
        self.taps = parse_taps("StudentAdapter", taps)
        for tap in self.taps.values():
            if tap.path is not None:
                find_module("StudentAdapter", model, tap.path)
        self.model = model

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Features of one batch.

        Args:
            inputs: what the model takes.

        Returns:
            One tensor `(b, ...)` a tap.

        Raises:
            ValueError: a tap did not fire, fired more than once without saying which call, lies inside a reentrant
                activation checkpoint, or had its tensor changed in place by what follows it.
        """
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            running = reentrant_checkpoint()
            if getattr(running, "__self__", running) is self:
                raise within_reentrant()
        return capture("StudentAdapter", self.model, self.taps, inputs)

    def extra_repr(self) -> str:
        return f"taps={self.taps}"
