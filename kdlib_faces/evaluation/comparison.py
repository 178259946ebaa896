"""Evaluation room: is one model better than another on the same images? Takes results by age gap, gives differences."""

from collections.abc import Mapping
from typing import Any

from kdlib_faces.evaluation._checks import require
from kdlib_faces.evaluation.protocols.age_gap_result import AgeGapResult
from kdlib_faces.evaluation.statistics.intervals import paired_difference

__all__ = ["compare"]


def compare(results: Mapping[str, AgeGapResult], a: str, b: str) -> list[dict[str, Any]]:
    """Difference a - b of every metric in every bin, with the interval of the paired resamples.

    Both models saw the same resamples of identities, so the interval of the difference says whether b would do worse on
    other people *of this kind*; `separate` is the stricter reading, that the two models' own intervals do not even
    meet. Many bins and metrics are compared at once: one difference whose interval misses 0 is not yet news.

    Args:
        results: by model name, results of one protocol.
        a: the name of one model.
        b: the name of the other.

    Returns:
        For each bin, then `"all"`, one entry for `auc`, `own_auc`, `tar@far` and `own_tar@far` each: `a`, `b`,
        `protocol`, `bin`, `metric`, `difference` and `separate`.

    Raises:
        ValueError: an unknown name, or results of two different protocols.

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
    require(
        first.fingerprint == second.fingerprint,
        "compare",
        f"a and b must be results of one protocol (same images, bins, fars, replicates and seed), "
        f"got two for {a!r} and {b!r}",
    )
    entries = []
    for left, right in zip((*first.bins, first.all), (*second.bins, second.all), strict=True):
        others = right.metrics()
        for metric, estimate in left.metrics().items():
            difference = paired_difference(estimate, others[metric], level=first.level)
            entries.append(
                {
                    "a": a,
                    "b": b,
                    "protocol": "age_gap",
                    "bin": left.name,
                    "metric": metric,
                    "difference": difference.to_dict(),
                    "separate": not estimate.overlaps(others[metric]),
                }
            )
    return entries
