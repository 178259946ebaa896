"""Evaluation of embeddings by any protocol."""

from typing import Protocol, TypeVar

from kdlib_faces.evaluation._types import Embeddings, JsonDict, Label
from kdlib_faces.evaluation.statistics.intervals import Estimate
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.summary import Description, HardPair, ModelSummary, ScoreTable


class Result(Protocol):
    """The result of any protocol, yours included: plain values for JSON."""

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        ...


class ProtocolResult(Result, Protocol):
    """The result of a protocol of this package: everything that a report shows of one model."""

    def describe(self) -> Description:
        """What the protocol measures and how; the same for all models."""
        ...

    def summary(self) -> ModelSummary:
        """Measures, bins and curves."""
        ...

    def outcomes(self) -> "dict[str, Outcomes] | dict[str, Estimate] | dict[str, Outcomes | Estimate]":
        """Measure key to what two models are compared by: single outcomes, or an estimate with its resamples."""
        ...

    def hardest(self, count: int) -> list[HardPair]:
        """At most `count` pairs of each kind on which the model fails."""
        ...

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """The scores behind the rates, with the names of images and of distractors."""
        ...


R = TypeVar("R", bound=Result, covariant=True)


class EvaluationProtocol(Protocol[R]):
    """A set of images and a way to measure embeddings of them; your own class may be one.

    Examples:
        >>> import numpy as np
        >>> class MeanNorm:
        ...     def evaluate(self, embeddings):
        ...         return MeanNormResult(float(np.linalg.norm(embeddings, axis=1).mean()))
        >>> class MeanNormResult:
        ...     def __init__(self, value):
        ...         self.value = value
        ...     def to_dict(self):
        ...         return {"mean_norm": self.value}
        >>> evaluate([[3.0, 4.0], [0.0, 1.0]], MeanNorm()).to_dict()
        {'mean_norm': 3.0}
    """

    def evaluate(self, embeddings: Embeddings) -> R:
        """Measure embeddings (n, d) in the order of the images."""
        ...


def evaluate(embeddings: Embeddings, protocol: EvaluationProtocol[R]) -> R:
    """Evaluate embeddings by a protocol.

    Args:
        embeddings: (n, d) array, memory map or tensor, normalized or not, in the order of the protocol's images; or
            shards of it, a sequence or an iterator of (m, d) arrays.
        protocol: Any `...Protocol` of this package, or your own object with the same method.

    Returns:
        The protocol's result; its `to_dict()` gives plain values for JSON.

    Raises:
        ValueError: An embedding is not finite or zero (the message gives its row), or the number of rows is wrong.

    Examples:
        >>> from kdlib_faces.evaluation import LeaveOneOutProtocol
        >>> evaluate([[1, 0], [1, 0], [0, 1], [0, 1]], LeaveOneOutProtocol([5, 5, 6, 6], ranks=(1,))).to_dict()["probes"]
        4
    """
    if not callable(getattr(protocol, "evaluate", None)):
        raise TypeError(f"evaluate: protocol must have an evaluate(embeddings) method, got {type(protocol).__name__}")
    return protocol.evaluate(embeddings)
