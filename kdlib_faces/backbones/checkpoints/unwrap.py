"""Extraction of the state dict from a training checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

__all__ = ["Unwrapped", "unwrap"]

# Entries of a checkpoint that may contain the network, in order of priority.
WRAPPERS = (
    "state_dict",
    "state_dict_backbone",
    "net_state_dict",
    "model_state_dict",
    "backbone_state_dict",
    "student_state_dict",
    "model",
    "backbone",
    "net",
    "network",
    "student",
    "encoder",
    "module",
    "distiller",
    "weights",
    "params",
    # Averaged weights are used only if there are no others.
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
    "ema_model",
    "ema",
)
# Prefixes of wrapping modules: DistributedDataParallel, torch.compile, `Distiller`, and containers of the projects.
PREFIXES = (
    "module.", "_orig_mod.", "student.", "backbone.", "model.", "encoder.", "features.", "arcface.", "net.", "network.",
    "feat_net.", "model_ema.", "ema_model.", "ema.", "_fsdp_wrapped_module.",
)  # fmt: skip
# Names that torch.compile, FSDP and activation checkpointing insert anywhere.
INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Prefixes of what is saved together with the network: a margin head, a teacher, an objective, another copy.
BESIDE = (
    "head.", "fc.", "parallel_fc.", "classifier.", "softmax_fc.", "margin.", "loss.", "criterion.", "teacher.",
    "teachers.", "objective.", "projection.", "projector.", "model_ema.", "ema_model.", "ema.", "n_averaged",
)  # fmt: skip
MAX_DEPTH = 8
MIN_TENSORS = 20  # of a network, whose first name is removed if all tensors share it


@dataclass(frozen=True)
class Unwrapped:
    """A state dict without its wrappers."""

    state: dict[str, object]
    wrappers: tuple[str, ...]  # unwrapped entries, outermost first
    around: tuple[str, ...]  # other entries of the wrappers
    prefix: str
    beside: tuple[str, ...]  # ignored keys


def unwrap(content: Mapping[object, object]) -> Unwrapped:
    """Remove wrappers and prefixes: the known ones, the only entry that holds tensors, and a name that all tensors share.

    A prefix is removed only if all other tensors belong to a margin head or to another network, so that no part of the
    network is dropped silently.

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
        holders = {key: each for key, each in content.items() if isinstance(key, str) and _holds_tensors(each)}
        name = next((key for key in WRAPPERS if key in holders), None)
        if name is None and len(holders) == 1 and not any(isinstance(value, Tensor) for value in content.values()):
            (name,) = holders
        if name is None:
            break
        wrappers.append(name)
        around += [str(key) for key in content if key != name]
        content = holders[name]
    state = {str(key): value for key, value in content.items()}
    prefix, beside = "", []
    for _ in range(MAX_DEPTH):
        tensors = {key for key, value in state.items() if isinstance(value, Tensor)}
        shared = {key.partition(".")[0] for key in tensors} if len(tensors) >= MIN_TENSORS else set()
        for candidate in (*PREFIXES, *(f"{each}." for each in shared if len(shared) == 1)):
            under = [key.removeprefix(candidate) for key in state if key.startswith(candidate)]
            rest = [key for key in state if not key.startswith(candidate)]
            if any(key[:1].isdigit() for key in under):
                continue  # a numbered part of the network itself, such as MobileNet's `features.0`
            if under and all(key.startswith(BESIDE) for key in rest if key in tensors):
                state = {key.removeprefix(candidate): value for key, value in state.items() if key not in rest}
                prefix += candidate
                beside += rest
                break
        else:
            break
    state = {INSERTED.sub("", key): value for key, value in state.items()}
    return Unwrapped(state, tuple(wrappers), tuple(around), prefix, tuple(beside))


def _holds_tensors(value: object) -> TypeGuard[Mapping[object, object]]:
    """Return whether a mapping, or one below it in a known entry, has a tensor; a hostile file may contain cycles."""
    seen, open_ = set[int](), list[object]([value])
    while open_:
        each = open_.pop()
        if isinstance(each, Mapping) and id(each) not in seen:
            if any(isinstance(entry, Tensor) for entry in each.values()):
                return True
            seen.add(id(each))
            open_ += [each.get(key) for key in WRAPPERS]
    return False
