"""Recipe: identification among distractors, judged for all models: MegaFace's challenge 1."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import DistractorResult, identify_with_distractors
from kdlib_faces.harness.panels import (
    MISSED,
    PAIRED,
    Arrays,
    HardPair,
    ProtocolResult,
    ScoreTable,
    differences,
    estimate,
    far_words,
    measure,
    missed_pairs,
)

__all__ = ["DistractorsPanel"]


@dataclass(frozen=True, eq=False)
class DistractorsPanel:
    """Judges MegaFace's challenge 1 for several models, each with distractors of its own embedding.

    Attributes:
        name: of the entry.
        title: its heading.
        identities: (n,) of the probes.
        ages: (n,) years of the probes, or None.
        convention: what else a reader must know: which distractors.
        fars: target false accept rates.
        ranks: of the table.
        sizes: numbers of distractors at which rank 1 is told.
        bins: lower ends of the bins of gaps.
        replicates: of the intervals.
        seed: of the resamples.
        level: confidence.
        notes: what was left out.
        progress: show how far it is.
        labels: what each probe is called.
        stranger_labels: what each distractor is called.
        num_failures: how many missed probes to show.
    """

    name: str
    title: str
    identities: NDArray[Any]
    ages: NDArray[Any] | None
    convention: dict[str, str]
    fars: tuple[float, ...] = (1e-6,)
    ranks: tuple[int, ...] = (1, 5)
    sizes: tuple[int, ...] = ()
    bins: tuple[float, ...] = (0, 5, 10, 20, 30)
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    notes: tuple[str, ...] = ()
    progress: bool = False
    labels: Callable[[int], str] = str
    stranger_labels: Callable[[int], str] = str
    num_failures: int = 6

    def judge(self, embeddings: Arrays, distractors: Arrays) -> ProtocolResult:
        """All models; `distractors` are embeddings of the same strangers by each of them."""
        results: dict[str, DistractorResult] = {}
        for name, array in embeddings.items():
            results[name] = identify_with_distractors(
                array,
                self.identities,
                distractors[name],
                fars=self.fars,
                ranks=self.ranks,
                sizes=[size for size in self.sizes if size <= len(distractors[name])],
                ages=self.ages,
                gap_bins=self.bins,
                replicates=self.replicates,
                seed=self.seed,
                level=self.level,
                progress=self.progress,
            )
        first = next(iter(results.values()))
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": "Who is it among very many strangers? Each probe with one mate and all distractors.",
            "convention": {
                "Definition": first.convention,
                "Score": "cosine",
                **self.convention,
                "Intervals": "bootstrap over identities, thresholds kept as they are",
            },
            "counts": {
                "probes": first.probes, "trials": first.trials, "distractors": first.distractors,
                "cleaned away": first.cleaned,
            },
            "notes": list(self.notes),
            "measures": {
                **{f"rank{rank}": measure(f"Rank-{rank}") for rank in first.rates},
                **{f"tar_{far:g}": measure(f"TAR, {far_words(far)}") for far in first.tar},
            },
            "bins": {},
            "models": {name: self._found(result) for name, result in results.items()},
        }  # fmt: skip
        if first.by_gap:
            entry["bins"]["gap"] = {
                "title": "Rank-1 by the gap between probe and mate",
                "axis": "age gap, years",
                "labels": [each.name for each in first.by_gap],
                "at": list(range(len(first.by_gap))),
                "counts": [each.trials for each in first.by_gap],
            }
        if first.by_size:
            entry["bins"]["size"] = {
                "title": "Rank-1 by the number of distractors",
                "axis": "distractors",
                "labels": [f"{size:,}" for size in first.by_size],
                "at": list(range(len(first.by_size))),
            }
        if len(results) > 1:
            entry["differences"] = self._differences(results)
            entry["difference_rule"] = PAIRED.format(" of identities")
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: self._missed(result) for name, result in results.items()},
            MISSED,
            ScoreTable(
                ("probe", "mate", "score", "place", "distractor", "distractor score"),
                lambda name: self._rows(results[name]),
                first.trials,
            ),
        )

    def _differences(self, results: dict[str, DistractorResult]) -> list[dict[str, Any]]:
        first = next(iter(results.values()))
        trials = {name: result.per_trial for name, result in results.items()}
        pairs = first.trials // 2  # the same pairs follow with probe and mate changed over
        hits: dict[str, Any] = {
            f"rank{rank}": {name: each.place <= rank for name, each in trials.items()} for rank in first.rates
        }
        hits |= {
            f"tar_{far:g}": {
                name: trials[name].score[:pairs] > result.tar[far].threshold for name, result in results.items()
            }
            for far in first.tar
        }
        who = self.identities[first.per_trial.probe]
        owners = {key: (who, who) if key.startswith("rank") else (who[:pairs], who[:pairs]) for key in hits}
        return differences(hits, owners, replicates=self.replicates, seed=self.seed, level=self.level)

    def _rows(self, result: DistractorResult) -> Iterator[tuple[Any, ...]]:
        """Every trial; a place beyond the largest rank is known as that only."""
        most, told = max(result.rates), result.per_trial
        for probe, mate, score, place in zip(told.probe, told.mate, told.score, told.place, strict=True):
            stranger, ahead = int(told.distractor[probe]), told.distractor_score[probe]
            named = self.stranger_labels(stranger) if stranger >= 0 else ""
            shown = place if place <= most else f">{most}"
            yield self.labels(int(probe)), self.labels(int(mate)), f"{score:.8f}", shown, named, f"{ahead:.8f}"

    def _missed(self, result: DistractorResult) -> list[HardPair]:
        told = result.per_trial
        missed = np.flatnonzero(told.place > 1)
        probes = told.probe[missed]
        mates = told.mate[missed], told.score[missed]
        strangers = told.distractor[probes], told.distractor_score[probes]
        return missed_pairs(probes, mates, strangers, self.identities[probes], self.num_failures, other=1)

    @staticmethod
    def _found(result: DistractorResult) -> dict[str, Any]:
        found: dict[str, Any] = {f"rank{rank}": estimate(each) for rank, each in result.rates.items()}
        found |= {
            f"tar_{far:g}": estimate(result.tar_by_identity[far], resolvable=point.resolvable)
            for far, point in result.tar.items()
        }
        bins: dict[str, Any] = {}
        if result.by_gap:
            bins["gap"] = [estimate(each.rank1) for each in result.by_gap]
        if result.by_size:
            bins["size"] = [estimate(each) for each in result.by_size.values()]
        return {"measures": found, "bins": bins}
