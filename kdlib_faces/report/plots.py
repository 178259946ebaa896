"""Room: report. The figures of one protocol: ROC and DET, ranks, bins with bands, scores, differences of models.

Functions of the view, the evaluation, a theme and a width; None where the evaluation has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

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

from kdlib_faces.report.evaluations import Bins, Difference, Evaluation, Measure, Measured
from kdlib_faces.report.theme import Look, Theme, dress, grid, legend, looks, new_figure, plain
from kdlib_faces.report.view import View

__all__ = ["PLOTS"]

Draw = Callable[[View, Evaluation, Theme, bool], Figure | None]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_PER_CENT = FuncFormatter(lambda rate, _: f"{100 * rate:g} %")
_DET_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.4)
_MOST_PAIRS = 4
_ROW = 0.42


def _points(curve: dict[str, Any] | Any, first: str, second: str) -> tuple[Floats, Floats]:
    """A curve's two columns, rising, without the points where either is not known."""
    both = zip(curve[first], curve[second], strict=True)
    kept = np.array(sorted((x, y) for x, y in both if x is not None and y is not None), dtype=np.float64)
    return kept.reshape(-1, 2)[:, 0], kept.reshape(-1, 2)[:, 1]


def _stroke(look: Look) -> dict[str, Any]:
    return {"color": look.color, "linestyle": look.dash, "linewidth": 2.2 if look.strong else 1.6}


def _rates(axes: Axes, low: float, high: float = 1.0, *, which: str = "y") -> None:
    """A linear axis of rates from a round number below `low` to 100 %."""
    bottom = max(0.0, np.floor((low - 0.02) * 20) / 20)
    if high - low < 0.04:  # models that nearly agree: a scale on which they differ
        bottom = max(0.0, low - 0.35 * max(high - low, 2e-3))
    top = max(high + 0.03 * (high - bottom), bottom + 0.01)
    (axes.set_ylim if which == "y" else axes.set_xlim)(bottom, top)
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(_PER_CENT)


def errors(view: View, evaluation: Evaluation, theme: Theme, narrow: bool) -> Figure | None:
    """ROC on a logarithmic axis, and DET on normal-deviate axes, where a normal score is a straight line."""
    names = evaluation.having("roc")
    curves = {name: _points(evaluation.found(name, "roc"), "far", "tar") for name in names}
    curves = {name: (far[far > 0], tar[far > 0]) for name, (far, tar) in curves.items() if (far > 0).any()}
    if not curves:
        return None
    figure = new_figure(theme, *((5.0, 7.6) if narrow else (10.4, 4.1)))
    left, right = grid(figure, 2, narrow)
    style = looks(view, theme)
    smallest = min(0.1, *(far[0] for far, _ in curves.values()))
    dress(left, theme, title="ROC", x="false accept rate", y="genuine pairs accepted", grid="both")
    dress(right, theme, title="DET", x="false accept rate", y="genuine pairs rejected", grid="both")
    for name in reversed(list(curves)):
        far, tar = curves[name]
        zorder = 3 if style[name].strong else 2
        left.plot(far, tar, drawstyle="steps-post", zorder=zorder, **_stroke(style[name]))
        inside = (far < 1) & (tar < 1) & (tar > 0)
        right.plot(_probit(far[inside]), _probit(1 - tar[inside]), zorder=zorder, **_stroke(style[name]))
    left.set_xscale("log")
    left.set_xlim(smallest, 1.0)
    left.xaxis.set_major_locator(LogLocator(numticks=8))
    left.xaxis.set_major_formatter(LogFormatterSciNotation())
    left.xaxis.set_minor_formatter(NullFormatter())
    _rates(left, min(tar[0] for _, tar in curves.values()))
    missed = np.concatenate([1 - tar[(far < 1) & (tar < 1) & (tar > 0)] for far, tar in curves.values()])
    if not missed.size:
        right.text(0.5, 0.5, "no genuine pair is rejected", transform=right.transAxes, ha="center", color=theme.muted)
    _deviates(right, smallest, min(missed, default=0.01), max(missed, default=0.5))
    legend(figure, theme, view, list(curves))
    return figure


def _probit(rates: Floats) -> Floats:
    inverse = NormalDist().inv_cdf
    return np.array([inverse(min(max(float(rate), 1e-12), 1 - 1e-12)) for rate in rates])


