"""Checks of taps and of the tensors that they return; a function named after a fault returns the error to raise."""

from collections.abc import Iterable, Mapping
from numbers import Integral

import torch
from torch import nn
from torch.fx import GraphModule

from kdlib._checks import nearest


def bad_spelling(spelling: str) -> ValueError:
    return ValueError(
        f"Tap: a tap must be 'path', 'path[0]', 'path[\"key\"]' or 'path#1' (the second call), got {spelling!r}"
        + ("; the model's return value is kdlib.OUTPUT" if not spelling else "")
    )


def check_index(key: object) -> int | str:
    """Return the index of a tap, which must be a whole number or a string."""
    if isinstance(key, bool) or not isinstance(key, (Integral, str)):
        raise TypeError(f"Tap: an index must be a whole number or a string, got {key!r}")
    return key if isinstance(key, str) else int(key)


def check_taps(owner: str, taps: object, kinds: tuple[type, ...]) -> None:
    """`taps` must be a non-empty mapping of strings to instances of `kinds`."""
    if not isinstance(taps, Mapping):
        raise TypeError(f"{owner}: taps must map feature names to module paths, got {type(taps).__name__}")
    if not taps:
        raise ValueError(f"{owner}: taps must name at least one feature, got none")
    for name, tap in taps.items():
        if not isinstance(name, str) or not isinstance(tap, kinds):
            raise TypeError(f"{owner}: taps must map strings to module paths or kdlib.OUTPUT, got {name!r}: {tap!r}")


def check_dtype(owner: str, dtype: object) -> None:
    """`dtype` must be None or a floating-point type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{owner}: dtype must be a floating-point torch.dtype, got {dtype!r}")


def check_exported_for_inference(owner: str, model: nn.Module) -> None:
    """The graph of a module of `torch.export` must not contain dropout or batch norm in training mode."""
    graphs = [each.graph for each in model.modules() if isinstance(each, GraphModule)]
    for node in (each for graph in graphs for each in graph.nodes if isinstance(each.target, torch._ops.OpOverload)):
        arguments = {
            argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)
        }
        if True in (arguments.get("train"), arguments.get("training")):
            raise ValueError(f"{owner}: the model was exported in training mode ({node.target}); export model.eval()")


def no_module(owner: str, path: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"{owner}: no module at path {path!r}{nearest(path, known)}")


def module_is_none(owner: str, path: str) -> ValueError:
    return ValueError(f"{owner}: the module at path {path!r} is None")


def compiled_module(owner: str, path: str) -> ValueError:
    return ValueError(
        f"{owner}: {path!r} lies in a compiled module, where a tap would not fire; compile the adapter instead: "
        f"torch.compile({owner}(model, taps))"
    )


def check_calls(owner: str, name: str, path: str, call: int | None, calls: int, mode: str) -> None:
    """The tapped module must have been called as often as the tap requires."""
    if calls == 0:
        raise ValueError(
            f"{owner}: tap {name!r} ({path!r}) did not fire: the forward in {mode} did not call this module "
            "(containers such as nn.ModuleList, and modules used by .forward() or by their weights, never fire)"
        )
    if call is None and calls > 1:
        raise ValueError(
            f"{owner}: tap {name!r} ({path!r}) fired {calls} times in one forward; choose a call: "
            f"'{path}#0' is the first, '{path}#{calls - 1}' the last"
        )
    if call is not None and call >= calls:
        raise ValueError(
            f"{owner}: tap {name!r} ({path!r}) requests call {call}, counted from 0, but the module was called "
            f"{calls} time{'s' if calls > 1 else ''}"
        )


def check_gradient(owner: str, name: str, path: str, passes: bool) -> None:
    """In training, gradients must be able to pass through the feature."""
    if not passes:
        raise ValueError(
            f"{owner}: tap {name!r} ({path!r}) fired where gradients are disabled, so no gradient could pass "
            "through it; inside activation checkpointing use checkpoint(..., use_reentrant=False) or tap the "
            "checkpointed block"
        )


def check_in_place(owner: str, name: str, path: str, unchanged: bool) -> None:
    """The tapped tensor must not be changed after the tap."""
    if not unchanged:
        raise ValueError(
            f"{owner}: the tensor of tap {name!r} ({path!r}) was changed in place after the tap, as "
            "nn.ReLU(inplace=True) does; tap the module that changes it, or set inplace=False there"
        )


def indexed_tensor(owner: str, name: str, tap: object, value: torch.Tensor, key: object, mode: str) -> ValueError:
    shape = tuple(value.shape)
    return ValueError(f"{owner}: tap {name!r} ({tap!r}) indexes a tensor {shape} in {mode}; drop [{key!r}]")


def no_part(owner: str, name: str, tap: object, value: object, key: object, mode: str) -> ValueError:
    return ValueError(
        f"{owner}: tap {name!r} ({tap!r}) finds no [{key!r}] in the value returned in {mode}, {_describe(value)}"
    )


def no_tensor(owner: str, name: str, tap: object, value: object, mode: str) -> TypeError:
    return TypeError(
        f"{owner}: tap {name!r} ({tap!r}) must lead to a tensor, got {_describe(value)} in {mode}; "
        "index it, as in 'path[0]' or OUTPUT['key']"
    )


def _describe(value: object) -> str:
    kind = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {list(value)}"
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind
