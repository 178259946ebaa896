"""The thresholds of a model in the report.json of an evaluation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kdlib_faces import report
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation.summary import ProtocolSummary

__all__ = ["Evaluation", "choose_threshold", "read_evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """One model of a report.

    Attributes:
        name: Key of the model.
        thresholds: Those of `operating_thresholds` of the protocol with most impostor pairs, with `"protocol"` and
            `"convention"`.
        summaries: The results of all protocols that evaluated the model.
    """

    name: str
    thresholds: dict[str, object]
    summaries: tuple[ProtocolSummary, ...]


def read_evaluation(given: str, model: Path) -> Evaluation:
    """Read `[NAME=]FILE`: the model NAME of a report.json, by default that of the name of the file, or the only one.

    Raises:
        InputError: The file is no report, has no such model, or its protocols give no thresholds.
    """
    name, equals, file = given.partition("=")
    if not equals or os.path.exists(given):
        name, file = "", given
    content = report.read(Path(file))
    if not name:
        name = model.stem if model.stem in content.models else next(iter(content.models))
        if model.stem not in content.models and len(content.models) > 1:
            raise InputError(
                f"{file}: --evaluation NAME={file} must name one of the models {', '.join(content.models)}"
            )
    if name not in content.models:
        raise InputError(f"{file}: no model named {name!r}; the report has {', '.join(content.models)}")
    found = []
    for key, result in content.models[name].protocols.items():
        entry = result.get("thresholds") if isinstance(result, Mapping) else None
        if isinstance(entry, Mapping) and entry.get("fars") and isinstance(entry.get("impostors"), int):
            found.append((int(entry["impostors"]), key, entry))
    if not found:
        raise InputError(
            f"{file}: no protocol of {name!r} gives thresholds; evaluate pairs (--protocol "
            "pairs=FILE), or a list with the column age or age_group"
        )
    _, key, entry = max(found, key=lambda each: each[:2])
    summaries = tuple(each for each in content.evaluations if name in each.models)
    convention = next((each.convention for each in summaries if each.name == key), {})
    return Evaluation(name, {"protocol": key, "convention": dict(convention), **entry}, summaries)


def choose_threshold(thresholds: object, far: float, where: str) -> float:
    """The threshold at a false accept rate.

    Raises:
        InputError: There is none for this rate; the message gives those that there are, or the reason.
    """
    entry = thresholds if isinstance(thresholds, Mapping) else {}
    points, name = entry.get("fars"), f"{far:g}"
    points = points if isinstance(points, Mapping) else {}
    point = points.get(name)
    if isinstance(point, Mapping) and isinstance(point.get("threshold"), float | int):
        return float(cast(float, point["threshold"]))
    left_out = entry.get("left_out")
    reason = left_out.get(name) if isinstance(left_out, Mapping) else None
    known = f"; there are {', '.join(map(str, points))}" if points else ""
    raise InputError(f"{where}: no threshold for FAR {name}{f' ({reason})' if reason else ''}{known}")
