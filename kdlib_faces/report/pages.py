"""The HTML page and the Markdown document of a report, from Jinja templates that escape all text."""

import base64
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdlib_faces.report import findings, numbers, tables
from kdlib_faces.report.curves import RUN_PLOTS
from kdlib_faces.report.numbers import isolate, visible
from kdlib_faces.report.plots import PLOTS
from kdlib_faces.report.schema import Report
from kdlib_faces.report.theme import inline_svg

__all__ = ["PictureFile", "html_page", "markdown_page"]

_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")


class PictureFile(NamedTuple):
    """A picture of the report, read from disk as PNG."""

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def html_page(
    report: Report, figures: Mapping[str, str], pictures: Sequence[PictureFile], missing: Sequence[str] = ()
) -> str:
    """The page: one file with its style and figures inside, without scripts or addresses outside the file.

    Args:
        report: The content.
        figures: Figure name to its SVG.
        pictures: The pictures on disk.
        missing: Names of listed pictures that are not on disk.

    Returns:
        The text of report.html.
    """
    style = files("kdlib_faces.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    return _environment().get_template("report.html.j2").render(
        _content(report, list(figures), pictures, missing), style=Markup(style),  # our own file
        svg=lambda name, title: Markup(inline_svg(figures[name], title)),  # matplotlib escapes its text
    )  # fmt: skip


def markdown_page(
    report: Report, figures: Sequence[str], pictures: Sequence[PictureFile], missing: Sequence[str] = ()
) -> str:
    """The document in Markdown (CommonMark with pipe tables), with links to the figures on disk; see `html_page`."""
    template = _markdown_environment().get_template("report.md.j2")
    text = template.render(_content(report, figures, pictures, missing))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _content(
    report: Report, figures: Sequence[str], pictures: Sequence[PictureFile], missing: Sequence[str]
) -> dict[str, object]:
    placed = {name for summary in report.evaluations for name in summary.pictures}
    return {
        "report": report,
        "finding": findings.finding(report),
        "key_figures": findings.key_figures(report),
        "remarks": findings.remarks(report, missing),
        "figures": figures,
        "pictures": pictures,
        "free_pictures": [picture for picture in pictures if picture.name not in placed],
        "run_plots": RUN_PLOTS,
        "plots": PLOTS,
        "tables": tables,
        "number": lambda value: f"{value:,.10g}",
        "level": numbers.level(report.level),
    }


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kdlib_faces.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, extensions=["jinja2.ext.do"], finalize=_html,
    )  # fmt: skip


@cache
def _markdown_environment() -> Environment:
    environment = _environment().overlay(finalize=_markdown)
    environment.filters["fence"] = _fence
    return environment


def _html(value: object) -> object:
    """Text that shows what it contains and does not affect the direction of its neighbors; Jinja escapes it."""
    return isolate(visible(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown(value: object) -> Markup:
    """One line of Markdown that shows the text as it is; the output of macros is Markdown already."""
    if isinstance(value, Markup):
        return value
    line = (
        isolate(visible(" ".join(str(value).split()))).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return Markup(_MARKDOWN.sub(r"\\\1", line))  # escaped above


def _fence(text: str) -> Markup:
    """A code block that the text cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return Markup(f"{fence}\n{visible(text.strip())}\n{fence}")  # a code block shows text as it is
