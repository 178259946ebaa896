"""A trainable student model that returns named features."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdlib.adapters.capture import capture, find_taps
from kdlib.adapters.tap import TapSpec

__all__ = ["StudentAdapter"]


class StudentAdapter(nn.Module):
    """A model and its taps: a forward returns one tensor per tap.

    The model is not modified: it has no hooks outside of a forward, `adapter.model` is the object that was passed in,
    and paths are those of `model.named_modules()`, also when it is wrapped for DDP. To compile, compile the adapter or
    a module that contains it, not the model inside. Activation checkpointing may wrap the adapter or parts of the
    model; it must be non-reentrant (`use_reentrant=False`) around the adapter and around tapped modules. torch does not
    compile taps within a checkpointed block into one graph.

    Args:
        model: any module.
        taps: feature name to module path (`"layer3"`), to one part of its return value (`"encoder[0]"`), to one of
            several calls (`"block#1"` is the second), to a slice of a tensor (`"norm[:, 0]"`), or to the model's return
            value (`kdlib.OUTPUT`, `OUTPUT["logits"]`); see `Tap`. A mapping gives one tap per mode of the model, as
            `{"train": OUTPUT[0], "eval": OUTPUT}` for a model that returns a tuple in training only; a mode that is
            left out does not return the feature. `kdlib.list_taps` shows what can be tapped.

    Raises:
        ValueError: a path does not exist; the nearest ones are named.
        TypeError: `model` is not a Module, or `taps` does not map strings to taps.

    Examples:
        >>> import torch
        >>> from kdlib.adapters import OUTPUT
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
        >>> adapter = StudentAdapter(model, {"map": "1", "embedding": OUTPUT})
        >>> {name: tuple(x.shape) for name, x in adapter(torch.zeros(2, 3, 8, 8)).items()}
        {'map': (2, 8, 6, 6), 'embedding': (2, 4)}
    """

    def __init__(self, model: nn.Module, taps: Mapping[str, TapSpec]) -> None:
        super().__init__()
        self.taps = find_taps("StudentAdapter", model, taps)
        self.model = model

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Compute the features of one batch.

        Args:
            inputs: the inputs of the model.
            named: its keyword arguments.

        Returns:
            One tensor `(b, ...)` per tap of the mode of the model.

        Raises:
            ValueError: a tap did not fire, fired more than once without choosing a call, lies inside a reentrant
                activation checkpoint, or its tensor was changed in place by a later module.
        """
        return capture("StudentAdapter", self.model, self.taps, inputs, named)

    def extra_repr(self) -> str:
        return f"taps={self.taps}"
