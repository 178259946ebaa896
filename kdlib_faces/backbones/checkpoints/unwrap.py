"""Extraction of the state dict from a training checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Unwrapped", "unwrap"]

# Entries of a checkpoint that may contain the network, in order of priority.
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
# Prefixes of wrapping modules: DistributedDataParallel, torch.compile, and containers of the projects.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "features.", "arcface.", "net.", "network.", "feat_net.")
# Prefixes of a margin head that is saved together with the network.
HEADS = ("head.", "fc.", "parallel_fc.", "classifier.", "softmax_fc.", "margin.", "loss.", "criterion.")
MAX_DEPTH = 4


@dataclass(frozen=True)
class Unwrapped:
    """A state dict without its wrappers."""

    state: dict[str, Any]
    wrappers: tuple[str, ...]  # unwrapped entries, outermost first
    around: tuple[str, ...]  # other entries of the wrappers
    prefix: str
    beside: tuple[str, ...]  # ignored keys of a head


def unwrap(content: Mapping[Any, Any]) -> Unwrapped:
    """Remove wrappers and prefixes.

    A prefix is removed only if all other keys belong to a margin head, so that no part of a network is dropped
    silently.

    Examples:
        >>> import torch
        >>> content = {"epoch": 3, "state_dict": {"model.conv1.weight": torch.ones(1), "head.kernel": torch.ones(2)}}
        >>> result = unwrap(content)
        >>> list(result.state), result.wrappers, result.prefix, result.beside
        (['conv1.weight'], ('state_dict',), 'model.', ('head.kernel',))
    """
    wrappers: list[str] = []
    around: list[str] = []
    while len(wrappers) < MAX_DEPTH:
        name = next((key for key in WRAPPERS if _holds_tensors(content.get(key))), None)
        if name is None:
            break
        wrappers.append(name)
        around += [str(key) for key in content if key != name]
        content = content[name]
    state = {str(key): value for key, value in content.items()}
    prefix, beside = "", []
    for _ in range(MAX_DEPTH):
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


def _holds_tensors(value: object, depth: int = 0) -> bool:
    if not isinstance(value, Mapping):
        return False
    if any(isinstance(each, Tensor) for each in value.values()):
        return True
    return depth < MAX_DEPTH and any(_holds_tensors(value.get(key), depth + 1) for key in WRAPPERS)
