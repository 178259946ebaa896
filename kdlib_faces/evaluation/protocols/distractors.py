"""Evaluation room: who is it among a million strangers? MegaFace's challenge 1, with FG-NET's or any probes. NumPy only."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_choice, check_number
from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_ages,
    check_fars,
    check_labels,
    check_level,
    gather,
    is_shards,
    require,
    shards_of,
    to_numpy,
    unit_rows,
)
from kdlib_faces.evaluation.protocols.distractor_result import DistractorResult, DistractorTrials, GapRates
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, operating_point
from kdlib_faces.evaluation.search import BLOCK, Search, dot_rows
from kdlib_faces.evaluation.statistics.bins import GAP_STARTS, bin_names, check_starts, place
from kdlib_faces.evaluation.statistics.clustered import draws, rate_estimate
from kdlib_faces.evaluation.statistics.intervals import Estimate
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs
from kdlib_faces.progress import progress_to

__all__ = ["DistractorProtocol", "identify_with_distractors"]

MOST_FALSE_ACCEPTS = 20_000_000
MEGAFACE = 1_000_000
CLEANING = ("none", "extra_dimension", "exclude_zeros", "zeros_score_0")
Cleaning = Literal["none", "extra_dimension", "exclude_zeros", "zeros_score_0"]


def identify_with_distractors(
    probes: Any,
    identities: Any,
    distractors: Any,
    *,
    fars: Sequence[float] = (1e-6,),
    ranks: Sequence[int] = (1,),
    ties: Literal["correct", "wrong"] = "correct",
    cleaning: Cleaning = "none",
    sizes: Sequence[int] = (),
    ages: Any = None,
    gap_bins: Sequence[float] = GAP_STARTS,
    most_distractors: int | None = None,
    replicates: int = 500,
    seed: int = 0,
    level: float = 0.95,
    progress: bool = False,
) -> DistractorResult:
    """Identification and verification among distractors: MegaFace's challenge 1.

    For every ordered pair (mate g, probe p) of one identity the gallery is g and all distractors; the other mates are
    not in it. The trial is correct at rank k when cos(p, g) is at least p's k-th largest distractor cosine. The rate
    is over all Σ M(M-1) trials. Verification takes the pairs of one identity as genuine and all probes x distractors
    as impostors, with the exact rule of `tar_at_far`; its threshold comes from the largest scores kept on the way.

    Distractors are read once, in blocks; memory does not grow with their number. Products are float32, and every score
    that can decide something is taken again in float64, so neither blocks nor shards change a result.

    Args:
        probes: (n, d) embeddings, normalized or not, several of each identity.
        identities: (n,) whole numbers or strings.
        distractors: (m, d) array, memory map or tensor, or shards of it: a sequence or an iterator of arrays.
        fars: target false accept rates, each allowing at most 20 million false accepts.
        ranks: the k's.
        ties: whether a mate as alike as the k-th distractor is `"correct"`, as published, or `"wrong"`.
        cleaning: how noisy distractors are marked in the set. `"none"`: there are none, a zero row is an error.
            `"extra_dimension"`: as insightface writes them, (m, d + 1) with a last column that is not 0; they match
            nobody. `"exclude_zeros"`: a zero row matches nobody. `"zeros_score_0"`: a zero row scores 0 against every
            probe, as in FaceX-Zoo, and so beats a mate of negative cosine.
        sizes: numbers of distractors, rising, at which rank 1 is told too: the first 10, 100, ... of them.
        ages: (n,) years; gives the rates by age gap between probe and mate.
        gap_bins: rising lower ends of the gap bins, years.
        most_distractors: an upper bound on their number, wanted of an iterator of more than a million.
        replicates: bootstrap resamples over identities; 0 for none.
        seed: of the resamples.
        level: confidence of the intervals.
        progress: show how far it is.

    Returns:
        The rates, and how many distractors were really used.

    Raises:
        ValueError: a row of either that is not finite or zero (it is named), no distractor, no identity with two
            images, more distractors than `most_distractors`.

    Examples:
        >>> probes = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.6, 1.0]]
        >>> result = identify_with_distractors(probes, [0, 0, 1, 1], [[-1.0, 0.0], [1.0, 1.0]], fars=(0.1,))
        >>> result.rank1, result.tar[0.1].tar, result.tar[0.1].resolvable, result.distractors
        (0.75, 0.5, False, 2)

    References:
        I. Kemelmacher-Shlizerman et al., "The MegaFace benchmark", CVPR 2016. MegaFace is withdrawn: bring any set, and
        name it beside the figure.
    """
    protocol = DistractorProtocol(
        identities,
        distractors,
        fars=fars,
        ranks=ranks,
        ties=ties,
        cleaning=cleaning,
        sizes=sizes,
        ages=ages,
        gap_bins=gap_bins,
        most_distractors=most_distractors,
        replicates=replicates,
        seed=seed,
        level=level,
        progress=progress,
    )
    return protocol.evaluate(probes)


class DistractorProtocol:
    """`identify_with_distractors` as a protocol for `evaluate`; the arguments are the same.

    An iterator of shards is used up by the first evaluation; give a sequence or one memory map to judge several models.

    Examples:
        >>> protocol = DistractorProtocol([0, 0], [[0.0, 1.0]], fars=(1.0,))
        >>> protocol.evaluate([[1.0, 0.0], [1.0, 0.2]]).rank1
        1.0
    """

    owner = "identify_with_distractors"

    def __init__(
        self,
        identities: Any,
        distractors: Any,
        *,
        fars: Sequence[float] = (1e-6,),
        ranks: Sequence[int] = (1,),
        ties: Literal["correct", "wrong"] = "correct",
        cleaning: Cleaning = "none",
        sizes: Sequence[int] = (),
        ages: Any = None,
        gap_bins: Sequence[float] = GAP_STARTS,
        most_distractors: int | None = None,
        replicates: int = 500,
        seed: int = 0,
        level: float = 0.95,
        progress: bool = False,
    ) -> None:
        owner = self.owner
        self.codes, labels = check_labels(owner, "identities", identities)
        require(self.codes.size > labels.size, owner, "identities must hold one with two images, got one image of each")
        self.fars = check_fars(owner, fars)
        require(len(ranks) > 0, owner, "ranks must not be empty, got ()")
        for rank in ranks:
            check_number(owner, "ranks", rank, min=1, max=100_000, integer=True)
        check_choice(owner, "ties", ties, ("correct", "wrong"))
        check_choice(owner, "cleaning", cleaning, CLEANING)
        for size in sizes:
            check_number(owner, "sizes", size, min=1, integer=True)
        require(list(sizes) == sorted(set(sizes)), owner, f"sizes must rise from the first, got {tuple(sizes)}")
        check_level(owner, level)
        self.ages = None if ages is None else check_ages(owner, ages, self.codes.size)
        self.starts = check_starts(owner, "gap_bins", gap_bins)
        self.most = _known_size(distractors) if most_distractors is None else most_distractors
        check_number(owner, "most_distractors", self.most, min=1, integer=True)
        self.top = 1 + max((allowed_false_accepts(far, self.codes.size * self.most) for far in self.fars), default=-1)
        require(
            self.top <= MOST_FALSE_ACCEPTS,
            owner,
            f"fars must allow at most {MOST_FALSE_ACCEPTS} false accepts, got {self.top - 1} of "
            f"{self.codes.size} x {self.most} impostor scores",
        )
        self.distractors, self.ranks, self.sizes = distractors, tuple(ranks), tuple(sizes)
        self.ties, self.cleaning, self.level, self.progress = ties, cleaning, float(level), progress
        self._draws = draws(owner, labels.size, replicates=replicates, seed=seed)

    def __repr__(self) -> str:
        return (
            f"DistractorProtocol(<{self.codes.size} images of {self.codes.max() + 1} identities>, <distractors>, "
            f"fars={self.fars}, ranks={self.ranks}, ties={self.ties!r}, cleaning={self.cleaning!r})"
        )

    def evaluate(self, embeddings: Any) -> DistractorResult:
        """Measure the probes' embeddings (n, d); see `identify_with_distractors`."""
        unit, extra = self._probes(embeddings)
        first, second = genuine_pairs(self.codes)
        scores = dot_rows(unit, first, unit, second)
        probe = np.concatenate([first, second])
        search = Search(self.owner, unit, max((1, *self.ranks)), self.top)
        cleaned, by_size = 0, {}
        with progress_to("distractors", quiet=not self.progress) as show:
            for rows, numbers, zeros, dropped in self._cleaned(unit.shape[1] + extra, search):
                search.add(rows, numbers)
                search.add_zeros(zeros)
                cleaned += dropped
                if search.seen in self.sizes and search.seen not in by_size:
                    by_size[search.seen] = self._rate(self._hits(scores, probe, search.best[:, 0]), probe)
                show(search.seen, self.most)
        require(
            search.seen > 0, self.owner, f"distractors must hold one that is not cleaned away, got none ({cleaned})"
        )
        missing = [size for size in self.sizes if size not in by_size]
        require(not missing, self.owner, f"sizes must be at most the {search.seen} distractors, got {missing[:1]}")
        place = self._places(scores, probe, search.best)
        hits = {rank: (place <= rank).astype(np.float64) for rank in {1, *self.ranks}}
        tar = self._operating_points(scores, search)
        who = self.codes[first]
        counts = np.bincount(self.codes)
        return DistractorResult(
            rates={rank: self._rate(hits[rank], probe) for rank in sorted(hits)},
            tar=tar,
            tar_by_identity={far: self._accepted(scores, who, point) for far, point in tar.items()},
            by_gap=self._by_gap(scores, first, second, hits[1], tar),
            by_size=by_size,
            probes=self.codes.size,
            mateless=int((counts[self.codes] == 1).sum()),
            trials=probe.size,
            distractors=search.seen,
            cleaned=cleaned,
            cleaning=self.cleaning,
            ties=self.ties,
            per_trial=DistractorTrials(
                probe,
                np.concatenate([second, first]),
                np.concatenate([scores, scores]),
                place,
                search.nearest,
                search.best[:, 0],
            ),
        )

    def _probes(self, embeddings: Any) -> tuple[FloatArray, int]:
        """Unit rows; with `"extra_dimension"` a last column of zeros may be there, as in the published files."""
        array = gather(self.owner, "probes", embeddings)
        extra = int(self.cleaning == "extra_dimension")
        if extra and array.shape[1] > 1 and not array[:, -1].any():
            array = array[:, :-1]
        return unit_rows(self.owner, "probes", array, rows=self.codes.size), extra

    def _cleaned(self, width: int, search: Search) -> Iterator[tuple[npt.NDArray[Any], IntArray, int, int]]:
        """Blocks of distractors to search, their numbers, how many beside them score 0, and how many are left out."""
        total = 0
        for shard in shards_of(self.owner, "distractors", self.distractors, width):
            at = 0
            while at < len(shard):
                following = [size - search.seen for size in self.sizes if size > search.seen]
                block = shard[at : at + min([BLOCK, *following])]
                at += len(block)
                numbers = np.arange(total, total + len(block))
                total += len(block)
                require(
                    total <= self.most,
                    self.owner,
                    f"most_distractors must be an upper bound, got {self.most} and a row {self.most}",
                )
                if self.cleaning == "none":
                    yield block, numbers, 0, 0
                    continue
                # Before rows are left out, so that a bad one has its own number.
                bad_rows = np.flatnonzero(~np.isfinite(block).all(axis=1))
                first = int(numbers[bad_rows[:1]].sum())
                require(
                    bad_rows.size == 0, self.owner, f"distractors must be finite (no NaN, no infinity), got row {first}"
                )
                if self.cleaning == "extra_dimension":
                    good = block[:, -1] == 0
                    block = block[:, :-1]
                else:
                    good = block.any(axis=1)
                bad = int(good.size - good.sum())
                kept = (block, numbers) if not bad else (block[good], numbers[good])
                yield (*kept, bad, 0) if self.cleaning == "zeros_score_0" else (*kept, 0, bad)

    def _hits(self, scores: FloatArray, probe: IntArray, limit: FloatArray) -> FloatArray:
        return (self._places(scores, probe, limit[:, None]) <= 1).astype(np.float64)

    def _places(self, scores: FloatArray, probe: IntArray, best: FloatArray) -> IntArray:
        """Place of each trial's mate among the (n, k) best distractors of its probe; k + 1 behind all of them."""
        both = np.concatenate([scores, scores])
        beats = np.greater if self.ties == "correct" else np.greater_equal
        ahead = np.zeros(probe.size, dtype=np.int64)
        for limit in best.T:
            ahead += beats(limit[probe], both)
        return 1 + ahead

    def _rate(self, hits: FloatArray, probe: IntArray) -> Estimate:
        return rate_estimate(hits, self.codes[probe], self._draws, level=self.level)

    def _accepted(self, scores: FloatArray, who: IntArray, point: TarAtFar) -> Estimate:
        """TAR at a threshold that is kept as it is, with its interval over identities."""
        return rate_estimate((scores > point.threshold).astype(np.float64), who, self._draws, level=self.level)

    def _operating_points(self, scores: FloatArray, search: Search) -> dict[float, TarAtFar]:
        falling = -np.sort(-search.largest)
        impostors = self.codes.size * search.seen
        points = {}
        for far in self.fars:
            k = allowed_false_accepts(far, impostors)
            threshold = float(falling[k]) if k < impostors else -np.inf
            points[far] = operating_point(
                far,
                threshold,
                accepted=int((scores > threshold).sum()),
                genuine=scores.size,
                false_accepts=int(np.searchsorted(-falling, -threshold)) if k < impostors else impostors,
                impostors=impostors,
                level=self.level,
            )
        return points

    def _by_gap(
        self, scores: FloatArray, first: IntArray, second: IntArray, hits: FloatArray, tar: Mapping[float, TarAtFar]
    ) -> tuple[GapRates, ...]:
        if self.ages is None:
            return ()
        gap = place(self.starts, np.abs(self.ages[first] - self.ages[second]))
        rows = []
        for number, name in enumerate(bin_names(self.starts)):
            pairs = np.flatnonzero(gap == number)
            trials = np.concatenate([pairs, pairs + first.size])
            who = self.codes[first[pairs]]
            accepted = {far: self._accepted(scores[pairs], who, point) for far, point in tar.items()}
            rank1 = rate_estimate(hits[trials], np.concatenate([who, who]), self._draws, level=self.level)
            rows.append(GapRates(name, trials.size, rank1, accepted))
        return tuple(rows)


def _known_size(distractors: Any) -> int:
    """How many there are, MegaFace's million where an iterator does not say."""
    if not is_shards(distractors):
        array = to_numpy(distractors)
        require(array.ndim == 2, DistractorProtocol.owner, f"distractors must be (m, d), or shards, got {array.shape}")
        return max(1, len(array))
    if isinstance(distractors, (list, tuple)):
        return max(1, sum(len(shard) for shard in distractors))
    return MEGAFACE
