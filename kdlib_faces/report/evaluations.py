"""Room: report. One protocol's results for all models, in the form that every protocol shares: its shape and its reader.

An entry of the run's `evaluations`:

- `name` (letters, digits, `_`), `title`, and optionally `question` (what is asked, a sentence), `convention` (name -> text:
  threshold rule, pooling, norm, distractors ...), `counts` (name -> number) and `notes`.
- `measures`: key -> `{title, unit, note, better}` in the order of the table, the headline first. `unit` is `rate`, `auc`,
  `score` or `number`, `better` is `high`, `low` or `none`.
- `bins`: key -> `{title, axis, labels, at, counts, unit}`, curves against age gap and the like; with `at`, numbers for
  the axis, the bins have an order and places of their own.
- `models`: name -> what was found: `measures` (key -> `{value, low, high, n, resolvable, note}`), `bins` (key -> a list of
  such estimates), `roc` (`far`, `tar`), `cmc` (`rank`, `rate`), `search` (`fpir`, `tpir`), `histogram` (`edges`,
  `genuine`, `impostor`, `threshold`).
- `differences`: `{a, b, measure, difference}`, by `difference_rule`; `pictures`: names of pictures of this protocol;
  `scores`: model -> file of scores beside the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdlib_faces._checks import report_key
from kdlib_faces.report._shape import (
    Check,
    count,
    each,
    flag,
    number,
    one_of,
    or_null,
    record,
    same_length,
    text,
    values,
)

__all__ = ["Bins", "Difference", "Evaluation", "Measure", "Measured", "check_evaluations"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,47}")
_VALUE = or_null(number)
_UNIT = one_of("rate", "auc", "score", "number")
_MEASURED = record({"value": _VALUE}, {"low": _VALUE, "high": _VALUE, "n": count, "resolvable": flag, "note": text})


def _curve(first: str, second: str) -> Check:
    return same_length(record({first: each(_VALUE), second: each(_VALUE)}), first, second)


_HISTOGRAM = same_length(
    same_length(
        record(
            {"edges": each(number), "genuine": each(number), "impostor": each(number)},
            {"threshold": number},
        ),
        "edges", "genuine", extra=1,
    ),
    "edges", "impostor", extra=1,
)  # fmt: skip
_FOUND = record(
    {},
    {
        "measures": values(or_null(_MEASURED)),
        "bins": values(each(or_null(_MEASURED))),
        "roc": _curve("far", "tar"),
        "cmc": _curve("rank", "rate"),
        "search": _curve("fpir", "tpir"),
        "histogram": _HISTOGRAM,
    },
)
_EVALUATION = record(
    {"name": text, "title": text, "models": values(_FOUND)},
    {
        "question": text,
        "convention": values(text),
        "counts": values(number),
        "notes": each(text),
        "measures": values(
            record({"title": text}, {"unit": _UNIT, "note": text, "better": one_of("high", "low", "none")})
        ),
        "bins": values(
            record(
                {"title": text, "labels": each(text)},
                {"axis": text, "at": each(number), "counts": each(or_null(count)), "unit": _UNIT},
            )
        ),
        "differences": each(
            record({"a": text, "b": text, "measure": text, "difference": _MEASURED}),
        ),
        "difference_rule": text,
        "pictures": each(text),
        "scores": values(text),
    },
)


def check_evaluations(evaluations: Sequence[Any], models: Mapping[str, Any]) -> None:
    """Refuse evaluations that the report cannot read; `models` are the run's.

    Raises:
        InputError: a key is missing or of the wrong kind, a name is unknown or taken twice; the path is named.
    """
    seen: set[str] = set()
    for index, entry in enumerate(evaluations):
        path = f"run.evaluations[{index}]"
        _EVALUATION(entry, path)
        name = entry["name"]
        if not _NAME.fullmatch(name) or name.casefold() in seen:
            raise report_key(f"{path}.name", "1 to 48 letters, digits or _, used once", name)
        seen.add(name.casefold())
        for model, found in entry["models"].items():
            _known(model, models, f"{path}.models")
            for key in found.get("measures") or {}:
                _known(key, entry.get("measures") or {}, f"{path}.models[{model!r}].measures")
            for key, row in (found.get("bins") or {}).items():
                place = f"{path}.models[{model!r}].bins"
                _known(key, entry.get("bins") or {}, place)
                _length(row, entry["bins"][key]["labels"], f"{place}[{key!r}]")
        for key, bins in (entry.get("bins") or {}).items():
            for side in ("at", "counts"):
                if bins.get(side) is not None:
                    _length(bins[side], bins["labels"], f"{path}.bins[{key!r}].{side}")
        for at, difference in enumerate(entry.get("differences") or ()):
            for side in ("a", "b"):
                _known(difference[side], entry["models"], f"{path}.differences[{at}].{side}")
            _known(difference["measure"], entry.get("measures") or {}, f"{path}.differences[{at}].measure")


def _known(name: str, among: Mapping[str, Any], path: str) -> None:
    if name not in among:
        raise report_key(path, f"among {', '.join(map(str, among)) or 'none'}", name)


def _length(row: Sequence[Any], labels: Sequence[Any], path: str) -> None:
    if len(row) != len(labels):
        raise report_key(path, f"{len(labels)} long to fit labels", f"{len(row)} values")


class Measured(NamedTuple):
    """A value with its interval; `resolvable` is False where there were too few impostors for its FAR."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    resolvable: bool = True
    note: str = ""

    @classmethod
    def read(cls, found: Mapping[str, Any] | None) -> Measured:
        """From the JSON form; None gives an estimate of nothing."""
        found = found or {}
        resolvable = found.get("resolvable")
        return cls(
            found.get("value"), found.get("low"), found.get("high"), found.get("n"),
            resolvable is None or bool(resolvable), found.get("note") or "",
        )  # fmt: skip


