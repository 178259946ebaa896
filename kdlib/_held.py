"""Calls of models, and values that must not change meanwhile: tensors that are read, and weights of frozen modules."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["hold", "is_sharded", "is_unchanged", "move", "split_inputs"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a model: one input, a tuple of them, or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


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


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as the parameters of `fully_shard` are."""
    module = sys.modules.get("torch.distributed.tensor")  # its import takes seconds; without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def move(module: nn.Module, fn: Callable[[Tensor], Tensor], *, cast: bool = True) -> None:
    """Apply the move of `fn`, the argument of `nn.Module._apply`, to a frozen module without changing its values.

    Only the device, the memory format and, with `cast`, the floating-point type of the result are used, so that
    `to_empty` or an initialization has no effect. The type changes only if all values are the same in the new type.
    A tensor on the meta device has no values; it stays there unless `fn` makes some, as `to_empty` does.
    """

    def target(tensor: Tensor) -> Tensor:
        return fn(torch.zeros([2] * tensor.dim(), dtype=tensor.dtype, device=tensor.device))

    values = [each for each in [*module.parameters(), *module.buffers()] if not each.is_meta]
    cast = cast and all(_is_exact(each, target(each).dtype) for each in values if each.is_floating_point())

    def moved(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            # A parent may be moved while the values are elsewhere: offloading hooks bring them before each forward.
            with suppress(NotImplementedError):
                return fn(tensor).to(tensor.dtype)
            return tensor
        probe, channels_last = target(tensor), _CHANNELS_LAST.get(tensor.dim())
        if channels_last is None or not probe.is_contiguous(memory_format=channels_last):
            channels_last = torch.preserve_format
        dtype = probe.dtype if cast and tensor.is_floating_point() else tensor.dtype
        return tensor.to(probe.device, dtype, memory_format=channels_last)

    module._apply(moved)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped


def _is_exact(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a cast to `dtype` and back returns every value."""
    if tensor.dtype == dtype:
        return True
    back = tensor.to(dtype).to(tensor.dtype)
    return dtype.is_floating_point and torch.allclose(back, tensor, rtol=0, atol=0, equal_nan=True)
