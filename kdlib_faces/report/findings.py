"""Headline, key figures and remarks of a report, derived from its numbers."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

from kdlib_faces.evaluation.summary import Measure, MeasuredValue, ProtocolSummary
from kdlib_faces.report import numbers
from kdlib_faces.report.schema import Report, StudentPair
from kdlib_faces.report.tables import measured

__all__ = ["Finding", "KeyFigure", "finding", "headline_measure", "key_figures", "remarks"]

Verdict = Literal["gain", "loss", "unclear", "none"]
Shown: TypeAlias = Callable[[float | None], str]


class Finding(NamedTuple):
    """Headline of a run, sentences below it, and whether distillation helped."""

    headline: str
    sentences: list[str]
    verdict: Verdict = "none"


class KeyFigure(NamedTuple):
    """A large number with its name above and a note below."""

    name: str
    value: str
    note: str
    verdict: Verdict = "none"


def headline_measure(report: Report) -> tuple[ProtocolSummary, str, Measure] | None:
    """The first measure of the first protocol that has one, as (protocol, key, measure)."""
    measured = [summary for summary in report.evaluations if summary.measures and summary.models]
    return (measured[0], *next(iter(measured[0].measures.items()))) if measured else None


def finding(report: Report) -> Finding:
    """The headline of a run.

    Examples:
        >>> from kdlib_faces.report.schema import ModelEntry
        >>> finding(Report("Empty", {"m": ModelEntry("student")})).headline
        'One model, nothing measured.'
    """
    headline = headline_measure(report)
    if headline is None:
        count = "One model" if len(report.models) == 1 else f"{len(report.models)} models"
        return Finding(f"{count}, nothing measured.", [])
    return _leader_finding(report) if report.pair is None else _distillation_finding(report, report.pair, *headline[:2])


def _name(measure: Measure) -> str:
    return f"{measure.title} ({measure.note})" if measure.note else measure.title


def _best(summary: ProtocolSummary, key: str, names: Iterable[str]) -> list[str]:
    """The models with the best value, in the direction of the measure; values that are shown alike are equal."""
    measure = summary.measures[key]
    values = {name: value for name in names if (value := measured(summary, name, key)).value is not None}
    if not values or measure.better == "none":
        return []
    pick = min if measure.better == "low" else max
    best = values[pick(values, key=lambda name: values[name].value or 0.0)]
    shown = numbers.amount(replace(best, resolvable=True), measure.unit)
    return [name for name, v in values.items() if numbers.amount(replace(v, resolvable=True), measure.unit) == shown]


def _difference(summary: ProtocolSummary, key: str, a: str, b: str) -> MeasuredValue:
    """Model `a` minus model `b` in one measure; without an interval where the protocol did not compare them."""
    for row in summary.differences:
        if row.measure == key and (row.a, row.b) == (a, b):
            return row.difference
    first, second = measured(summary, a, key).value, measured(summary, b, key).value
    return MeasuredValue(None if first is None or second is None else first - second)


def _verdict(difference: MeasuredValue, measure: Measure) -> Verdict:
    if difference.low is None or difference.high is None or measure.better == "none":
        return "none"
    if difference.low <= 0 <= difference.high:
        return "unclear"
    return "gain" if (difference.low > 0) == (measure.better == "high") else "loss"


class _Comparison(NamedTuple):
    """The two students by the headline measure, the best teacher, and the share of it that the distilled student has."""

    difference: MeasuredValue
    verdict: Verdict
    teacher: str | None
    share: float | None


def _compare(report: Report, pair: StudentPair, summary: ProtocolSummary, key: str) -> _Comparison:
    measure, difference = summary.measures[key], _difference(summary, key, pair.distilled, pair.alone)
    best = _best(summary, key, [name for name, model in report.models.items() if model.role == "teacher"])
    teacher = best[0] if best else None
    student, reference = measured(summary, pair.distilled, key).value, measured(summary, teacher or "", key).value
    share = None
    if measure.unit in ("rate", "auc") and measure.better == "high" and student is not None and reference:
        share = student / reference
    return _Comparison(difference, _verdict(difference, measure), teacher, share)


def _distillation_finding(report: Report, pair: StudentPair, summary: ProtocolSummary, key: str) -> Finding:
    measure = summary.measures[key]
    difference, verdict, _, share = _compare(report, pair, summary, key)
    if share is None:
        text = f"The distilled student reaches {_amount(summary, pair.distilled, key, measure)} in {_name(measure)}"
    else:
        text = f"The distilled student reaches {numbers.percent(share, 0)} of the best teacher's {_name(measure)}"
    text += {
        "gain": " and is better than the student trained alone.",
        "loss": " and is worse than the student trained alone.",
        "unclear": ", without a clear gain over the student trained alone.",
        "none": ".",
    }[verdict]
    sentences = [_sentence(report, summary, key, measure)]
    if difference.value is not None:
        spread = ""
        if difference.low is not None and difference.high is not None:
            ends = (numbers.points(end, measure.unit) for end in (difference.low, difference.high))
            spread = f" ({numbers.level(report.level)} interval {' to '.join(ends)})"
        unit = {"rate": " points", "auc": " hundredths of AUC"}.get(measure.unit, "")
        sentences.append(f"Distilled minus alone: {numbers.points(difference.value, measure.unit)}{unit}{spread}.")
    if verdict == "unclear":
        sentences.append(
            "The interval of the difference includes zero: this run does not show an effect of distillation."
        )
    elif verdict != "none":
        first, second = (measured(summary, name, key) for name in (pair.distilled, pair.alone))
        overlap = "do not overlap" if _separate(first, second) else "overlap"
        sentences.append(f"The interval of the difference excludes zero. The two students' own intervals {overlap}.")
    return Finding(text, sentences, verdict)


def _separate(first: MeasuredValue, second: MeasuredValue) -> bool:
    ends = (first.low, first.high, second.low, second.high)
    low, high, other_low, other_high = (float("nan") if end is None else end for end in ends)
    return low > other_high or other_low > high


def _amount(summary: ProtocolSummary, name: str, key: str, measure: Measure) -> str:
    value = measured(summary, name, key)
    spread = numbers.interval(value, measure.unit)
    return numbers.amount(value, measure.unit) + (f" ({spread})" if spread else "")


def _sentence(report: Report, summary: ProtocolSummary, key: str, measure: Measure) -> str:
    values = [f"{report.label(name)} {_amount(summary, name, key, measure)}" for name in summary.models]
    return f"{summary.title}, {_name(measure)}: {'; '.join(values)}."


def _leader_finding(report: Report) -> Finding:
    """Which model is best by the first measures of the protocols, and whether paired intervals support it."""
    summaries = [summary for summary in report.evaluations if summary.measures and summary.models]
    firsts = [(summary, *next(iter(summary.measures.items()))) for summary in summaries]
    sentences = [_sentence(report, *first) for first in firsts[:6]]
    summary, key, measure = firsts[0]
    if len(report.models) == 1:
        (name,) = report.models
        value = numbers.amount(measured(summary, name, key), measure.unit)
        return Finding(f"{report.label(name)}: {_name(measure)} {value} on {summary.title}.", sentences)
    best = [_best(summary, key, summary.models) for summary, key, _ in firsts]
    known = [
        sum(measured(summary, name, key).value is not None for name in report.models) for summary, key, _ in firsts
    ]
    leads = Counter(names[0] for names, count in zip(best, known, strict=True) if len(names) == 1 and count > 1)
    leaders = [name for name in report.models if leads and leads[name] == max(leads.values())]
    names = _join([report.label(name) for name in leaders or best[0]])
    if len(leaders) == 1 and len(firsts) == 1:
        text = f"{names} has the best {_name(measure)} on {summary.title}{_support(firsts, leaders[0])}"
    elif len(leaders) == 1:
        count = f"{leads[leaders[0]]} of {len(firsts)} protocols"
        text = f"{names} is ahead on {count}{_support(firsts, leaders[0])}"
    elif leaders:
        text = f"{names} are each ahead on {leads[leaders[0]]} of {len(firsts)} protocols."
    elif len(firsts) == 1 and 1 < len(best[0]) < known[0]:
        text = f"{names} share the best {_name(measure)} on {summary.title}."
    else:
        text = "No model is ahead of the others."
    return Finding(text, sentences)


def _join(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def _support(firsts: Sequence[tuple[ProtocolSummary, str, Measure]], best: str) -> str:
    """The end of a headline: the paired differences of the first measures that are clearly in favor of the leading model."""
    favorable = {"gain": "loss", "loss": "gain"}
    verdicts = []
    for summary, key, measure in firsts:
        for row in summary.differences:
            if row.measure == key and best in (row.a, row.b):
                verdict = _verdict(row.difference, measure)
                verdicts.append(verdict if row.a == best else favorable.get(verdict, verdict))
    verdicts = [verdict for verdict in verdicts if verdict != "none"]
    clear = verdicts.count("gain")
    if not verdicts:
        return "."
    if clear == len(verdicts):
        return ", and the interval of every paired difference excludes zero."
    return f"; {clear} of {len(verdicts)} paired differences are clearly in its favor."


def key_figures(report: Report) -> list[KeyFigure]:
    """Numbers for the top of the page: the share of the teacher, the gain, and the student's size and speed."""
    headline = headline_measure(report)
    if report.pair is None or headline is None:
        return []
    summary, key, measure = headline
    difference, verdict, teacher, share = _compare(report, report.pair, summary, key)
    figures = []
    if share is not None:
        figures.append(KeyFigure("Share of the best teacher", numbers.percent(share, 0), _name(measure)))
    if difference.value is not None and difference.low is not None and difference.high is not None:
        ends = f"{numbers.points(difference.low, measure.unit)} to {numbers.points(difference.high, measure.unit)}"
        value = numbers.points(difference.value, measure.unit)
        figures.append(KeyFigure("Distilled minus alone, points", value, ends, verdict))
    if teacher is not None:
        own, other = report.models[report.pair.distilled], report.models[teacher]
        few, fast = ("fewer", "more"), ("faster", "slower")
        figures += _cost("Parameters", own.parameters, other.parameters, numbers.count, few)
        if own.latency_ms and other.latency_ms:
            figures += _cost("Time for one image", own.latency_ms, other.latency_ms, numbers.milliseconds, fast)
        else:
            figures += _cost("Multiply-adds", own.macs, other.macs, numbers.count, few)
    return figures


