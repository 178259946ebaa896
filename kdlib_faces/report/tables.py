"""Tables of a report as plain cells, shown alike in HTML and in Markdown."""

from collections.abc import Mapping
from typing import NamedTuple

from kdlib_faces.evaluation.summary import MeasuredValue, ModelSummary, ProtocolSummary, Unit
from kdlib_faces.report import numbers
from kdlib_faces.report.deployment import Deployment
from kdlib_faces.report.numbers import NOT_MEASURED
from kdlib_faces.report.schema import Report

__all__ = [
    "Cell", "Table", "bins_table", "data_table", "differences_table", "facts", "forms_table", "measured", "measures_table",
    "models_table", "overview_table", "runtimes_table", "seeds_table", "weights_table",
]  # fmt: skip


class Cell(NamedTuple):
    """A text and the small print below it."""

    text: str
    note: str = ""


class Table(NamedTuple):
    """Titles of the columns, rows whose first cell is a heading, and the model of each column (None for no model)."""

    columns: list[str]
    rows: list[list[Cell]]
    models: list[str | None]


def measured(summary: ProtocolSummary, model: str, key: str) -> MeasuredValue:
    """One measure of one model; a value of None where it was not measured."""
    return summary.models.get(model, ModelSummary()).measures.get(key, MeasuredValue())


def _cell(value: MeasuredValue, unit: Unit) -> Cell:
    notes = [numbers.interval(value, unit), numbers.shorten(value.note)]
    return Cell(numbers.amount(value, unit), "; ".join(note for note in notes if note))


def _by_model(report: Report, names: list[str], rows: list[list[Cell]], first: tuple[str, ...] = ("",)) -> Table:
    """A table with one column per model; rows without any value are left out."""
    kept = [row for row in rows if any(cell.text != NOT_MEASURED for cell in row[len(first) :])]
    return Table([*first, *map(report.label, names)], kept, [*[None] * len(first), *names])


def overview_table(report: Report) -> Table:
    """One row per protocol: the first measure of all models."""
    rows = []
    for summary in report.evaluations:
        for key, measure in list(summary.measures.items())[:1]:
            values = [measured(summary, name, key) for name in report.models]
            cells = [Cell(numbers.amount(each, measure.unit), numbers.interval(each, measure.unit)) for each in values]
            title = f"{measure.title}, {measure.note}" if measure.note else measure.title
            rows.append([Cell(summary.title, title), *cells])
    return _by_model(report, list(report.models), rows)


def measures_table(report: Report, summary: ProtocolSummary) -> Table:
    """One row per measure of a protocol."""
    rows = []
    for key, measure in summary.measures.items():
        cells = [_cell(measured(summary, name, key), measure.unit) for name in summary.models]
        rows.append([Cell(measure.title, measure.note), *cells])
    return _by_model(report, list(summary.models), rows)


def bins_table(report: Report, summary: ProtocolSummary, key: str) -> Table:
    """One row per bin."""
    bins = summary.bins[key]
    names = [name for name, result in summary.models.items() if result.bins.get(key)]
    rows = []
    for at, label in enumerate(bins.labels):
        size = None if bins.counts is None else bins.counts[at]
        cells = [_cell(summary.models[name].bins[key][at], bins.unit) for name in names]
        rows.append([Cell(label.replace("-", "–")), Cell(NOT_MEASURED if size is None else f"{size:,}"), *cells])
    return Table([bins.axis or "Bin", "n", *map(report.label, names)], rows, [None, None, *names])


def differences_table(report: Report, summary: ProtocolSummary) -> Table:
    """One row per pair of models and measure, in the order of the measures."""
    order = list(summary.measures)
    rows = []
    for row in sorted(summary.differences, key=lambda row: order.index(row.measure)):
        measure, value = summary.measures[row.measure], row.difference
        side = ends = NOT_MEASURED
        if value.low is not None and value.high is not None:
            side = "includes zero" if value.low <= 0 <= value.high else "above zero" if value.low > 0 else "below zero"
            ends = f"{numbers.points(value.low, measure.unit)} to {numbers.points(value.high, measure.unit)}"
        text = Cell(numbers.points(value.value, measure.unit), "" if ends == NOT_MEASURED else ends)
        pair = Cell(f"{report.label(row.a)} − {report.label(row.b)}")
        rows.append([pair, Cell(measure.title, measure.note), text, Cell(side, value.note)])
    columns = ["Comparison", "Measure", "Difference, points", "Its interval"]
    if len({row[0].text for row in rows}) == 1:  # a single pair of models is named once, above its measures
        return Table([rows[0][0].text, *columns[2:]], [row[1:] for row in rows], [None] * 3)
    return Table(columns, rows, [None] * 4)


