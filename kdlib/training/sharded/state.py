"""Separation of the sharded tensors of a nested state from all other values."""

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from kdlib._gather import is_sharded
from kdlib.training.sharded.files import Key, Keys

__all__ = ["insert", "not_finite", "separate"]

_K = TypeVar("_K", bound=Key)


def separate(state: Mapping[_K, object], place: Keys = ()) -> tuple[dict[_K, object], dict[Keys, Tensor]]:
    """Return a nested state without its sharded tensors, and these by their keys."""
    plain: dict[_K, object] = {}
    sharded: dict[Keys, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and is_sharded(value):
            sharded[*place, key] = value
        elif isinstance(value, dict):
            plain[key], more = separate(value, (*place, key))
            sharded |= more
        else:
            plain[key] = value
    return plain, sharded


def insert(state: Mapping[_K, object], tensors: Mapping[Keys, Tensor]) -> dict[_K, object]:
    """Return a copy of a nested state with tensors at their keys."""
    whole = {key: insert(value, {}) if isinstance(value, dict) else value for key, value in state.items()}
    for place, tensor in tensors.items():
        at = cast(dict[Key, object], whole)
        for key in place[:-1]:
            at = cast(dict[Key, object], at.setdefault(key, {}))
        at[place[-1]] = tensor
    return whole


def not_finite(weights: Mapping[str, object]) -> list[str]:
    """Return the names of tensors with a NaN or infinite value."""
    return [name for name, x in weights.items() if isinstance(x, Tensor) and not torch.isfinite(x).all()]
