"""Room: report. The parts that pages are made of: tables, figures, facts, folds. Everything from the run is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from kdlib_faces.report.tables import Cell, Table
from kdlib_faces.report.view import View

__all__ = ["FigureImages", "Section", "Shown", "facts", "figure", "more", "photos", "table", "tile"]


class Section(NamedTuple):
    """A part of the page: the anchor, the heading, the body as HTML."""

    anchor: str
    title: str
    body: str


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


def table(view: View, content: Table, label: str) -> str:
    """A table that scrolls sideways by itself where the page is narrow."""
    marks = [' class="mark"' if model is not None and model == view.distilled else "" for model in content.models]
    head = "".join(
        f'<th scope="col"{mark}>{_swatch(view, model)}{escape(title)}</th>'
        for title, model, mark in zip(content.columns, content.models, marks, strict=True)
    )
    body = []
    for index, row in enumerate(content.rows):
        if index in content.sections:
            span = len(content.columns) - 1
            title = escape(content.sections[index])
            body.append(f'<tr class="part"><th scope="rowgroup">{title}</th><td colspan="{span}"></td></tr>')
        cells = [_cell(row[0], "th", ' scope="row"')]
        cells += [_cell(cell, "td", mark) for cell, mark in zip(row[1:], marks[1:], strict=True)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(images: FigureImages, title: str, caption: str, kind: str = "plot") -> str:
    """A drawn figure in the page's theme and width, with its caption."""
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


def facts(rows: Sequence[tuple[str, str]], kind: str = "") -> str:
    """Names and texts in columns; of the kind `"wide"` in fewer ones, for sentences."""
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in rows)
    return f'<dl class="facts {kind}">{listed}</dl>'


def more(title: str, body: str) -> str:
    """A part that opens when its title is chosen."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def tile(name: str, value: str, note: str, kind: str = "") -> str:
    """A large number with its name above and a note below."""
    return (
        f'<div class="tile {kind}"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<small>{escape(note)}</small></div>"
    )


def photos(shown: Sequence[Shown]) -> str:
    """The caller's pictures with heading and caption."""
    return "".join(
        f'<figure class="photo"><h3>{escape(s.title)}</h3><div class="scroll" role="region" tabindex="0" '
        f'aria-label="{escape(s.title)}"><img src="{_uri(s.png)}" alt="{escape(s.title)}"></div>'
        f"<figcaption>{escape(s.caption)}</figcaption></figure>"
        for s in shown
    )
