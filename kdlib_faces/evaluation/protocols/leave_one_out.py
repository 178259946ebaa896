"""Leave-one-image-out identification, the protocol of FG-NET."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdlib_faces._checks import counted
from kdlib_faces.evaluation._checks import check_ages, check_level, check_ranks, check_whole, rows_at_a_time, unit_rows
from kdlib_faces.evaluation._labels import check_identities
from kdlib_faces.evaluation._types import ArrayLike, Embeddings, FloatArray, IntArray, JsonDict, Label
from kdlib_faces.evaluation.hardest import missed_probes
from kdlib_faces.evaluation.matching.search import cosines, ranks_of
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, PROBE_AGE_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.clustered import rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, resample_counts, wilson_estimate
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.summary import (
    MAX_CMC_RANK,
    Bins,
    CmcCurve,
    Description,
    HardPair,
    Measure,
    MeasuredValue,
    ModelSummary,
    ScoreTable,
)

OWNER = "LeaveOneOutProtocol"
BLOCK = 512


@dataclass(frozen=True)
class BinRates:
    """Identification rates of the probes of one bin.

    Attributes:
        name: Name of the bin, such as `"5-10"`.
        probes: Number of probes.
        rates: Rank to rate, with intervals over identities; None in an empty bin.
    """

    name: str
    probes: int
    rates: Mapping[int, Estimate]

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        rates = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        return {"name": self.name, "probes": self.probes, **rates}


@dataclass(frozen=True)
class LeaveOneOutResult:
    """Result of a `LeaveOneOutProtocol`.

    Attributes:
        rates: Rank to rate, with Wilson's interval over probes. It takes probes as independent: with many images per
            identity it is too narrow.
        ranks_of_mates: (n,) rank of each probe's best mate, from 1; 0 without a mate.
        mates: (n,) row of each probe's most similar mate, -1 without one.
        mate_scores: (n,) their cosines, NaN without a mate.
        impostors: (n,) row of the most similar image of another identity.
        impostor_scores: (n,) their cosines.
        by_age: Rates by the probe's age; empty without ages.
        by_gap: Rates by the years between the probe and its most similar mate; empty without ages.
    """

    rates: Mapping[int, Estimate]
    ranks_of_mates: IntArray = field(repr=False)
    mates: IntArray = field(repr=False, compare=False)
    mate_scores: FloatArray = field(repr=False, compare=False)
    impostors: IntArray = field(repr=False, compare=False)
    impostor_scores: FloatArray = field(repr=False, compare=False)
    by_age: tuple[BinRates, ...]
    by_gap: tuple[BinRates, ...]
    protocol: "LeaveOneOutProtocol" = field(repr=False, compare=False)

    @property
    def probes(self) -> int:
        """Number of images; each is a probe once."""
        return self.ranks_of_mates.size

    @property
    def mateless(self) -> int:
        """Number of probes without another image of their identity; by definition they are misses."""
        return int((self.ranks_of_mates == 0).sum())

    def cmc(self, max_rank: int) -> FloatArray:
        """(max_rank,) rate at ranks 1, 2, ... `max_rank`: the cumulative match characteristic."""
        max_rank = check_whole("LeaveOneOutResult.cmc", "max_rank", max_rank, min=1)
        return np.array(CmcCurve.of(self.ranks_of_mates, max_rank).rate)

    def describe(self) -> Description:
        """What the protocol measures and how."""
        bins = {}
        for key, rates, kind, axis in (
            ("by_age", self.by_age, "age", "age of the probe, years"),
            ("by_gap", self.by_gap, "gap", "gap to the nearest mate, years"),
        ):
            if rates:
                names, counts = [each.name for each in rates], [each.probes for each in rates]
                bins[key] = Bins.ordered(f"Rank-{self.protocol.ranks[0]} by {kind}", names, axis, counts)
        return Description(
            question="Which identity is it? Each image is a probe once, all other images are the gallery.",
            convention={
                "Gallery": "all other images; the probe is left out by its row, not by its score",
                "Ties": "the lower row first",
                "Without a mate": f"{counted(self.mateless, 'probe')}, counted as misses",
                "Network": "as it is: not adapted to the gallery between rounds",
                "Score": "cosine",
            },
            intervals="Wilson's, over probes; in bins a bootstrap over identities",
            counts={"probes": self.probes, "identities": self.protocol.num_identities},
            measures={f"rank{rank}": Measure(f"Rank-{rank}") for rank in self.protocol.ranks},
            bins=bins,
            failures="identification",
        )

    def summary(self) -> ModelSummary:
        """Rates by rank, by age and by gap, and the CMC."""
        max_rank = min(MAX_CMC_RANK, self.probes - 1)
        bins = {"by_age": self.by_age, "by_gap": self.by_gap}
        first = self.protocol.ranks[0]
        return ModelSummary(
            {f"rank{rank}": MeasuredValue.of(self.rates[rank]) for rank in self.protocol.ranks},
            {key: [MeasuredValue.of(each.rates[first]) for each in rates] for key, rates in bins.items() if rates},
            cmc=CmcCurve.of(self.ranks_of_mates, max_rank),
        )

    def outcomes(self) -> dict[str, Outcomes]:
        """Probes identified at each rank."""
        ranks, identities = self.ranks_of_mates, (self.protocol.codes, self.protocol.codes)
        return {f"rank{rank}": Outcomes((ranks >= 1) & (ranks <= rank), identities) for rank in self.protocol.ranks}

    def hardest(self, count: int) -> list[HardPair]:
        """The missed probes whose mate is furthest behind an impostor: with the mate, then with the impostor."""
        missed = np.flatnonzero(self.ranks_of_mates > 1)
        mates = self.mates[missed], self.mate_scores[missed]
        impostors = self.impostors[missed], self.impostor_scores[missed]
        return missed_probes(missed, mates, impostors, self.protocol.codes[missed], count)

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """For every probe the best mate and the best impostor."""

        def rows() -> Iterator[tuple[str | int, ...]]:
            for row, rank in enumerate(self.ranks_of_mates.tolist()):
                mate = (label(int(self.mates[row])), f"{self.mate_scores[row]:.8f}") if rank else ("", "")
                impostor = label(int(self.impostors[row])), f"{self.impostor_scores[row]:.8f}"
                yield label(row), rank, *mate, *impostor

        columns = ("probe", "rank of mate", "mate", "mate score", "impostor", "impostor score")
        return ScoreTable(columns, rows(), self.probes)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON: `{"rank1": ..., "probes": n}`, and the rates by age and gap if there are ages."""
        entry: JsonDict = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry["probes"] = self.probes
        if self.by_age:
            entry["by_age"] = [rates.to_dict() for rates in self.by_age]
            entry["by_gap"] = [rates.to_dict() for rates in self.by_gap]
        return entry


