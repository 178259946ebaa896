"""Room: report. The page: one HTML file with its style and figures inside. No script, no address outside the file.

Everything from the run is escaped; a content policy in the page forbids scripts and foreign addresses as a second wall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from kdlib_faces.report import notes, tables, words
from kdlib_faces.report.elements import FigureImages, Section, Shown, facts, figure, more, photos, table, tile
from kdlib_faces.report.figures import FIGURES
from kdlib_faces.report.sections import evaluation_sections
from kdlib_faces.report.summary import evaluations_finding
from kdlib_faces.report.theme import DARK, LIGHT, looks
from kdlib_faces.report.view import View

__all__ = ["page"]


def _tiles(view: View, verdict: str, verdict_words: str) -> str:
    tiles = [tile(*parts, kind=verdict if index == 1 else "") for index, parts in notes.tiles(view, verdict_words)]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _colors(view: View) -> str:
    def rules(theme: object) -> str:
        style = looks(view, LIGHT if theme is LIGHT else DARK)
        return "".join(f".m{index}{{background:{style[name].color}}}" for index, name in enumerate(view.names))

    return f"{rules(LIGHT)}@media (prefers-color-scheme:dark){{{rules(DARK)}}}"


def _results(view: View, figures: Mapping[str, FigureImages], shown: Sequence[Shown]) -> list[Section]:
    drawn = {
        p.name: figure(figures[p.name], p.title, p.caption, "plot side" if p.name == "cost" else "plot")
        for p in FIGURES
        if p.name in figures
    }
    out = evaluation_sections(view, figures, shown) if view.evaluations else _ages(view, drawn)
    models = table(view, tables.models_table(view), "Models")
    aside = "" if view.evaluations else f'<p class="aside">{escape(notes.models(view))}</p>'
    out.append(Section("models", "The models", models + aside + drawn.get("cost", "")))
    seeds = tables.seeds_table(view)
    if seeds is not None:
        out.append(Section("seeds", "Over several seeds", table(view, seeds, "Seeds")))
    out += [
        Section(name, title, drawn[name]) for name, title in (("roc", "ROC"), ("scores", "Scores")) if name in drawn
    ]
    return out


def _ages(view: View, drawn: Mapping[str, str]) -> list[Section]:
    """Accuracy by age gap, and the comparison of the models by it."""
    out = []
    by_bin = [
        more(
            f"Table: {words.metric_name(metric)}",
            table(view, tables.bins_table(view, metric), words.metric_name(metric)),
        )
        for metric in view.bin_metrics()
    ]
    if drawn.get("ages") or by_bin:
        title = "Accuracy between age groups" if view.kind == "group" else "Accuracy against age gap"
        out.append(Section("ages", title, drawn.get("ages", "") + "".join(by_bin)))
    if view.comparisons:
        listed = table(view, tables.comparisons_table(view), "Comparisons")
        body = drawn.get("differences", "") + more("Table: all comparisons", listed)
        out.append(Section("differences", "Is the difference real?", f"<p>{escape(notes.separate(view))}</p>{body}"))
    return out


def _training(view: View, figures: Mapping[str, FigureImages]) -> list[Section]:
    body = figure(figures["training"], "Training", FIGURES[-1].caption) if "training" in figures else ""
    weights = tables.weights_table(view)
    if weights is not None:
        body += "<h3>Weight of each teacher</h3>" + table(view, weights, "Weights")
    if view.run.get("agreement"):
        body += "<h3>Agreement with the teachers</h3>" + facts(tables.facts(view.run["agreement"]))
    return [Section("training", "Training", body)] if body else []


def _pictures(view: View, shown: Sequence[Shown]) -> list[Section]:
    """The pictures that belong to no protocol."""
    placed = {name for evaluation in view.evaluations for name in evaluation.pictures}
    body = photos([picture for picture in shown if picture.name not in placed])
    return [Section("pictures", "Pictures", body)] if body else []


def _reproduce(view: View) -> list[Section]:
    run, parts = view.run, []
    data = run.get("data") or {}
    listed = tables.data_table(view)
    if data.get("name"):
        parts.append(f"<p>Data: <b>{escape(data['name'])}</b></p>")
    if listed is not None:
        parts.append(table(view, listed, "Data"))
    if run.get("command"):
        parts.append(f"<h3>Command</h3><pre><code>{escape(run['command'])}</code></pre>")
    if run.get("seeds"):
        parts.append(f"<p>Seeds: {escape(', '.join(map(str, run['seeds'])))}</p>")
    for key, title in (("config", "Configuration"), ("environment", "Environment")):
        if run.get(key):
            parts.append(more(title, facts(tables.facts(run[key]))))
    return [Section("reproduce", "Data and setup", "".join(parts))] if parts else []


def page(view: View, figures: Mapping[str, FigureImages], pictures: Sequence[Shown], missing: Sequence[str]) -> str:
    """The whole page.

    Args:
        view: the run.
        figures: figure name -> its images, for those that could be drawn.
        pictures: the caller's pictures.
        missing: names of pictures that were recorded and are not on disk.

    Returns:
        HTML text.
    """
    run, found = view.run, evaluations_finding(view) if view.evaluations else words.finding(view)
    style = files("kdlib_faces.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [*_results(view, figures, pictures), *_training(view, figures)]
    sections += [*_pictures(view, pictures), *_reproduce(view)]
    limits = "".join(f"<li>{escape(line)}</li>" for line in notes.limits(view, missing))
    sections.append(Section("limits", "How to read this", f"<ul>{limits}</ul>"))
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    bodies = "".join(
        f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>' for anchor, title, body in sections
    )
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in found.sentences)
    foot = escape(notes.made(view))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(run['title'])}</title><style>{style}{_colors(view)}</style></head>\n"
        f'<body><header><p class="over">{escape(run["title"])}</p><h1>{escape(found.headline)}</h1>'
        f'<div class="said">{said}</div>{_tiles(view, found.verdict, found.verdict_words)}</header>'
        f'<nav aria-label="Sections">{links}</nav>\n<main>{bodies}</main>\n<footer>{foot}</footer></body></html>\n'
    )
