"""Dataclasses for models, data and the results of protocols, as stored in report.json."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np

from kdlib_faces.evaluation._types import AnyArray
from kdlib_faces.evaluation.roc import TarAtFar, roc_points
from kdlib_faces.evaluation.statistics.intervals import Estimate

Unit = Literal["rate", "auc", "score", "number"]
EDGES = np.linspace(-1, 1, 101)
MAX_CMC_RANK = 50
KEPT_THRESHOLDS = (
    "Paired bootstrap, both models on the same resamples of {}; each model's thresholds are kept as they are."
)
"""Rule of paired differences, with what is resampled."""


def far_text(far: float, rate: str) -> str:
    """A rate by its name for a heading: `FAR 0.1 %`, and `FAR 1e-06` below 0.01 %."""
    return f"{rate}\u00a0{100 * far:g}\u00a0%" if far >= 1e-4 else f"{rate}\u00a0{far:g}"


@dataclass(frozen=True)
class Measure:
    """One measure of a protocol: a row of the report's table, with its heading and an addition to it.

    A `"rate"` is shown in per cent, a `"score"` is a cosine.
    """

    title: str
    unit: Unit = "rate"
    note: str = ""
    better: Literal["high", "low", "none"] = "high"


def far_measures(
    prefix: str, title: str, fars: Iterable[float], *, rate: str = "FAR", note: str = "", lower_is_better: bool = False
) -> dict[str, Measure]:
    """The measures of a rate at several false accept rates, with the keys `PREFIX_FAR`."""
    better: Literal["high", "low"] = "low" if lower_is_better else "high"
    return {f"{prefix}_{far:g}": Measure(f"{title} at {far_text(far, rate)}", "rate", note, better) for far in fars}


@dataclass(frozen=True)
class MeasuredValue:
    """A value with its confidence interval.

    Attributes:
        value: The estimate; None if it could not be computed.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of observations.
        resolvable: Whether there were enough impostors for the false accept rate.
        note: Addition to the value.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    resolvable: bool = True
    note: str = ""

    @classmethod
    def of(cls, estimate: Estimate | TarAtFar | None, *, resolvable: bool = True, note: str = "") -> Self:
        """The value of an estimate or of an operating point; of None, a value that could not be computed."""
        if estimate is None:
            return cls()
        if isinstance(estimate, TarAtFar):
            return cls(estimate.tar, estimate.low, estimate.high, estimate.genuine, estimate.resolvable, note)
        return cls(estimate.value, estimate.low, estimate.high, estimate.n, resolvable, note)


@dataclass(frozen=True)
class Bins:
    """An axis of bins, such as age gaps.

    Attributes:
        title: Heading of the table and the plot.
        labels: Name of each bin.
        axis: Label of the axis.
        at: Position of each bin on the axis; None for bins without an order.
        counts: Observations in each bin.
        unit: Unit of the values.
    """

    title: str
    labels: list[str]
    axis: str = ""
    at: list[float] | None = None
    counts: list[int | None] | None = None
    unit: Unit = "rate"

    @classmethod
    def ordered(cls, title: str, labels: list[str], axis: str, counts: Sequence[int] | None = None) -> Self:
        """Bins side by side at 0, 1, ..."""
        return cls(title, labels, axis, [float(k) for k in range(len(labels))], None if counts is None else [*counts])


@dataclass(frozen=True)
class RocCurve:
    """Points of a ROC curve: false accept rates and true accept rates."""

    far: list[float | None]
    tar: list[float | None]

    @classmethod
    def of(cls, genuine: AnyArray, impostor: AnyArray) -> Self:
        """The curve of two score vectors."""
        far, tar = roc_points(genuine, impostor)
        return cls(far.tolist(), tar.tolist())


@dataclass(frozen=True)
class CmcCurve:
    """Points of a cumulative match characteristic: ranks and identification rates."""

    rank: list[float | None]
    rate: list[float | None]

    @classmethod
    def of(cls, ranks: AnyArray, max_rank: int) -> Self:
        """The curve at ranks 1, 2, ... `max_rank` from the ranks of all mates (n,), 0 for a probe without a mate."""
        counts = np.bincount(np.minimum(ranks, max_rank + 1), minlength=max_rank + 2)[1 : max_rank + 1]
        return cls(list(range(1, max_rank + 1)), (np.cumsum(counts) / ranks.size).tolist())


@dataclass(frozen=True)
class SearchCurve:
    """Points of an open-set search: false and true positive identification rates."""

    fpir: list[float | None]
    tpir: list[float | None]