class LeaveOneOutProtocol:
    """Each image against all other images, see `leave_one_out`.

    Args:
        identities: (n,) whole numbers or strings.
        ranks: Ranks, from 1 to n - 1.
        ages: (n,) years; adds the rates by the probe's age and by the gap to its most similar mate.
        age_bins: Rising lower ends of the bins of the probe's age, years.
        gap_bins: Rising lower ends of the bins of the gap, years.
        replicates: Bootstrap resamples over identities for the bins; 0 for none.
        seed: Seed of the resamples.
        level: Confidence of the intervals.

    Examples:
        >>> protocol = LeaveOneOutProtocol([7, 7, 8, 8], ranks=(1,))
        >>> protocol.evaluate([[1.0, 0], [1, 0], [0, 1], [0, 1]]).rates[1].value
        1.0
    """

    def __init__(
        self,
        identities: ArrayLike,
        ranks: Sequence[int] = (1, 5),
        *,
        ages: ArrayLike | None = None,
        age_bins: Sequence[float] = PROBE_AGE_STARTS,
        gap_bins: Sequence[float] = GAP_STARTS,
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
    ) -> None:
        self.codes, labels = check_identities(OWNER, identities)
        self.num_identities = labels.size
        self.ranks = check_ranks(OWNER, ranks, max=self.codes.size - 1)
        self.ages = None if ages is None else check_ages(OWNER, ages, self.codes.size)
        self.age_starts = check_starts(OWNER, "age_bins", age_bins)
        self.gap_starts = check_starts(OWNER, "gap_bins", gap_bins)
        self.level = check_level(OWNER, level)
        self.resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)

    def __repr__(self) -> str:
        return f"LeaveOneOutProtocol(<{self.codes.size} images>, ranks={self.ranks})"

    def evaluate(self, embeddings: Embeddings) -> LeaveOneOutResult:
        """Measure embeddings (n, d) in the order of the identities."""
        codes, count = self.codes, self.codes.size
        unit = unit_rows(OWNER, "embeddings", embeddings, rows=count)
        step = rows_at_a_time(BLOCK, count)
        parts = [_nearest(unit, codes, start, start + step) for start in range(0, count, step)]
        ranks, mates, mate_scores, impostors, impostor_scores = map(np.concatenate, zip(*parts, strict=True))
        rates = {rank: wilson_estimate((ranks >= 1) & (ranks <= rank), level=self.level) for rank in self.ranks}
        by_age: tuple[BinRates, ...] = ()
        by_gap: tuple[BinRates, ...] = ()
        if self.ages is not None:
            gap = np.where(ranks == 0, -1, place(self.gap_starts, np.abs(self.ages - self.ages[mates])))
            by_age = self._by_bin(self.age_starts, place(self.age_starts, self.ages), ranks)
            by_gap = self._by_bin(self.gap_starts, gap, ranks)
        return LeaveOneOutResult(
            rates, ranks, mates, mate_scores, impostors, impostor_scores, by_age, by_gap, protocol=self
        )

    def _by_bin(self, starts: FloatArray, bins: IntArray, ranks: IntArray) -> tuple[BinRates, ...]:
        rows = []
        for number, name in enumerate(bin_names(starts)):
            inside = bins == number
            hits = {rank: ((ranks >= 1) & (ranks <= rank))[inside] for rank in self.ranks}
            rates = {
                rank: rate_estimate(each, self.codes[inside], self.resamples, level=self.level)
                for rank, each in hits.items()
            }
            rows.append(BinRates(name, int(inside.sum()), rates))
        return tuple(rows)


