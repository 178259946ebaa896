"""Evaluation room: one call for any protocol, on embeddings alone, so that any framework's model can be evaluated."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import (
    check_ages,
    check_labels,
    check_level,
    to_numpy,
)
from kdlib_faces.evaluation.protocols.leave_one_out import LeaveOneOutResult, leave_one_out_result
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, PROBE_AGE_STARTS

__all__ = ["EvaluationProtocol", "LeaveOneOutProtocol", "Result", "evaluate"]


class Result(Protocol):
    """What a protocol returns: it can be written down."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ...


R = TypeVar("R", bound=Result, covariant=True)


class EvaluationProtocol(Protocol[R]):
    """Anything that knows a set of images and can measure embeddings of them; yours too."""

    def evaluate(self, embeddings: Any) -> R:
        """Measure (n, d) embeddings in the order of the images."""
        ...


def evaluate(embeddings: Any, protocol: EvaluationProtocol[R]) -> R:
    """Evaluate embeddings by a protocol.

    Args:
        embeddings: (n, d) array, memory map or tensor, normalized or not, in the order of the protocol's images; or
            shards of it, a sequence or an iterator of (m, d) arrays.
        protocol: any `...Protocol` of this room, or an object of yours with the same method.

    Returns:
        The protocol's result; its `to_dict()` gives plain values for JSON.

    Raises:
        ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.

    Examples:
        >>> evaluate([[1, 0], [1, 0], [0, 1], [0, 1]], LeaveOneOutProtocol([5, 5, 6, 6], ranks=(1,))).to_dict()["probes"]
        4
    """
    if not callable(getattr(protocol, "evaluate", None)):
        raise TypeError(f"evaluate: protocol must have an evaluate(embeddings) method, got {type(protocol).__name__}")
    return protocol.evaluate(embeddings)


class LeaveOneOutProtocol:
    """Each image against all the others: see `leave_one_out`.

    Args:
        identities: (n,) whole numbers or strings.
        ranks: the k's, from 1 to n - 1.
        ages: (n,) years; gives the rates by the probe's age and by the gap to its most alike mate.
        age_bins: rising lower ends of the bins of the probe's age, years.
        gap_bins: of the bins of the gap.
        replicates: bootstrap resamples over identities for the bins; 0 for none.
        seed: of the resamples.
        level: confidence of the intervals.

    Raises:
        ValueError: identities or ages that cannot be used.

    Examples:
        >>> evaluate([[1, 0], [0, 1]], LeaveOneOutProtocol("aabc", ranks=(1,)))
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: LeaveOneOutProtocol: identities must be (n,), not empty, got shape ()
    """

    def __init__(
        self,
        identities: Any,
        ranks: Sequence[int] = (1, 5),
        *,
        ages: Any = None,
        age_bins: Sequence[float] = PROBE_AGE_STARTS,
        gap_bins: Sequence[float] = GAP_STARTS,
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.identities = to_numpy(identities)
        codes, _ = check_labels("LeaveOneOutProtocol", "identities", self.identities)
        for rank in ranks:
            check_number("LeaveOneOutProtocol", "ranks", rank, min=1, max=codes.size - 1, integer=True)
        self.ranks = tuple(ranks)
        self.ages = None if ages is None else check_ages("LeaveOneOutProtocol", ages, codes.size)
        self.age_bins, self.gap_bins = tuple(age_bins), tuple(gap_bins)
        check_number("LeaveOneOutProtocol", "replicates", replicates, min=0, integer=True)
        check_number("LeaveOneOutProtocol", "seed", seed, min=0, integer=True)
        check_level("LeaveOneOutProtocol", level)
        self.replicates, self.seed, self.level = replicates, seed, float(level)

    def __repr__(self) -> str:
        return f"LeaveOneOutProtocol(<{self.identities.size} images>, ranks={self.ranks})"

    def evaluate(self, embeddings: Any) -> LeaveOneOutResult:
        """Measure (n, d) embeddings in the order of the identities."""
        return leave_one_out_result(
            embeddings,
            self.identities,
            self.ranks,
            ages=self.ages,
            age_bins=self.age_bins,
            gap_bins=self.gap_bins,
            replicates=self.replicates,
            seed=self.seed,
            level=self.level,
        )
