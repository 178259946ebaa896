"""Figures of one protocol: ROC and DET, ranks, bins, scores, differences; None where there is nothing to draw."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Generic, NamedTuple, ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from numpy.typing import NDArray

from kdlib_faces.evaluation.summary import Bins, Difference, MeasuredValue, ProtocolSummary
from kdlib_faces.report.schema import Report
from kdlib_faces.report.theme import GRID, INK, MUTED, PAGE, Look, dress, figure_grid, legend, looks, plain

__all__ = ["PERCENT", "PLOTS", "Plot", "draw_bins", "known_points", "rate_limits"]

Floats = NDArray[np.float64]
PERCENT = FuncFormatter(lambda rate, _: f"{100 * rate:g} %")
_DET_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99)
_MAX_PAIRS = 4


P = ParamSpec("P")


class Plot(NamedTuple, Generic[P]):
    """Heading, explanation and function of a figure; it draws a report, or a report and one of its protocols."""

    title: str
    caption: str
    draw: Callable[P, Figure | None]


def known_points(x: Sequence[float | None], y: Sequence[float | None], above: float = 0) -> tuple[Floats, Floats]:
    """The known points of a curve with x > `above`, in rising order."""
    known = sorted((a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None and a > above)
    columns = np.array(known, dtype=np.float64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def rate_limits(axes: Axes, low: float, high: float, *, which: str = "y") -> None:
    """A linear axis of rates from a round number below `low` to a little above `high`."""
    bottom = max(0.0, np.floor((low - 0.02) * 20) / 20)
    if high - low < 0.04:  # models that nearly agree need a scale on which they differ
        bottom = max(0.0, low - 0.35 * max(high - low, 2e-3))
    top = max(high + 0.03 * (high - bottom), bottom + 0.01)
    (axes.set_ylim if which == "y" else axes.set_xlim)(bottom, top)
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PERCENT)


def _line(axes: Axes, x: Floats, y: Floats, look: Look, *, steps: bool = False, marks: bool = False) -> None:
    axes.plot(
        x, y, color=look.color, linestyle=look.dash, linewidth=2.0, drawstyle="steps-post" if steps else "default",
        marker=look.mark if marks else "", markersize=6.5, markeredgecolor=PAGE, zorder=3,
    )  # fmt: skip


def draw_errors(report: Report, summary: ProtocolSummary) -> Figure | None:
    """ROC on a logarithmic axis, and DET on normal-deviate axes, where normal scores give a straight line."""
    curves = {name: known_points(model.roc.far, model.roc.tar) for name, model in summary.models.items() if model.roc}
    curves = {name: points for name, points in curves.items() if points[0].size}
    if not curves:
        return None
    figure, (left, right) = figure_grid(2, 3.7)
    styles = looks(report)
    smallest = min(0.1, *(far[0] for far, _ in curves.values()))
    dress(left, title="ROC", x="false accept rate", y="genuine pairs accepted", grid="both")
    dress(right, title="DET", x="false accept rate", y="genuine pairs rejected", grid="both")
    missed = []
    for name in reversed(list(curves)):
        far, tar = curves[name]
        _line(left, far, tar, styles[name], steps=True)
        inside = (far < 1) & (tar < 1) & (tar > 0)
        _line(right, _probit(far[inside]), _probit(1 - tar[inside]), styles[name])
        missed += (1 - tar[inside]).tolist()
    left.set_xscale("log")
    left.set_xlim(smallest, 1.0)
    left.xaxis.set_major_locator(LogLocator(numticks=8))
    left.xaxis.set_major_formatter(LogFormatterSciNotation())
    left.xaxis.set_minor_formatter(NullFormatter())
    rate_limits(left, min(tar[0] for _, tar in curves.values()), 1.0)
    if not missed:
        right.text(0.5, 0.5, "no genuine pair is rejected", transform=right.transAxes, ha="center", color=MUTED)
    low, high = min(missed, default=0.01), max(missed, default=0.5)
    _deviate_axes(right, (smallest * 0.9, 0.5), (max(low * 0.8, 1e-6), min(max(high * 1.1, 3 * low), 0.995)))
    legend(figure, report, list(curves))
    return figure


def _probit(rates: Floats) -> Floats:
    inverse = NormalDist().inv_cdf
    return np.array([inverse(min(max(float(rate), 1e-12), 1 - 1e-12)) for rate in rates])


def _deviate_axes(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Axes in normal deviates, labeled with rates."""
    ticks = {float(at): _percentage(rate) for at, rate in zip(_probit(np.array(_DET_TICKS)), _DET_TICKS, strict=True)}
    for axis, ends, set_limits in ((axes.xaxis, x, axes.set_xlim), (axes.yaxis, y, axes.set_ylim)):
        first, last = _probit(np.array(ends)).tolist()
        axis.set_major_locator(FixedLocator([at for at in ticks if first <= at <= last]))
        axis.set_major_formatter(FuncFormatter(lambda at, _: ticks.get(at, "")))
        set_limits(first, last)


