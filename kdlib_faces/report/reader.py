"""Conversion between dataclasses and JSON, with errors that name the path of the wrong value."""

import dataclasses
import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from kdlib_faces._checks import InputError, report_key

__all__ = ["from_json", "to_json"]

T = TypeVar("T")
_MAX_DEPTH = 24
_SCALARS: dict[object, tuple[str, Callable[[object], bool]]] = {
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    int: ("a whole number >= 0", lambda value: type(value) is int and value >= 0),
}


def from_json(cls: type[T], value: object, path: str) -> T:
    """Build a dataclass from parsed JSON, checked against its type hints.

    Hints may be `str`, `bool`, `int` (not negative), `float`, `Literal`, a dataclass, `list` and `dict` of these, any of
    them or None, and `object` for arbitrary JSON. Values are not converted, and unknown keys are refused.

    Raises:
        InputError: A key is missing, unknown or of the wrong type; the message starts with `path`.

    Examples:
        >>> from kdlib_faces.evaluation.summary import Measure
        >>> from_json(Measure, {"title": "AUC", "unit": "metres"}, "run.measures['auc']")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: report: run.measures['auc'].unit must be one of 'rate', 'auc', 'score', 'number', got 'metres'
    """
    return cast(T, _read(cls, value, path))


def _read(hint: Any, value: object, path: str) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is object:
        return to_json(value, path)
    if hint in _SCALARS:
        expected, matches = _SCALARS[hint]
        if not matches(value):
            raise report_key(path, expected, value)
        return value
    if dataclasses.is_dataclass(hint):
        return _read_fields(cast("type[Any]", hint), value, path)
    if origin is Literal:
        if value not in arguments:
            raise report_key(path, "one of " + ", ".join(map(repr, arguments)), value)
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (each for each in arguments if each is not types.NoneType)
        return None if value is None else _read(inner, value, path)
    if origin is list:
        if not isinstance(value, list):
            raise report_key(path, "a list", value)
        if arguments[0] in (float, float | None) and all(type(item) is float for item in value):
            return value
        return [_read(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        raise report_key(path, "a mapping", value)
    return {key: _read(arguments[1], item, f"{path}[{key!r}]") for key, item in value.items()}


def _read_fields(cls: type[Any], value: object, path: str) -> object:
    if not isinstance(value, dict):
        raise report_key(path, "a mapping", value)
    hints, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise report_key(path, f"a mapping with keys among {', '.join(fields)}", key)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise InputError(f"report: {path}.{name} is missing")
    return cls(**{key: _read(hints[key], item, f"{path}.{key}") for key, item in value.items()})


def to_json(value: object, path: str = "run", depth: int = 0) -> Any:
    """Copy a value into plain JSON types.

    Arrays and tuples become lists, non-finite numbers null, and the keys of mappings text. Fields of a dataclass that are
    equal to their defaults are left out, except `value`, which is null where nothing was measured.

    Raises:
        InputError: A value has no JSON form, or is nested too deeply; the message starts with `path`.

    Examples:
        >>> to_json({0.01: (np.float32(0.5), float("nan"))})
        {'0.01': [0.5, None]}
    """
    if depth > _MAX_DEPTH:
        raise report_key(path, f"nested at most {_MAX_DEPTH} deep", type(value).__name__)
    if isinstance(value, str | PurePath):
        return _text(str(value))
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise report_key(path, f"at most {sys.float_info.max:.1e} in magnitude", value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return to_json(value.tolist(), path, depth)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: field for field in dataclasses.fields(value)}
        items = {name: getattr(value, name) for name in fields}
        value = {name: item for name, item in items.items() if item != _default(fields[name]) or name == "value"}
    if isinstance(value, Mapping):
        return {_text(str(key)): to_json(item, f"{path}[{str(key)!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if all(type(item) in (int, float) and abs(item) <= sys.float_info.max for item in value):
            return [*value]  # long curves: no text is made for the path of each number
        return [to_json(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise report_key(path, "text, a number, true or false, null, a list or a mapping", value)


def _text(value: str) -> str:
    """Text that can be written as UTF-8: lone surrogates, as in file names of another encoding, become escapes."""
    return value.encode("utf-8", "backslashreplace").decode()


def _default(field: "dataclasses.Field[object]") -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
