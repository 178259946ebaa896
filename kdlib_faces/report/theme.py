"""Colors, marks and axes of the figures, and their SVG form."""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdlib_faces.report.numbers import isolate, shorten, visible
from kdlib_faces.report.schema import Report

__all__ = [
    "GRID", "INK", "MUTED", "PAGE", "PALETTE", "Look", "dress", "figure_grid", "inline_svg", "legend", "looks",
    "plain", "to_svg",
]  # fmt: skip

# Colors of the light theme. Inside a page they become CSS variables of style.css, which has the dark ones too.
PAGE, INK, MUTED, GRID = "#ffffff", "#1b2330", "#5a6675", "#e5e8ed"
PALETTE = (
    "#0b62b5", "#d1500a", "#4f9c8c", "#9a86b4", "#b0447f", "#6a55c8", "#8f7a00", "#3b7d23", "#7f8998", "#a08a5a",
)  # fmt: skip
_VARIABLES = {PAGE: "card", INK: "ink", MUTED: "muted", GRID: "line"} | {
    color: f"m{index}" for index, color in enumerate(PALETTE)
}
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "*")
Dash: TypeAlias = Literal["-", "--", "-.", ":"] | tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """Color, mark and line style of one model in all figures."""

    color: str
    mark: str
    dash: Dash


def looks(report: Report) -> dict[str, Look]:
    """One look per model, by its position; teachers beside students have dashed lines."""
    students = any(model.role == "student" for model in report.models.values())
    return {
        name: Look(PALETTE[at % 10], _MARKS[at % 10], (0, (5, 2)) if students and model.role == "teacher" else "-")
        for at, (name, model) in enumerate(report.models.items())
    }


def plain(text: str, limit: int = 34) -> str:
    """Text from outside as one short line without mathematics; a leading underscore would hide it from a legend."""
    line = shorten(text, limit).strip("\u2068\u2069").replace("$", r"\$")  # each text of a figure stands alone
    return f" {line}" if line.startswith("_") else line


def figure_grid(panels: int, height: float, *, width: float = 5.2) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes, at most two beside each other; width and height of one panel in inches."""
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), facecolor=PAGE, layout="constrained")
    cells = list(np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel())
    for empty in cells[panels:]:
        empty.remove()
    return figure, cells[:panels]


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: str = "y", pad: float = 6.0) -> None:
    """Two spines, a light grid, and the title at the left, `pad` points above the axes."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type] # "x", "y" or "both"
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=pad)
    axes.set_xlabel(x, fontsize=9.5, color=MUTED)
    axes.set_ylabel(y, fontsize=9.5, color=MUTED)


def legend(figure: Figure, report: Report, names: Sequence[str], *, lines: bool = True) -> None:
    """The models above the axes, in the order of the tables, in as many columns as fit."""
    styles = looks(report)
    handles = [
        Line2D(
            [], [], color=styles[name].color, marker=styles[name].mark, markersize=6,
            linestyle=styles[name].dash if lines else "none", linewidth=2.0,
        )
        for name in names
    ]  # fmt: skip
    labels = [plain(report.label(name)) for name in names]
    longest = 0.65 + 0.085 * max(map(len, labels), default=0)  # inches: the handle, then letters of 9.5 points
    columns = max(1, min(len(names), 4, int(figure.get_size_inches()[0] / longest)))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK,
        handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG file in the light theme; equal figures give equal text."""
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        # A model may be named in a script that the bundled font lacks; the viewer's fonts may have it.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        figure.savefig(buffer, format="svg", facecolor=PAGE, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(svg: str, title: str) -> str:
    """The SVG element for a page: without names that could collide, in the colors of the page."""
    body = svg[svg.index("<svg") :]
    width, height = (float(value) for value in re.findall(r'\b(?:width|height)="([\d.]+)pt"', body[:600]))
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # names of groups; hashed names of marks and clips stay
    body = re.sub(r"(?<=: )#[0-9a-f]{6}(?=[;\"])", lambda match: _variable(match[0]), body)
    size = f'viewBox="0 0 {width:g} {height:g}" style="--width:{width * 100 / 72:.0f}px"'
    return f'<svg {size} role="img" aria-label="{escape(isolate(visible(title)))}">{body}'


def _variable(color: str) -> str:
    return f"var(--{_VARIABLES[color]})" if color in _VARIABLES else color
