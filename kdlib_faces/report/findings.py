"""Headline, key figures and remarks of a report, derived from its numbers."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from kdlib_faces.evaluation.summary import Measure, MeasuredValue, ProtocolSummary
from kdlib_faces.report import numbers
from kdlib_faces.report.schema import Report, StudentPair
from kdlib_faces.report.tables import measured

__all__ = ["Finding", "KeyFigure", "cost_keys", "finding", "headline_measure", "key_figures", "remarks"]

Verdict = Literal["gain", "loss", "unclear", "none"]


class Finding(NamedTuple):
    """What a run shows: a headline, sentences below it, and whether distillation helped."""

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
    if headline_measure(report) is None:
        return Finding(f"{_count(len(report.models), 'model')}, nothing measured.", [])
    return _leader_finding(report) if report.pair is None else _distillation_finding(report, report.pair)


def _count(number: int, noun: str) -> str:
    return f"One {noun}" if number == 1 else f"{number} {noun}s"


def _name(measure: Measure) -> str:
    return f"{measure.title} ({measure.note})" if measure.note else measure.title


def _teacher_share(report: Report, pair: StudentPair) -> tuple[str, float] | None:
    """The best teacher by the headline measure, and the student's value divided by that teacher's."""
    headline = headline_measure(report)
    if headline is None or headline[2].unit not in ("rate", "auc"):
        return None
    summary, key, _ = headline
    values = {
        name: measured(summary, name, key).value for name, model in report.models.items() if model.role == "teacher"
    }
    known = {name: value for name, value in values.items() if value}
    student = measured(summary, pair.distilled, key).value
    if not known or student is None:
        return None
    best = max(known, key=known.__getitem__)
    return best, student / known[best]


def _difference(summary: ProtocolSummary, key: str, a: str, b: str) -> MeasuredValue:
    """Model `a` minus model `b` in one measure; without an interval where the protocol did not compare them."""
    for row in summary.differences:
        if row.measure == key and (row.a, row.b) == (a, b):
            return row.difference
    first, second = measured(summary, a, key).value, measured(summary, b, key).value
    return MeasuredValue(None if first is None or second is None else first - second)


def _verdict(difference: MeasuredValue, measure: Measure) -> Verdict:
    if difference.low is None or difference.high is None:
        return "none"
    if difference.low <= 0 <= difference.high:
        return "unclear"
    return "gain" if (difference.low > 0) == (measure.better != "low") else "loss"


def _distillation_finding(report: Report, pair: StudentPair) -> Finding:
    headline = headline_measure(report)
    assert headline is not None
    summary, key, measure = headline
    difference = _difference(summary, key, pair.distilled, pair.alone)
    verdict = _verdict(difference, measure)
    share = _teacher_share(report, pair)
    if share is None:
        text = f"The distilled student reaches {_amount(summary, pair.distilled, key, measure)} in {_name(measure)}"
    else:
        text = f"The distilled student reaches {numbers.percent(share[1], 0)} of the best teacher's {_name(measure)}"
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
    leaders = [_leader(*first) for first in firsts]
    ahead = {name: leaders.count(name) for name in report.models}
    best = max(ahead, key=ahead.__getitem__)
    if not ahead[best]:
        return Finding("No model is ahead of the others.", sentences)
    text = f"{report.label(best)} is ahead on {ahead[best]} of {_count(len(firsts), 'protocol').lower()}"
    if len(firsts) == 1:
        text = f"{report.label(best)} has the best {_name(measure)} on {summary.title}"
    return Finding(text + _support(firsts, best), sentences)


def _leader(summary: ProtocolSummary, key: str, measure: Measure) -> str | None:
    """The model with the best value, None where two models share it or there is nothing to compare."""
    sign = -1.0 if measure.better == "low" else 1.0
    values = {name: measured(summary, name, key).value for name in summary.models}
    known = {name: sign * value for name, value in values.items() if value is not None}
    best = [name for name, value in known.items() if value == max(known.values())]
    return best[0] if len(best) == 1 and len(known) > 1 else None


def _support(firsts: Sequence[tuple[ProtocolSummary, str, Measure]], best: str) -> str:
    """How many paired differences of the first measures are clearly in favor of the leading model."""
    verdicts = []
    for summary, key, measure in firsts:
        for row in summary.differences:
            if row.measure == key and best in (row.a, row.b):
                verdict = _verdict(row.difference, measure)
                verdicts.append("loss" if row.b == best and verdict == "gain" else
                                "gain" if row.b == best and verdict == "loss" else verdict)  # fmt: skip
    verdicts = [verdict for verdict in verdicts if verdict != "none"]
    clear = verdicts.count("gain")
    if not verdicts:
        return "."
    if clear == len(verdicts):
        return ", and the interval of every paired difference excludes zero."
    return f"; {clear} of {len(verdicts)} paired differences are clearly in its favor."


def cost_keys(report: Report) -> list[tuple[str, dict[str, float]]]:
    """Multiply-adds and parameters of the models for which they are known, as (name, values)."""
    models = report.models.items()
    costs: list[tuple[str, dict[str, float | None]]] = [
        ("multiply-adds", {name: model.macs for name, model in models}),
        ("parameters", {name: model.parameters for name, model in models}),
    ]
    return [(title, {name: float(value) for name, value in values.items() if value}) for title, values in costs]


def key_figures(report: Report) -> list[KeyFigure]:
    """Up to three numbers for the top of the page: the share of the teacher, the gain, the size."""
    headline = headline_measure(report)
    if report.pair is None or headline is None:
        return []
    summary, key, measure = headline
    figures = []
    share = _teacher_share(report, report.pair)
    if share is not None:
        figures.append(KeyFigure("Share of the best teacher", numbers.percent(share[1], 0), _name(measure)))
    difference = _difference(summary, key, report.pair.distilled, report.pair.alone)
    if difference.value is not None and difference.low is not None and difference.high is not None:
        ends = f"{numbers.points(difference.low, measure.unit)} to {numbers.points(difference.high, measure.unit)}"
        value = numbers.points(difference.value, measure.unit)
        figures.append(KeyFigure("Distilled minus alone, points", value, ends, _verdict(difference, measure)))
    for title, costs in cost_keys(report):
        student = costs.get(report.pair.distilled)
        teacher = costs.get(share[0]) if share else None
        if student and teacher and teacher > student:
            note = f"{numbers.count(student)} {title} instead of {numbers.count(teacher)}"
            ratio = teacher / student
            return [*figures, KeyFigure("Lighter than the teacher", f"{ratio:.{0 if ratio >= 10 else 1}f} ×", note)]
    return figures


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
