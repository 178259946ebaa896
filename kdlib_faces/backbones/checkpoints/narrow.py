"""Backbones that are narrower than their arguments say, as `kdlib.compression.shrink` makes them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib.compression import narrow_like
from kdlib_faces.backbones.networks.base import Backbone
from kdlib_faces.backbones.registry import build_backbone

__all__ = ["narrow_backbone", "removed_modules"]


def removed_modules(model: Backbone) -> list[str] | None:
    """Return the paths of modules that became the identity, or None for a network of the full size."""
    with torch.device("meta"):
        full = build_backbone(model.family, **model.arguments)
        state = model.state_dict()
        shapes, wanted = ({key: x.shape for key, x in each.items()} for each in (state, full.state_dict()))
        return None if shapes == wanted else _identities(narrow_like(full, state), full)


def narrow_backbone(full: Backbone, state: Mapping[str, object], removed: object) -> Backbone:
    """Return the narrow network of a file.

    Args:
        full: the network of the file's arguments, on the meta device.
        state: entries of the file.
        removed: paths of modules that are the identity in it.

    Raises:
        ValueError: the entries belong to no narrower version of the network.
    """
    if not isinstance(removed, Sequence) or not all(isinstance(path, str) for path in removed):
        raise ValueError("'removed' must be a list of module paths")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    model = narrow_like(full, tensors)
    missing = sorted(set(_identities(model, full)) ^ set(removed))
    if missing:
        raise ValueError(f"entries of {missing[0]} are missing")
    return model


def _identities(model: nn.Module, full: nn.Module) -> list[str]:
    kinds = dict(full.named_modules())
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Identity) and not isinstance(kinds[path], nn.Identity)
    ]
