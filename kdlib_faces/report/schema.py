"""Room: report. The shape of the run dict that becomes report.json: checked, and made strict JSON. Imports no plotting.

Unknown keys are kept and never refused, so that a newer program's file still reads; a known key of the wrong kind is
refused with its full path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from kdlib_faces._checks import report_key
from kdlib_faces.report._shape import (
    count,
    each,
    flag,
    mapping,
    number,
    one_of,
    or_null,
    record,
    same_length,
    text,
    values,
)
from kdlib_faces.report.evaluations import check_evaluations

__all__ = ["FORMAT", "check_run", "to_json"]

FORMAT = 1
_DEPTH = 24


def _far(value: Any, path: str) -> None:
    mapping(value, path)
    for key, estimate in value.items():
        try:
            good = 0.0 <= float(key) <= 1.0
        except (TypeError, ValueError):
            good = False
        if not good:
            raise report_key(f"{path}[{key!r}]", "keyed by a false accept rate from 0 to 1", key)
        or_null(_ESTIMATE)(estimate, f"{path}[{key!r}]")


def _histogram(value: Any, path: str) -> None:
    counts = each(or_null(number))
    record({"edges": each(number), "genuine": values(counts), "impostor": counts})(value, path)
    expected = len(value["edges"]) - 1
    named = {f"genuine[{name!r}]": row for name, row in value["genuine"].items()} | {"impostor": value["impostor"]}
    for name, row in named.items():
        if len(row) != expected:
            raise report_key(f"{path}.{name}", f"{expected} counts long to fit edges", f"{len(row)} counts")


_VALUE = or_null(number)
_ESTIMATE = record({"value": _VALUE}, {"low": _VALUE, "high": _VALUE, "n": count})
_EST = or_null(_ESTIMATE)
_BIN = {"auc": _EST, "tar": _far, "own_auc": _EST, "own_tar": _far}
_CURVE = same_length(record({"far": each(_VALUE), "tar": each(_VALUE)}), "far", "tar")
_AGE_GAP = record(
    {
        "kind": one_of("gap", "group"),
        "bins": each(record({"name": text, "genuine": count, "impostor": count}, _BIN)),
    },
    {
        "all": record({}, {"genuine": count, "impostor": count, **_BIN}),
        "roc": values(or_null(_CURVE)),
        "histogram": _histogram,
    },
)
_VERIFICATION = record(
    {"accuracy": _VALUE}, {"std": _VALUE, "folds": each(_VALUE), "threshold_rule": text, "pairs": count}
)
_PROTOCOLS = record(
    {},
    {
        "age_gap": _AGE_GAP,
        "verification": _VERIFICATION,
        "leave_one_out": record({}, {"rank1": _EST, "rank5": _EST, "probes": count}),
    },
)
_MODEL = record(
    {"role": one_of("teacher", "student"), "protocols": _PROTOCOLS},
    {
        "label": text,
        "backbone": text,
        "parameters": count,
        "macs": number,
        "latency_ms": number,
        "input_size": count,
        "train_seconds": number,
        "train_steps": count,
    },
)
_TRAINING = same_length(
    record({"step": each(number), "loss": each(_VALUE)}, {"terms": values(each(_VALUE))}), "step", "loss"
)
_COMPARISON = record(
    {"a": text, "b": text, "bin": text, "metric": text, "difference": _ESTIMATE},
    {"protocol": text, "separate": flag},
)
_COUNTS = dict.fromkeys(("train_images", "train_identities", "test_images", "test_identities"), count)
_RUN = record(
    {"format": count, "title": text, "models": values(_MODEL)},
    {
        "command": text,
        "created": text,
        "version": text,
        "seeds": each(count),
        "config": mapping,
        "environment": mapping,
        "data": record({}, {"name": text, "notes": each(text), "synthetic": flag, **_COUNTS}),
        "comparisons": each(_COMPARISON),
        "teachers_kept": values(_VALUE),
        "weights": values(values(_VALUE)),
        "training": values(_TRAINING),
        "agreement": mapping,
        "figures": values(text),
        "pictures": values(record({}, {"title": text, "caption": text})),
        "per_seed": each(record({"seed": count, "models": values(mapping)})),
        "level": number,
        "evaluations": each(mapping),
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
    check_evaluations(run.get("evaluations") or (), run["models"])
    for index, entry in enumerate(run.get("per_seed") or ()):
        for name, model in entry["models"].items():
            if model.get("protocols") is not None:
                _PROTOCOLS(model["protocols"], f"run.per_seed[{index}].models[{name!r}].protocols")
    for name, curve in (run.get("training") or {}).items():
        for term, logged in (curve.get("terms") or {}).items():
            if len(logged) != len(curve["step"]):
                path = f"run.training[{name!r}].terms[{term!r}]"
                raise report_key(path, f"{len(curve['step'])} long to fit step", f"{len(logged)} values")


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
