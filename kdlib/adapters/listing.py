"""The taps that a model offers: a table of them, and a choice by a regular expression."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from kdlib._checks import check_type
from kdlib._held import unchanged
from kdlib.adapters._checks import bad_name, bad_pattern, check_distinct, check_initialized, no_match
from kdlib.adapters.capture import HOOKING, module_paths
from kdlib.adapters.tap import OUTPUT, Tap

__all__ = ["TapRow", "TapTable", "list_taps", "match_taps"]


@dataclass(frozen=True)
class TapRow:
    """One tensor that a model returns on its way, and the tap that reads it.

    Args:
        tap: the tap; `str(tap)` is its spelling.
        module: class of the module.
        shape: shape of the tensor; `None` if the module was not called or returned no tensor.
        dtype: type of the tensor, or `None`.
        calls: how often the forward called the module; a tap of a module that was not called never fires.

    Examples:
        >>> TapRow(Tap("0"), "Linear", (1, 2), torch.float32, calls=1).shape
        (1, 2)
    """

    tap: Tap
    module: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    calls: int


class TapTable(tuple[TapRow, ...]):
    """The rows of `list_taps`, which print as an aligned table.

    Examples:
        >>> table = list_taps(nn.Linear(4, 2), torch.zeros(1, 4))
        >>> table[0].shape
        (1, 2)
    """

    def __repr__(self) -> str:
        lines = [("tap", "module", "shape", "dtype", "calls")]
        for row in self:
            shape = "not called" if not row.calls else "no tensor" if row.shape is None else str(row.shape)
            dtype = "" if row.dtype is None else str(row.dtype).removeprefix("torch.")
            lines.append((str(row.tap), row.module, shape, dtype, str(row.calls)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def list_taps(model: nn.Module, /, *inputs: Any, **named: Any) -> TapTable:
    """List the tensors that a model returns on one batch, with the tap of each.

    There is one row for each tensor of each module, in the order of `model.named_modules()`, and the return value of the
    model comes last. A module that is called several times has the rows of each call, and one that is not called has a
    row without a shape. Of a structure, only the tensors are listed.

    The model runs once, without gradient, in its current mode except for normalization and dropout layers, which run in
    eval mode. Its weights, statistics and modes and torch's random state are unchanged afterwards. A model on the `meta`
    device is listed without computation.

    Args:
        model: any module.
        inputs: one batch, on the device of the model.
        named: its keyword arguments.

    Returns:
        The rows, a tuple that prints as a table.

    Raises:
        TypeError: `model` is not a Module.
        ValueError: the model has lazy parameters that are not created yet.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
        >>> rows = list_taps(model, torch.zeros(2, 3, 8, 8))
        >>> rows
        tap     module      shape         dtype    calls
        0       Conv2d      (2, 8, 6, 6)  float32  1
        1       ReLU        (2, 8, 6, 6)  float32  1
        2       Flatten     (2, 288)      float32  1
        3       Linear      (2, 4)        float32  1
        OUTPUT  Sequential  (2, 4)        float32  1
        >>> [row.tap for row in rows if row.shape == (2, 4)]
        [Tap('3'), OUTPUT]
    """
    check_type("list_taps", "model", model, nn.Module, "a Module")
    check_initialized("list_taps", (name for name, parameter in model.named_parameters() if is_lazy(parameter)))
    paths = module_paths(model)
    found: dict[str, list[list[TapRow]]] = {path: [] for path in paths}
    thread = threading.get_ident()

    def make_hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                found[path].append(list(_rows(Tap(path), type(module).__name__, output)))

        return hook

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # Compiled modules would not call the hooks.
    with unchanged(model, device=device), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for module in model.modules():
            module.training = module.training and not isinstance(module, (_NormBase, _DropoutNd))
        with HOOKING:
            handles = [module.register_forward_hook(make_hook(path)) for path, module in paths.items()]
        try:
            output = model(*inputs, **named)
        finally:
            for handle in handles:
                handle.remove()
    rows: list[TapRow] = []
    for path, module in paths.items():
        calls = found[path]
        if not calls:
            rows.append(TapRow(Tap(path), type(module).__name__, None, None, 0))
        for index, each in enumerate(calls):
            call = index if len(calls) > 1 else None
            rows += [TapRow(Tap(path, call, x.tap.index), x.module, x.shape, x.dtype, len(calls)) for x in each]
    return TapTable([*rows, *_rows(OUTPUT, type(model).__name__, output)])


def _rows(tap: Tap, module: str, value: Any) -> Iterator[TapRow]:
    """Yield the tensors of a return value; a row without a shape if there are none."""
    leaves = list(_leaves(tap, value))
    yield from (TapRow(each, module, tuple(x.shape), x.dtype, 1) for each, x in leaves)
    if not leaves:
        yield TapRow(tap, module, None, None, 1)


def _leaves(tap: Tap, value: Any) -> Iterator[tuple[Tap, Tensor]]:
    if isinstance(value, Tensor):
        yield tap, value
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = [(key, item) for key, item in value.items() if isinstance(key, (int, str))]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    for key, item in items:
        yield from _leaves(tap[key], item)


def match_taps(model: nn.Module, pattern: str | re.Pattern[str], *, name: str | None = None) -> dict[str, Tap]:
    r"""Choose the modules whose whole path matches a regular expression.

    Args:
        model: any module.
        pattern: regular expression of `re`.
        name: feature name of each match, in which `\1` or `\g<stage>` stands for a group of the pattern, as in
            `re.sub`; `None` for the path itself.

    Returns:
        Feature name to tap, in the order of `model.named_modules()`: the `taps` of an adapter.

    Raises:
        ValueError: nothing matches (the nearest paths are named), the pattern or the name is invalid, or two paths have
            the same name.

    Examples:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
        >>> match_taps(model, r"[12]\.1")
        {'1.1': Tap('1.1'), '2.1': Tap('2.1')}
        >>> taps = match_taps(model, r"(\d)\.0", name=r"stage\1")
        >>> {name: tap[:, 0] for name, tap in taps.items() if name != "stage0"}
        {'stage1': Tap('1.0')[:, 0], 'stage2': Tap('2.0')[:, 0]}
    """
    check_type("match_taps", "model", model, nn.Module, "a Module")
    check_type("match_taps", "pattern", pattern, (str, re.Pattern), "a regular expression")
    paths = list(module_paths(model))
    try:
        expression = re.compile(pattern)
        matches = [match for path in paths if (match := expression.fullmatch(path))]
    except (re.error, TypeError) as error:
        raise bad_pattern(pattern, error) from error
    if not matches:
        raise no_match(expression.pattern, paths)
    try:
        names = [match[0] if name is None else match.expand(name) for match in matches]
    except (re.error, IndexError) as error:
        raise bad_name(str(name), expression.pattern, error) from error
    check_distinct(names, name)
    return {key: Tap(match[0]) for key, match in zip(names, matches, strict=True)}
