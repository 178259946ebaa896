"""Room: report. The figures of a run: functions of the view, a theme and a width; None where there is nothing to draw.

A wide figure is for a page of about 1000 points, a narrow one for a telephone: the same content, panels stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

from kdlib_faces.report import words
from kdlib_faces.report.curves import training
from kdlib_faces.report.theme import Theme, dress, grid, legend, looks, new_figure, plain
from kdlib_faces.report.view import ALL, Estimate, View

__all__ = ["FIGURES", "Plot"]

Draw = Callable[[View, Theme, bool], Figure | None]
_PER_CENT = FuncFormatter(lambda rate, _: f"{100 * rate:g} %")
_SPAN = 0.56


class Plot(NamedTuple):
    """A figure's file name, heading, the sentence that explains it, and its function."""

    name: str
    title: str
    caption: str
    draw: Draw


def _floor(lowest: float) -> float:
    """A round lower limit, a little below the lowest point."""
    return max(0.0, math.floor((lowest - 0.02) * 20) / 20)


def _ceiling(highest: float) -> float:
    """The whole range, unless everything lies in its lower part."""
    return 1.0 if highest > 0.6 else math.ceil((highest + 0.02) * 20) / 20


def _points(axes: Axes, view: View, theme: Theme, metric: str, names: Sequence[str], *, upright: bool) -> None:
    """One mark with its interval per model and bin, dodged so that no two intervals cover each other."""
    style, lowest, highest = looks(view, theme), 1.0, 0.0
    step = _SPAN / max(len(names) - 1, 1)
    for order, name in enumerate(names):
        shift = (order * step - _SPAN / 2) if len(names) > 1 else 0.0
        rows = [(i, view.estimate(name, bin_name, metric)) for i, bin_name in enumerate(view.bins)]
        found = [(i, e) for i, e in rows if e.value is not None]
        look = style[name]
        at = np.array([i for i, _ in found]) + shift
        values = np.array([e.value for _, e in found], dtype=float)
        low = np.array([e.low if e.low is not None else np.nan for _, e in found], dtype=float)
        high = np.array([e.high if e.high is not None else np.nan for _, e in found], dtype=float)
        spread = np.nan_to_num(np.clip(np.stack([values - low, high - values]), 0, None)) if found else None
        width, alpha = (2.2, 1.0) if look.strong else (1.5, 0.9)
        x, y = (at, values) if upright else (values, at)
        up, along = (spread, None) if upright else (None, spread)
        axes.errorbar(
            x, y, yerr=up, xerr=along, fmt="none", ecolor=look.color, elinewidth=width, capsize=2.5, alpha=alpha
        )
        if upright:
            axes.plot(x, y, color=look.color, linestyle=look.dash, linewidth=1.1, alpha=0.45)
        axes.plot(
            x, y, linestyle="none", marker=look.mark, markersize=7.5 if look.strong else 6,
            markerfacecolor=look.color, markeredgecolor=theme.page, markeredgewidth=0.8,
        )  # fmt: skip
        lowest = min([lowest, *values, *low[np.isfinite(low)]])
        highest = max([highest, *values, *high[np.isfinite(high)]])
    bottom, top = _floor(lowest), _ceiling(highest)
    limits = (bottom, top + 0.03 * (top - bottom))
    if metric.endswith("auc") and bottom < 0.5:
        (axes.axhline if upright else axes.axvline)(0.5, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)))
    (axes.set_ylim if upright else axes.set_xlim)(*limits)


