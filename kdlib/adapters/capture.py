"""Stage 1, the mechanism: one forward of a model with its taps read. Hooks the model for that one forward alone."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from kdlib.adapters._checks import check_calls, check_gradient, check_in_place, compiled, no_module, not_there
from kdlib.adapters.tap import Tap, pick

__all__ = ["capture", "find_module", "reentrant_checkpoint"]

# torch counts the handles of hooks without a lock, and two hooks of one number would be one hook.
_HOOKING = threading.Lock()

# Where DDP and AveragedModel, torch.compile, FSDP and activation checkpointing hold the user's module.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def find_module(owner: str, model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, seen through the wrappers of DDP, FSDP, `torch.compile` and checkpointing.

    Raises:
        ValueError: there is none (the nearest are named), or it lies inside a compiled module, where taps do not fire.
    """
    module = model
    parts = path.split(".")
    # A path noted down under DDP begins with "module." and must serve without DDP too.
    while len(parts) > 1 and parts[0] in _WRAPPERS and parts[0] not in module._modules:
        parts = parts[1:]
    for part in parts:
        while part not in module._modules:
            inner = [name for name in _WRAPPERS if name in module._modules]
            if not inner:
                known = [_unwrapped(name) for name, _ in model.named_modules()]
                raise no_module(owner, path, known)
            module = _enter(owner, path, module, inner[0])
        module = _enter(owner, path, module, part)
    if module._compiled_call_impl is not None:
        raise compiled(owner, path)
    return module


def _enter(owner: str, path: str, module: nn.Module, name: str) -> nn.Module:
    if name == "_orig_mod" or module._compiled_call_impl is not None:
        raise compiled(owner, path)
    child = module._modules[name]
    if child is None:
        raise not_there(owner, path)
    return child


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def capture(owner: str, model: nn.Module, taps: Mapping[str, Tap], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Run `model(*inputs)` once and read every tap.

    The hooks live as long as the call. They answer only to the thread that made the call, so that several threads may
    run one model, and so that the recomputation of a checkpointed block in the backward pass passes unseen.

    Returns:
        One tensor a tap, in the order of `taps`.

    Raises:
        ValueError: a tap did not fire, fired more than once without saying which call, fired where gradients were
            switched off, so that none could pass, or had its tensor changed in place after it.
    """
    compiling = torch.compiler.is_compiling()
    thread = 0 if compiling else threading.get_ident()
    grad = torch.is_grad_enabled()
    calls: dict[str, int] = {tap.path: 0 for tap in taps.values() if tap.path is not None}
    found: dict[str, tuple[Tensor, int]] = {}
    without_gradient: list[str] = []

    def make_hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not compiling and threading.get_ident() != thread:
                return
            for name, tap in taps.items():
                if tap.path == path and (tap.call is None or tap.call == calls[path]):
                    if not compiling and grad and not torch.is_grad_enabled():
                        trained = any(parameter.requires_grad for parameter in module.parameters())
                        if trained or reentrant_checkpoint() is not None:
                            without_gradient.append(name)
                    tensor = pick(owner, name, tap, output)
                    found[name] = (tensor, _version(tensor, compiling))
            calls[path] += 1

        return hook

    modules = {path: find_module(owner, model, path) for path in calls}
    if compiling:
        output = _traced_call(model, inputs, [(module, make_hook(path)) for path, module in modules.items()])
    else:
        with _HOOKING:
            handles = [module.register_forward_hook(make_hook(path)) for path, module in modules.items()]
        try:
            output = model(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    features = {}
    for name, tap in taps.items():
        if tap.path is None:
            features[name] = pick(owner, name, tap, output)
            continue
        check_calls(owner, name, tap, calls[tap.path])
        tensor, version = found[name]
        # What a reentrant checkpoint returns is put on the graph after the tap; what is inside of it never is.
        check_gradient(owner, name, tap, name not in without_gradient or tensor.requires_grad)
        check_in_place(owner, name, tap, _version(tensor, compiling) == version)
        features[name] = tensor
    return features


def _traced_call(model: nn.Module, inputs: tuple[Any, ...], hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Any:
    # register_forward_hook counts its handles in a class attribute, which torch.compile cannot trace; an exchange of
    # the hook dictionaries it can, and what was exchanged is back before the trace ends.
    before = []
    try:
        for key, (module, hook) in enumerate(hooks):
            before.append((module, module._forward_hooks))
            module._forward_hooks = OrderedDict(module._forward_hooks)
            module._forward_hooks[-1 - key] = hook
        return model(*inputs)
    finally:
        for module, kept in reversed(before):
            # The trace knows an empty dictionary by its content alone and would put back a plain one.
            module._forward_hooks = kept if len(kept) > 0 else OrderedDict()


def _version(tensor: Tensor, compiling: bool) -> int:
    # Inference tensors keep no count, and a traced tensor has none to read.
    return 0 if compiling or tensor.is_inference() else tensor._version


def reentrant_checkpoint() -> Any:
    """What `checkpoint(..., use_reentrant=True)` is running just now, further up in this thread; None if nothing."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return frame.f_locals.get("run_function")
        frame = frame.f_back
    return None
