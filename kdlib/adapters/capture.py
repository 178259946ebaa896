"""One forward pass of a model that also returns the tensors at its taps."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib._held import hold, is_unchanged
from kdlib.adapters._checks import (
    check_calls,
    check_gradient,
    check_in_place,
    compiled_module,
    module_is_none,
    no_module,
)
from kdlib.adapters.tap import Tap, Taps, TapSpec, parse_taps, pick, taps_in

__all__ = ["HOOKING", "capture", "find_taps", "module_paths"]

# torch numbers hook handles without a lock; two hooks with the same number would overwrite each other.
HOOKING = threading.Lock()

# Attributes under which DDP and AveragedModel, torch.compile, FSDP and activation checkpointing hold the user's module.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def find_taps(owner: str, model: nn.Module, taps: Mapping[str, TapSpec]) -> dict[str, Tap | Mapping[str, Tap]]:
    """Convert the user's strings and taps to taps, and check that their modules exist in `model`."""
    check_type(owner, "model", model, nn.Module, "a Module")
    parsed = parse_taps(owner, taps)
    for tap in (*taps_in(parsed, training=True).values(), *taps_in(parsed, training=False).values()):
        if tap.path is not None:
            find_module(owner, model, tap.path)
    return parsed


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules below the model by the paths that taps use: without the wrappers that torch inserts."""
    inserted = tuple(name for name in _WRAPPERS if name[0] == "_")
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        steps = name.split(".")
        if name and steps[-1] not in inserted:
            found[".".join(step for step in steps if step not in inserted)] = module
    return found


def find_module(owner: str, model: nn.Module, path: str) -> nn.Module:
    """Return the module at `path`, ignoring the wrappers of DDP, FSDP, `torch.compile` and checkpointing."""
    module = model
    parts = path.split(".")
    # A path written down under DDP begins with "module." and must be valid without DDP too.
    while len(parts) > 1 and parts[0] in _WRAPPERS and parts[0] not in module._modules:
        parts = parts[1:]
    for part in parts:
        while part not in module._modules:
            inner = [name for name in _WRAPPERS if name in module._modules]
            if not inner:
                steps = [name.split(".") for name, _ in model.named_modules()]
                raise no_module(owner, path, [".".join(x for x in each if x not in _WRAPPERS) for each in steps])
            module = _child(owner, path, module, inner[0])
        module = _child(owner, path, module, part)
    if module._compiled_call_impl is not None:
        raise compiled_module(owner, path)
    return module


def _child(owner: str, path: str, module: nn.Module, name: str) -> nn.Module:
    if name == "_orig_mod" or module._compiled_call_impl is not None:
        raise compiled_module(owner, path)
    child = module._modules[name]
    if child is None:
        raise module_is_none(owner, path)
    return child


def capture(
    owner: str, model: nn.Module, every: Taps, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Run `model(*inputs, **named)` once and return the tensor of each tap of its mode, in the order of `every`.

    The hooks exist during the call only. They ignore other threads, so that several threads can run one model and the
    recomputation of a checkpointed block in the backward pass is not recorded.
    """
    compiling = torch.compiler.is_compiling()
    training = model.training
    taps = taps_in(every, training=training)
    thread = 0 if compiling else threading.get_ident()
    grad = torch.is_grad_enabled()
    calls: dict[str, int] = {tap.path: 0 for tap in taps.values() if tap.path is not None}
    tensors: dict[str, tuple[Tensor, int | None]] = {}
    without_gradient: list[str] = []

    def make_hook(path: str) -> "Callable[[nn.Module, Any, Any], None]":  # text: torch 2.6 does not trace it
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not compiling and threading.get_ident() != thread:
                return
            for name, tap in taps.items():
                if tap.path == path and (tap.call is None or tap.call == calls[path]):
                    if grad and not compiling and not torch.is_grad_enabled():
                        without_gradient.append(name)
                    tensors[name] = hold(pick(owner, name, tap, output, training=module.training))
            calls[path] += 1

        return hook

    modules = {path: find_module(owner, model, path) for path in calls}
    if compiling:
        output = _traced_call(model, inputs, named, [(module, make_hook(path)) for path, module in modules.items()])
    else:
        with HOOKING:
            handles = [module.register_forward_hook(make_hook(path)) for path, module in modules.items()]
        try:
            output = model(*inputs, **named)
        finally:
            for handle in handles:
                handle.remove()

    features = {}
    for name, tap in taps.items():
        if tap.path is None:
            features[name] = pick(owner, name, tap, output, training=training)
            continue
        check_calls(owner, name, tap.path, tap.call, calls[tap.path], training)
        tensor, version = tensors[name]
        if name in without_gradient:
            # The output of a reentrant checkpoint joins the graph after its tap has fired; tensors inside never do.
            frozen = not any(parameter.requires_grad for parameter in model.parameters())
            check_gradient(owner, name, tap.path, tensor.requires_grad or frozen)
        check_in_place(owner, name, tap.path, is_unchanged(tensor, version))
        features[name] = tensor
    return features


def _traced_call(
    model: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
    hooks: list[tuple[nn.Module, Callable[..., None]]],
) -> Any:
    # torch.compile cannot trace register_forward_hook, which counts its handles in a class attribute. It can trace a
    # replacement of the hook dictionaries; the originals are restored before the trace ends.
    before = []
    try:
        for key, (module, hook) in enumerate(hooks):
            before.append((module, module._forward_hooks))
            module._forward_hooks = OrderedDict(module._forward_hooks)
            module._forward_hooks[-1 - key] = hook
        return model(*inputs, **named)
    finally:
        for module, original in reversed(before):
            # The trace compares an empty dictionary by content and would restore a plain dict.
            module._forward_hooks = original if len(original) > 0 else OrderedDict()