def ages(view: View, theme: Theme, narrow: bool) -> Figure | None:
    """Accuracy against age gap; between age groups the bins lie down, as they have no order and long names."""
    metrics = [m for m in view.bin_metrics() if m == f"tar@{view.far}" or m == "own_auc"]
    metrics = metrics or view.bin_metrics()[:1]
    if not metrics:
        return None
    upright = view.kind == "gap"
    tall = 3.7 if upright else 1.2 + (0.16 * len(view.names) + 0.32) * len(view.bins)
    if narrow:
        figure = new_figure(theme, 5.0, tall * len(metrics) + 0.3 * len(view.names) / 2)
    else:
        figure = new_figure(theme, 10.4, tall + 0.3)
    for index, (axes, metric) in enumerate(zip(grid(figure, len(metrics), narrow), metrics, strict=True)):
        title = {"own_auc": "AUC within the bin"}.get(metric, f"Genuine pairs found: {words.metric_name(metric)}")
        dress(axes, theme, title=title, grid="y" if upright else "x")
        _points(axes, view, theme, metric, view.names, upright=upright)
        ticks = []
        for name in view.bins:
            pairs = view.pairs(name, "genuine")
            ticks.append(plain(words.bin_name(view, name), 22) + (f"\nn {pairs:,}" if pairs is not None else ""))
        rate = axes.yaxis if upright else axes.xaxis
        if metric.endswith("auc"):
            rate.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        else:
            rate.set_major_formatter(_PER_CENT)
        if upright:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlim(-0.6, len(ticks) - 0.4)
            axes.set_xlabel("age gap in years, and genuine pairs in the bin")
        else:
            axes.set_yticks(range(len(ticks)), ticks if index == 0 or narrow else [""] * len(ticks))
            axes.set_ylim(len(ticks) - 0.4, -0.6)
            for edge in range(1, len(ticks)):
                axes.axhline(edge - 0.5, color=theme.grid, linewidth=0.8)
    legend(figure, theme, view, view.names)
    return figure


def _interval_row(axes: Axes, theme: Theme, color: str, row: int, difference: Estimate) -> None:
    """One difference in points; the mark is full if its interval leaves zero out."""
    value, low, high, _ = difference
    if value is None:
        return
    clear = low is not None and high is not None and (low > 0 or high < 0)
    if low is not None and high is not None:
        axes.plot([100 * low, 100 * high], [row, row], color=color, linewidth=2.2, solid_capstyle="round")
    face = color if clear else theme.page
    axes.plot([100 * value], [row], marker="o", color=color, markerfacecolor=face, markersize=7.5, markeredgewidth=1.8)


def differences(view: View, theme: Theme, narrow: bool) -> Figure | None:
    """Distilled minus alone (or the first pair compared) by bin, around zero, one panel a metric."""
    measured = [c for c in view.comparisons if c.difference.value is not None]
    pair = next(iter([(c.a, c.b) for c in measured if (c.a, c.b) == (view.distilled, view.alone)] or
                     [(c.a, c.b) for c in measured]), None)  # fmt: skip
    rows = {(c.metric, c.bin): c.difference for c in measured if (c.a, c.b) == pair}
    found = list(dict.fromkeys(metric for metric, _ in rows))
    metrics = [metric for metric in (f"tar@{view.far}", "own_auc") if metric in found] or found[:1]
    bins = [name for name in (*view.bins, ALL) if any((metric, name) in rows for metric in metrics)]
    if pair is None or not bins:
        return None
    tall = 1.15 + 0.36 * len(bins)
    figure = new_figure(theme, *((5.0, tall * len(metrics) + 0.3) if narrow else (5.2 * len(metrics), tall + 0.3)))
    color = looks(view, theme)[pair[0]].color
    for index, (axes, metric) in enumerate(zip(grid(figure, len(metrics), narrow), metrics, strict=True)):
        unit = "hundredths" if metric.endswith("auc") else "points"
        dress(axes, theme, title=words.metric_name(metric), x=f"difference, {unit}", grid="x")
        for row, name in enumerate(bins):
            if (metric, name) in rows:
                _interval_row(axes, theme, color, row, rows[metric, name])
        axes.axvline(0, color=theme.muted, linewidth=1.2)
        labels = [plain(words.bin_name(view, name), 24) for name in bins]
        axes.set_yticks(range(len(bins)), labels if index == 0 or narrow else [""] * len(bins))
        axes.set_ylim(len(bins) - 0.5, -0.5)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    first, second = (plain(view.label(name), 24) for name in pair)
    figure.suptitle(f"{first} minus {second}", x=0.01, ha="left", fontsize=10.5, color=theme.muted)
    return figure