def models_table(report: Report) -> Table:
    """Size, speed and training of all models."""
    columns = []
    for model in report.models.values():
        size = f"input {model.input_size} × {model.input_size}" if model.input_size else ""
        note = ", ".join(part for part in (size, numbers.shorten(model.input)) if part)
        steps = "" if model.train_steps is None else f"{model.train_steps:,} steps"
        columns.append([
            Cell(numbers.shorten(model.backbone or NOT_MEASURED, 40), note), Cell(numbers.count(model.parameters)),
            Cell(numbers.count(model.macs)), Cell(numbers.milliseconds(model.latency_ms)),
            Cell(numbers.seconds(model.train_seconds), steps),
        ])  # fmt: skip
    heads = {"Network": "", "Parameters": "", "Multiply-adds": "one image", "Latency": "one image", "Training": ""}
    rows = [[Cell(*head), *cells] for head, *cells in zip(heads.items(), *columns, strict=True)]
    return _by_model(report, list(report.models), rows)


def seeds_table(report: Report) -> Table | None:
    """Mean and range over the seeds, one row per measure; None for a run of one seed."""
    if len(report.per_seed) < 2:
        return None
    rows = []
    for summary in report.evaluations:
        for key, measure in summary.measures.items():
            cells = [Cell(f"{summary.title}: {measure.title}", measure.note)]
            for name in report.models:
                found = [entry.models.get(name, {}).get(summary.name, {}).get(key) for entry in report.per_seed]
                known = [value for value in found if value is not None]
                mean = MeasuredValue()
                if known:
                    mean = MeasuredValue(sum(known) / len(known), min(known), max(known), note=f"{len(known)} seeds")
                cells.append(_cell(mean, measure.unit))
            rows.append(cells)
    return _by_model(report, list(report.models), rows)


def weights_table(report: Report) -> Table | None:
    """Mean weight of each teacher in each loss term; None where no weights were logged."""
    teachers = list(dict.fromkeys(name for row in report.weights.values() for name in row))
    rows = [
        [Cell(term), *(Cell(NOT_MEASURED if (w := row.get(name)) is None else numbers.percent(w)) for name in teachers)]
        for term, row in report.weights.items()
    ]
    return _by_model(report, teachers, rows, ("Loss term",)) if teachers else None


def data_table(report: Report) -> Table | None:
    """Images and identities for training and for the test; None where they are not known."""
    data = report.data
    parts = {"Training": (data.train_identities, data.train_images), "Test": (data.test_identities, data.test_images)}
    rows = [
        [Cell(part), *(Cell(NOT_MEASURED if n is None else f"{n:,}") for n in sizes)] for part, sizes in parts.items()
    ]
    known = any(size is not None for sizes in parts.values() for size in sizes)
    return Table(["Part", "Identities", "Images"], rows, [None] * 3) if known else None


def forms_table(report: Report, deployment: Deployment) -> Table:
    """One row per exported form: the first measure of each protocol, and the cosine to the network."""
    known = [summary for summary in report.evaluations if summary.measures]
    shown = [summary for summary in known if any(summary.name in form.measures for form in deployment.forms)]
    first = {summary.name: next(iter(summary.measures.values())) for summary in shown}
    rows = [
        [
            Cell(report.label(form.model), numbers.shorten(form.form)),
            *(_cell(form.measures.get(name, MeasuredValue()), measure.unit) for name, measure in first.items()),
            Cell(NOT_MEASURED if form.cosine is None else f"{form.cosine:.4f}"),
        ]
        for form in deployment.forms
    ]
    heads = [f"{summary.title}: {first[summary.name].title}" for summary in shown]
    columns = ["Model and form", *heads, "Cosine to the network"]
    return Table(columns, rows, [None] * len(columns))


def runtimes_table(report: Report, deployment: Deployment) -> Table:
    """One row per form, number of threads and batch."""
    rows = []
    for row in deployment.runtimes:
        values = (row.images_per_second, row.peak_mib, row.file_mib)
        digits = (0, 0, 2)
        rows.append([
            Cell(report.label(row.model), numbers.shorten(row.form)), Cell(str(row.threads)), Cell(str(row.batch)),
            Cell(numbers.milliseconds(row.milliseconds), numbers.shorten(row.note)),
            *(Cell(NOT_MEASURED if n is None else f"{n:,.{k}f}") for n, k in zip(values, digits, strict=True)),
        ])  # fmt: skip
    columns = ["Model and form", "Threads", "Batch", "One forward", "Images/s", "Peak memory, MiB", "File, MiB"]
    return Table(columns, rows, [None] * len(columns))


def facts(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of dotted name and text.

    Examples:
        >>> facts({"train": {"steps": 300, "lr": 0.05}, "ages": [5, 10]})
        [('train.steps', '300'), ('train.lr', '0.05'), ('ages', '5, 10')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += facts(value, f"{prefix}{key}.")
            continue
        text = ", ".join(map(str, value)) or "(none)" if isinstance(value, list | tuple) else str(value)
        text = f"{value:.6g}" if isinstance(value, float) else NOT_MEASURED if value is None else text
        rows.append((f"{prefix}{key}", numbers.shorten(text, 400)))
    return rows
