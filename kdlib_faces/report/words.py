"""Room: report. Numbers and findings in words: formats, names of metrics and bins, the headline. Pure text, no markup.

Rates are shown in per cent, differences of rates in points (hundredths), an AUC with three decimals.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kdlib_faces.report.view import ALL, Estimate, View

__all__ = [
    "NOTHING",
    "Finding",
    "bin_name",
    "count",
    "far_words",
    "finding",
    "first_upper",
    "interval",
    "large_words",
    "level_words",
    "metric_name",
    "number",
    "pairs_words",
    "per_cent",
    "points",
    "seconds",
    "shorten",
    "value",
]

NOTHING = "–"
_SPACE = "\u00a0"  # no line break between a number and its unit


def per_cent(rate: float | None, digits: int = 1) -> str:
    """0.8123 -> '81.2 %', with a space that does not break."""
    return NOTHING if rate is None else f"{100 * rate:.{digits}f}{_SPACE}%"


def points(difference: float | None, digits: int = 1) -> str:
    """0.0123 -> '+1.2', with a real minus sign."""
    return NOTHING if difference is None else f"{100 * difference:+.{digits}f}".replace("-", "−")


def count(amount: float | None) -> str:
    """A large count in three figures, the unit after a space that does not break: 1003136 -> '1.00 M', 12345 -> '12.3 k', 900 -> '900'."""
    if amount is None:
        return NOTHING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(amount) >= size:
            scaled = amount / (1e3 if unit == "k" else size)
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{_SPACE}{unit}"
    return f"{amount:,.0f}"


def number(amount: float | None, digits: int = 3) -> str:
    """Significant figures without an exponent for everyday sizes."""
    return NOTHING if amount is None else f"{amount:.{digits}g}"


def seconds(duration: float | None) -> str:
    """52.3 -> '52 s', 130 -> '2 min 10 s', 9000 -> '2 h 30 min'."""
    if duration is None:
        return NOTHING
    whole = round(duration)
    if whole < 10:
        return f"{duration:.1f} s"
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def first_upper(text: str) -> str:
    """The first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def shorten(text: str, limit: int = 60) -> str:
    """One line, cut with an ellipsis."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def value(estimate: Estimate, metric: str) -> str:
    """The estimate's value in the metric's unit."""
    if estimate.value is None:
        return NOTHING
    return f"{estimate.value:.3f}" if metric.endswith("auc") else per_cent(estimate.value)


def interval(estimate: Estimate, metric: str) -> str:
    """The estimate's interval in the metric's unit without the unit's sign; empty if there is none."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return ""
    if metric == "difference":
        return f"{points(estimate.low)} to {points(estimate.high)}"
    if metric.endswith("auc"):
        return f"{estimate.low:.3f}–{estimate.high:.3f}"
    return f"{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"


def far_words(far: str) -> str:
    """'0.001' -> 'one false match in 1,000 impostor pairs'."""
    rate = float(far)
    one_in = 1 / rate if rate > 0 else math.inf
    if math.isfinite(one_in) and abs(one_in - round(one_in)) < 1e-6 * one_in:
        return f"one false match in {round(one_in):,} impostor pairs"
    return f"a false accept rate of {100 * rate:g} %"


def metric_name(metric: str) -> str:
    """'tar@0.01' -> 'TAR at FAR 1 %'."""
    kind, _, far = metric.partition("@")
    names = {"auc": "AUC", "own_auc": "AUC, own impostors", "tar": "TAR", "own_tar": "TAR, own impostors"}
    name = names.get(kind, kind.replace("_", " "))
    try:
        return f"{name}, FAR{_SPACE}{100 * float(far):g}{_SPACE}%" if far else name
    except ValueError:
        return metric


def bin_name(view: View, name: str) -> str:
    """A bin as a row's name: '10-19' -> '10–19'; groups keep theirs."""
    if name == ALL:
        return "all pairs"
    return name.replace("-", "–") if view.kind == "gap" else name


def pairs_words(view: View, name: str) -> str:
    """A bin in a sentence: 'pairs with an age gap of 30+ years'."""
    if name == ALL:
        return "all pairs"
    return f"pairs with an age gap of {bin_name(view, name)} years" if view.kind == "gap" else f"{name} pairs"


def large_words(view: View) -> str:
    """The headline bin as a short name."""
    if view.large is None:
        return "large age gap"
    name = bin_name(view, view.large)
    return f"age gap {name}" if view.kind == "gap" else name


def level_words(view: View) -> str:
    """The confidence level of all intervals."""
    return f"{100 * float(view.run.get('level') or 0.95):g}{_SPACE}%"


class Finding(NamedTuple):
    """What the run shows: a headline, sentences below it, and whether it shows a gain."""

    headline: str
    sentences: list[str]
    verdict: str  # "gain", "loss", "unclear" or "none"
    verdict_words: str


