"""Room: report. The same report as Markdown, with links to the figures on disk. Text from the run is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdlib_faces.report import evaluation_tables, notes, tables, words
from kdlib_faces.report.evaluations import Evaluation
from kdlib_faces.report.figures import FIGURES
from kdlib_faces.report.plots import PLOTS
from kdlib_faces.report.sections import counts_rows
from kdlib_faces.report.summary import evaluations_finding
from kdlib_faces.report.tables import Cell, Table
from kdlib_faces.report.view import View

__all__ = ["page"]

_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")


def _text(text: str) -> str:
    """One line of Markdown that shows `text` as it is."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def _cell(cell: Cell) -> str:
    return _text(cell.text) + (f" ({_text(cell.note)})" if cell.note else "")


def _table(table: Table) -> str:
    lines = [" | ".join(["", *(_text(title) or " " for title in table.columns), ""]).strip()]
    lines.append("|" + "---|" + "---:|" * (len(table.columns) - 1))
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text.strip()}\n{fence}\n"


def _facts(values: Mapping[str, Any]) -> str:
    lines = [f"| {_text(name)} | {_text(text)} |" for name, text in tables.facts(values)]
    return "\n".join(["| name | value |", "|---|---|", *lines]) + "\n"


def _evaluation(
    view: View, evaluation: Evaluation, drawn: Sequence[str], pictures: Mapping[str, tuple[str, str, str]]
) -> list[str]:
    """One protocol: measures, convention, figures with their tables, pictures."""
    out = [f"## {_text(evaluation.title)}\n", _text(evaluation.question) + "\n" if evaluation.question else ""]
    if evaluation.measures:
        out.append(_table(evaluation_tables.measures_table(view, evaluation)))
    rows = [f"| {_text(name)} | {_text(text)} |" for name, text in counts_rows(evaluation)]
    out.append("\n".join(["| what was measured | and how |", "|---|---|", *rows]) + "\n" if rows else "")
    for plot, (title, caption, _) in PLOTS.items():
        if f"{evaluation.name}-{plot}" not in drawn:
            continue
        out.append(f"### {title}\n\n![{title}](figures/{evaluation.name}-{plot}.png)\n\n{_text(caption)}\n")
        if plot == "bins":
            for bins in evaluation.bins:
                table = evaluation_tables.bins_table(view, evaluation, bins)
                out.append(f"{_text(bins.title)}:\n\n{_table(table)}")
        if plot == "differences":
            out.append(_text(evaluation.difference_rule) + "\n" if evaluation.difference_rule else "")
            out.append(_table(evaluation_tables.differences_table(view, evaluation)))
    for name in evaluation.pictures:
        if name in pictures:
            title, caption, path = pictures[name]
            out.append(f"### {_text(title)}\n\n![{_text(title)}]({path})\n\n{_text(caption)}\n")
    if evaluation.scores:
        out.append("Scores: " + ", ".join(map(_text, evaluation.scores.values())) + "\n")
    out.append("\n".join(f"- {_text(note)}" for note in evaluation.notes) + "\n" if evaluation.notes else "")
    return out


def page(view: View, drawn: Sequence[str], pictures: Mapping[str, tuple[str, str, str]], missing: Sequence[str]) -> str:
    """The whole document.

    Args:
        view: the run.
        drawn: names of the figures that are on disk.
        pictures: name -> (title, caption, relative path) of the caller's pictures.
        missing: names of pictures that were recorded and are not on disk.

    Returns:
        Markdown text (CommonMark with pipe tables).
    """
    run, found = view.run, evaluations_finding(view) if view.evaluations else words.finding(view)
    figures = {
        p.name: f"![{p.title}](figures/{p.name}.png)\n\n{_text(p.caption)}\n" for p in FIGURES if p.name in drawn
    }
    out = [f"# {_text(run['title'])}\n", f"**{_text(found.headline)}**\n"]
    out += [_text(sentence) + "\n" for sentence in found.sentences]
    placed = {name for evaluation in view.evaluations for name in evaluation.pictures}
    if len(view.evaluations) > 1:
        out += ["## Overview\n", _table(evaluation_tables.overview_table(view))]
    for evaluation in view.evaluations:
        out += _evaluation(view, evaluation, drawn, pictures)
    if view.bin_metrics() and not view.evaluations:
        out.append("## Accuracy " + ("between age groups\n" if view.kind == "group" else "against age gap\n"))
        out.append(figures.get("ages", ""))
        for metric in view.bin_metrics():
            out += [f"### {_text(words.metric_name(metric))}\n", _table(tables.bins_table(view, metric))]
    if view.comparisons and not view.evaluations:
        out += ["## Is the difference real?\n", _text(notes.separate(view)) + "\n", figures.get("differences", "")]
        out.append(_table(tables.comparisons_table(view)))
    out += ["## The models\n", _table(tables.models_table(view))]
    out.append("" if view.evaluations else _text(notes.models(view)) + "\n")
    out.append(figures.get("cost", ""))
    seeds = tables.seeds_table(view)
    if seeds is not None:
        out += ["## Over several seeds\n", _table(seeds)]
    for name, title in (("roc", "ROC"), ("scores", "Scores"), ("training", "Training")):
        if name in figures:
            out += [f"## {title}\n", figures[name]]
    weights = tables.weights_table(view)
    if weights is not None:
        out += ["## Weight of each teacher\n", _table(weights)]
    if run.get("agreement"):
        out += ["## Agreement with the teachers\n", _facts(run["agreement"])]
    free = [picture for name, picture in pictures.items() if name not in placed]
    if free:
        out.append("## Pictures\n")
        out += [f"### {_text(t)}\n\n![{_text(t)}]({path})\n\n{_text(caption)}\n" for t, caption, path in free]
    out.append("## Data and setup\n")
    data = run.get("data") or {}
    table = tables.data_table(view)
    out.append(f"Data: {_text(data['name'])}\n" if data.get("name") else "")
    out.append(_table(table) if table is not None else "")
    out.append(_code(run["command"]) if run.get("command") else "")
    out.append(f"Seeds: {', '.join(map(str, run['seeds']))}\n" if run.get("seeds") else "")
    for key, title in (("config", "Configuration"), ("environment", "Environment")):
        if run.get(key):
            out += [f"### {title}\n", _facts(run[key])]
    out.append("## How to read this\n")
    out.append("\n".join(f"- {_text(line)}" for line in notes.limits(view, missing)) + "\n")
    out.append(_text(notes.made(view)) + "\n")
    return "\n".join(part for part in out if part)
