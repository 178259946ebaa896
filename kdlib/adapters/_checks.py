"""Stage 1: the checks of taps and of what they caught. Words errors; touches no tensor's values and no hook."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kdlib._checks import nearest

__all__ = [
    "check_calls",
    "check_dtype",
    "check_gradient",
    "check_in_place",
    "check_key",
    "check_tap",
    "check_taps",
    "compiled",
    "indexed_tensor",
    "no_module",
    "no_part",
    "no_tap",
    "no_tensor",
    "not_there",
    "within_reentrant",
]


def no_tap(spelling: str) -> ValueError:
    """A string that is no tap."""
    return ValueError(
        f"Tap: a tap must be 'path', 'path[0]', 'path[\"key\"]' or 'path#1' (the second call), got {spelling!r}"
        + ("; the model's return value is kdlib.OUTPUT" if not spelling else "")
    )


def check_key(key: object) -> None:
    """A tap is indexed by a number or a name."""
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise TypeError(f"Tap: an index must be a whole number or a string, got {key!r}")


def check_taps(owner: str, taps: object) -> None:
    """Taps must be a mapping that names a feature."""
    if not isinstance(taps, Mapping):
        raise TypeError(f"{owner}: taps must map feature names to module paths, got {type(taps).__name__}")
    if not taps:
        raise ValueError(f"{owner}: taps must name at least one feature, got none")


def check_tap(owner: str, name: object, tap: object, kinds: tuple[type, ...]) -> None:
    """A feature's name must be a string, and its tap one of `kinds`."""
    if not isinstance(name, str) or not isinstance(tap, kinds):
        raise TypeError(f"{owner}: taps must map strings to module paths or kdlib.OUTPUT, got {name!r}: {tap!r}")


def check_dtype(owner: str, dtype: object) -> None:
    """`dtype` must be None or a floating-point type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{owner}: dtype must be a floating-point torch.dtype, got {dtype!r}")


def no_module(owner: str, path: str, known: Iterable[str]) -> ValueError:
    """A path that leads nowhere."""
    return ValueError(f"{owner}: no module at path {path!r}{nearest(path, known)}")


def not_there(owner: str, path: str) -> ValueError:
    """A path to a child that was registered as None."""
    return ValueError(f"{owner}: the module at path {path!r} is None")


def compiled(owner: str, path: str) -> ValueError:
    """A path into what torch.compile has compiled."""
    return ValueError(
        f"{owner}: {path!r} lies in a compiled module, where a tap would not fire; compile the adapter instead: "
        f"torch.compile({owner}(model, taps))"
    )


def check_calls(owner: str, name: str, tap: Any, calls: int) -> None:
    """The module of a tap must have been called, as often as the tap says."""
    if calls == 0:
        raise ValueError(
            f"{owner}: tap {name!r} ({tap.path!r}) did not fire: the forward did not call this module "
            "(containers such as nn.ModuleList, and modules used by .forward() or by their weights, never fire)"
        )
    if tap.call is None and calls > 1:
        raise ValueError(
            f"{owner}: tap {name!r} ({tap.path!r}) fired {calls} times in one forward; say which call: "
            f"{tap.path + '#0'!r} is the first, {tap.path + f'#{calls - 1}'!r} the last"
        )
    if tap.call is not None and tap.call >= calls:
        raise ValueError(
            f"{owner}: tap {name!r} ({tap!r}) asks for call {tap.call}, counted from 0, but the module was called "
            f"{calls} time{'s' if calls > 1 else ''}"
        )


def check_gradient(owner: str, name: str, tap: Any, passes: bool) -> None:
    """Where gradients are wanted they must be able to pass through the feature."""
    if not passes:
        raise ValueError(
            f"{owner}: tap {name!r} ({tap.path!r}) fired where gradients are switched off, so no gradient could pass "
            "through it; inside activation checkpointing use checkpoint(..., use_reentrant=False) or tap the "
            "checkpointed block"
        )


def check_in_place(owner: str, name: str, tap: Any, unchanged: bool) -> None:
    """What follows a tap must leave its tensor alone."""
    if not unchanged:
        raise ValueError(
            f"{owner}: the tensor of tap {name!r} ({tap.path!r}) was changed in place after the tap, as "
            "nn.ReLU(inplace=True) does; tap the module that changes it, or set inplace=False there"
        )


def within_reentrant() -> ValueError:
    """An adapter inside a reentrant checkpoint."""
    return ValueError(
        "StudentAdapter: features cannot pass a reentrant checkpoint, which would drop their gradients; "
        "use checkpoint(adapter, ..., use_reentrant=False)"
    )


def indexed_tensor(owner: str, name: str, tap: object, value: torch.Tensor, key: object) -> ValueError:
    """An index where there is a tensor already."""
    return ValueError(f"{owner}: tap {name!r} ({tap!r}) indexes a tensor {tuple(value.shape)}; drop [{key!r}]")


def no_part(owner: str, name: str, tap: object, value: object, key: object) -> ValueError:
    """An index that is not in what was returned."""
    return ValueError(f"{owner}: tap {name!r} ({tap!r}) finds no [{key!r}] in what was returned, {_describe(value)}")


def no_tensor(owner: str, name: str, tap: object, value: object) -> TypeError:
    """A tap that leads to something else than a tensor."""
    return TypeError(
        f"{owner}: tap {name!r} ({tap!r}) must lead to a tensor, got {_describe(value)}; "
        "index it, as in 'path[0]' or OUTPUT['key']"
    )


def _describe(value: object) -> str:
    kind = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {list(value)}"
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind
