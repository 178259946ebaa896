"""Room: report. The shape of the run dict that becomes report.json: checked, and made strict JSON. Imports no plotting.

Unknown keys are kept and never refused, so that a newer program's file still reads; a known key of the wrong kind is
refused with its full path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from kdlib_faces._checks import InputError, report_key

__all__ = ["FORMAT", "check_run", "to_json"]

FORMAT = 1
_DEPTH = 24

Check = Callable[[Any, str], None]


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise report_key(path, "text", value)


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise report_key(path, "a number", value)


def _count(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise report_key(path, "a whole number >= 0", value)


def _flag(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise report_key(path, "true or false", value)


def _anything(value: Any, path: str) -> None:
    return None


def _mapping(value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
        raise report_key(path, "a mapping", value)


def _far(value: Any, path: str) -> None:
    _mapping(value, path)
    for key, estimate in value.items():
        try:
            good = 0.0 <= float(key) <= 1.0
        except (TypeError, ValueError):
            good = False
        if not good:
            raise report_key(f"{path}[{key!r}]", "keyed by a false accept rate from 0 to 1", key)
        _or_null(_ESTIMATE)(estimate, f"{path}[{key!r}]")


def _one_of(*allowed: str) -> Check:
    def check(value: Any, path: str) -> None:
        if value not in allowed:
            raise report_key(path, "one of " + ", ".join(map(repr, allowed)), value)

    return check


def _or_null(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if value is not None:
            inner(value, path)

    return check


def _each(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, list | tuple):
            raise report_key(path, "a list", value)
        for index, item in enumerate(value):
            inner(item, f"{path}[{index}]")

    return check


def _values(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        _mapping(value, path)
        for key, item in value.items():
            inner(item, f"{path}[{key!r}]")

    return check


def _record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        _mapping(value, path)
        for key, inner in required.items():
            if key not in value:
                raise InputError(f"report: {path}.{key} is missing")
            inner(value[key], f"{path}.{key}")
        for key, inner in (optional or {}).items():
            if value.get(key) is not None:
                inner(value[key], f"{path}.{key}")

    return check


def _same_length(inner: Check, first: str, second: str, extra: int = 0) -> Check:
    """`inner`, and the list under `second` is `extra` shorter than the one under `first`."""

    def check(value: Any, path: str) -> None:
        inner(value, path)
        lengths = len(value[first]), len(value[second])
        if lengths[0] - extra != lengths[1]:
            raise report_key(f"{path}.{second}", f"{lengths[0] - extra} long to fit {first}", f"{lengths[1]} values")

    return check


def _histogram(value: Any, path: str) -> None:
    counts = _each(_or_null(_number))
    _record({"edges": _each(_number), "genuine": _values(counts), "impostor": counts})(value, path)
    expected = len(value["edges"]) - 1
    named = {f"genuine[{name!r}]": row for name, row in value["genuine"].items()} | {"impostor": value["impostor"]}
    for name, row in named.items():
        if len(row) != expected:
            raise report_key(f"{path}.{name}", f"{expected} counts long to fit edges", f"{len(row)} counts")


_VALUE = _or_null(_number)
_ESTIMATE = _record({"value": _VALUE}, {"low": _VALUE, "high": _VALUE, "n": _count})
_EST = _or_null(_ESTIMATE)
_BIN = {"auc": _EST, "tar": _far, "own_auc": _EST, "own_tar": _far}
_CURVE = _same_length(_record({"far": _each(_VALUE), "tar": _each(_VALUE)}), "far", "tar")
_AGE_GAP = _record(
    {
        "kind": _one_of("gap", "group"),
        "bins": _each(_record({"name": _text, "genuine": _count, "impostor": _count}, _BIN)),
    },
    {
        "all": _record({}, {"genuine": _count, "impostor": _count, **_BIN}),
        "roc": _values(_or_null(_CURVE)),
        "histogram": _histogram,
    },
)
_VERIFICATION = _record(
    {"accuracy": _VALUE}, {"std": _VALUE, "folds": _each(_VALUE), "threshold_rule": _text, "pairs": _count}
)
_PROTOCOLS = _record(
    {},
    {
        "age_gap": _AGE_GAP,
        "verification": _VERIFICATION,
        "leave_one_out": _record({}, {"rank1": _EST, "rank5": _EST, "probes": _count}),
    },
)
_MODEL = _record(
    {"role": _one_of("teacher", "student"), "protocols": _PROTOCOLS},
    {
        "label": _text,
        "backbone": _text,
        "parameters": _count,
        "macs": _number,
        "latency_ms": _number,
        "input_size": _count,
        "train_seconds": _number,
        "train_steps": _count,
    },
)
_TRAINING = _same_length(
    _record({"step": _each(_number), "loss": _each(_VALUE)}, {"terms": _values(_each(_VALUE))}), "step", "loss"
)
_COMPARISON = _record(
    {"a": _text, "b": _text, "bin": _text, "metric": _text, "difference": _ESTIMATE},
    {"protocol": _text, "separate": _flag},
)
_COUNTS = dict.fromkeys(("train_images", "train_identities", "test_images", "test_identities"), _count)
_RUN = _record(
    {"format": _count, "title": _text, "models": _values(_MODEL)},
    {
        "command": _text,
        "created": _text,
        "version": _text,
        "seeds": _each(_count),
        "config": _mapping,
        "environment": _mapping,
        "data": _record({}, {"name": _text, "notes": _each(_text), "synthetic": _flag, **_COUNTS}),
        "comparisons": _each(_COMPARISON),
        "teachers_kept": _values(_VALUE),
        "weights": _values(_values(_VALUE)),
        "training": _values(_TRAINING),
        "agreement": _mapping,
        "figures": _values(_text),
        "pictures": _values(_record({}, {"title": _text, "caption": _text})),
        "per_seed": _each(_record({"seed": _count, "models": _values(_mapping)})),
        "level": _number,
    },
)


def check_run(run: Mapping[str, Any]) -> None:
    """Refuse a run dict that the report cannot read.

    Args:
        run: the content of report.json. Required: `format`, `title` and `models`; in a model `role` and `protocols`.
            Any other key may be absent or null.

    Raises:
        InputError: a key is missing or of the wrong kind; the message gives the key's path.

    Examples:
        >>> check_run({"format": 1, "title": "Demo", "models": {"m": {"role": "judge", "protocols": {}}}})
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: report: run.models['m'].role must be one of 'teacher', 'student', got 'judge'
    """
    _RUN(run, "run")
    if run["format"] != FORMAT:
        raise report_key("run.format", f"{FORMAT}, the format this version reads", run["format"])
    if not run["models"]:
        raise report_key("run.models", "at least one model", run["models"])
    for index, comparison in enumerate(run.get("comparisons") or ()):
        for side in ("a", "b"):
            if comparison[side] not in run["models"]:
                raise report_key(f"run.comparisons[{index}].{side}", "a name under models", comparison[side])
    for index, entry in enumerate(run.get("per_seed") or ()):
        for name, model in entry["models"].items():
            if model.get("protocols") is not None:
                _PROTOCOLS(model["protocols"], f"run.per_seed[{index}].models[{name!r}].protocols")
    for name, curve in (run.get("training") or {}).items():
        for term, values in (curve.get("terms") or {}).items():
            if len(values) != len(curve["step"]):
                path = f"run.training[{name!r}].terms[{term!r}]"
                raise report_key(path, f"{len(curve['step'])} long to fit step", f"{len(values)} values")


def to_json(value: Any, path: str = "run", depth: int = 0) -> Any:
    """A copy of `value` in plain JSON types: arrays and tuples become lists, non-finite floats null, keys text.

    Raises:
        InputError: something in it has no JSON form, or it is nested too deeply; the message gives the path.

    Examples:
        >>> to_json({0.01: (np.float32(0.5), float("nan"))})
        {'0.01': [0.5, None]}
    """
    if depth > _DEPTH:
        raise report_key(path, f"nested at most {_DEPTH} deep", type(value).__name__)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return to_json(value.tolist(), path, depth)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{path}[{str(key)!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise report_key(path, "text, a number, true or false, null, a list or a mapping", value)
