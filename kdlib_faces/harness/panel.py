"""Summary of one protocol for several models: measures, curves, paired differences and hard pairs."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations

from kdlib_faces.evaluation import Estimate, Outcomes, ProtocolResult, Sampling, paired_difference, paired_test
from kdlib_faces.evaluation.summary import Difference, MeasuredValue, ProtocolSummary
from kdlib_faces.harness.tasks import EvaluationTask

__all__ = ["summarize"]

MAX_ALL_PAIRS = 4
"""With more models, only differences to the first model are reported."""


def summarize(task: EvaluationTask, results: Mapping[str, ProtocolResult], sampling: Sampling) -> ProtocolSummary:
    """Summarize the results of one protocol by model name, without pictures and files of scores.

    `sampling` sets the resamples of the paired differences.
    """
    description = next(iter(results.values())).describe()
    compared = len(results) > 1
    convention = {**description.convention, "Alignment": task.alignment, **task.convention}
    return ProtocolSummary(
        name=task.name,
        title=task.title,
        question=description.question,
        convention={**convention, "Intervals": description.intervals},
        counts={**description.counts},
        notes=[*task.notes, *description.notes],
        measures=description.measures,
        bins=description.bins,
        models={name: result.summary() for name, result in results.items()},
        differences=_differences(results, sampling) if compared else [],
        difference_rule=description.difference_rule if compared else "",
    )


def _differences(results: Mapping[str, ProtocolResult], sampling: Sampling) -> list[Difference]:
    outcomes = {name: dict[str, Outcomes | Estimate](result.outcomes()) for name, result in results.items()}
    first, *others = results
    pairs = list(combinations(results, 2)) if len(others) < MAX_ALL_PAIRS else [(first, each) for each in others]
    return [
        Difference(a, b, key, _difference(outcomes[a][key], outcomes[b][key], sampling))
        for key in outcomes[first]
        for a, b in pairs
    ]


def _difference(a: Outcomes | Estimate, b: Outcomes | Estimate, sampling: Sampling) -> MeasuredValue:
    if isinstance(a, Estimate) or isinstance(b, Estimate):
        assert isinstance(a, Estimate)
        assert isinstance(b, Estimate)
        return MeasuredValue.of(paired_difference(a, b, level=sampling.level))
    first, second = (None, None) if a.identities is None else a.identities
    test = paired_test(a.hits, b.hits, identities=first, other_identities=second, **asdict(sampling))
    p_value = f"p {test.p_value:.2g}" if test.p_value >= 1e-4 else "p < 0.0001"
    note = f"{a.verb} by one model only: {test.only_a} and {test.only_b}, McNemar {p_value}"
    return MeasuredValue.of(test.difference, note=note)