def _percentage(rate: float) -> str:
    return f"{100 * rate:g} %" if rate >= 1e-3 else f"$10^{{{round(np.log10(rate))}}}$"


def draw_ranks(report: Report, summary: ProtocolSummary) -> Figure | None:
    """Closed-set identification by rank, and open-set identification against false alarms."""
    models = summary.models.items()
    closed = {name: known_points(model.cmc.rank, model.cmc.rate) for name, model in models if model.cmc}
    search = {name: known_points(model.search.fpir, model.search.tpir) for name, model in models if model.search}
    panels = [(title, x, curves) for title, x, curves in (
        ("CMC", "rank", closed), ("Open-set search", "false positive identification rate", search),
    ) if any(at.size for at, _ in curves.values())]  # fmt: skip
    if not panels:
        return None
    figure, cells = figure_grid(len(panels), 3.6)
    styles = looks(report)
    for axes, (title, x, curves) in zip(cells, panels, strict=True):
        dress(axes, title=title, x=x, y="probes identified", grid="both")
        drawn = {name: points for name, points in curves.items() if points[0].size}
        for name, (at, rate) in reversed(list(drawn.items())):
            few = title == "CMC" and at.size <= 12
            _line(axes, at, rate, styles[name], steps=not few, marks=few)
        first, last = min(at[0] for at, _ in drawn.values()), max(at[-1] for at, _ in drawn.values())
        if title != "CMC" or last > 20:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if title != "CMC":
            axes.set_xlim(first, 1.0)
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
            integers = MaxNLocator(8, integer=True)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12) if last > 20 else integers)
        low, high = (pick(rate) for pick, rate in ((np.min, _rates(drawn)), (np.max, _rates(drawn))))
        rate_limits(axes, float(low), 1.0 if high > 0.97 else float(high))
    legend(figure, report, [name for name in summary.models if name in closed | search])
    return figure


def _rates(curves: dict[str, tuple[Floats, Floats]]) -> Floats:
    return np.concatenate([rate for _, rate in curves.values()])


def draw_bins(report: Report, summary: ProtocolSummary) -> Figure | None:
    """Values by bin with their intervals: curves with bands where the bins have an order, bars where they do not."""
    results = summary.models.values()
    drawn = {key: bins for key, bins in summary.bins.items()
             if any(value.value is not None for result in results for value in result.bins.get(key, ()))}  # fmt: skip
    if not drawn:
        return None
    rows = 0.16 * len(summary.models) + 0.32
    height = max(3.2 if bins.at is not None else 1.2 + rows * len(bins.labels) for bins in drawn.values())
    figure, cells = figure_grid(len(drawn), height)
    for axes, (key, bins) in zip(cells, drawn.items(), strict=True):
        values = {name: _columns(result.bins[key]) for name, result in summary.models.items() if result.bins.get(key)}
        (_bands if bins.at is not None else _bars)(axes, report, bins, values)
        known = np.concatenate([column[np.isfinite(column)] for columns in values.values() for column in columns])
        low, high, which = float(known.min()), float(known.max()), "x" if bins.at is None else "y"
        if bins.unit == "rate":
            rate_limits(axes, low, 1.0 if high > 0.6 else high, which=which)
        else:
            pad = 0.06 * max(high - low, 1e-3)
            (axes.set_ylim if which == "y" else axes.set_xlim)(low - pad, high + pad)
    legend(figure, report, [name for name, result in summary.models.items() if any(map(result.bins.get, drawn))])
    return figure


