"""Paired differences of two models in every bin of an age-gap protocol."""

from collections.abc import Mapping

from kdlib_faces.evaluation._checks import require
from kdlib_faces.evaluation._types import JsonDict
from kdlib_faces.evaluation.protocols.age_gap import AgeGapResult
from kdlib_faces.evaluation.statistics.intervals import paired_difference


def compare(results: Mapping[str, AgeGapResult], a: str, b: str) -> list[JsonDict]:
    """Difference a - b of every metric in every bin, with the interval of the paired resamples.

    Both models use the same resamples of identities, so the interval of the difference shows whether b would also be worse
    on other identities of this kind. `separate` is stricter: the models' own intervals do not overlap. Many bins and
    metrics are compared at once, so a single difference whose interval excludes 0 is weak evidence.

    Args:
        results: Model name to the result of the same protocol.
        a: Name of one model.
        b: Name of the other model.

    Returns:
        For each bin, then `"all"`, one entry for each of `auc`, `own_auc`, `tar@far` and `own_tar@far`: `a`, `b`,
        `protocol`, `bin`, `metric`, `difference` and `separate`.

    Raises:
        ValueError: A name is unknown, or the results are of two different protocols.

    Examples:
        >>> import numpy as np
        >>> from kdlib_faces.evaluation import AgeGapProtocol
        >>> protocol = AgeGapProtocol([0, 0, 1, 1], ages=[1, 2, 3, 4], fars=(0.5,), replicates=20)
        >>> results = {"x": protocol.evaluate(np.eye(2)[[0, 0, 1, 1]]), "y": protocol.evaluate(np.eye(4) + 1)}
        >>> [entry["difference"]["value"] for entry in compare(results, "x", "y") if entry["bin"] == "0-4"]
        [0.5, 0.5, 1.0, 1.0]
    """
    for name in (a, b):
        require(name in results, "compare", f"a and b must be among {', '.join(results)}, got {name!r}")
    first, second = results[a], results[b]
    alike = first.protocol.fingerprint == second.protocol.fingerprint
    wanted = "results of one protocol (same images, bins, fars, replicates and seed)"
    require(alike, "compare", f"a and b must be {wanted}, got two for {a!r} and {b!r}")
    level, bins = first.protocol.level, zip((*first.bins, first.all), (*second.bins, second.all), strict=True)
    return [
        {
            "a": a,
            "b": b,
            "protocol": "age_gap",
            "bin": left.name,
            "metric": metric,
            "difference": paired_difference(estimate, other := right.metrics()[metric], level=level).to_dict(),
            "separate": not estimate.overlaps(other),
        }
        for left, right in bins
        for metric, estimate in left.metrics().items()
    ]