def _nearest(
    unit: FloatArray, codes: IntArray, start: int, stop: int
) -> tuple[IntArray, IntArray, FloatArray, IntArray, FloatArray]:
    """For the probes of one block of rows: rank, row and score of the best mate; row and score of the best impostor."""
    rows = np.arange(start, min(stop, codes.size))
    scores = cosines(unit[rows], unit)
    same = codes[rows, None] == codes
    itself = np.arange(rows.size), rows
    scores[itself], same[itself] = -np.inf, False
    mates, mated = np.where(same, scores, -np.inf).argmax(axis=1), same.any(axis=1)
    mate_scores, ranks = ranks_of(scores, mates)
    scores[same] = -np.inf
    impostors = scores.argmax(axis=1)
    return (
        np.where(mated, ranks, 0),
        np.where(mated, mates, -1),
        np.where(mated, mate_scores, np.nan),
        impostors,
        np.take_along_axis(scores, impostors[:, None], axis=1)[:, 0],
    )


def leave_one_out(embeddings: Embeddings, identities: ArrayLike, ranks: Sequence[int] = (1,)) -> FloatArray:
    """Leave-one-image-out identification: each image is a probe, all others are the gallery.

    A probe is identified at rank k if an image of its identity is among the k gallery images of largest cosine; equal
    cosines are ordered by row number. The probe itself is left out by its row number, not by its score, so a duplicate
    image stays in the gallery. A probe without a mate is a miss.

    Args:
        embeddings: (n, d), normalized or not.
        identities: (n,) whole numbers or strings.
        ranks: Ranks, from 1 to n - 1.

    Returns:
        (len(ranks),) the rate at each rank, in the given order.

    Examples:
        >>> embeddings = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.3]]
        >>> leave_one_out(embeddings, ["a", "a", "b", "b", "b"], ranks=(1, 3)).tolist()
        [0.8, 1.0]

    References:
        FG-NET's usual protocol in age-invariant face recognition, with a network that is not adapted between rounds.
    """
    result = LeaveOneOutProtocol(identities, ranks, replicates=0).evaluate(embeddings)
    return np.array([result.rates[rank].value for rank in result.protocol.ranks], dtype=np.float64)