def roc(view: View, theme: Theme, narrow: bool) -> Figure | None:
    """ROC over all pairs and over the large gap, false accept rate on a logarithmic axis."""
    keys = [key for key in (ALL, view.large) if key and any(view.roc(name).get(key) for name in view.names)]
    if not keys:
        return None
    figure = new_figure(theme, *((5.0, 3.5 * len(keys) + 0.5) if narrow else (5.2 * len(keys), 3.9)))
    style = looks(view, theme)
    for axes, key in zip(grid(figure, len(keys), narrow), keys, strict=True):
        title = "All pairs" if key == ALL else words.first_upper(words.pairs_words(view, key))
        dress(axes, theme, title=plain(title, 44), x="false accept rate", y="true accept rate", grid="both")
        lowest, smallest = 1.0, 0.1
        for name in reversed(view.names):
            curve = view.roc(name).get(key)
            kept = (
                [(f, t) for f, t in zip(curve["far"], curve["tar"], strict=True) if f and t is not None]
                if curve
                else []
            )
            if not kept:
                continue
            far, tar = np.array(sorted(kept), dtype=float).T
            look = style[name]
            axes.plot(
                far, tar, color=look.color, linestyle=look.dash, linewidth=2.2 if look.strong else 1.6,
                drawstyle="steps-post", zorder=3 if look.strong else 2,
            )  # fmt: skip
            lowest, smallest = min(lowest, tar[0]), min(smallest, far[0])
        axes.set_xscale("log")
        axes.set_xlim(smallest, 1.0)
        axes.set_ylim(_floor(lowest), 1.01)
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_major_formatter(LogFormatterSciNotation())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(_PER_CENT)
        if view.far and smallest < float(view.far) < 1:
            axes.axvline(float(view.far), color=theme.muted, linewidth=1, linestyle=(0, (1, 2)))
    legend(figure, theme, view, view.names)
    return figure


def scores(view: View, theme: Theme, narrow: bool) -> Figure | None:
    """Genuine scores of each bin above the impostors' scores, one ridge a bin."""
    order = [name for name in (view.alone, view.distilled) if name] or view.names[:2]
    chosen = [name for name in order if view.age_gap(name).get("histogram")]
    if not chosen:
        return None
    bins = [b for b in view.bins if any(view.age_gap(n)["histogram"]["genuine"].get(b) for n in chosen)] or [ALL]
    tall = 1.3 + 0.62 * len(bins)
    figure = new_figure(theme, *((5.0, tall * len(chosen)) if narrow else (5.2 * len(chosen), tall)))
    style = looks(view, theme)
    for index, (axes, name) in enumerate(zip(grid(figure, len(chosen), narrow), chosen, strict=True)):
        histogram = view.age_gap(name)["histogram"]
        edges = np.array(histogram["edges"], dtype=float)
        dress(axes, theme, title=plain(view.label(name)), x="cosine similarity of a pair", grid="x")
        for row, bin_name in enumerate(bins):
            base = float(len(bins) - 1 - row)
            counts = histogram["genuine"].get(bin_name) or []
            for heights, color, alpha in (
                (histogram["impostor"], theme.muted, 0.28),
                (counts, style[name].color, 0.62),
            ):
                density = np.array([h or 0 for h in heights], dtype=float)
                if density.size == 0 or density.max() <= 0:
                    continue
                top = base + 0.86 * density / density.max()
                axes.stairs(top, edges, baseline=base, fill=True, color=color, alpha=alpha, linewidth=0)
                axes.stairs(top, edges, baseline=None, color=color, linewidth=1.1)
            axes.axhline(base, color=theme.grid, linewidth=0.8)
        labels = [plain(words.bin_name(view, b), 22) if index == 0 or narrow else "" for b in bins]
        axes.set_yticks([len(bins) - 1 - row + 0.2 for row in range(len(bins))], labels)
        axes.set_ylim(-0.04, len(bins))
        filled = np.flatnonzero(
            np.sum([[h or 0 for h in r] for r in (histogram["impostor"], *histogram["genuine"].values())], axis=0)
        )
        if filled.size:
            axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        axes.spines["left"].set_visible(False)
    return figure