def _columns(values: Sequence[MeasuredValue]) -> tuple[Floats, Floats, Floats]:
    """Value, low and high of each bin, NaN where not known."""
    rows = [(value.value, value.low, value.high) for value in values]
    value, low, high = np.array(rows, dtype=np.float64).T
    return value, low, high


def _labels(bins: Bins) -> list[str]:
    counts = bins.counts or [None] * len(bins.labels)
    return [
        plain(label.replace("-", "–"), 22) + ("" if count is None else f"\nn {count:,}")
        for label, count in zip(bins.labels, counts, strict=True)
    ]


def _bands(axes: Axes, report: Report, bins: Bins, values: dict[str, tuple[Floats, Floats, Floats]]) -> None:
    dress(axes, title=plain(bins.title, 60), x=bins.axis)
    styles, at = looks(report), np.arange(len(bins.labels), dtype=np.float64)
    for name in reversed(list(values)):
        value, low, high = values[name]
        axes.fill_between(at, low, high, color=styles[name].color, alpha=0.14, linewidth=0, zorder=1)
        known = np.isfinite(np.r_[np.nan, value, np.nan])
        alone = np.isfinite(low) & ~known[:-2] & ~known[2:]  # a band needs two neighboring bins
        axes.vlines(at[alone], low[alone], high[alone], color=styles[name].color, linewidth=2, alpha=0.5)
        _line(axes, at, value, styles[name], marks=True)
    axes.set_xticks(at, _labels(bins))
    axes.set_xlim(-0.4, len(at) - 0.6)


def _bars(axes: Axes, report: Report, bins: Bins, values: dict[str, tuple[Floats, Floats, Floats]]) -> None:
    dress(axes, title=plain(bins.title, 60), x=bins.axis, grid="x")
    for (name, (value, low, high)), shift in zip(values.items(), np.linspace(-0.28, 0.28, len(values)), strict=True):
        at, look = np.arange(len(value)) + (shift if len(values) > 1 else 0.0), looks(report)[name]
        axes.hlines(at, low, high, color=look.color, linewidth=2.2)
        axes.plot(value, at, linestyle="none", marker=look.mark, markersize=7, color=look.color, markeredgecolor=PAGE)
    axes.set_yticks(range(len(bins.labels)), _labels(bins))
    axes.set_ylim(len(bins.labels) - 0.4, -0.6)
    for edge in range(1, len(bins.labels)):
        axes.axhline(edge - 0.5, color=GRID, linewidth=0.8)