def _cost(title: str, own: float | None, other: float | None, shown: Shown, words: tuple[str, str]) -> list[KeyFigure]:
    """The student's cost against the teacher's in words such as ("fewer", "more"); none where one is not known."""
    if not own or not other:
        return []
    ratio = max(own, other) / min(own, other)
    text = f"{ratio:.{0 if ratio >= 10 else 1}f} × {words[own > other]}" if ratio >= 1.05 else "the same"
    return [KeyFigure(f"{title}, against the teacher", text, f"{shown(own)} instead of {shown(other)}")]


def remarks(report: Report, missing: Sequence[str] = ()) -> list[str]:
    """Notes on the data, then how to read the numbers; `missing` names pictures that are not on disk."""
    summaries = report.evaluations
    lines = list(report.data.notes)
    if report.data.synthetic:
        lines.append(
            "The faces are synthetic. The numbers show that the method and the code work; they make no claim about people "
            "and do not carry over to photographs."
        )
    else:
        lines.append("The numbers describe the test images named above. Other cameras, identities or ages may differ.")
    lines.append(
        f"Intervals are {numbers.level(report.level)} intervals and describe the choice of test identities or pairs; each "
        "protocol states how its own were computed. Wilson intervals treat pairs or probes as independent and are too "
        "narrow where one identity has many."
    )
    if report.training and len(report.per_seed) < 2:
        lines.append("One seed was trained. Intervals do not cover the variation between training runs.")
    if any(summary.differences for summary in summaries):
        lines.append(
            "The difference of two models has an interval of its own, computed on the same resamples for both. Many "
            "measures are compared at once, so a single interval that just excludes zero is weak evidence."
        )
    if any(
        not value.resolvable for s in summaries for result in s.models.values() for value in result.measures.values()
    ):
        lines.append(
            "† Not resolvable: the set has too few impostors (or probes without a mate) for this rate. The value is the one "
            "without any false accept, and a single pair can change it."
        )
    titles = [measure.title for summary in summaries for measure in summary.measures.values()]
    if any(title.startswith("TAR") for title in titles):
        lines.append("TAR is the share of genuine pairs accepted at the threshold that accepts the stated share (FAR) of impostor pairs.")  # fmt: skip
    if any("AUC" in title for title in titles):
        lines.append("AUC is the probability that a genuine pair scores higher than an impostor pair; 0.5 is chance.")
    if any(title.startswith("Accuracy") for title in titles):
        lines.append(
            "Accuracy over folds uses the threshold that is best on the other folds; ± is the standard deviation over folds, "
            "not an interval."
        )
    return lines + [f"The picture {name!r} is listed in report.json but missing on disk." for name in missing]
