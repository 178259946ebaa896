"""Configuration: nested frozen dataclasses from TOML and `a.b=3`, and back. Touches one file; imports nothing heavy."""

import dataclasses
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kdlib_faces._checks import InputError

__all__ = ["dump_toml", "load_config"]

T = TypeVar("T")
MAX_BYTES = 1_000_000


def load_config(
    cls: type[T],
    path: str | PathLike[str] | None = None,
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    base: T | None = None,
) -> T:
    """Build a config dataclass from its defaults, a TOML file and overrides; later ones win.

    Fields may be bool, int, float, str, `Path`, `Literal`, tuples, lists and dicts of these, nested dataclasses, and
    any of them or None. A whole number passes for a float, the text `"none"` for None; nothing else is converted.

    Args:
        cls: a dataclass whose fields all have defaults.
        path: a TOML file; tables are nested dataclasses.
        overrides: `"a.b=3"` each, the right side a TOML value, or plain text where it is none; or a mapping from
            `"a.b"` to values.
        base: a config whose values stand in for the defaults.

    Raises:
        InputError: a file that is missing or no TOML, an unknown key (with the nearest), a value of another type, or
            one that the dataclass itself refuses; the message names the key and where it came from.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     steps: int = 10
        ...     rate: float = 0.1
        >>> load_config(Config, overrides=["rate=1e-2"])
        Config(steps=10, rate=0.01)
    """
    merged: dict[str, tuple[object, str]] = {}
    if path is not None:
        _flatten(cls, _read_toml(Path(path)), "", str(path), merged)
    items = overrides.items() if isinstance(overrides, Mapping) else [_split(text) for text in overrides]
    for key, value in items:
        _place(cls, key, value, f"{key}={_shown(value)}", merged)
    built: T = _build(cls, "", merged, base)
    return built


def dump_toml(config: object) -> str:
    """A config dataclass as TOML that `load_config` reads back to an equal object.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     steps: int = 10
        ...     name: str = "a"
        >>> print(dump_toml(Config()), end="")
        steps = 10
        name = "a"
    """
    lines: list[str] = []
    _dump(config, "", lines)
    return "\n".join(lines).strip("\n") + "\n" if lines else ""


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: a configuration has at most {MAX_BYTES:,} bytes")
        return tomllib.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"configuration not found: {path}") from None
    except OSError as error:
        raise InputError(f"configuration not readable: {path} ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not TOML: {str(error) or 'nested too deeply'}") from None


def _split(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"a setting must be key=value, got {text!r}")
    try:
        parsed: object = tomllib.loads(f"value = {value.strip()}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = value.strip()
    return key.strip(), parsed


def _flatten(cls: Any, table: Mapping[str, object], prefix: str, where: str, merged: dict[str, Any]) -> None:
    for name, value in table.items():
        _place(cls, name, value, where, merged, prefix)


def _place(cls: Any, key: str, value: object, where: str, merged: dict[str, Any], prefix: str = "") -> None:
    """Find the field that `key` (dotted) names, and note its value; a table goes into the nested dataclass's fields."""
    from kdlib._checks import nearest  # here, since it imports torch: a good configuration is read without

    name, _, rest = key.partition(".")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    if name not in names:
        known = [f"{prefix}{each}" for each in names]
        raise InputError(f"{where}: no setting named {prefix + name!r}{nearest(prefix + name, known)}")
    nested = _dataclass_of(hints[name])
    full = prefix + name
    if nested is None:
        if rest:
            raise InputError(f"{where}: {full!r} is a single value, it has no {rest!r}")
        merged[full] = (_convert(hints[name], value, full, where), where)
    elif rest:
        _place(nested, rest, value, where, merged, f"{full}.")
    elif isinstance(value, Mapping):
        _flatten(nested, value, f"{full}.", where, merged)
    else:
        raise InputError(f"{where}: {full!r} is a group of settings, got {_shown(value)}")


def _dataclass_of(hint: Any) -> Any:
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _build(cls: Any, prefix: str, merged: Mapping[str, tuple[object, str]], base: Any = None) -> Any:
    """`base`, or the defaults of `cls`, with the fields changed that `merged` holds under `prefix`."""
    values: dict[str, object] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        full = prefix + field.name
        nested = _dataclass_of(hints[field.name])
        if nested is None and full in merged:
            values[field.name] = merged[full][0]
        elif nested is not None and any(key.startswith(f"{full}.") for key in merged):
            start = _default(field, nested) if base is None else getattr(base, field.name)
            values[field.name] = _build(nested, f"{full}.", merged, start)
    sources = ", ".join(dict.fromkeys(where for key, (_, where) in merged.items() if key.startswith(prefix)))
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{sources}: {error}" if sources else str(error)) from error


def _default(field: "dataclasses.Field[Any]", cls: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return cls() if field.default is dataclasses.MISSING else field.default


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _convert(hint: Any, value: object, key: str, where: str) -> object:
    """`value` as the type `hint`, or an error that says what was wanted."""
    origin, arguments = get_origin(hint), get_args(hint)
    refuse = InputError(f"{where}: {key} must be {_describe(hint)}, got {_shown(value)}")
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "none"):
            return None
        for option in arguments:
            try:
                return _convert(option, value, key, where)
            except InputError:
                continue
        raise refuse
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise refuse
    if origin in (tuple, list) or hint in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise refuse
        return _convert_sequence(hint, origin or hint, arguments, value, key, where, refuse)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise refuse
        inner = arguments[1] if arguments else object
        return {str(name): _convert(inner, item, f"{key}.{name}", where) for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint in (bool, int, float, str) and type(value) is hint:
        return value
    raise refuse


def _convert_sequence(
    hint: Any, kind: Any, arguments: tuple[Any, ...], value: Sequence[object], key: str, where: str, refuse: InputError
) -> object:
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise refuse
        inner = list(arguments)
    else:
        inner = [arguments[0] if arguments else object] * len(value)
    return kind(
        _convert(one, item, f"{key}[{at}]", where) for at, (one, item) in enumerate(zip(inner, value, strict=True))
    )


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join('"none"' if option is type(None) else _describe(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (tuple, list) and arguments:
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}: " + ", ".join(_describe(each) for each in arguments)
        return f"a list, each {_describe(arguments[0])}"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dump(config: Any, prefix: str, lines: list[str]) -> None:
    groups = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            groups.append((field.name, value))
        elif not (value is None and field.default is None):
            lines.append(f"{field.name} = {_toml(value)}")
    for name, value in groups:
        lines += ["", f"[{prefix}{name}]"]
        _dump(value, f"{prefix}{name}.", lines)


def _toml(value: object) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        return _text(str(value))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(name))} = {_toml(item)}" for name, item in value.items()) + "}"
    raise TypeError(f"dump_toml: values must be numbers, text, paths, lists or tables, got {type(value).__name__}")


def _text(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    plain = (escapes.get(char, char if char >= " " and char != "\x7f" else f"\\u{ord(char):04x}") for char in text)
    return '"' + "".join(plain) + '"'
