"""Checks of taps and of the tensors that they return; a function named after a fault returns the error to raise."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral
from types import EllipsisType

import torch
from torch import nn
from torch.fx import GraphModule

from kdlib._checks import check_type, nearest

# The modes of a model in taps, and the hint of an error that another mode may explain.
MODES = ("train", "eval")
_BOTH = "; for outputs that differ by mode give {'train': tap, 'eval': tap}"


def bad_spelling(spelling: str) -> ValueError:
    return ValueError(
        "Tap: a tap must be 'path', 'path[0]', 'path[\"key\"]', 'path[:, 0]' (a slice) or 'path#1' (the second call), got "
        f"{spelling!r}" + ("; the model's return value is kdlib.OUTPUT" if not spelling else "")
    )


def check_index(key: object) -> int | str | tuple[int | slice | EllipsisType, ...]:
    """Return a key of a tap: a whole number, a string, or a slice whose first index is `:`, as a tuple."""
    if isinstance(key, str):
        return key
    if isinstance(key, (slice, tuple)):
        items = tuple(_check_item(item) for item in (key if isinstance(key, tuple) else (key,)))
        if items[:1] != (slice(None),):
            raise ValueError(f"Tap: a slice must begin with ':' (the batch), as [:, 0] does, got [{show_key(items)}]")
        return items
    if isinstance(key, bool) or not isinstance(key, Integral):
        raise TypeError(f"Tap: an index must be a whole number, a string or a slice such as [:, 0], got {key!r}")
    return int(key)


def _check_item(item: object) -> int | slice | EllipsisType:
    if isinstance(item, EllipsisType):
        return item
    if not isinstance(item, slice):
        return _whole(item, item)
    start, stop, step = (None if end is None else _whole(end, item) for end in (item.start, item.stop, item.step))
    if step is not None and step < 1:
        raise ValueError(f"Tap: the step of a slice must be >= 1, got {step}")
    return slice(start, stop, step)


def _whole(number: object, item: object) -> int:
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"Tap: a slice must hold whole numbers, ':' and '...', got {item!r}")
    return int(number)


def show_key(key: object) -> str:
    """Return a key of a tap as it is written between brackets: `0`, `'logits'` or `:, 1:`."""
    return ", ".join(_show_item(item) for item in key) if isinstance(key, tuple) else repr(key)


def _show_item(item: object) -> str:
    if not isinstance(item, slice):
        return "..." if item is ... else repr(item)
    start, stop, step = ("" if end is None else str(end) for end in (item.start, item.stop, item.step))
    return f"{start}:{stop}" + (f":{step}" if step else "")


def check_taps(owner: str, taps: object, kinds: tuple[type, ...]) -> None:
    """`taps` must be a non-empty mapping of strings to instances of `kinds`, or to those by mode."""
    if not isinstance(taps, Mapping):
        raise TypeError(f"{owner}: taps must map feature names to module paths, got {type(taps).__name__}")
    if not taps:
        raise ValueError(f"{owner}: taps must name at least one feature, got none")
    for name, tap in taps.items():
        by_mode = isinstance(tap, Mapping)
        each = list(tap.values()) if isinstance(tap, Mapping) else [tap]
        if not isinstance(name, str) or not all(isinstance(one, kinds) for one in each):
            raise TypeError(f"{owner}: taps must map strings to module paths or kdlib.OUTPUT, got {name!r}: {tap!r}")
        if by_mode and (not tap or not set(tap) <= set(MODES)):
            raise ValueError(f"{owner}: a tap by mode must have the keys 'train' or 'eval', got {name!r}: {tap!r}")


def check_eval_taps(owner: str, taps: Mapping[str, object], in_eval: Mapping[str, object]) -> None:
    """A teacher runs in eval mode only, so each of its features must have a tap there."""
    for name, tap in taps.items():
        if name not in in_eval:
            raise ValueError(f"{owner}: a teacher runs in eval mode, for which tap {name!r} has no entry, got {tap!r}")


def check_input_names(owner: str, inputs: object) -> str | tuple[str, ...] | dict[str, str] | None:
    """Return `inputs`: None, the name of a target, names of targets, or keyword arguments to such names."""
    if inputs is None or isinstance(inputs, str):
        return inputs
    if not isinstance(inputs, (Sequence, Mapping)):
        raise TypeError(f"{owner}: inputs must be a name of a target, names or a mapping to names, got {inputs!r}")
    names = [*inputs, *inputs.values()] if isinstance(inputs, Mapping) else list(inputs)
    for name in names:
        check_type(owner, "each name in inputs", name, str, "a str")
    if not names:
        raise ValueError(
            f"{owner}: inputs must name at least one target, got {inputs!r}; None reads the batch's inputs"
        )
    return dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)


def check_device(owner: str, device: object) -> torch.device | None:
    """Return `device`, which must be None, a `torch.device` or its text or index."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"{owner}: device must be a torch.device or its name, such as 'cuda:1', got {device!r}"
        ) from error


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


