"""Room: report. The headline of a run that measures models by protocols, and what must be said of their numbers."""

from __future__ import annotations

import numpy as np

from kdlib_faces.report.evaluation_tables import measured_words
from kdlib_faces.report.evaluations import Evaluation
from kdlib_faces.report.view import View
from kdlib_faces.report.words import Finding, level_words

__all__ = ["evaluations_finding", "evaluations_limits"]


def evaluations_finding(view: View) -> Finding:
    """What the first measure of each protocol says, model by model.

    Examples:
        >>> entry = {"name": "lfw", "title": "LFW", "measures": {"accuracy": {"title": "Accuracy"}},
        ...          "models": {"m": {"measures": {"accuracy": {"value": 0.5}}}}}
        >>> run = {"format": 1, "title": "t", "models": {"m": {"role": "student", "protocols": {}}}, "evaluations": [entry]}
        >>> evaluations_finding(View(run)).headline.replace("\\u00a0", " ")
        'm: Accuracy 50.00 % on LFW.'
    """
    told = [evaluation for evaluation in view.evaluations if evaluation.measures and evaluation.models]
    if not told:
        return Finding(f"{_models(view)}, without a number.", [], "none", "")
    if len(view.names) == 1:
        first, name = told[0], view.names[0]
        found = measured_words(first.measured(name, first.measures[0].key), first.measures[0].unit)
        headline = f"{view.label(name)}: {first.measures[0].title} {found} on {first.title}."
        return Finding(headline, [_sentence(view, evaluation) for evaluation in told[1:5]], "none", "")
    leaders = [_leader(evaluation) for evaluation in told]
    plural = "protocol" if len(told) == 1 else "protocols"
    ahead = {name: leaders.count(name) for name in view.names}
    best = max(view.names, key=lambda name: ahead[name])
    if len(told) == 1:
        headline = f"{view.label(best)} has the best {told[0].measures[0].title} on {told[0].title}"
    else:
        headline = f"{view.label(best)} is ahead on {ahead[best]} of {len(told)} {plural}"
    headline += _clear(told, best)
    return Finding(headline, [_sentence(view, evaluation) for evaluation in told[:6]], "none", "")


def _models(view: View) -> str:
    return "One model" if len(view.names) == 1 else f"{len(view.names)} models"


def _leader(evaluation: Evaluation) -> str | None:
    """The model with the best headline measure, None where two share it."""
    measure = evaluation.measures[0]
    sign = -1.0 if measure.better == "low" else 1.0
    values = {name: evaluation.measured(name, measure.key).value for name in evaluation.models}
    known = {name: sign * value for name, value in values.items() if value is not None}
    top = max(known.values(), default=None)
    first = [name for name, value in known.items() if value == top]
    return first[0] if len(first) == 1 and len(known) > 1 else None


def _clear(told: list[Evaluation], best: str) -> str:
    """Whether paired intervals carry the lead: all differences of the headline measures that concern `best`."""
    paired = [
        # Positive where `best` is the better one.
        (1 if d.a == best else -1)
        * (-1 if d.measure.better == "low" else 1)
        * np.array([d.difference.low, d.difference.high])
        for evaluation in told
        for d in evaluation.differences
        if d.measure == evaluation.measures[0] and best in (d.a, d.b)
        if d.difference.low is not None and d.difference.high is not None
    ]
    if not paired:
        return "."
    clear = sum(bool((ends > 0).all()) for ends in paired)
    of = "that measure" if len(told) == 1 else "the first measures"
    if clear == len(paired):
        return f", and every paired interval of {of} leaves zero out."
    return f"; {clear} of {len(paired)} paired differences of {of} leave zero out in its favor."


def _sentence(view: View, evaluation: Evaluation) -> str:
    measure = evaluation.measures[0]
    found = [
        f"{view.label(name)} {measured_words(evaluation.measured(name, measure.key), measure.unit)}"
        for name in evaluation.models
    ]
    return f"{evaluation.title}, {measure.title}: {'; '.join(found)}."


def evaluations_limits(view: View) -> list[str]:
    """How to read numbers of protocols: intervals, unresolved points, what a difference says."""
    if not view.evaluations:
        return []
    out = []
    if any(evaluation.unresolved() for evaluation in view.evaluations):
        out.append(
            "† Not resolvable: the set has too few impostors (or probes without a mate) for this rate, so the number is "
            "the one at no false accept at all. It moves with a single pair."
        )
    if any(evaluation.differences for evaluation in view.evaluations):
        out.append(
            "A difference of two models has an interval of its own, from the same resamples for both. Many measures are "
            "compared at once: one that just misses zero is not yet news."
        )
    out.append(
        f"Intervals are {level_words(view)} intervals. Each protocol names how its own were made; Wilson's take pairs "
        "or probes as independent and are too narrow where one person has many."
    )
    return out