@dataclass(frozen=True)
class Histogram:
    """Counts of genuine and impostor scores between n + 1 edges, and the threshold to draw."""

    edges: list[float]
    genuine: list[float]
    impostor: list[float]
    threshold: float | None = None

    @classmethod
    def of(cls, genuine: AnyArray, impostor: AnyArray, threshold: float | None = None) -> Self:
        """Counts of two score vectors in 100 bins from -1 to 1; a threshold that is not finite is left out."""
        same, other = (np.histogram(np.clip(scores, -1, 1), EDGES)[0].tolist() for scores in (genuine, impostor))
        finite = threshold is not None and np.isfinite(threshold)
        return cls(EDGES.tolist(), same, other, threshold if finite else None)


@dataclass
class ModelSummary:
    """Values of one model in a protocol.

    Attributes:
        measures: Measure key to its value.
        bins: Key of an axis of bins to one value per bin.
        roc: ROC curve over all pairs.
        cmc: Closed-set identification rates by rank.
        search: Open-set search.
        histogram: Distribution of the scores.
    """

    measures: dict[str, MeasuredValue] = field(default_factory=dict)
    bins: dict[str, list[MeasuredValue]] = field(default_factory=dict)
    roc: RocCurve | None = None
    cmc: CmcCurve | None = None
    search: SearchCurve | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True)
class Description:
    """Measures and conventions of a protocol: the part of a `ProtocolSummary` that does not depend on the model.

    Attributes:
        question: The question that the protocol answers, one sentence.
        convention: Name to text: threshold rule, pooling ...
        intervals: How the intervals were computed.
        counts: Name to number: images, identities, pairs ...
        measures: Measure key to its description, the headline measure first.
        bins: Key of an axis of bins to its description.
        notes: Remarks on the data.
        difference_rule: How the paired intervals of the differences are computed.
        failures: Whether the hardest pairs are pairs to verify, or missed probes with the images ranked first.
    """

    question: str
    convention: dict[str, str]
    intervals: str
    counts: dict[str, int]
    measures: dict[str, Measure]
    bins: dict[str, Bins] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    difference_rule: str = KEPT_THRESHOLDS.format("identities")
    failures: Literal["verification", "identification"] = "verification"


@dataclass(frozen=True)
class Difference:
    """Model `a` minus model `b` in one measure, with a paired interval."""

    a: str
    b: str
    measure: str
    difference: MeasuredValue


@dataclass
class ProtocolSummary:
    """Results of one protocol for all models: an entry of `evaluations` in report.json. See also `Description`.

    Attributes:
        name: Identifier, 1 to 48 letters, digits or `_`.
        models: Model name to its results.
        pictures: Names of the pictures that belong to this protocol.
        scores: Model name to the path of its file of scores, relative to the report.
    """

    name: str
    title: str
    question: str = ""
    convention: dict[str, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    bins: dict[str, Bins] = field(default_factory=dict)
    models: dict[str, ModelSummary] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    difference_rule: str = ""
    pictures: list[str] = field(default_factory=list)
    scores: dict[str, str] = field(default_factory=dict)


@dataclass
class ModelEntry:
    """One model of the report.

    Attributes:
        label: Name for readers.
        input: Preprocessing of its images.
        input_size: Side of its images in pixels.
        macs: Multiply-adds for one image.
        latency_ms: Time for one image in milliseconds.
        protocols: Protocol name to the result as the protocol writes it.
    """

    role: Literal["teacher", "student"]
    label: str = ""
    backbone: str = ""
    input: str = ""
    input_size: int | None = None
    parameters: int | None = None
    macs: float | None = None
    latency_ms: float | None = None
    train_seconds: float | None = None
    train_steps: int | None = None
    protocols: dict[str, object] = field(default_factory=dict)


@dataclass
class DataSummary:
    """Training and test data: the name of the set or lists, and the numbers of images and identities."""

    name: str = ""
    synthetic: bool = False
    train_images: int | None = None
    train_identities: int | None = None
    test_images: int | None = None
    test_identities: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HardPair:
    """A pair that a model scores wrongly, or nearly so.

    Attributes:
        left: Row of the left image.
        right: Row of the right image, in the image set `right_set` (1 for a distractor).
        score: Cosine.
        same: Whether the pair is genuine.
        note: Addition to the caption, such as the ages.
    """

    left: int
    right: int
    score: float
    same: bool
    note: str = ""
    right_set: int = 0


@dataclass(frozen=True)
class ScoreTable:
    """Scores to be written to a CSV file: column names, rows made one by one, and their number."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[str | int | float, ...]]
    total: int
