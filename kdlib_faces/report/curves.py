"""Figures of a whole run: accuracy against cost, and training curves; None where there is nothing to draw."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from kdlib_faces.report.findings import headline_measure
from kdlib_faces.report.numbers import count
from kdlib_faces.report.plots import Plot, known_points, rate_limits
from kdlib_faces.report.schema import Report
from kdlib_faces.report.tables import measured
from kdlib_faces.report.theme import INK, PAGE, PALETTE, Dash, dress, figure_grid, legend, looks, plain

__all__ = ["RUN_PLOTS"]

Floats = NDArray[np.float64]


class _Curve(NamedTuple):
    label: str
    steps: Floats
    losses: Floats
    color: str
    dash: Dash


def draw_cost(report: Report) -> Figure | None:
    """The headline measure against multiply-adds, or against parameters where multiply-adds are not known."""
    headline = headline_measure(report)
    if headline is None:
        return None
    summary, key, measure = headline
    values = {name: measured(summary, name, key) for name in report.models}
    known = [name for name in report.models if values[name].value is not None]
    title = "multiply-adds" if all(report.models[name].macs for name in known) else "parameters"
    costs = {
        name: model.macs if title == "multiply-adds" else model.parameters for name, model in report.models.items()
    }
    sizes = {name: float(cost) for name, cost in costs.items() if cost}
    names = [name for name in known if name in sizes]
    if len({sizes[name] for name in names}) < 2:
        return None
    figure, (axes,) = figure_grid(1, 3.3)
    what = f"{measure.title}, {measure.note}" if measure.note else measure.title
    dress(
        axes, title=plain(what, 48), x="multiply-adds for one image" if title == "multiply-adds" else title, grid="both"
    )
    smallest, largest = min(sizes[name] for name in names), max(sizes[name] for name in names)
    styles, ends = looks(report), []
    for index, name in enumerate(names):
        # Models of about the same size would cover each other, so each is moved by a little of the axis.
        similar = sum(0.95 < sizes[name] / sizes[other] < 1.05 for other in names[:index])
        at = sizes[name] * (largest / smallest) ** (0.035 * similar)
        value = values[name]
        center = float("nan") if value.value is None else value.value
        low, high = (center if end is None else end for end in (value.low, value.high))
        axes.plot([at, at], [low, high], color=styles[name].color, linewidth=2.0)
        axes.plot(
            [at], [center], marker=styles[name].mark, color=styles[name].color, markersize=9, markeredgecolor=PAGE,
            linestyle="none",
        )  # fmt: skip
        ends += [low, high]
    axes.set_xscale("log")
    margin = (largest / smallest) ** 0.15
    axes.set_xlim(smallest / margin, largest * margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if largest < 1e3 * smallest else (1.0,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x).replace(".00", "").replace(".0", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if measure.unit == "rate":
        rate_limits(axes, min(ends), max(ends))
    legend(figure, report, names, lines=False)
    return figure


def draw_training(report: Report) -> Figure | None:
    """Total loss of every model against the step, and the terms of one student."""
    styles = looks(report)
    totals, terms, owner = [], [], ""
    for name, log in report.training.items():
        totals.append(
            _Curve(report.label(name), *known_points(log.step, log.loss, -1), styles[name].color, styles[name].dash)
        )
    logged = [name for name, log in report.training.items() if len(log.terms) > 1]
    if logged:
        owner = report.pair.distilled if report.pair and report.pair.distilled in logged else logged[0]
        log = report.training[owner]
        for (term, losses), color in zip(log.terms.items(), PALETTE, strict=False):
            terms.append(_Curve(term, *known_points(log.step, losses, -1), color, "-"))
    panels = {"Total loss": totals, f"Terms of {plain(report.label(owner), 26)}": terms}
    panels = {title: [curve for curve in curves if curve.steps.size] for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    figure, cells = figure_grid(len(panels), 3.6)
    for axes, (title, curves) in zip(cells, panels.items(), strict=True):
        dress(axes, title=title, x="step", pad=10 + 14 * -(-len(curves) // 2))
        _draw_curves(axes, curves)
    return figure


def _smooth(values: Floats) -> Floats:
    """A centered running mean over about a twentieth of the run, shorter at both ends."""
    half = len(values) // 40
    total, index = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def _draw_curves(axes: Axes, curves: Sequence[_Curve]) -> None:
    handles = []
    for curve in curves:
        axes.plot(curve.steps, curve.losses, color=curve.color, linewidth=0.8, alpha=0.28)
        axes.plot(curve.steps, _smooth(curve.losses), color=curve.color, linewidth=1.9, linestyle=curve.dash)
        label = plain(curve.label, 26)
        handles.append(Line2D([], [], color=curve.color, linewidth=1.9, linestyle=curve.dash, label=label))
    losses = np.concatenate([curve.losses for curve in curves])
    if losses.min() > 0 and losses.max() > 20 * losses.min():
        axes.set_yscale("log")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.2, ncols=2, fontsize=8.5,
        labelcolor=INK, handlelength=2.2, frameon=False,
    )  # fmt: skip


RUN_PLOTS: Mapping[str, Plot[[Report]]] = {
    "cost": Plot(
        "Accuracy against cost",
        "The headline measure against the size of the network, on a logarithmic axis. Networks of equal size are drawn side "
        "by side.",
        draw_cost,
    ),
    "training": Plot("Training", "Loss against step: thin as logged, thick as a running mean.", draw_training),
}
