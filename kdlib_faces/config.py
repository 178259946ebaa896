"""Configurations: nested frozen dataclasses from TOML files and `key=value` settings, and back to TOML."""

import dataclasses
import re
import tomllib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from kdlib_faces._checks import InputError, show_name

__all__ = ["Configuration", "dump_toml", "load_config", "read_toml", "refuse_unused", "to_toml", "walk_settings"]

T = TypeVar("T", bound="Configuration")
MAX_BYTES = 1_000_000
MAX_INTEGER = 2**63 - 1
# The parser needs memory in the square of the parts of a key.
DEEP_KEY = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){32}""")


class Configuration(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


def load_config(
    cls: type[T],
    path: str | PathLike[str] | None = None,
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    base: T | None = None,
    other_tables: Collection[str] = (),
) -> T:
    """Build a configuration dataclass from its defaults, a TOML file and overrides, in increasing priority.

    Fields may be bool, int, float, str, `Path`, `Literal`, tuples, lists and dicts of these, nested dataclasses, and
    any of them or None. An integer is accepted for a float, and the text `"none"` for None; nothing else is converted.

    Args:
        cls: a dataclass whose fields all have defaults.
        path: a TOML file; tables are nested dataclasses.
        overrides: settings `"a.b=3"`, whose right side is a TOML value or otherwise plain text; or a mapping from
            `"a.b"` to values.
        base: a configuration whose values replace the defaults.
        other_tables: names of tables of the file that hold something other than settings.

    Raises:
        InputError: the file is missing or not TOML, a key is unknown (the message lists the nearest), a value has
            another type, or the dataclass rejects it; the message names the key and its source.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     steps: int = 10
        ...     rate: float = 0.1
        >>> load_config(Config, overrides=["rate=1e-2"])
        Config(steps=10, rate=0.01)
    """
    settings: dict[str, tuple[object, str]] = {}
    if path is not None:
        for key, value in read_toml(Path(path)).items():
            if key not in other_tables:
                _set(cls, key, value, str(path), settings)
    items = overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides)
    for key, value in items:
        _set(cls, key, value, f"{key}={_show(value)}", settings)
    config: T = _build(cls, "", settings, base)
    return config


def dump_toml(config: Configuration) -> str:
    """Write a configuration dataclass as TOML that `load_config` reads back to an equal object.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     steps: int = 10
        ...     name: str = "a"
        >>> print(dump_toml(Config()), end="")
        steps = 10
        name = "a"
    """
    return tomli_w.dumps(to_toml(config))


def walk_settings(config: Configuration, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of each setting of a configuration dataclass, nested ones included.

    Examples:
        >>> from kdlib_faces.training import RunConfig
        >>> dict(walk_settings(RunConfig()))["training.batch_size"]
        64
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from walk_settings(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def refuse_unused(
    config: Configuration,
    reasons: Mapping[str, str],
    *,
    base: Configuration | None = None,
    command: str = "train",
) -> None:
    """Refuse settings that differ from their defaults in a run that does not read them.

    Args:
        config: The settings of the run, a dataclass with defaults.
        reasons: Dotted names of settings, or groups of them, that this run does not read, each with the reason.
        base: The configuration that holds the defaults of this run; None for those of the dataclass.
        command: The command, for the message.

    Raises:
        InputError: One of them was changed.

    Examples:
        >>> from kdlib_faces.training import TrainingConfig
        >>> reasons = {"ema_decay": "the result is the last checkpoint"}
        >>> refuse_unused(TrainingConfig(lr=0.2), reasons)
        >>> refuse_unused(TrainingConfig(ema_decay=0.999), reasons)
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: train: ema_decay=0.999 has no effect: the result is the last checkpoint
    """
    defaults = dict(walk_settings(type(config)() if base is None else base))
    for name, reason in reasons.items():
        for setting, value in walk_settings(config):
            if f"{setting}.".startswith(f"{name}.") and value != defaults[setting]:
                raise InputError(f"{command}: {setting}={value} has no effect: {reason}")


def to_toml(config: Configuration) -> dict[str, object]:
    """Return a configuration as a TOML table. TOML has no null: fields that are None and None by default are omitted.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     output: Path = Path("runs")
        ...     steps: int | None = None
        ...     lr: float | None = 0.1
        >>> to_toml(Config(lr=None))
        {'output': 'runs', 'lr': 'none'}
    """
    items = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {field.name: _toml_value(item) for field, item in items if item is not None or field.default is not None}


def _toml_value(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_toml(value)
    if isinstance(value, Mapping):
        return {str(name): _toml_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_toml_value(item) for item in value]
    if value is None:
        return "none"
    return str(value) if isinstance(value, Path) else value


def read_toml(path: Path) -> dict[str, object]:
    """Read a TOML file of at most a million bytes.

    Raises:
        InputError: the file is missing, unreadable or not TOML.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.toml").write_text("[training]\\nsteps = 100\\n")
        ...     read_toml(Path(folder, "run.toml"))
        {'training': {'steps': 100}}
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: a configuration has at most {MAX_BYTES:,} bytes")
        return _parse_toml(raw.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"configuration not found: {path}") from None
    except OSError as error:
        raise InputError(f"configuration not readable: {path} ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise InputError(f"{path}: tables or lists are nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def _parse_toml(text: str) -> dict[str, object]:
    """Parse TOML.

    Raises:
        ValueError: It is not TOML, a key has more than 32 parts, or a number has more digits than Python converts.
        RecursionError: It is nested too deeply.
    """
    if DEEP_KEY.search(text):
        raise ValueError("a key has more than 32 parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("a number has too many digits") from None


def _split(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"a setting must be key=value, got {text!r}")
    try:
        parsed = _parse_toml(f"value = {value.strip()}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()
    return key.strip(), parsed


def _set(
    cls: type[Configuration],
    key: str,
    value: object,
    source: str,
    settings: dict[str, tuple[object, str]],
    prefix: str = "",
    root: type[Configuration] | None = None,
) -> None:
    """Convert the value of the field with the dotted name `key`; a table sets the fields of a nested dataclass."""
    name, _, rest = key.partition(".")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    full, root = prefix + name, root or cls
    if name not in names:
        near = _nearest_settings(prefix + key, [prefix + each for each in names], [*_settings(root)])
        raise InputError(f"{source}: no setting named {_show(full)!r}{near}")
    nested = hints[name] if dataclasses.is_dataclass(hints[name]) else None
    if nested is None:
        if rest:
            raise InputError(f"{source}: {full!r} is a single value without {_show(rest)!r}")
        settings[full] = (_convert(hints[name], value, full, source), source)
    elif rest:
        _set(nested, rest, value, source, settings, f"{full}.", root)
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            _set(nested, inner, item, source, settings, f"{full}.", root)
    else:
        raise InputError(f"{source}: {full!r} is a group of settings, got {_show(value)}")


def _settings(cls: type[Configuration], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings of a dataclass."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _settings(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _nearest_settings(key: str, beside: list[str], known: list[str]) -> str:
    """The settings of that name in other groups, else those of a similar name."""
    from kdlib._checks import nearest  # imports torch, which a valid configuration does not need

    same = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; the nearest are {', '.join(map(repr, same))}" if same else nearest(_show(key), [*beside, *known])


def _build(cls: type[T], prefix: str, settings: Mapping[str, tuple[object, str]], base: T | None = None) -> T:
    """Return `base`, or the defaults of `cls`, with the fields of `settings` below `prefix` changed."""
    values: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        full = prefix + field.name
        if full in settings:
            values[field.name] = settings[full][0]
        elif any(key.startswith(f"{full}.") for key in settings):
            nested = hints[field.name]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            start = default if base is None else getattr(base, field.name)
            values[field.name] = _build(nested, f"{full}.", settings, start)
    sources = ", ".join(dict.fromkeys(source for key, (_, source) in settings.items() if key.startswith(prefix)))
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{sources}: {error}" if sources else str(error)) from error


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _convert(hint: Any, value: object, key: str, source: str) -> object:
    """Convert `value` to the type `hint`, or raise an error that names the expected type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value == "none"):
            return None
        for option in arguments:
            try:
                return _convert(option, value, key, source)
            except InputError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin in (tuple, list):
        if isinstance(value, (list, tuple)):
            fixed = origin is tuple and arguments[-1] is not Ellipsis
            hints = arguments if fixed else arguments[:1] * len(value)
            if len(hints) == len(value):
                return origin(_convert(hints[at], item, f"{key}[{at}]", source) for at, item in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(name): _convert(arguments[1], item, f"{key}.{name}", source) for name, item in value.items()}
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        pass
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif type(value) is hint:
        return value
    raise InputError(f"{source}: {key} must be {_describe(hint)}, got {_show(value)}")


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


def _show(value: object) -> str:
    if type(value) is int and abs(value) > MAX_INTEGER:
        return f"a number of {value.bit_length()} bits"
    text = value if isinstance(value, str) else repr(value).lower() if isinstance(value, bool) else repr(value)
    return show_name(text, 80)
