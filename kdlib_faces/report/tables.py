"""Room: report. The tables of a run as plain cells, written once and set in HTML and in Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kdlib_faces.report import words
from kdlib_faces.report.view import ALL, Estimate, View

__all__ = [
    "Cell",
    "Table",
    "bins_table",
    "comparisons_table",
    "data_table",
    "facts",
    "models_table",
    "seeds_table",
    "weights_table",
]


class Cell(NamedTuple):
    """A value and the small print below it."""

    text: str
    note: str = ""


class Table(NamedTuple):
    """Columns and rows; a row's first cell is its name, and `sections` titles the part that begins at a row."""

    columns: list[str]
    rows: list[list[Cell]]
    models: list[str | None]
    sections: dict[int, str]


def _estimate(estimate: Estimate, metric: str) -> Cell:
    return Cell(words.value(estimate, metric), words.interval(estimate, metric))


def _size(model: Mapping[str, Any]) -> Cell:
    side = model.get("input_size")
    return Cell(words.shorten(model.get("backbone") or words.NOTHING, 40), f"input {side} × {side}" if side else "")


def _ten_fold(model: Mapping[str, Any]) -> Cell:
    result = model["protocols"].get("verification") or {}
    accuracy, std = result.get("accuracy"), result.get("std")
    note = f"± {100 * std:.1f} over folds" if accuracy is not None and std is not None else ""
    return Cell(words.per_cent(accuracy), note)


def _rank(model: Mapping[str, Any], rank: str) -> Cell:
    found = (model["protocols"].get("leave_one_out") or {}).get(rank)
    return _estimate(Estimate.read(found), "rank")


def _trained(model: Mapping[str, Any]) -> Cell:
    steps = model.get("train_steps")
    return Cell(words.seconds(model.get("train_seconds")), f"{steps:,} steps" if steps is not None else "")


def models_table(view: View) -> Table:
    """One column a model, one row a measure: accuracy first, cost below. Rows that no model has are left out."""
    far, large = view.far, view.large
    accuracy: list[list[Cell]] = []
    if large is not None:
        for metric in view.bin_metrics():
            # A bin's own impostors set too few thresholds for a main table; own_tar stands in the tables by bin.
            if view.has(metric, [large]) and not metric.startswith("own_tar"):
                name = Cell(words.metric_name(metric), words.large_words(view))
                accuracy.append([name, *(_estimate(view.estimate(m, large, metric), metric) for m in view.names)])
    for metric in [f"tar@{far}"] * (far is not None) + ["auc"]:
        name = Cell(words.metric_name(metric), "all pairs")
        accuracy.append([name, *(_estimate(view.estimate(m, ALL, metric), metric) for m in view.names)])
    models = [view.models[name] for name in view.names]
    accuracy += [
        [Cell(f"Rank-{rank[-1]}", "leave one out"), *(_rank(model, rank) for model in models)]
        for rank in ("rank1", "rank5")
    ]
    accuracy.append([Cell("Ten-fold accuracy", "verification pairs"), *(_ten_fold(model) for model in models)])
    costs = [
        [Cell("Backbone"), *(_size(model) for model in models)],
        [Cell("Parameters"), *(Cell(words.count(model.get("parameters"))) for model in models)],
        [Cell("Multiply-adds", "one image"), *(Cell(words.count(model.get("macs"))) for model in models)],
        [
            Cell("Latency", "one image"),
            *(
                Cell(words.number(ms) + (" ms" if ms is not None else ""))
                for ms in (model.get("latency_ms") for model in models)
            ),
        ],
        [Cell("Training"), *(_trained(model) for model in models)],
    ]
    if view.evaluations:  # each protocol has its own table of accuracy
        accuracy = []
    kept = [[row for row in rows if any(cell.text != words.NOTHING for cell in row[1:])] for rows in (accuracy, costs)]
    sections = {0: "Accuracy", len(kept[0]): "Cost"} if kept[0] else {0: "Cost"}
    return Table(["", *map(view.label, view.names)], kept[0] + kept[1], [None, *view.names], sections)


def bins_table(view: View, metric: str) -> Table:
    """One row a bin, one column a model, for one metric."""
    rows = []
    for name in [*view.bins, *([ALL] if view.has(metric, [ALL]) else [])]:
        genuine, impostor = view.pairs(name, "genuine"), view.pairs(name, "impostor")
        pairs = [Cell(f"{amount:,}" if amount is not None else words.NOTHING) for amount in (genuine, impostor)]
        values = [_estimate(view.estimate(model, name, metric), metric) for model in view.names]
        rows.append([Cell(words.bin_name(view, name)), *pairs, *values])
    first = "Age gap, years" if view.kind == "gap" else "Age groups"
    columns = [first, "Genuine pairs", "Impostor pairs", *map(view.label, view.names)]
    return Table(columns, rows, [None, None, None, *view.names], {})


