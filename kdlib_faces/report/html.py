"""Room: report. The page: one HTML file with its style and figures inside. No script, no address outside the file.

Everything from the run is escaped; a content policy in the page forbids scripts and foreign addresses as a second wall.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from kdlib_faces.report import notes, tables, words
from kdlib_faces.report.figures import FIGURES
from kdlib_faces.report.tables import Cell, Table
from kdlib_faces.report.theme import DARK, LIGHT, looks
from kdlib_faces.report.view import View

__all__ = ["FigureImages", "Shown", "page"]


class FigureImages(NamedTuple):
    """One figure as PNG for each theme and width; `size` is the wide one's width in CSS pixels."""

    light: bytes
    dark: bytes
    light_narrow: bytes
    dark_narrow: bytes
    size: int


class Shown(NamedTuple):
    """A picture that the caller gave, read back from disk."""

    name: str
    title: str
    caption: str
    path: str
    png: bytes


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _cell(cell: Cell, tag: str = "td", attributes: str = "") -> str:
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f"<{tag}{attributes}>{escape(cell.text)}{note}</{tag}>"


def _swatch(view: View, model: str | None) -> str:
    return f'<i class="dot m{view.names.index(model)}"></i>' if model in view.names else ""


def _table(view: View, table: Table, label: str) -> str:
    marks = [' class="mark"' if model is not None and model == view.distilled else "" for model in table.models]
    head = "".join(
        f'<th scope="col"{mark}>{_swatch(view, model)}{escape(title)}</th>'
        for title, model, mark in zip(table.columns, table.models, marks, strict=True)
    )
    body = []
    for index, row in enumerate(table.rows):
        if index in table.sections:
            span = len(table.columns) - 1
            title = escape(table.sections[index])
            body.append(f'<tr class="part"><th scope="rowgroup">{title}</th><td colspan="{span}"></td></tr>')
        cells = [_cell(row[0], "th", ' scope="row"')]
        cells += [_cell(cell, "td", mark) for cell, mark in zip(row[1:], marks[1:], strict=True)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(images: FigureImages, title: str, caption: str, kind: str = "plot") -> str:
    sources = (
        ("(prefers-color-scheme: dark) and (max-width: 640px)", images.dark_narrow, 500),
        ("(prefers-color-scheme: dark)", images.dark, images.size),
        ("(max-width: 640px)", images.light_narrow, 500),
    )
    listed = "".join(f'<source media="{media}" srcset="{_uri(png)}" width="{w}">' for media, png, w in sources)
    image = f'<img src="{_uri(images.light)}" width="{images.size}" alt="{escape(title)}">'
    return (
        f'<figure class="{kind}"><picture>{listed}{image}</picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in rows)
    return f'<dl class="facts">{listed}</dl>'


def _more(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _section(anchor: str, title: str, body: str) -> tuple[str, str, str]:
    return anchor, title, body


def _tile(name: str, value: str, note: str, kind: str = "") -> str:
    return (
        f'<div class="tile {kind}"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<small>{escape(note)}</small></div>"
    )


def _tiles(view: View, verdict: str, verdict_words: str) -> str:
    tiles = [_tile(*tile, kind=verdict if index == 1 else "") for index, tile in notes.tiles(view, verdict_words)]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _colours(view: View) -> str:
    def rules(theme: object) -> str:
        style = looks(view, LIGHT if theme is LIGHT else DARK)
        return "".join(f".m{index}{{background:{style[name].colour}}}" for index, name in enumerate(view.names))

    return f"{rules(LIGHT)}@media (prefers-color-scheme:dark){{{rules(DARK)}}}"


def _results(view: View, figures: Mapping[str, FigureImages]) -> list[tuple[str, str, str]]:
    drawn = {
        p.name: _figure(figures[p.name], p.title, p.caption, "plot side" if p.name == "cost" else "plot")
        for p in FIGURES
        if p.name in figures
    }
    out = []
    gaps = drawn.get("ages", "")
    by_bin = [
        _more(
            f"Table: {words.metric_name(metric)}",
            _table(view, tables.bins_table(view, metric), words.metric_name(metric)),
        )
        for metric in view.bin_metrics()
    ]
    if gaps or by_bin:
        title = "Accuracy between age groups" if view.kind == "group" else "Accuracy against age gap"
        out.append(_section("ages", title, gaps + "".join(by_bin)))
    if view.comparisons:
        table = _table(view, tables.comparisons_table(view), "Comparisons")
        body = drawn.get("differences", "") + _more("Table: all comparisons", table)
        out.append(_section("differences", "Is the difference real?", f"<p>{escape(notes.separate(view))}</p>{body}"))
    models = _table(view, tables.models_table(view), "Models") + f'<p class="aside">{escape(notes.models(view))}</p>'
    out.append(_section("models", "The models", models + drawn.get("cost", "")))
    seeds = tables.seeds_table(view)
    if seeds is not None:
        out.append(_section("seeds", "Over several seeds", _table(view, seeds, "Seeds")))
    out += [
        _section(name, title, drawn[name]) for name, title in (("roc", "ROC"), ("scores", "Scores")) if name in drawn
    ]
    return out


def _training(view: View, figures: Mapping[str, FigureImages]) -> list[tuple[str, str, str]]:
    body = _figure(figures["training"], "Training", FIGURES[-1].caption) if "training" in figures else ""
    weights = tables.weights_table(view)
    if weights is not None:
        body += "<h3>Weight of each teacher</h3>" + _table(view, weights, "Weights")
    if view.run.get("agreement"):
        body += "<h3>Agreement with the teachers</h3>" + _facts(tables.facts(view.run["agreement"]))
    return [_section("training", "Training", body)] if body else []


def _pictures(shown: Sequence[Shown]) -> list[tuple[str, str, str]]:
    body = "".join(
        f'<figure class="photo"><h3>{escape(s.title)}</h3><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(s.title)}"><img src="{_uri(s.png)}" alt="{escape(s.title)}"></div>'
        f"<figcaption>{escape(s.caption)}</figcaption></figure>"
        for s in shown
    )
    return [_section("pictures", "Pictures", body)] if body else []


def _reproduce(view: View) -> list[tuple[str, str, str]]:
    run, parts = view.run, []
    data = run.get("data") or {}
    table = tables.data_table(view)
    if data.get("name"):
        parts.append(f"<p>Data: <b>{escape(data['name'])}</b></p>")
    if table is not None:
        parts.append(_table(view, table, "Data"))
    if run.get("command"):
        parts.append(f"<h3>Command</h3><pre><code>{escape(run['command'])}</code></pre>")
    if run.get("seeds"):
        parts.append(f"<p>Seeds: {escape(', '.join(map(str, run['seeds'])))}</p>")
    for key, title in (("config", "Configuration"), ("environment", "Environment")):
        if run.get(key):
            parts.append(_more(title, _facts(tables.facts(run[key]))))
    return [_section("reproduce", "Data and setup", "".join(parts))] if parts else []


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
    run, found = view.run, words.finding(view)
    style = files("kdlib_faces.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [*_results(view, figures), *_training(view, figures), *_pictures(pictures), *_reproduce(view)]
    limits = "".join(f"<li>{escape(line)}</li>" for line in notes.limits(view, missing))
    sections.append(_section("limits", "How to read this", f"<ul>{limits}</ul>"))
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
        f"<title>{escape(run['title'])}</title><style>{style}{_colours(view)}</style></head>\n"
        f'<body><header><p class="over">{escape(run["title"])}</p><h1>{escape(found.headline)}</h1>'
        f'<div class="said">{said}</div>{_tiles(view, found.verdict, found.verdict_words)}</header>'
        f'<nav aria-label="Sections">{links}</nav>\n<main>{bodies}</main>\n<footer>{foot}</footer></body></html>\n'
    )
