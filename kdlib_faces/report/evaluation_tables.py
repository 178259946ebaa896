"""Room: report. The tables of the protocols as plain cells: overview, measures, bins, differences."""

from __future__ import annotations

from kdlib_faces.report import words
from kdlib_faces.report.evaluations import Bins, Evaluation, Measured
from kdlib_faces.report.tables import Cell, Table
from kdlib_faces.report.view import View

__all__ = ["bins_table", "differences_table", "measured_words", "measures_table", "overview_table", "spread_words"]

MARK = "\u00a0†"


def measured_words(found: Measured, unit: str) -> str:
    """A value in its unit, a dagger behind it where it could not be resolved."""
    if found.value is None:
        return words.NOTHING
    text = {
        "rate": words.per_cent(found.value, 2),
        "auc": f"{found.value:.4f}",
        "score": f"{found.value:.3f}",
    }.get(unit) or words.number(found.value, 4)
    return text.replace("-", "−") + ("" if found.resolvable else MARK)


def spread_words(found: Measured, unit: str) -> str:
    """The interval in the unit of its value, empty where there is none."""
    if found.low is None or found.high is None or found.value is None:
        return ""
    if unit == "rate":
        return f"{100 * found.low:.2f}–{100 * found.high:.2f}"
    shown = [f"{end:.{4 if unit == 'auc' else 3}f}".replace("-", "−") for end in (found.low, found.high)]
    return f"{shown[0]} to {shown[1]}" if found.low < 0 else "–".join(shown)


def _cell(found: Measured, unit: str) -> Cell:
    parts = [spread_words(found, unit), words.shorten(found.note, 60)]
    return Cell(measured_words(found, unit), "; ".join(part for part in parts if part))


def overview_table(view: View) -> Table:
    """One row a protocol, by its headline measure; one column a model."""
    rows = []
    for evaluation in view.evaluations:
        if evaluation.measures:
            measure = evaluation.measures[0]
            values = [_cell(evaluation.measured(name, measure.key), measure.unit) for name in view.names]
            rows.append([Cell(evaluation.title, measure.title), *values])
    return Table(["", *map(view.label, view.names)], rows, [None, *view.names], {})


def measures_table(view: View, evaluation: Evaluation) -> Table:
    """One row a measure, one column a model."""
    rows = [
        [
            Cell(measure.title, measure.note),
            *(_cell(evaluation.measured(name, measure.key), measure.unit) for name in evaluation.models),
        ]
        for measure in evaluation.measures
    ]
    kept = [row for row in rows if any(cell.text != words.NOTHING for cell in row[1:])]
    return Table(["", *map(view.label, evaluation.models)], kept, [None, *evaluation.models], {})


def bins_table(view: View, evaluation: Evaluation, bins: Bins) -> Table:
    """One row a bin, one column a model."""
    named = [(name, evaluation.binned(name, bins.key)) for name in evaluation.models]
    named = [(name, row) for name, row in named if row]
    rows = [
        [
            Cell(label.replace("-", "–")),
            Cell(f"{bins.counts[at]:,}" if bins.counts[at] is not None else words.NOTHING),
            *(_cell(row[at], bins.unit) for _, row in named),
        ]
        for at, label in enumerate(bins.labels)
    ]
    models = [name for name, _ in named]
    return Table([bins.axis or "Bin", "n", *map(view.label, models)], rows, [None, None, *models], {})


def differences_table(view: View, evaluation: Evaluation) -> Table:
    """Every pair of models by every measure: the difference, its interval, and what may be said of it."""
    rows = []
    place = {measure.key: at for at, measure in enumerate(evaluation.measures)}
    for told in sorted(evaluation.differences, key=lambda each: place[each.measure.key]):
        found, rate = told.difference, told.measure.unit in ("rate", "auc")
        amount = words.points(found.value, 2) if rate else words.number(found.value, 3).replace("-", "−")
        spread = ""
        said = words.NOTHING
        if found.low is not None and found.high is not None:
            ends = [
                words.points(e, 2) if rate else words.number(e, 3).replace("-", "−") for e in (found.low, found.high)
            ]
            spread = f"{ends[0]} to {ends[1]}"
            inside = found.low <= 0 <= found.high
            said = "includes zero" if inside else ("above zero" if found.low > 0 else "below zero")
        pair = f"{view.label(told.a)} − {view.label(told.b)}"
        rows.append(
            [Cell(pair), Cell(told.measure.title, told.measure.note), Cell(amount, spread), Cell(said, found.note)]
        )
    columns = ["Comparison", "Measure", "Difference, points", "Its interval"]
    if len({row[0].text for row in rows}) == 1:  # one pair of models: its name once, above the measures
        return Table([rows[0][0].text, *columns[2:]], [row[1:] for row in rows], [None] * 3, {})
    return Table(columns, rows, [None] * 4, {})
