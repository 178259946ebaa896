"""Room: report. The training curves: total loss of every model, and the terms of the distilled student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kdlib_faces.report.theme import Theme, dress, looks, new_figure, plain
from kdlib_faces.report.view import View

__all__ = ["training"]


def _clean(steps: Sequence[float], values: Sequence[float | None]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    array = np.array(kept, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A centerd running mean over about a twentieth of the run, shorter at both ends."""
    half = len(values) // 40
    if half < 1:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    smooth: np.ndarray[Any, Any] = (total[high] - total[low]) / (high - low)
    return smooth


def _draw(axes: Axes, curves: Mapping[str, tuple[Any, Any, str, Any]], theme: Theme) -> None:
    handles, every = [], []
    for label, (steps, values, color, dash) in curves.items():
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.28)
        axes.plot(steps, _smooth(values), color=color, linewidth=1.9, linestyle=dash)
        handles.append(Line2D([], [], color=color, linewidth=1.9, linestyle=dash, label=label))
        every.append(values)
    together = np.concatenate(every)
    if together.min() > 0 and together.max() > 20 * together.min():
        axes.set_yscale("log")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2, ncols=2, fontsize=8.5,
        labelcolor=theme.ink, handlelength=2.2, frameon=False,
    )  # fmt: skip


def training(view: View, theme: Theme, narrow: bool) -> Figure | None:
    """Loss against step: each model's total, and, where logged, the terms of one student."""
    logged: Mapping[str, Mapping[str, Any]] = view.run.get("training") or {}
    style = looks(view, theme)
    totals = {}
    for name, log in logged.items():
        steps, values = _clean(log["step"], log["loss"])
        if len(steps):
            look = style.get(name)
            label = plain(view.label(name), 26)
            totals[label] = (steps, values, look.color if look else theme.muted, look.dash if look else "-")
    owner = next(
        (
            n
            for n in (view.distilled, *logged)
            if n is not None and n in logged and len(logged[n].get("terms") or {}) > 1
        ),
        None,
    )
    terms = {}
    palette = (theme.distilled, theme.alone, *theme.others, *theme.teachers)
    dashes = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
    if owner is not None:
        log = logged[owner]
        for index, (term, raw) in enumerate(log["terms"].items()):
            steps, values = _clean(log["step"], raw)
            if len(steps) and index < len(palette):
                terms[plain(term, 26)] = (steps, values, palette[index], dashes[index % 4])
    panels = [(title, curves) for title, curves in (("Loss", totals), ("Terms", terms)) if curves]
    if not panels:
        return None
    figure = new_figure(theme, *((5.0, 3.7 * len(panels)) if narrow else (5.2 * len(panels), 3.8)))
    shape = (len(panels), 1) if narrow else (1, len(panels))
    for axes, (title, curves) in zip(np.asarray(figure.subplots(*shape, squeeze=False)).ravel(), panels, strict=True):
        full = f"Terms of {plain(view.label(owner), 26)}" if title == "Terms" and owner is not None else "Total loss"
        dress(axes, theme, title=full, x="step", grid="y", pad=10 + 14 * -(-len(curves) // 2))
        _draw(axes, curves, theme)
    return figure