def check_calls(owner: str, name: str, path: str, call: int | None, calls: int, training: bool) -> None:
    """The tapped module must have been called as often as the tap requires."""
    if calls == 0:
        raise ValueError(
            f"{owner}: tap {name!r} ({path!r}) did not fire: the forward in {_mode(training)} did not call this module "
            "(containers such as nn.ModuleList, and modules used by .forward() or by their weights, never fire); "
            "kdlib.list_taps shows the calls" + _BOTH
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


def indexed_tensor(owner: str, name: str, tap: object, value: torch.Tensor, key: object, training: bool) -> ValueError:
    keep = f" or write [:, {key}] to keep the batch" if isinstance(key, int) else ""
    return ValueError(
        f"{owner}: tap {name!r} ({tap!r}) indexes a tensor {tuple(value.shape)} in {_mode(training)}; drop "
        f"[{show_key(key)}]{keep}{_BOTH}"
    )


def sliced_structure(owner: str, name: str, tap: object, value: object, key: object, training: bool) -> ValueError:
    return ValueError(
        f"{owner}: tap {name!r} ({tap!r}) must slice a tensor by [{show_key(key)}], got {_describe(value)} in "
        f"{_mode(training)}; index it first, as in OUTPUT['key'][:, 0]{_BOTH}"
    )


def no_part(owner: str, name: str, tap: object, value: object, key: object, training: bool) -> ValueError:
    return ValueError(
        f"{owner}: tap {name!r} ({tap!r}) finds no [{show_key(key)}] in the value returned in {_mode(training)}, "
        f"{_describe(value)}{'' if isinstance(value, torch.Tensor) else _BOTH}"
    )


def no_tensor(owner: str, name: str, tap: object, value: object, training: bool) -> TypeError:
    return TypeError(
        f"{owner}: tap {name!r} ({tap!r}) must lead to a tensor, got {_describe(value)} in {_mode(training)}; "
        f"index it, as in 'path[0]' or OUTPUT['key']{_BOTH}"
    )


def bad_pattern(pattern: object, error: Exception) -> ValueError:
    return ValueError(f"match_taps: pattern must be a regular expression, got {pattern!r}: {error}")


def bad_name(name: str, pattern: str, error: Exception) -> ValueError:
    return ValueError(f"match_taps: name {name!r} must refer to groups of the pattern {pattern!r}: {error}")


def no_match(pattern: str, paths: Iterable[str]) -> ValueError:
    return ValueError(
        f"match_taps: no module path matches {pattern!r} as a whole{nearest(pattern, paths)}; '.*' matches any text"
    )


def check_distinct(names: Sequence[str], name: object) -> None:
    """Each matched path must give another feature name."""
    twice = [each for each, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"match_taps: name={name!r} gives several paths the name {twice[0]!r}; use more groups")


def check_initialized(owner: str, lazy: Iterable[str]) -> None:
    """The parameters must exist: a forward would create those of lazy modules."""
    names = list(lazy)
    if names:
        raise ValueError(f"{owner}: the model has lazy parameters, such as {names[0]!r}; call it on one batch first")


def _mode(training: bool) -> str:
    return "training mode" if training else "eval mode"


def _describe(value: object) -> str:
    kind = f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {list(value)}"
    if is_dataclass(value):
        return f"{kind} with the fields {[field.name for field in fields(value)]}"
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind
