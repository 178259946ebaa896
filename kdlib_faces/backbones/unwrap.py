"""Backbones room, private: the state dict inside a training checkpoint. Touches dicts only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Unwrapped", "unwrap"]

# Entries of a checkpoint that hold the network, in the order they are looked for.
WRAPPERS = (
    "state_dict",
    "state_dict_backbone",
    "net_state_dict",
    "model_state_dict",
    "backbone_state_dict",
    "model",
    "backbone",
    "net",
    "network",
)
# What wrapping modules put before each key: DistributedDataParallel, torch.compile, and projects' own containers.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "features.", "arcface.", "net.", "network.", "feat_net.")
# A margin head, saved beside a network that has a prefix.
HEADS = ("head.", "fc.", "parallel_fc.", "classifier.", "softmax_fc.", "margin.", "loss.", "criterion.")
DEEPEST = 4


@dataclass(frozen=True)
class Unwrapped:
    """A state dict without its wrapping.

    Attributes:
        state: keys to what the file has there.
        wrappers: entries that were opened, outermost first.
        around: entries that stood beside those.
        prefix: what stood before each key.
        beside: keys of a head that stood beside the network and were left out.
    """

    state: dict[str, Any]
    wrappers: tuple[str, ...]
    around: tuple[str, ...]
    prefix: str
    beside: tuple[str, ...]


def unwrap(content: Mapping[Any, Any]) -> Unwrapped:
    """Open the wrappers and strip the prefixes.

    A prefix goes only if every other key is one of a margin head, so that no part of a network is dropped unseen.

    Examples:
        >>> import torch
        >>> content = {"epoch": 3, "state_dict": {"model.conv1.weight": torch.ones(1), "head.kernel": torch.ones(2)}}
        >>> found = unwrap(content)
        >>> list(found.state), found.wrappers, found.prefix, found.beside
        (['conv1.weight'], ('state_dict',), 'model.', ('head.kernel',))
    """
    wrappers: list[str] = []
    around: list[str] = []
    while len(wrappers) < DEEPEST:
        name = next((key for key in WRAPPERS if _holds_tensors(content.get(key))), None)
        if name is None:
            break
        wrappers.append(name)
        around += [str(key) for key in content if key != name]
        content = content[name]
    state = {str(key): value for key, value in content.items()}
    prefix, beside = "", []
    for _ in range(DEEPEST):
        for candidate in PREFIXES:
            under = [key.removeprefix(candidate) for key in state if key.startswith(candidate)]
            rest = [key for key in state if not key.startswith(candidate)]
            if any(key[:1].isdigit() for key in under):
                continue  # a numbered part of the network itself, such as MobileNet's `features.0`
            if under and all(key.startswith(HEADS) for key in rest):
                state = {key.removeprefix(candidate): value for key, value in state.items() if key not in rest}
                prefix += candidate
                beside += rest
                break
        else:
            break
    return Unwrapped(state, tuple(wrappers), tuple(around), prefix, tuple(beside))


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping):
        return False
    if any(isinstance(each, Tensor) for each in value.values()):
        return True
    return depth < DEEPEST and any(_holds_tensors(value.get(key), depth + 1) for key in WRAPPERS)