def _deviates(axes: Axes, smallest: float, low: float, high: float) -> None:
    """Both axes as normal deviates, with rates for labels."""
    named = [(float(_probit(np.array([tick]))[0]), _percentage(tick)) for tick in (*_DET_TICKS, 0.6, 0.8, 0.95, 0.99)]
    for axis, (first, last) in (
        (axes.xaxis, _probit(np.array([smallest * 0.9, 0.5]))),
        (axes.yaxis, _probit(np.array([max(low * 0.8, 1e-6), min(max(high * 1.1, 3 * low), 0.995)]))),
    ):
        inside = [(at, label) for at, label in named if first <= at <= last]
        axis.set_major_locator(FixedLocator([at for at, _ in inside]))
        axis.set_major_formatter(FuncFormatter(lambda at, _, k=dict(inside): k.get(at, "")))
        (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(first, last)


def _percentage(rate: float) -> str:
    return f"{100 * rate:g} %" if rate >= 1e-3 else f"$10^{{{round(np.log10(rate))}}}$"


def ranks(view: View, evaluation: Evaluation, theme: Theme, narrow: bool) -> Figure | None:
    """CMC: identified within the first k; and, of an open set, identified against false alarms."""
    panels = [kind for kind in ("cmc", "search") if evaluation.having(kind)]
    if not panels:
        return None
    size = (5.0, 3.8 * len(panels)) if narrow else (5.2 * len(panels), 4.0)
    figure = new_figure(theme, *size)
    style = looks(view, theme)
    for axes, kind in zip(grid(figure, len(panels), narrow), panels, strict=True):
        first, second = ("rank", "rate") if kind == "cmc" else ("fpir", "tpir")
        title = "CMC" if kind == "cmc" else "Open-set search"
        x = "rank" if kind == "cmc" else "false positive identification rate"
        dress(axes, theme, title=title, x=x, y="probes identified", grid="both")
        lowest, highest, ends = 1.0, 0.0, [1.0]
        for name in reversed(evaluation.having(kind)):
            at, rate = _points(evaluation.found(name, kind), first, second)
            at, rate = at[at > 0], rate[at > 0]
            if not at.size:
                continue
            shape: dict[str, Any] = {"drawstyle": "steps-post"}
            if kind == "cmc" and at.size <= 12:
                shape = {"marker": style[name].mark, "markersize": 5, "markeredgecolor": theme.page}
            axes.plot(at, rate, **_stroke(style[name]), **shape)
            lowest, highest = min(lowest, float(rate.min())), max(highest, float(rate.max()))
            ends += [float(at[0]), float(at[-1])]
        if kind == "search" or max(ends) > 20:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if kind == "search":
            axes.set_xlim(min(ends), 1.0)
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:g}"))
            if max(ends) > 20:
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _rates(axes, lowest, 1.0 if highest > 0.97 else highest)
    legend(figure, theme, view, [name for name in evaluation.models if any(evaluation.found(name, k) for k in panels)])
    return figure