def _judge(view: View, pair: tuple[str, str], metric: str, large: str) -> tuple[str, str, list[str]]:
    student, alone = (view.estimate(name, large, metric) for name in pair)
    compared = view.compared(large, metric)
    if compared is None or compared.difference.value is None:
        if student.value is None or alone.value is None:
            return "none", "", []
        gap = points(student.value - alone.value)
        return "none", "", [f"Distilled minus alone: {gap} points; no interval of the difference was given."]
    difference = compared.difference
    spread = (
        f" ({level_words(view)} interval {interval(difference, 'difference')})"
        if interval(difference, "difference")
        else ""
    )
    unit = "hundredths of AUC" if metric.endswith("auc") else "points"
    said = [f"Distilled minus alone: {points(difference.value)} {unit}{spread}."]
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "none", "", said
    if low <= 0 <= high:
        said.append(
            "The interval of the difference includes zero: this run does not show that distillation changed it."
        )
        return "unclear", "difference includes zero", said
    better = low > 0
    if compared.separate:
        said.append("The two students' own intervals do not overlap.")
        words = "intervals are separate"
    else:
        side = "above" if better else "below"
        said.append(f"The two students' own intervals overlap; that of the paired difference stays {side} zero.")
        words = f"paired difference {side} zero"
    return ("gain" if better else "loss"), words, said


def _without_distillation(view: View, metric: str, large: str) -> Finding:
    """Of models that are only measured: the best one in the headline bin, then the others."""
    rates = {name: view.estimate(name, large, metric) for name in view.names}
    known = sorted((n for n in rates if rates[n].value is not None), key=lambda n: rates[n].value or 0.0, reverse=True)
    best, pairs = known[0], pairs_words(view, large)
    if metric.startswith("tar@"):
        start = f"{view.label(best)} finds {value(rates[best], metric)} of the genuine {pairs}."
        how = f"At {far_words(metric[4:])}"
    else:
        start = f"{view.label(best)} reaches {value(rates[best], metric)} on {pairs}."
        how = metric_name(metric)
    said = [
        f"{view.label(name)} {value(rates[name], metric)} ({interval(rates[name], metric) or NOTHING})"
        for name in known
    ]
    return Finding(start, [f"{how}, with {level_words(view)} intervals: {'; '.join(said)}."], "none", "")


def finding(view: View) -> Finding:
    """The headline of a run, from its large-gap bin; falls back by steps as parts of the run are missing.

    Examples:
        >>> run = {"format": 1, "title": "t", "models": {"m": {"role": "student", "protocols": {}}}}
        >>> finding(View(run)).headline
        'One model, without an age-gap result.'
    """
    large = view.large
    metrics = [name for name in view.bin_metrics() if large is not None and view.has(name, [large])]
    if large is None or not metrics:
        models = "One model" if len(view.names) == 1 else f"{len(view.names)} models"
        return Finding(f"{models}, without an age-gap result.", [], "none", "")
    pairs = pairs_words(view, large)
    metric = next((name for name in metrics if view.compared(large, name)), metrics[0])
    if view.distilled is None:
        return _without_distillation(view, metric, large)
    kept, teacher = view.kept(large), view.best_teacher(large)
    verdict, words = "none", ""
    more: list[str] = []
    if view.alone is not None:
        verdict, words, more = _judge(view, (view.distilled, view.alone), metric, large)
    if kept is not None:
        whose = "its teacher's" if len(view.teachers) == 1 else "its best teacher's"
        name = f"{whose} true matches on {pairs}"
        share = f"finds {kept:.2f} times" if kept > 1.0005 else f"keeps {per_cent(kept, 0)} of"
        start = f"The distilled student {share} {name}"
    else:
        rate = value(view.estimate(view.distilled, large, metric), metric)
        start = f"The distilled student reaches {rate} ({metric_name(metric)}) on {pairs}"
    # What was kept says nothing of what distillation gave: the second half of the sentence does.
    ends = {"gain": ", more than the student alone", "loss": ", fewer than the student alone"}
    if not metric.startswith("tar@"):
        ends = {"gain": "; its AUC is above the student alone's", "loss": "; its AUC is below the student alone's"}
    ends["unclear"] = ", without a clear gain over the student alone"
    headline = f"{start}{ends.get(verdict, '')}."
    sentences: list[str] = []
    shown = [(name, view.estimate(name, large, metric)) for name in (view.distilled, view.alone, teacher) if name]
    said = [
        f"{view.label(name)} {value(estimate, metric)}"
        + (f" ({spread})" if (spread := interval(estimate, metric)) else "")
        for name, estimate in shown
        if estimate.value is not None
    ]
    if said and metric.startswith("tar@"):
        sentences.append(f"Genuine pairs found at {far_words(metric[4:])}: {'; '.join(said)}.")
    elif said:
        sentences.append(f"{metric_name(metric)}: {'; '.join(said)}.")
    return Finding(headline, sentences + more, verdict, words)
