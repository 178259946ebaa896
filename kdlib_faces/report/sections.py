"""Room: report. The sections of a page that show protocols: an overview, then one section each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from kdlib_faces.report import evaluation_tables as tables
from kdlib_faces.report.elements import FigureImages, Section, Shown, facts, figure, more, photos, table
from kdlib_faces.report.evaluations import Evaluation
from kdlib_faces.report.plots import PLOTS
from kdlib_faces.report.view import View

__all__ = ["counts_rows", "evaluation_sections"]


def evaluation_sections(view: View, figures: Mapping[str, FigureImages], shown: Sequence[Shown]) -> list[Section]:
    """An overview where there are several protocols, and a section for each.

    Args:
        view: the run.
        figures: file name (`PROTOCOL-PLOT`) -> its images.
        shown: the pictures on disk; each protocol takes its own.

    Returns:
        The sections in the order of the run.
    """
    out = []
    if len(view.evaluations) > 1:
        overview = table(view, tables.overview_table(view), "Overview")
        out.append(
            Section("overview", "Overview", overview + '<p class="aside">The first measure of each protocol.</p>')
        )
    out += [Section(f"p-{each.name}", each.title, _body(view, each, figures, shown)) for each in view.evaluations]
    return out


def counts_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What was counted and the convention, as names and texts."""
    counted = [(name, f"{amount:,.10g}") for name, amount in evaluation.counts.items()]
    return [*counted, *((name, text) for name, text in evaluation.convention.items())]


def _body(view: View, evaluation: Evaluation, figures: Mapping[str, FigureImages], shown: Sequence[Shown]) -> str:
    parts = [f"<p>{escape(evaluation.question)}</p>"] if evaluation.question else []
    if evaluation.measures:
        parts.append(table(view, tables.measures_table(view, evaluation), f"{evaluation.title}: measures"))
    if evaluation.unresolved():
        parts.append(
            '<p class="aside">† Not resolvable: too few impostors for this rate, measured at no false accept.</p>'
        )
    rows = counts_rows(evaluation)
    if rows:
        parts.append(f"<h3>What was measured, and how</h3>{facts(rows, 'wide')}")
    drawn = {plot: figures.get(f"{evaluation.name}-{plot}") for plot in PLOTS}
    for plot, (title, caption, _) in PLOTS.items():
        images = drawn[plot]
        if images is None:
            continue
        said = (
            caption
            if plot != "differences" or not evaluation.difference_rule
            else f"{caption} {evaluation.difference_rule}"
        )
        parts.append(f"<h3>{escape(title)}</h3>" + figure(images, f"{evaluation.title}: {title}", said))
        if plot == "differences":
            listed = table(view, tables.differences_table(view, evaluation), "Differences")
            parts.append(more("Table: all differences", listed))
        if plot == "bins":
            parts += [
                more(f"Table: {bins.title}", table(view, tables.bins_table(view, evaluation, bins), bins.title))
                for bins in evaluation.bins
            ]
    parts.append(photos([picture for picture in shown if picture.name in evaluation.pictures]))
    if evaluation.scores:
        files = ", ".join(f"<code>{escape(path)}</code>" for path in evaluation.scores.values())
        parts.append(f'<p class="aside">The scores behind these numbers, row by row: {files}.</p>')
    if evaluation.notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in evaluation.notes) + "</ul>")
    return "".join(parts)
