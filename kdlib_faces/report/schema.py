"""Dataclasses of report.json, and the checks that types alone cannot express."""

import re
from collections.abc import Collection, Sized
from dataclasses import dataclass, field

from kdlib_faces._checks import report_key
from kdlib_faces.evaluation.summary import DataSummary, ModelEntry, ModelSummary, ProtocolSummary

__all__ = [
    "FORMAT",
    "PICTURE_NAME",
    "PictureEntry",
    "Report",
    "SeedEntry",
    "StudentPair",
    "TrainingCurve",
    "check_report",
]

FORMAT = 1
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

    def label(self, name: str) -> str:
        """The name of a model for readers."""
        entry = self.models.get(name)
        return name if entry is None else entry.label or name.replace("_", " ")


def check_report(report: Report) -> None:
    """Check that names are known and lists have fitting lengths.

    Raises:
        InputError: A model, measure or axis of bins is unknown, a name is invalid or used twice, a cost is negative, or a
            list has the wrong length.
    """
    if not report.models:
        raise report_key("run.models", "at least one model", report.models)
    for name, model in report.models.items():
        costs = {"macs": model.macs, "latency_ms": model.latency_ms, "train_seconds": model.train_seconds}
        for key, amount in costs.items():
            if amount is not None and amount < 0:
                raise report_key(f"run.models[{name!r}].{key}", "a number >= 0", amount)
    if report.pair is not None:
        for side, name in (("distilled", report.pair.distilled), ("alone", report.pair.alone)):
            _known(name, report.models, f"run.pair.{side}")
    for name in report.pictures:
        if not PICTURE_NAME.fullmatch(name):
            raise report_key("run.pictures", "keyed by names of 1 to 64 letters, digits, _ or -", name)
    for name, curve in report.training.items():
        path = f"run.training[{name!r}]"
        _fits(curve.loss, curve.step, "step", f"{path}.loss")
        for term, losses in curve.terms.items():
            _fits(losses, curve.step, "step", f"{path}.terms[{term!r}]")
    seen: set[str] = set()
    for index, summary in enumerate(report.evaluations):
        path = f"run.evaluations[{index}]"
        if not _NAME.fullmatch(summary.name) or summary.name.casefold() in seen:
            raise report_key(f"{path}.name", "1 to 48 letters, digits or _, used once", summary.name)
        seen.add(summary.name.casefold())
        for key, bins in summary.bins.items():
            for side, values in (("at", bins.at), ("counts", bins.counts)):
                if values is not None:
                    _fits(values, bins.labels, "labels", f"{path}.bins[{key!r}].{side}")
        for name, result in summary.models.items():
            _known(name, report.models, f"{path}.models")
            _check_result(summary, result, f"{path}.models[{name!r}]")
        for at, row in enumerate(summary.differences):
            _known(row.a, summary.models, f"{path}.differences[{at}].a")
            _known(row.b, summary.models, f"{path}.differences[{at}].b")
            _known(row.measure, summary.measures, f"{path}.differences[{at}].measure")


def _check_result(summary: ProtocolSummary, result: ModelSummary, path: str) -> None:
    for key in result.measures:
        _known(key, summary.measures, f"{path}.measures")
    for key, row in result.bins.items():
        _known(key, summary.bins, f"{path}.bins")
        _fits(row, summary.bins[key].labels, "labels", f"{path}.bins[{key!r}]")
    if (roc := result.roc) is not None:
        _fits(roc.tar, roc.far, "far", f"{path}.roc.tar")
    if (cmc := result.cmc) is not None:
        _fits(cmc.rate, cmc.rank, "rank", f"{path}.cmc.rate")
    if (search := result.search) is not None:
        _fits(search.tpir, search.fpir, "fpir", f"{path}.search.tpir")
    if (histogram := result.histogram) is not None:
        for side, counts in (("genuine", histogram.genuine), ("impostor", histogram.impostor)):
            _fits(counts, histogram.edges[1:], "edges", f"{path}.histogram.{side}")


def _known(name: str, names: Collection[str], path: str) -> None:
    if name not in names:
        raise report_key(path, f"among {', '.join(names) or 'none'}", name)


def _fits(values: Sized, reference: Sized, name: str, path: str) -> None:
    if len(values) != len(reference):
        raise report_key(path, f"{len(reference)} long to fit {name}", f"{len(values)} values")
