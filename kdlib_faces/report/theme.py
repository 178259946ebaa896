"""Room: report. Colors, marks and the plain axes of every figure. Matplotlib by its object interface: no global state.

A model has one color, mark and dash everywhere. The student alone is vermilion and the distilled one blue (told apart
under every common color blindness); teachers are muted and dashed.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from kdlib_faces.report.view import View
from kdlib_faces.report.words import shorten

__all__ = [
    "DARK",
    "LIGHT",
    "Look",
    "Theme",
    "dress",
    "grid",
    "lay_out_like",
    "legend",
    "looks",
    "new_figure",
    "plain",
    "to_png",
]

_DPI = 150
_TEACHER_MARKS = ("^", "D", "v", "P")
_OTHER_MARKS = ("X", "p", "h", "*")


@dataclass(frozen=True)
class Theme:
    """One color scheme, the same as the page's."""

    name: str
    page: str
    ink: str
    muted: str
    grid: str
    alone: str
    distilled: str
    teachers: tuple[str, ...]
    others: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1b2330", "#5a6675", "#e5e8ed", "#d1500a", "#0b62b5",
    ("#7f8998", "#4f9c8c", "#9a86b4", "#a08a5a"), ("#b0447f", "#6a55c8", "#8f7a00", "#3b7d23"),
)  # fmt: skip
DARK = Theme(
    "dark", "#171c24", "#e7eaf0", "#a2adbb", "#2b333f", "#ff8a45", "#5cb2ff",
    ("#a4aebb", "#7cc4b2", "#c0acd8", "#c9b481"), ("#ea8cc0", "#a99bf5", "#d8c34a", "#84c96b"),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one model is drawn."""

    color: str
    mark: str
    dash: Any
    strong: bool


def looks(view: View, theme: Theme) -> dict[str, Look]:
    """One look for each model of the run."""
    found: dict[str, Look] = {}
    others = [name for name in view.students if name not in (view.alone, view.distilled)]
    if not view.students or view.evaluations:
        # Nothing to stand back from: all take the strong colors.
        strong = (theme.distilled, theme.alone, *theme.others, *theme.teachers)
        marks = ("o", "s", *_OTHER_MARKS, *_TEACHER_MARKS)
        return {name: Look(strong[i % 10], marks[i % 10], "-", True) for i, name in enumerate(view.names)}
    for index, name in enumerate(view.teachers):
        dash = ((0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 1)))[index % 4]
        found[name] = Look(theme.teachers[index % 4], _TEACHER_MARKS[index % 4], dash, False)
    for index, name in enumerate(others):
        found[name] = Look(theme.others[index % 4], _OTHER_MARKS[index % 4], "-", True)
    if view.alone is not None:
        found[view.alone] = Look(theme.alone, "s", "-", True)
    if view.distilled is not None:
        found[view.distilled] = Look(theme.distilled, "o", "-", True)
    return {name: found[name] for name in view.names}


def plain(text: str, limit: int = 34) -> str:
    """Text from outside made safe for a figure: one short line, no mathematics, never hidden from a legend."""
    line = shorten(text, limit).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure, inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=theme.page, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.05, hspace=0.08)  # type: ignore[union-attr, call-arg] # the constrained engine takes these
    return figure


def grid(figure: Figure, panels: int, narrow: bool, *, across: int | None = None) -> list[Axes]:
    """Axes for `panels`, beside each other (`across` in a row), or below each other on a narrow figure."""
    columns = 1 if narrow else min(across or panels, panels)
    cells = list(np.asarray(figure.subplots(-(-panels // columns), columns, squeeze=False)).ravel())
    for empty in cells[panels:]:
        empty.remove()
    return cells[:panels]


def dress(
    axes: Axes, theme: Theme, *, title: str = "", x: str = "", y: str = "", grid: str = "y", pad: float = 6.0
) -> None:
    """A quiet frame: two spines, light grid, the title at the left, `pad` points above."""
    axes.set_facecolor(theme.page)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(which="both", colors=theme.muted, labelsize=9, length=0)
    if grid:
        axes.grid(True, axis=grid, color=theme.grid, linewidth=0.8)  # type: ignore[arg-type] # "x", "y" or "both"
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink, fontweight="bold", pad=pad)
    axes.set_xlabel(x, fontsize=9.5, color=theme.muted)
    axes.set_ylabel(y, fontsize=9.5, color=theme.muted)


def legend(figure: Figure, theme: Theme, view: View, names: Sequence[str], *, lines: bool = True) -> None:
    """The models' names above the axes, in the order of the tables, in as many columns as fit."""
    style = looks(view, theme)
    handles = [
        Line2D(
            [], [], color=style[name].color, marker=style[name].mark, markersize=6,
            linestyle=style[name].dash if lines else "none", linewidth=2.0,
        )
        for name in names
    ]  # fmt: skip
    labels = [plain(view.label(name)) for name in names]
    longest = 0.65 + 0.085 * max(map(len, labels), default=0)  # inches: the handle, then 9.5 point letters
    columns = max(1, min(len(names), 4, int(figure.get_size_inches()[0] / longest)))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, frameon=False,
        fontsize=9.5, labelcolor=theme.ink, handlelength=2.6, columnspacing=1.6,
    )  # fmt: skip


def lay_out_like(figure: Figure, model: Figure) -> Figure:
    """Give a figure the layout of another one that differs in colors alone and was drawn: finding it takes most time."""
    figure.set_layout_engine("none")
    for axes, other in zip(figure.axes, model.axes, strict=True):
        axes.set_position(other.get_position())
    ours, theirs = figure._suptitle, model._suptitle  # type: ignore[attr-defined]  # no public name for it
    if ours is not None and theirs is not None:
        ours.set_position(theirs.get_position())
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, without a date, so that equal runs give equal files."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A model may be named in a script that the bundled font lacks; a box in a figure is no reason to fail.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*missing")
        figure.savefig(buffer, format="rgba", facecolor=figure.get_facecolor())
    pixels = Image.frombytes("RGBA", figure.canvas.get_width_height(physical=True), buffer.getvalue()).convert("RGB")
    # A palette makes the file a third of its size; flat colors lose nothing that an eye could see.
    small = pixels.quantize(192, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    small.save(packed, format="PNG", compress_level=9)
    return packed.getvalue()
