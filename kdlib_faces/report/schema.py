"""Dataclasses of report.json, and the checks that types alone cannot express."""

import math
import re
from collections.abc import Collection, Iterable, Sized
from dataclasses import dataclass, field
from itertools import pairwise

from kdlib_faces._checks import report_key
from kdlib_faces.evaluation.summary import (
    DataSummary,
    Measure,
    MeasuredValue,
    ModelEntry,
    ModelSummary,
    ProtocolSummary,
    Unit,
)
from kdlib_faces.report.deployment import Deployment
from kdlib_faces.report.numbers import isolate, shorten, visible

__all__ = [
    "FORMAT", "PICTURE_NAME", "PictureEntry", "Report", "SeedEntry", "StudentPair", "TrainingCurve", "check_report",
]  # fmt: skip

FORMAT = 1
_ROUNDING = 1e-6
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,47}")
PICTURE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass
class TrainingCurve:
    """Logged losses of a training.

    Attributes:
        step: Steps.
        loss: Total loss at each step.
        terms: Name of a term to its loss at each step.
    """

    step: list[float]
    loss: list[float | None]
    terms: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass
class StudentPair:
    """The models that the headline compares: a distilled student, and the same student trained without teachers."""

    distilled: str
    alone: str


@dataclass
class SeedEntry:
    """Results of one seed: model name to protocol name to measure key to value."""

    seed: int
    models: dict[str, dict[str, dict[str, float | None]]]


@dataclass
class PictureEntry:
    """Heading and caption of the picture figures/NAME.png."""

    title: str
    caption: str = ""


@dataclass
class Report:
    """The content of report.json.

    Attributes:
        title: Heading.
        models: Model name to its entry, in the order of the report.
        command: Command line of the run.
        created: Time of the run in ISO 8601.
        version: Version of the program.
        seeds: Seeds of the run.
        config: Configuration.
        environment: Versions and machine.
        data: Training and test data.
        level: Confidence level of all intervals.
        evaluations: Results by protocol; the first measure of the first protocol is the headline measure.
        pair: Students to compare in the headline.
        training: Model name to its training curve.
        weights: Loss term to the mean weight of each teacher.
        per_seed: Results of each seed, for runs of several seeds.
        pictures: Name to heading and caption of each picture.
        deployment: Exported forms of the models.

    Examples:
        >>> models = {"large": ModelEntry("teacher"), "small": ModelEntry("student", label="Small network")}
        >>> report = Report("Two models", models, training={"small": TrainingCurve(step=[1, 2], loss=[0.9, 0.4])})
        >>> check_report(report)
        >>> report.training["medium"] = TrainingCurve(step=[1], loss=[0.5])
        >>> check_report(report)
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: report: run.training must be among large, small, got 'medium'
    """

    title: str
    models: dict[str, ModelEntry]
    command: str = ""
    created: str = ""
    version: str = ""
    seeds: list[int] = field(default_factory=list)
    config: dict[str, object] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)
    data: DataSummary = field(default_factory=DataSummary)
    level: float = 0.95
    evaluations: list[ProtocolSummary] = field(default_factory=list)
    pair: StudentPair | None = None
    training: dict[str, TrainingCurve] = field(default_factory=dict)
    weights: dict[str, dict[str, float | None]] = field(default_factory=dict)
    per_seed: list[SeedEntry] = field(default_factory=list)
    pictures: dict[str, PictureEntry] = field(default_factory=dict)
    deployment: Deployment | None = None

    def label(self, name: str) -> str:
        """The name of a model for readers."""
        entry = self.models.get(name)
        return isolate(visible(name if entry is None else entry.label or name.replace("_", " ")))


