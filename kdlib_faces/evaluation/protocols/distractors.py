"""Identification and verification among distractors, the challenge 1 of MegaFace."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import (
    check_ages,
    check_fars,
    check_level,
    check_numbers,
    check_ranks,
    check_whole,
    gather,
    require,
    unit_rows,
)
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import ArrayLike, BoolArray, Embeddings, FloatArray, IntArray, JsonDict, Label
from kdlib_faces.evaluation.hardest import missed_probes
from kdlib_faces.evaluation.matching.distractors import (
    Cleaning,
    DistractorTrials,
    GapRates,
    distractor_blocks,
    known_size,
)
from kdlib_faces.evaluation.matching.search import BLOCK, Search, dot_rows
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, by_far, points_of_largest
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.clustered import rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate, resample_counts
from kdlib_faces.evaluation.statistics.paired import Outcomes
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs
from kdlib_faces.evaluation.summary import (
    Bins,
    Description,
    HardPair,
    Measure,
    MeasuredValue,
    ModelSummary,
    ScoreTable,
    far_measures,
)
from kdlib_faces.progress import progress_to

OWNER = "identify_with_distractors"
MAX_FALSE_ACCEPTS = 20_000_000


@dataclass(frozen=True)
class DistractorResult:
    """Result of `identify_with_distractors`.

    Attributes:
        rates: Rank to the part of the trials that is correct, with an interval over identities.
        tar: Target FAR to the operating point; as a number it is the TAR. Its interval is Wilson's, over pairs.
        tar_by_identity: The TARs with intervals over identities, at thresholds kept as they are.
        by_gap: The rates by age gap; empty without ages.
        by_size: Number of distractors to the rank-1 rate with the first so many of them.
        distractors: Number of distractors used.
        cleaned: Number of distractors left out as noisy.
        trials: The single trials.
    """

    rates: Mapping[int, Estimate]
    tar: Mapping[float, TarAtFar]
    tar_by_identity: Mapping[float, Estimate]
    by_gap: tuple[GapRates, ...]
    by_size: Mapping[int, Estimate]
    distractors: int
    cleaned: int
    trials: DistractorTrials = field(repr=False, compare=False)
    protocol: "DistractorProtocol" = field(repr=False, compare=False)

    @property
    def rank1(self) -> float:
        """The part of the trials whose mate is ahead of all distractors."""
        return float((self.trials.rank <= 1).mean())

    @property
    def convention(self) -> str:
        """How the numbers are defined, in words."""
        cleaning, ties = self.protocol.cleaning, self.protocol.ties
        cleaned = "no cleaning" if cleaning == "none" else f"{self.cleaned} cleaned away ({cleaning})"
        return (
            f"MegaFace challenge 1: one mate and {self.distractors} distractors for each ordered pair of one identity, "
            f"{cleaned}; a tie is {ties}; TAR by the exact rule over probes x distractors"
        )

    def describe(self) -> Description:
        """What the protocol measures and how."""
        bins = {}
        if self.by_gap:
            names, counts = [each.name for each in self.by_gap], [each.trials for each in self.by_gap]
            bins["gap"] = Bins.ordered("Rank-1 by the gap between probe and mate", names, "age gap, years", counts)
        if self.by_size:
            sizes = [f"{size:,}" for size in self.by_size]
            bins["size"] = Bins.ordered("Rank-1 by the number of distractors", sizes, "distractors")
        measures = {f"rank{rank}": Measure(f"Rank-{rank}") for rank in self.rates}
        twins = int((self.trials.distractor_score > 1 - 1e-9).sum())
        return Description(
            question="Which identity is it among many distractors? Each probe with one mate and all distractors.",
            convention={"Definition": self.convention, "Score": "cosine"},
            intervals="bootstrap over identities, thresholds kept as they are",
            counts={
                "probes": self.protocol.codes.size,
                "trials": self.trials.rank.size,
                "distractors": self.distractors,
                "cleaned away": self.cleaned,
            },
            measures=measures | far_measures("tar", "TAR", self.tar),
            bins=bins,
            notes=(f"{twins} probes have a distractor of the same embedding",) if twins else (),
            failures="identification",
        )

    def summary(self) -> ModelSummary:
        """Rates by rank and TAR; rank-1 rate by age gap and by number of distractors."""
        measures = {f"rank{rank}": MeasuredValue.of(each) for rank, each in self.rates.items()}
        for far, point in self.tar.items():
            estimate = self.tar_by_identity[far]
            measures[f"tar_{far:g}"] = MeasuredValue.of(estimate, resolvable=point.resolvable)
        bins = {"gap": [each.rank1 for each in self.by_gap], "size": list(self.by_size.values())}
        return ModelSummary(measures, {key: list(map(MeasuredValue.of, each)) for key, each in bins.items() if each})

    def outcomes(self) -> dict[str, Outcomes]:
        """Trials identified at each rank, and genuine pairs accepted at each FAR."""
        trials, identities = self.trials, self.protocol.codes[self.trials.probe]
        pairs = trials.rank.size // 2  # The second half holds the same pairs with probe and mate exchanged.
        genuine = identities[:pairs]
        ranks = {f"rank{rank}": Outcomes(trials.rank <= rank, (identities, identities)) for rank in self.rates}
        return ranks | {
            f"tar_{far:g}": Outcomes(trials.score[:pairs] > point.threshold, (genuine, genuine))
            for far, point in self.tar.items()
        }

    def hardest(self, count: int) -> list[HardPair]:
        """The missed probes whose mate is furthest behind a distractor: with the mate, then with the distractor."""
        trials, missed = self.trials, np.flatnonzero(self.trials.rank > 1)
        probes = trials.probe[missed]
        mates = trials.mate[missed], trials.score[missed]
        distractors = trials.distractor[probes], trials.distractor_score[probes]
        return missed_probes(probes, mates, distractors, self.protocol.codes[probes], count, impostor_set=1)

    def score_table(self, label: Label, distractor_label: Label) -> ScoreTable:
        """Every trial; a rank beyond the largest requested one is known as such only."""
        trials, max_rank = self.trials, max(self.rates)

        def rows() -> Iterator[tuple[str | int, ...]]:
            each = (part.tolist() for part in (trials.probe, trials.mate, trials.score, trials.rank))
            for probe, mate, score, rank in zip(*each, strict=True):
                distractor, best = int(trials.distractor[probe]), trials.distractor_score[probe]
                name = distractor_label(distractor) if distractor >= 0 else ""
                shown = rank if rank <= max_rank else f">{max_rank}"
                yield label(probe), label(mate), f"{score:.8f}", shown, name, f"{best:.8f}"

        columns = ("probe", "mate", "score", "rank", "distractor", "distractor score")
        return ScoreTable(columns, rows(), trials.rank.size)

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        entry: JsonDict = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry |= {"tar": by_far(self.tar), "tar_by_identity": by_far(self.tar_by_identity)}
        if self.by_gap:
            entry["by_gap"] = [rates.to_dict() for rates in self.by_gap]
        if self.by_size:
            entry["by_size"] = {str(size): estimate.to_dict() for size, estimate in self.by_size.items()}
        protocol = self.protocol
        return entry | {
            "probes": protocol.codes.size,
            "mateless": protocol.mateless,
            "trials": self.trials.rank.size,
            "distractors": self.distractors,
            "cleaned": self.cleaned,
            "cleaning": protocol.cleaning,
            "ties": protocol.ties,
            "convention": self.convention,
        }


class DistractorProtocol:
    """`identify_with_distractors` as a protocol for `evaluate`, with the same arguments.

    An iterator of shards is used up by the first evaluation; use a sequence or a memory map to evaluate several models.

    Examples:
        >>> protocol = DistractorProtocol([0, 0], [[0.0, 1.0]], fars=(1.0,))
        >>> protocol.evaluate([[1.0, 0.0], [1.0, 0.2]]).rank1
        1.0
    """

    def __init__(
        self,
        identities: ArrayLike,
        distractors: Embeddings,
        *,
        fars: Sequence[float] = (1e-6,),
        ranks: Sequence[int] = (1,),
        ties: Literal["correct", "wrong"] = "correct",
        cleaning: Cleaning = "none",
        sizes: Sequence[int] = (),
        ages: ArrayLike | None = None,
        gap_bins: Sequence[float] = GAP_STARTS,
        max_distractors: int | None = None,
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
        progress: bool = False,
    ) -> None:
        self.codes, labels = check_labels(OWNER, "identities", identities)
        count = self.codes.size
        self.num_identities = labels.size
        require(count > labels.size, OWNER, "identities must hold one with two images, got one image of each")
        self.fars = check_fars(OWNER, fars)
        self.ranks = check_ranks(OWNER, ranks, max=100_000)
        check_choice(OWNER, "ties", ties, ("correct", "wrong"))
        check_choice(OWNER, "cleaning", cleaning, get_args(Cleaning))
        self.sizes = tuple(map(int, check_numbers(OWNER, "sizes", sizes, integer=True, min=1)))
        rising = list(self.sizes) == sorted(set(self.sizes))
        require(rising, OWNER, f"sizes must rise from the first, got {self.sizes}")
        self.level = check_level(OWNER, level)
        self.ages = None if ages is None else check_ages(OWNER, ages, count)
        self.starts = check_starts(OWNER, "gap_bins", gap_bins)
        bound = known_size(OWNER, distractors) if max_distractors is None else max_distractors
        self.max_distractors = bound = check_whole(OWNER, "max_distractors", bound, min=1)
        # The thresholds need the largest scores, one more than the false accepts that they allow.
        self.top = 1 + max((allowed_false_accepts(far, count * bound) for far in self.fars), default=-1)
        message = f"fars must allow at most {MAX_FALSE_ACCEPTS} false accepts"
        scores = f"{count} x {bound} impostor scores"
        require(self.top <= MAX_FALSE_ACCEPTS, OWNER, f"{message}, got {self.top - 1} of {scores}")
        self.distractors, self.used_up, self.progress = distractors, False, progress
        self.ties, self.cleaning = ties, cleaning
        self.resamples = resample_counts(OWNER, labels.size, replicates=replicates, seed=seed)

    @property
    def mateless(self) -> int:
        """Number of probes without a mate; they are no trials of identification, but they are impostors."""
        return int((np.bincount(self.codes)[self.codes] == 1).sum())

    def __repr__(self) -> str:
        return (
            f"DistractorProtocol(<{self.codes.size} images of {self.num_identities} identities>, <distractors>, "
            f"fars={self.fars}, ranks={self.ranks}, ties={self.ties!r}, cleaning={self.cleaning!r})"
        )

    def evaluate(self, embeddings: Embeddings) -> DistractorResult:
        """Measure the probes' embeddings (n, d); see `identify_with_distractors`."""
        require(
            not self.used_up, OWNER, "distractors was an iterator, which an evaluation used up; pass a list of shards"
        )
        self.used_up = isinstance(self.distractors, Iterator)
        unit, extra = self._probes(embeddings)
        first, second = genuine_pairs(self.codes)
        scores = dot_rows(unit, first, unit, second)
        probe, both = np.concatenate([first, second]), np.concatenate([scores, scores])
        search = Search(OWNER, unit, max((1, *self.ranks)), self.top)
        cleaned, by_size = 0, {}
        blocks = distractor_blocks(
            OWNER,
            self.distractors,
            unit.shape[1] + extra,
            cleaning=self.cleaning,
            sizes=self.sizes,
            max_distractors=self.max_distractors,
            block_size=BLOCK,
        )
        with progress_to("distractors", quiet=not self.progress) as show:
            for block in blocks:
                search.add(block.rows, block.numbers)
                search.add_zeros(block.zeros)
                cleaned += block.cleaned
                if search.seen in self.sizes and search.seen not in by_size:
                    by_size[search.seen] = self._rate(self._ranks(both, probe, search.best[:, :1]) <= 1, probe)
                show(search.seen, self.max_distractors)
        require(search.seen > 0, OWNER, f"distractors must hold one that is not cleaned away, got none ({cleaned})")
        missing = [size for size in self.sizes if size not in by_size]
        require(not missing, OWNER, f"sizes must be at most the {search.seen} distractors, got {missing[:1]}")
        ranks = self._ranks(both, probe, search.best)
        falling, impostors = -np.sort(-search.largest), self.codes.size * search.seen
        points = points_of_largest(falling, impostors, scores, self.fars, self.level)
        trials = DistractorTrials(
            probe, np.concatenate([second, first]), both, ranks, search.nearest, search.best[:, 0]
        )
        return DistractorResult(
            rates={rank: self._rate(ranks <= rank, probe) for rank in sorted({1, *self.ranks})},
            tar=points,
            tar_by_identity={far: self._rate(scores > point.threshold, first) for far, point in points.items()},
            by_gap=self._by_gap(scores, first, second, ranks <= 1, points),
            by_size=by_size,
            distractors=search.seen,
            cleaned=cleaned,
            trials=trials,
            protocol=self,
        )

    def _probes(self, embeddings: Embeddings) -> tuple[FloatArray, int]:
        """Unit rows; with `"extra_dimension"` there may be a last column of zeros, as in the published files."""
        array = gather(OWNER, "probes", embeddings)
        extra = int(self.cleaning == "extra_dimension")
        if extra and array.shape[1] > 1 and not array[:, -1].any():
            array = array[:, :-1]
        return unit_rows(OWNER, "probes", array, rows=self.codes.size), extra

    def _ranks(self, scores: FloatArray, probe: IntArray, best: FloatArray) -> IntArray:
        """Rank of each trial's mate among the (n, k) best distractors of its probe; k + 1 behind all of them."""
        beats = np.greater if self.ties == "correct" else np.greater_equal
        ranks = np.ones(probe.size, dtype=np.int64)
        for limit in best.T:
            ranks += beats(limit[probe], scores)
        return ranks

    def _rate(self, hits: BoolArray, rows: IntArray) -> Estimate:
        return rate_estimate(hits, self.codes[rows], self.resamples, level=self.level)

    def _by_gap(
        self, scores: FloatArray, first: IntArray, second: IntArray, hits: BoolArray, points: Mapping[float, TarAtFar]
    ) -> tuple[GapRates, ...]:
        if self.ages is None:
            return ()
        gap = place(self.starts, np.abs(self.ages[first] - self.ages[second]))
        rows = []
        for number, name in enumerate(bin_names(self.starts)):
            pairs = np.flatnonzero(gap == number)
            trials, probes = np.concatenate([pairs, pairs + first.size]), first[pairs]
            tar = {far: self._rate(scores[pairs] > point.threshold, probes) for far, point in points.items()}
            rank1 = self._rate(hits[trials], np.concatenate([probes, probes]))
            rows.append(GapRates(name, trials.size, rank1, tar))
        return tuple(rows)