class Measure(NamedTuple):
    """A row of the table: what is measured and in which unit."""

    key: str
    title: str
    unit: str
    note: str
    better: str


class Bins(NamedTuple):
    """An axis of bins: a title, the axis' name, and the bins' labels, places and sizes."""

    key: str
    title: str
    axis: str
    labels: list[str]
    at: list[float] | None
    counts: list[int | None]
    unit: str


class Difference(NamedTuple):
    """Model `a` minus model `b` by one measure."""

    a: str
    b: str
    measure: Measure
    difference: Measured


class Evaluation:
    """One entry of a checked run's `evaluations`, read by measure and model.

    Args:
        entry: passed `check_evaluations`.
        order: the run's models in the order of the report.

    Examples:
        >>> entry = {"name": "lfw", "title": "LFW", "measures": {"accuracy": {"title": "Accuracy"}},
        ...          "models": {"m": {"measures": {"accuracy": {"value": 0.5}}}}}
        >>> Evaluation(entry, ["other", "m"]).measured("m", "accuracy").value
        0.5
    """

    def __init__(self, entry: Mapping[str, Any], order: Sequence[str]) -> None:
        self.entry = entry
        self.name: str = entry["name"]
        self.title: str = entry["title"]
        self.question: str = entry.get("question") or ""
        self.convention: Mapping[str, str] = entry.get("convention") or {}
        self.counts: Mapping[str, float] = entry.get("counts") or {}
        self.notes: Sequence[str] = entry.get("notes") or ()
        self.pictures: Sequence[str] = entry.get("pictures") or ()
        self.scores: Mapping[str, str] = entry.get("scores") or {}
        self.difference_rule: str = entry.get("difference_rule") or ""
        self.models = [name for name in order if name in entry["models"]]
        self.measures = [
            Measure(key, m["title"], m.get("unit") or "rate", m.get("note") or "", m.get("better") or "high")
            for key, m in (entry.get("measures") or {}).items()
        ]
        self.bins = [
            Bins(
                key, b["title"], b.get("axis") or "", b["labels"], b.get("at"),
                b.get("counts") or [None] * len(b["labels"]), b.get("unit") or "rate",
            )
            for key, b in (entry.get("bins") or {}).items()
        ]  # fmt: skip
        named = {measure.key: measure for measure in self.measures}
        self.differences = [
            Difference(row["a"], row["b"], named[row["measure"]], Measured.read(row["difference"]))
            for row in entry.get("differences") or ()
        ]

    def found(self, model: str, key: str) -> Mapping[str, Any]:
        """`roc`, `cmc`, `search` or `histogram` of a model, empty if absent."""
        return self.entry["models"][model].get(key) or {}

    def having(self, key: str) -> list[str]:
        """The models that have it."""
        return [name for name in self.models if self.found(name, key)]

    def measured(self, model: str, key: str) -> Measured:
        """One measure of one model."""
        return Measured.read((self.entry["models"].get(model) or {}).get("measures", {}).get(key))

    def binned(self, model: str, key: str) -> list[Measured]:
        """One model's estimates of all bins of an axis, empty if it has none."""
        rows = (self.entry["models"][model].get("bins") or {}).get(key) or ()
        return [Measured.read(row) for row in rows]

    def unresolved(self) -> list[Measure]:
        """The measures that some model could not resolve."""
        return [m for m in self.measures if any(not self.measured(name, m.key).resolvable for name in self.models)]