def check_report(report: Report) -> None:
    """Check that names are known, lists have fitting lengths, and rates, levels and costs lie in their ranges.

    Raises:
        InputError: The message names the path of the first wrong value.
    """
    for name, many, low, high in (
        ("models", report.models, 1, 100), ("evaluations", report.evaluations, 0, 200), ("pictures", report.pictures, 0, 50_000),
    ):  # fmt: skip
        if not low <= len(many) <= high:
            raise report_key(f"run.{name}", f"{low} to {high:,} entries", len(many))
    if not 0 < report.level < 1:
        raise report_key("run.level", "above 0 and below 1", report.level)
    for name, model in report.models.items():
        costs = {"macs": model.macs, "latency_ms": model.latency_ms, "train_seconds": model.train_seconds}
        for key, amount in costs.items():
            if amount is not None and amount < 0:
                raise report_key(f"run.models[{name!r}].{key}", "a number >= 0", amount)
    if report.pair is not None:
        for side, name in (("distilled", report.pair.distilled), ("alone", report.pair.alone)):
            _check_known(name, report.models, f"run.pair.{side}")
    for name in report.pictures:
        if not PICTURE_NAME.fullmatch(name):
            raise report_key("run.pictures", "keyed by names of 1 to 64 letters, digits, _ or -", name)
    for name, curve in report.training.items():
        path = f"run.training[{name!r}]"
        _check_known(name, report.models, "run.training")
        _check_count(curve.step, f"{path}.step", 1_000_000)
        _check_length(curve.loss, curve.step, "step", f"{path}.loss")
        for term, losses in curve.terms.items():
            _check_length(losses, curve.step, "step", f"{path}.terms[{term!r}]")
    for term, row in report.weights.items():
        _check_range(row.values(), f"run.weights[{term!r}]")
    seen: set[str] = set()
    for index, summary in enumerate(report.evaluations):
        path = f"run.evaluations[{index}]"
        if not _NAME.fullmatch(summary.name) or summary.name.casefold() in seen:
            raise report_key(f"{path}.name", "1 to 48 letters, digits or _, used once", summary.name)
        seen.add(summary.name.casefold())
        _check_protocol(report, summary, path)
    protocols = {summary.name: summary.measures for summary in report.evaluations}
    if report.deployment is not None:
        _check_deployment(report, report.deployment)
    for at, entry in enumerate(report.per_seed):
        for name, results in entry.models.items():
            _check_known(name, report.models, f"run.per_seed[{at}].models")
            for protocol, values in results.items():
                _check_known(protocol, protocols, f"run.per_seed[{at}].models[{name!r}]")
                for key in values:
                    _check_known(key, protocols[protocol], f"run.per_seed[{at}].models[{name!r}][{protocol!r}]")


def _check_deployment(report: Report, deployment: Deployment) -> None:
    path, protocols = "run.deployment", {summary.name: summary for summary in report.evaluations}
    _check_count(deployment.forms, f"{path}.forms", 1000)
    _check_count(deployment.runtimes, f"{path}.runtimes", 10_000)
    for at, form in enumerate(deployment.forms):
        _check_known(form.model, report.models, f"{path}.forms[{at}].model")
        _check_range([form.cosine], f"{path}.forms[{at}].cosine", low=-1.0)
        for name, value in form.measures.items():
            _check_known(name, protocols, f"{path}.forms[{at}].measures")
            measure = next(iter(protocols[name].measures.values()), Measure("", "number"))
            _check_value(value, measure.unit, f"{path}.forms[{at}].measures[{name!r}]")
    for at, row in enumerate(deployment.runtimes):
        _check_known(row.model, report.models, f"{path}.runtimes[{at}].model")
        for key in ("milliseconds", "images_per_second", "peak_mib", "file_mib"):
            _check_range([getattr(row, key)], f"{path}.runtimes[{at}].{key}", high=math.inf)