def bands(view: View, evaluation: Evaluation, theme: Theme, narrow: bool) -> Figure | None:
    """Curves over bins (age gaps, ages), each with the band of its intervals; unordered bins lie down."""
    drawn = [b for b in evaluation.bins if any(m.value is not None for n in evaluation.models for m in evaluation.binned(n, b.key))]  # fmt: skip
    if not drawn:
        return None
    across = 1 if narrow else min(2, len(drawn))
    rows = -(-len(drawn) // across)
    tall = max(3.3 if b.at is not None else 1.2 + (0.16 * len(evaluation.models) + 0.32) * len(b.labels) for b in drawn)
    figure = new_figure(theme, 5.0 if narrow else 5.2 * across, tall * rows + 0.4)
    cells = grid(figure, len(drawn), narrow, across=across)
    for axes, bins in zip(cells, drawn, strict=True):
        (_band if bins.at is not None else _bars)(axes, view, evaluation, bins, theme)
    legend(figure, theme, view, [n for n in evaluation.models if any(evaluation.binned(n, b.key) for b in drawn)])
    return figure


def _ends(found: Sequence[Measured]) -> tuple[Floats, Floats, Floats]:
    """Value, low and high of each bin, NaN where not known."""

    def column(key: str) -> Floats:
        return np.array([np.nan if getattr(m, key) is None else getattr(m, key) for m in found], dtype=np.float64)

    return column("value"), column("low"), column("high")


def _labels(bins: Bins) -> list[str]:
    return [
        plain(label.replace("-", "–"), 22) + (f"\nn {count:,}" if count is not None else "")
        for label, count in zip(bins.labels, bins.counts, strict=True)
    ]


def _scale(axes: Axes, bins: Bins, lowest: float, highest: float, which: str) -> None:
    if bins.unit == "rate":
        _rates(axes, lowest, 1.0 if highest > 0.6 else highest, which=which)
    else:
        pad = 0.06 * max(highest - lowest, 1e-3)
        (axes.set_ylim if which == "y" else axes.set_xlim)(lowest - pad, highest + pad)


def _band(axes: Axes, view: View, evaluation: Evaluation, bins: Bins, theme: Theme) -> None:
    dress(axes, theme, title=plain(bins.title, 60), x=bins.axis, grid="y")
    style, at = looks(view, theme), np.arange(len(bins.labels), dtype=np.float64)
    seen = [np.nan]
    for name in reversed(evaluation.models):
        found = evaluation.binned(name, bins.key)
        if not found:
            continue
        value, low, high = _ends(found)
        look = style[name]
        axes.fill_between(at, low, high, color=look.color, alpha=0.14, linewidth=0, zorder=1)
        alone = np.isfinite(low) & ~np.isfinite(np.r_[np.nan, value[:-1]]) & ~np.isfinite(np.r_[value[1:], np.nan])
        axes.vlines(at[alone], low[alone], high[alone], color=look.color, linewidth=2, alpha=0.5)
        axes.plot(at, value, marker=look.mark, markersize=6.5, markeredgecolor=theme.page, zorder=3, **_stroke(look))
        seen += [*value, *low, *high]
    axes.set_xticks(at, _labels(bins))
    axes.set_xlim(-0.4, len(at) - 0.6)
    _scale(axes, bins, float(np.nanmin(seen)), float(np.nanmax(seen)), "y")


def _bars(axes: Axes, view: View, evaluation: Evaluation, bins: Bins, theme: Theme) -> None:
    dress(axes, theme, title=plain(bins.title, 60), x=bins.axis, grid="x")
    style = looks(view, theme)
    step = 0.56 / max(len(evaluation.models) - 1, 1)
    seen = [np.nan]
    for order, name in enumerate(evaluation.models):
        found = evaluation.binned(name, bins.key)
        if not found:
            continue
        value, low, high = _ends(found)
        at = np.arange(len(value)) + ((order * step - 0.28) if len(evaluation.models) > 1 else 0.0)
        look = style[name]
        axes.hlines(at, low, high, color=look.color, linewidth=2.2)
        axes.plot(value, at, linestyle="none", marker=look.mark, markersize=7, color=look.color, markeredgecolor=theme.page)  # fmt: skip
        seen += [*value, *low, *high]
    axes.set_yticks(range(len(bins.labels)), _labels(bins))
    axes.set_ylim(len(bins.labels) - 0.4, -0.6)
    for edge in range(1, len(bins.labels)):
        axes.axhline(edge - 0.5, color=theme.grid, linewidth=0.8)
    _scale(axes, bins, float(np.nanmin(seen)), float(np.nanmax(seen)), "x")


def scores(view: View, evaluation: Evaluation, theme: Theme, narrow: bool) -> Figure | None:
    """Scores of genuine and of impostor pairs, one panel a model, each shape to its own peak."""
    names = evaluation.having("histogram")
    if not names:
        return None
    across = 1 if narrow else min(3, len(names))
    rows = -(-len(names) // across)
    figure = new_figure(theme, 5.0 if narrow else max(5.2, 3.5 * across), 2.1 * rows + 0.5)
    style = looks(view, theme)
    for axes, name in zip(grid(figure, len(names), narrow, across=across), names, strict=True):
        histogram = evaluation.found(name, "histogram")
        edges = np.array(histogram["edges"], dtype=np.float64)
        dress(axes, theme, title=plain(view.label(name)), x="score of a pair", grid="x")
        filled = []
        for heights, color, alpha in (
            (histogram["impostor"], theme.muted, 0.3),
            (histogram["genuine"], style[name].color, 0.6),
        ):
            density = np.array(heights, dtype=np.float64)
            if density.max(initial=0) <= 0:
                continue
            filled += np.flatnonzero(density).tolist()
            axes.stairs(density / density.max(), edges, fill=True, color=color, alpha=alpha, linewidth=0)
            axes.stairs(density / density.max(), edges, color=color, linewidth=1.2)
        if filled:
            axes.set_xlim(edges[min(filled)], edges[max(filled) + 1])
        if histogram.get("threshold") is not None:
            axes.axvline(histogram["threshold"], color=theme.ink, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_ylim(0, 1.08)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    return figure


def differences(view: View, evaluation: Evaluation, theme: Theme, narrow: bool) -> Figure | None:
    """Model against model, one panel a pair of models: differences with intervals, around zero."""
    told = [d for d in evaluation.differences if d.difference.value is not None and d.measure.unit in ("rate", "auc")]
    pairs = list(dict.fromkeys((d.a, d.b) for d in told))[:_MOST_PAIRS]
    if not pairs:
        return None
    measures = [m for m in evaluation.measures if any(d.measure == m for d in told)]
    across = 1 if narrow else min(2, len(pairs))
    rows = -(-len(pairs) // across)
    figure = new_figure(
        theme, 5.0 if narrow else (10.4 if across == 2 else 7.4), (1.1 + _ROW * len(measures)) * rows + 0.1
    )
    style = looks(view, theme)
    for place, (axes, (a, b)) in enumerate(zip(grid(figure, len(pairs), narrow, across=across), pairs, strict=True)):
        first, second = (plain(view.label(name), 26) for name in (a, b))
        title = (
            f"{first} minus {second}" if len(first + second) < (20 if narrow else 34) else f"{first}\nminus {second}"
        )
        dress(axes, theme, title=title, x="difference, points", grid="x")
        for row, measure in enumerate(measures):
            found = next((d for d in told if (d.a, d.b) == (a, b) and d.measure == measure), None)
            if found is not None:
                _interval(axes, theme, found, row, style[a].color, style[b].color)
        axes.axvline(0, color=theme.muted, linewidth=1.2, zorder=1)
        named = place % across == 0
        axes.set_yticks(range(len(measures)), [_row_name(m, measures) if named else "" for m in measures])
        axes.set_ylim(len(measures) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if abs(x) > 1e-9 else "0")
        )
    return figure


def _row_name(measure: Measure, among: Sequence[Measure]) -> str:
    """The title, with the note where another measure has the same title."""
    title = plain(measure.title, 34)
    alone = sum(other.title == measure.title for other in among) == 1
    return title if alone or not measure.note else f"{title}\n{plain(measure.note, 34)}"


def _interval(axes: Axes, theme: Theme, found: Difference, row: int, ahead: str, behind: str) -> None:
    """The color is the better model's where the interval leaves zero out; a hollow gray mark where it does not."""
    value, low, high = found.difference.value or 0.0, found.difference.low, found.difference.high
    sign = -1 if found.measure.better == "low" else 1
    clear = low is not None and high is not None and (low > 0 or high < 0)
    color = (ahead if sign * value > 0 else behind) if clear else theme.muted
    if low is not None and high is not None:
        axes.plot([100 * low, 100 * high], [row, row], color=color, linewidth=2.2, solid_capstyle="round", zorder=2)
    axes.plot(
        [100 * value], [row], marker="o", color=color, markerfacecolor=color if clear else theme.page, markersize=7.5,
        markeredgewidth=1.8, zorder=3,
    )  # fmt: skip


PLOTS: dict[str, tuple[str, str, Draw]] = {
    "errors": (
        "ROC and DET",
        "Left, the share of genuine pairs accepted against the share of impostor pairs accepted. Right, the errors of "
        "both kinds on normal-deviate axes: lower and further left is better. At the left end a step is a single "
        "impostor pair.",
        errors,
    ),
    "ranks": (
        "Ranks",
        "CMC: the share of probes whose mate is among the first k. Open-set search, where shown: the mate must come first "
        "and above the threshold; the axis is the share of probes without a mate that raise a false alarm.",
        ranks,
    ),
    "bins": (
        "By bin",
        "Bands and bars are the intervals; n is how many pairs (or probes) a bin holds. A bin without pairs is left out.",
        bands,
    ),
    "scores": (
        "Scores",
        "Gray: impostor pairs. Colored: genuine pairs. Each shape is scaled to its own peak; the dashed line is the "
        "threshold of the first TAR in the table.",
        scores,
    ),
    "differences": (
        "Model against model",
        "The same pairs, resampled alike for both models. A full mark, in the color of the better model: the interval "
        "leaves zero out. A hollow one: it does not.",
        differences,
    ),
}