def comparisons_table(view: View) -> Table:
    """Every comparison: the difference, its interval, and what may be said of it."""
    rows = []
    for c in view.comparisons:
        _, low, high, _ = c.difference
        said = words.NOTHING
        if low is not None and high is not None:
            side = "includes zero" if low <= 0 <= high else ("above zero" if low > 0 else "below zero")
            said = f"difference {side}"
        own = {True: "separate", False: "overlap", None: words.NOTHING}[c.separate]
        amount = Cell(words.points(c.difference.value), words.interval(c.difference, "difference"))
        pair = f"{view.label(c.a)} − {view.label(c.b)}"
        place = [Cell(pair), Cell(words.bin_name(view, c.bin)), Cell(words.metric_name(c.metric))]
        rows.append([*place, amount, Cell(said), Cell(own)])
    columns = ["Comparison", "Bin", "Metric", "Difference, points", "Its interval", "The two intervals"]
    return Table(columns, rows, [None] * 6, {})


def _seed_values(view: View, model: Mapping[str, Any]) -> dict[str, tuple[float | None, str]]:
    """Metric name -> (value, unit) of one model in one seed: read from its protocols, or flat numbers as given."""
    protocols = model.get("protocols")
    if protocols is None:
        return {str(k): (v, "") for k, v in model.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    one = View({**view.run, "models": {"m": {"role": "student", "protocols": protocols}}, "comparisons": []})
    found: dict[str, tuple[float | None, str]] = {}
    places = ([(view.large, words.large_words(view))] if view.large else []) + [(ALL, "all pairs")]
    for place, said in places:
        metrics = ([f"tar@{view.far}"] if view.far else []) + (["own_auc"] if place != ALL else ["auc"])
        for metric in metrics:
            unit = "auc" if metric.endswith("auc") else "rate"
            found[f"{words.metric_name(metric)}, {said}"] = (one.estimate("m", place, metric).value, unit)
    rank = (protocols.get("leave_one_out") or {}).get("rank1") or {}
    found["Rank-1"] = (rank.get("value"), "rate")
    found["Ten-fold accuracy"] = ((protocols.get("verification") or {}).get("accuracy"), "rate")
    return found


def seeds_table(view: View) -> Table | None:
    """Mean and range over seeds, one row a metric; None for a run of one seed."""
    entries = view.run.get("per_seed") or []
    if len(entries) < 2:
        return None
    gathered: dict[str, dict[str, list[float]]] = {}
    units: dict[str, str] = {}
    for entry in entries:
        for name, model in entry["models"].items():
            for metric, (value, unit) in _seed_values(view, model).items():
                if value is not None:
                    gathered.setdefault(metric, {}).setdefault(name, []).append(float(value))
                    units[metric] = unit
    names = [name for name in view.names if any(name in row for row in gathered.values())]

    def show(value: float, unit: str) -> str:
        return words.per_cent(value) if unit == "rate" else f"{value:.3f}" if unit == "auc" else words.number(value, 4)

    rows = []
    for metric, row in gathered.items():
        cells = [Cell(metric)]
        for name in names:
            values, unit = row.get(name, []), units[metric]
            if values:
                spread = f"{show(min(values), unit)} to {show(max(values), unit)}, {len(values)} seeds"
                cells.append(Cell(show(sum(values) / len(values), unit), spread))
            else:
                cells.append(Cell(words.NOTHING))
        rows.append(cells)
    return Table(["Mean over seeds", *map(view.label, names)], rows, [None, *names], {}) if rows else None


def weights_table(view: View) -> Table | None:
    """Mean weight of each teacher in each term; None if no weights were logged."""
    weights: Mapping[str, Mapping[str, float | None]] = view.run.get("weights") or {}
    teachers = list(dict.fromkeys(name for row in weights.values() for name in row))
    if not teachers:
        return None
    rows = [[Cell(term), *(Cell(words.per_cent(row.get(name))) for name in teachers)] for term, row in weights.items()]
    return Table(["Term", *map(view.label, teachers)], rows, [None, *teachers], {})


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of dotted name and text.

    Examples:
        >>> facts({"train": {"steps": 300, "lr": 0.05}, "ages": [5, 10]})
        [('train.steps', '300'), ('train.lr', '0.05'), ('ages', '5, 10')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += facts(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append((name, words.shorten(", ".join(map(str, value)), 400) or "(none)"))
        elif isinstance(value, float):
            rows.append((name, f"{value:.6g}"))
        else:
            rows.append((name, words.NOTHING if value is None else words.shorten(str(value), 400)))
    return rows


def data_table(view: View) -> Table | None:
    """Images and identities of training and test; None if the run does not say."""
    data = view.run.get("data") or {}
    parts: Sequence[str] = ("train", "test")
    rows = [
        [
            Cell(part.capitalize()),
            *(
                Cell(f"{data[key]:,}" if data.get(key) is not None else words.NOTHING)
                for key in (f"{part}_identities", f"{part}_images")
            ),
        ]
        for part in parts
    ]
    if all(cell.text == words.NOTHING for row in rows for cell in row[1:]):
        return None
    return Table(["Part", "Identities", "Images"], rows, [None] * 3, {})