def _check_protocol(report: Report, summary: ProtocolSummary, path: str) -> None:
    for name in summary.pictures:
        _check_known(name, report.pictures, f"{path}.pictures")
    _check_range(summary.counts.values(), f"{path}.counts", high=math.inf)
    for name in summary.scores:
        _check_known(name, summary.models, f"{path}.scores")
    _check_count(summary.measures, f"{path}.measures", 1000)
    _check_count(summary.bins, f"{path}.bins", 100)
    _check_count(summary.differences, f"{path}.differences", 100_000)
    for key, bins in summary.bins.items():
        _check_count(bins.labels, f"{path}.bins[{key!r}].labels", 10_000)
        for side, values in (("at", bins.at), ("counts", bins.counts)):
            if values is not None:
                _check_length(values, bins.labels, "labels", f"{path}.bins[{key!r}].{side}")
    for name, result in summary.models.items():
        _check_known(name, report.models, f"{path}.models")
        _check_result(summary, result, f"{path}.models[{name!r}]")
    for at, row in enumerate(summary.differences):
        _check_known(row.a, summary.models, f"{path}.differences[{at}].a")
        _check_known(row.b, summary.models, f"{path}.differences[{at}].b")
        _check_known(row.measure, summary.measures, f"{path}.differences[{at}].measure")
        _check_value(
            row.difference, summary.measures[row.measure].unit, f"{path}.differences[{at}].difference", low=-1.0
        )


def _check_result(summary: ProtocolSummary, result: ModelSummary, path: str) -> None:
    for key, value in result.measures.items():
        _check_known(key, summary.measures, f"{path}.measures")
        _check_value(value, summary.measures[key].unit, f"{path}.measures[{key!r}]")
    for key, row in result.bins.items():
        _check_known(key, summary.bins, f"{path}.bins")
        _check_length(row, summary.bins[key].labels, "labels", f"{path}.bins[{key!r}]")
        for at, value in enumerate(row):
            _check_value(value, summary.bins[key].unit, f"{path}.bins[{key!r}][{at}]")
    for kind, curve in (("roc", result.roc), ("search", result.search), ("cmc", result.cmc)):
        if curve is not None:
            (x, points), (y, rates) = vars(curve).items()
            _check_count(points, f"{path}.{kind}.{x}", 100_000)
            _check_length(rates, points, x, f"{path}.{kind}.{y}")
            _check_range(rates, f"{path}.{kind}.{y}")
            _check_range(points, f"{path}.{kind}.{x}", high=math.inf if kind == "cmc" else 1.0)
    if (histogram := result.histogram) is not None:
        edges = histogram.edges
        _check_count(edges, f"{path}.histogram.edges", 10_000)
        if len(edges) < 2 or any(low >= high for low, high in pairwise(edges)):
            raise report_key(f"{path}.histogram.edges", "at least two numbers that rise", edges)
        for side, counts in (("genuine", histogram.genuine), ("impostor", histogram.impostor)):
            _check_length(counts, edges[1:], "edges", f"{path}.histogram.{side}")
            _check_range(counts, f"{path}.histogram.{side}", high=math.inf)


def _check_known(name: str, names: Collection[str], path: str) -> None:
    if name not in names:
        raise report_key(path, f"among {shorten(', '.join(names), 200) or 'none'}", name)


def _check_count(values: Sized, path: str, limit: int) -> None:
    if len(values) > limit:
        raise report_key(path, f"at most {limit:,} entries", len(values))


def _check_length(values: Sized, reference: Sized, name: str, path: str) -> None:
    if len(values) != len(reference):
        raise report_key(path, f"{len(reference)} long to fit {name}", f"{len(values)} values")


def _check_value(value: MeasuredValue, unit: Unit, path: str, *, low: float = 0.0) -> None:
    """A value and the ends of its interval: between `low` and 1 for rates and AUC, and in order."""
    if unit in ("rate", "auc"):
        _check_range((value.value, value.low, value.high), path, low=low)
    if value.low is not None and value.high is not None and value.low > value.high:
        raise report_key(f"{path}.low", "at most the high end", value.low)


def _check_range(values: Iterable[float | None], path: str, *, low: float = 0.0, high: float = 1.0) -> None:
    for value in values:
        if value is not None and not low - _ROUNDING <= value <= high + _ROUNDING:
            raise report_key(path, f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}", value)
