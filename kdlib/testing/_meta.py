"""Runs on the meta device, which has shapes but no values: no value can be read, so no device ever waits for the host."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from kdlib.testing._run import expect

__all__ = ["expect_meta", "on_meta", "to_meta"]


class _Strict(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Fails on operations that torch accepts on the meta device although they need another device or wait for one."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.name().startswith(("aten::_linalg_check_errors", "aten::index_put")) and _reads_values(func, args):
            raise AssertionError(
                f"an accelerator waits for {func}; use masked_fill or torch.where for an assignment by a mask, and the _ex "
                "functions of torch.linalg, which raise no errors"
            )
        tensors = [x for x in tree_iter((args, kwargs or {})) if isinstance(x, Tensor)]
        other = next((x for x in tensors if x.dim() and not x.is_meta), None)
        if other is not None and any(x.is_meta for x in tensors):
            shape = tuple(other.shape)
            raise AssertionError(
                f"{func} takes a tensor {shape} on the {other.device.type} beside those on the meta device; create it "
                "on the device of the inputs, or register it as a buffer"
            )
        return func(*args, **(kwargs or {}))


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an accelerator reads values for a check of errors, or for an assignment by a mask."""
    masks = (torch.bool, torch.uint8)
    return "index_put" not in func.name() or any(x is not None and x.dtype in masks for x in args[1])


@contextmanager
def on_meta() -> Iterator[None]:
    """Explain the errors of a component that reads values or holds tensors on the CPU."""
    try:
        with _Strict():  # type: ignore[no-untyped-call]  # likewise
            yield
    except AssertionError:
        raise
    except Exception as error:
        if (
            "meta" not in str(error).lower()
        ):  # not of the device, such as an argument that the component does not accept
            raise
        raise AssertionError(
            "on the meta device it must run without reading values, as item(), nonzero(), an index by a mask or a "
            f"condition on a tensor do, got {type(error).__name__}: {error}"
        ) from error


def to_meta(value: Any) -> Any:
    """Return a Module, moved, or copies of tensors and containers of them, on the meta device."""
    if isinstance(value, nn.Module):
        return value.to("meta")
    return tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), value)


def expect_meta(what: str, x: Any, shape: Sequence[int] | None = None) -> None:
    """Expect a tensor on the meta device, of a given shape."""
    expect(isinstance(x, Tensor) and x.is_meta, f"{what} must be on the meta device like the inputs")
    if shape is not None:
        expect(
            tuple(x.shape) == tuple(shape), f"{what} must be {tuple(shape)} on the meta device, got {tuple(x.shape)}"
        )