def cost(view: View, theme: Theme, narrow: bool) -> Figure | None:
    """What the large-gap accuracy costs: multiply-adds, or parameters where they were not counted."""
    key = "macs" if all(view.models[name].get("macs") for name in view.names) else "parameters"
    metric = next(iter(m for m in view.bin_metrics() if view.large and view.has(m, [view.large])), None)
    rows = [
        (name, view.models[name][key], view.estimate(name, view.large, metric))
        for name in view.names
        if metric and view.large and view.models[name].get(key)
    ]
    rows = [row for row in rows if row[2].value is not None]
    if metric is None or len(rows) < 2 or len({size for _, size, _ in rows}) < 2:
        return None
    figure = new_figure(theme, 5.0, 3.6)
    (axes,) = grid(figure, 1, narrow)
    what = "multiply-adds of one image" if key == "macs" else "parameters"
    dress(axes, theme, title=plain(f"{words.metric_name(metric)}, {words.large_words(view)}", 48), x=what, grid="both")
    style, lowest, highest, seen = looks(view, theme), 1.0, 0.0, {}  # type: ignore[var-annotated] # sizes met so far
    widest = max(size for _, size, _ in rows) / min(size for _, size, _ in rows)
    for name, size, estimate in rows:
        # Students share one network, so their marks would lie on each other: step aside by a little of the axis.
        at = size * widest ** (0.035 * seen.setdefault(size, 0))
        seen[size] += 1
        look, (_, low, high, _) = style[name], estimate
        value = float(estimate.value or 0.0)
        if low is not None and high is not None:
            axes.plot([at, at], [low, high], color=look.color, linewidth=2.0)
            lowest, highest = min(lowest, low), max(highest, high)
        axes.plot(
            [at],
            [value],
            marker=look.mark,
            color=look.color,
            markersize=9,
            markeredgecolor=theme.page,
            linestyle="none",
        )
        lowest, highest = min(lowest, value), max(highest, value)
    axes.set_xscale("log")
    sizes = [size for _, size, _ in rows]
    axes.set_xlim(min(sizes) / widest**0.15, max(sizes) * widest**0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if widest < 1e3 else (1.0,), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: words.count(x).replace(".00", "").replace(".0", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(_floor(lowest), _ceiling(highest) * 1.01)
    if not metric.endswith("auc"):
        axes.yaxis.set_major_formatter(_PER_CENT)
    legend(figure, theme, view, [name for name, _, _ in rows], lines=False)
    return figure


FIGURES: tuple[Plot, ...] = (
    Plot(
        "ages",
        "Accuracy against age gap",
        "TAR: the share of genuine pairs accepted when one threshold, the same for every bin, lets the stated share of "
        "all impostor pairs through. AUC: against impostor pairs of the same bin only, so that age alone cannot tell "
        "the two kinds apart; 0.5 is guessing. Bars are intervals over identities; n is the number of genuine pairs.",
        ages,
    ),
    Plot(
        "differences",
        "Differences with their intervals",
        "Both models are resampled with the same identities, so the interval of the difference is narrower than the "
        "two models' own. A full mark: the interval leaves zero out. A hollow one: it does not.",
        differences,
    ),
    Plot(
        "roc",
        "ROC",
        "True against false accept rate; a single bin is drawn against its own impostor pairs. The dotted line marks the false accept rate of the headline; at the left end "
        "a step is a single impostor pair.",
        roc,
    ),
    Plot(
        "scores",
        "Scores",
        "Colored: genuine pairs of each bin. Gray: all impostor pairs, the same in each row. The less they overlap, "
        "the better; each shape is scaled to its own peak.",
        scores,
    ),
    Plot(
        "cost",
        "Accuracy against cost",
        "Large-gap accuracy against the size of the network, on a logarithmic axis. Equal sizes stand side by side.",
        cost,
    ),
    Plot("training", "Training", "Loss against step: thin as logged, strong as a running mean.", training),
)
