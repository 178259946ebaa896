"""Calls of models, and values that must not change meanwhile: tensors that are read, weights and state of modules."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.types import Targets, TeacherInputs

__all__ = [
    "fork_random_state", "hold", "input_names", "is_unchanged", "map_tensors", "move", "move_tensors",
    "read_inputs", "split_inputs", "tensors_in", "unchanged",
]  # fmt: skip

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a model: one input, a tuple of them, or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


def input_names(inputs: TeacherInputs) -> tuple[str, ...]:
    """Return the names of the targets that a teacher reads in place of the inputs of the batch."""
    if not inputs:
        return ()
    if isinstance(inputs, str):
        return (inputs,)
    return tuple(inputs.values() if isinstance(inputs, Mapping) else inputs)


def read_inputs(inputs: TeacherInputs, targets: Targets, batch: Any) -> Any:
    """Return what a teacher is called with: the inputs of the batch, or the targets that it reads in their place."""
    if not inputs:
        return batch
    if isinstance(inputs, str):
        return targets[inputs]
    if isinstance(inputs, Mapping):
        return {argument: targets[name] for argument, name in inputs.items()}
    return tuple(targets[name] for name in inputs)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the tensors in tuples, lists, mappings and dataclasses, whose types are kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {name: map_tensors(item, change) for name, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return changed
        same = copy.copy(value)
        for name, item in changed.items():
            same[name] = item
        return same
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{x.name: map_tensors(getattr(value, x.name), change) for x in fields(value) if x.init})
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists, mappings and dataclasses, in their order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def move_tensors(value: Any, device: torch.device) -> Any:
    """Move all tensors of `value` to a device; only a copy to the CPU, whose values are read at once, waits."""
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"))


def hold(tensor: Tensor) -> tuple[Tensor, int | None]:
    """Return the tensor and its version, or a copy and None where no version counts the changes in place.

    Inference tensors have no version counter, that of a traced tensor cannot be read, and those of tensors in the
    transforms of `torch.func` do not count every change. Compilers remove a copy that is not needed.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch.compiler.is_compiling() or tensor.is_inference() or wrapped(tensor):
        return tensor.clone(), None
    return tensor, tensor._version


def is_unchanged(tensor: Tensor, version: int | None) -> bool:
    """Return whether a tensor still has the version with which `hold` returned it."""
    return version is None or tensor._version == version


def move(module: nn.Module, fn: Callable[[Tensor], Tensor], *, cast: bool = True, stay: bool = False) -> None:
    """Apply the move of `fn`, the argument of `nn.Module._apply`, to a frozen module without changing its values.

    Only the device (unless it must `stay`), the memory format and, with `cast`, the floating-point type of the result
    are used, so that `to_empty` or an initialization has no effect. The type changes only if all values are the same
    in the new type. A tensor on the meta device has no values; it stays there unless `fn` makes some, as `to_empty`.
    """

    def target(tensor: Tensor) -> Tensor:
        return fn(torch.zeros([2] * tensor.dim(), dtype=tensor.dtype, device=tensor.device))

    values = [each for each in [*module.parameters(), *module.buffers()] if not each.is_meta]
    cast = cast and all(_is_exact(each, target(each).dtype) for each in values if each.is_floating_point())

    def moved(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            # A parent may be moved while the values are elsewhere: offloading hooks bring them before each forward.
            with suppress(NotImplementedError):
                return tensor if stay else fn(tensor).to(tensor.dtype)
            return tensor
        probe, channels_last = target(tensor), _CHANNELS_LAST.get(tensor.dim())
        if channels_last is None or not probe.is_contiguous(memory_format=channels_last):
            channels_last = torch.preserve_format
        dtype = probe.dtype if cast and tensor.is_floating_point() else tensor.dtype
        return tensor.to(tensor.device if stay else probe.device, dtype, memory_format=channels_last)

    module._apply(moved)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped


def _is_exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a cast to `dtype` and back returns every value."""
    if tensor.dtype == dtype:
        return True
    back = tensor.to(dtype).to(tensor.dtype)
    return dtype.is_floating_point and torch.allclose(back, tensor, rtol=0, atol=0, equal_nan=True)


def fork_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's random state, on the CPU and on `device`, after the block."""
    devices = {"devices": [device], "device_type": device.type} if device.type in ("cuda", "xpu") else {"devices": []}
    return torch.random.fork_rng(**devices)


@contextmanager
def unchanged(*modules: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore buffers, plain attributes, hooks and torch's random state after the block.

    Inside, the buffers are replaced by copies, because the originals may belong to a graph whose backward is still to
    run.
    """
    inside = {each for module in modules for each in module.modules()}
    saved = [(each, dict(vars(each)), dict(each._buffers.items())) for each in inside]
    copies = {
        id(buffer): buffer.detach().clone() for _, _, own in saved for buffer in own.values() if buffer is not None
    }
    # A model may add hooks at its first forward, and an attribute that says so.
    hooks = [
        (held, dict(held))
        for each in inside
        for name, held in vars(each).items()
        if "_hooks" in name and isinstance(held, dict)
    ]
    try:
        for each, _, own in saved:
            for name, buffer in own.items():
                each._buffers[name] = copies.get(id(buffer))
        with fork_random_state(device):
            yield
    finally:
        for held, entries in hooks:
            held.clear()
            held.update(entries)
        for each, attributes, own in saved:
            for name in set(vars(each)) - set(attributes):
                del vars(each)[name]
            vars(each).update(attributes)
            for name in set(each._buffers.keys()) - set(own):
                del each._buffers[name]
            for name, buffer in own.items():  # a scripted module has no `update`
                each._buffers[name] = buffer
