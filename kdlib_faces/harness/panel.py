"""Summary of one protocol for several models: measures, curves, paired differences and hard pairs."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from kdlib_faces.evaluation import Estimate, Outcomes, ProtocolResult, Sampling, paired_difference, paired_test
from kdlib_faces.evaluation.summary import Difference, MeasuredValue, ProtocolSummary
from kdlib_faces.harness.tasks import EvaluationTask

__all__ = ["summarize"]

MAX_ALL_PAIRS = 4
"""With more models, only differences to the first model are reported."""


def summarize(task: EvaluationTask, results: Mapping[str, ProtocolResult], sampling: Sampling) -> ProtocolSummary:
    """Summarize the results of one protocol.

    Args:
        task: The protocol with its images.
        results: Model name to result.
        sampling: Resamples of the paired differences.

    Returns:
        The summary, without pictures and files of scores.
    """
    description = next(iter(results.values())).describe()
    compared = len(results) > 1
    return ProtocolSummary(
        name=task.name,
        title=task.title,
        question=description.question,
        convention={**description.convention, **task.convention, "Intervals": description.intervals},
        counts={**description.counts},
        notes=[*task.notes, *description.notes],
        measures=description.measures,
        bins=description.bins,
        models={name: result.summary() for name, result in results.items()},
        differences=_differences(results, sampling) if compared else [],
        difference_rule=description.difference_rule if compared else "",
    )


def _model_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each model with each, or with the first one if there are many."""
    return list(combinations(names, 2)) if len(names) <= MAX_ALL_PAIRS else [(names[0], each) for each in names[1:]]


def _differences(results: Mapping[str, ProtocolResult], sampling: Sampling) -> list[Difference]:
    outcomes: dict[str, Mapping[str, Outcomes | Estimate]] = {
        name: dict(result.outcomes()) for name, result in results.items()
    }
    return [
        Difference(a, b, key, _difference(outcomes[a][key], outcomes[b][key], sampling))
        for key in next(iter(outcomes.values()))
        for a, b in _model_pairs(list(results))
    ]


def _difference(a: Outcomes | Estimate, b: Outcomes | Estimate, sampling: Sampling) -> MeasuredValue:
    if isinstance(a, Estimate) or isinstance(b, Estimate):
        assert isinstance(a, Estimate)
        assert isinstance(b, Estimate)
        return MeasuredValue.of(paired_difference(a, b, level=sampling.level))
    first, second = (None, None) if a.identities is None else a.identities
    test = paired_test(
        a.hits,
        b.hits,
        identities=first,
        other_identities=second,
        replicates=sampling.replicates,
        seed=sampling.seed,
        level=sampling.level,
    )
    note = f"{a.verb} by one model only: {test.only_a} and {test.only_b}, McNemar p {test.p_value:.2g}"
    return MeasuredValue.of(test.difference, note=note)