def draw_scores(report: Report, summary: ProtocolSummary) -> Figure | None:
    """Scores of genuine and impostor pairs, one panel per model."""
    histograms = {name: result.histogram for name, result in summary.models.items() if result.histogram}
    if not histograms:
        return None
    figure, cells = figure_grid(len(histograms), 2.0)
    for axes, (name, histogram) in zip(cells, histograms.items(), strict=True):
        dress(axes, title=plain(report.label(name)), x="score of a pair", grid="x")
        edges, color = np.array(histogram.edges), looks(report)[name].color
        for counts, shade, alpha in ((histogram.impostor, MUTED, 0.3), (histogram.genuine, color, 0.6)):
            density = np.array(counts) / max([1e-12, *counts])
            if density.any():
                axes.stairs(density, edges, fill=True, color=shade, alpha=alpha, linewidth=0)
                axes.stairs(density, edges, color=shade, linewidth=1.2)
        filled = np.flatnonzero(np.array(histogram.impostor) + np.array(histogram.genuine))
        if filled.size:
            axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        if histogram.threshold is not None:
            axes.axvline(histogram.threshold, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_ylim(0, 1.08)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    return figure


def draw_differences(report: Report, summary: ProtocolSummary) -> Figure | None:
    """Differences of two models with their intervals, one panel per pair of models."""
    units = {key: measure.unit for key, measure in summary.measures.items()}
    rows = [
        row for row in summary.differences if row.difference.value is not None and units[row.measure] in ("rate", "auc")
    ]
    pairs = list(dict.fromkeys((row.a, row.b) for row in rows))[:_MAX_PAIRS]
    if not pairs:
        return None
    measures = {key: measure for key, measure in summary.measures.items() if any(row.measure == key for row in rows)}
    titles = Counter(measure.title for measure in measures.values())
    names = [
        plain(each.title, 34) + (f"\n{plain(each.note, 34)}" if titles[each.title] > 1 and each.note else "")
        for each in measures.values()
    ]
    figure, cells = figure_grid(len(pairs), 1.0 + 0.42 * len(measures), width=5.2 if len(pairs) > 1 else 7.4)
    styles, formatter = looks(report), FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if abs(x) > 1e-9 else "0")
    for place, (axes, (a, b)) in enumerate(zip(cells, pairs, strict=True)):
        first, second = (plain(report.label(name), 26) for name in (a, b))
        separator = " " if len(first + second) < 34 else "\n"
        dress(axes, title=f"{first}{separator}minus {second}", x="difference, points", grid="x")
        for at, key in enumerate(measures):
            for row in rows:
                if (row.a, row.b, row.measure) == (a, b, key):
                    _interval(axes, row, at, measures[key].better, styles)
        axes.axvline(0, color=MUTED, linewidth=1.2, zorder=1)
        axes.set_yticks(range(len(measures)), names if place % 2 == 0 else [""] * len(names))
        axes.set_ylim(len(measures) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(formatter)
    return figure


def _interval(axes: Axes, row: Difference, at: int, better: str, styles: dict[str, Look]) -> None:
    """In the color of the better model where the interval excludes zero; a hollow gray mark where it does not."""
    value, low, high = row.difference.value or 0.0, row.difference.low, row.difference.high
    clear = low is not None and high is not None and (low > 0 or high < 0)
    ahead = row.a if (value > 0) == (better != "low") else row.b
    color = styles[ahead].color if clear else MUTED
    if low is not None and high is not None:
        axes.plot([100 * low, 100 * high], [at, at], color=color, linewidth=2.2, solid_capstyle="round", zorder=2)
    axes.plot(
        [100 * value], [at], marker="o", color=color, markerfacecolor=color if clear else PAGE, markersize=7.5,
        markeredgewidth=1.8, zorder=3,
    )  # fmt: skip


PLOTS: Mapping[str, Plot[[Report, ProtocolSummary]]] = {
    "bins": Plot(
        "By bin",
        "Bands and bars are confidence intervals; n is the number of pairs (or probes) in a bin. Empty bins are left out.",
        draw_bins,
    ),
    "differences": Plot(
        "Paired differences",
        "A full mark in the color of the better model: the interval excludes zero. A hollow mark: it does not.",
        draw_differences,
    ),
    "errors": Plot(
        "ROC and DET",
        "ROC: the share of genuine pairs accepted against the share of impostor pairs accepted. DET: both error rates on "
        "normal-deviate axes; lower left is better. At the left end one step is a single impostor pair.",
        draw_errors,
    ),
    "ranks": Plot(
        "Ranks",
        "CMC: the share of probes whose mate is among the first k. Open-set search: the mate must come first and above the "
        "threshold; the axis is the share of probes without a mate that raise a false alarm.",
        draw_ranks,
    ),
    "scores": Plot(
        "Scores",
        "Gray: impostor pairs. Colored: genuine pairs. Each histogram is scaled to its own peak; the dashed line is the "
        "threshold of the first TAR in the table.",
        draw_scores,
    ),
}
