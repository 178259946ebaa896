"""Recipe: identification among distractors, judged for all models: MegaFace's challenge 1."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import (
    DistractorResult,
    identify_with_distractors,
)
from kdlib_faces.evaluation.resampling import genuine_pairs
from kdlib_faces.recipes.panels import (
    PAIRED,
    Arrays,
    Judgement,
    differences,
    estimate,
    far_words,
    measure,
    unit_rows,
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

    def judge(self, embeddings: Arrays, distractors: Arrays) -> Judgement:
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
            codes = np.unique(self.identities, return_inverse=True)[1].reshape(-1).astype(np.int64)
            rows, mates = genuine_pairs(codes)
            accepted: dict[str, Any] = {f"tar_{far:g}": {} for far in first.tar}
            for name, result in results.items():
                unit = unit_rows(embeddings[name])
                scores = np.einsum("gd,gd->g", unit[rows], unit[mates])
                for far, point in result.tar.items():
                    accepted[f"tar_{far:g}"][name] = scores > point.threshold
            entry["differences"] = differences(
                accepted, dict.fromkeys(accepted, (codes[rows], codes[rows])), replicates=self.replicates,
                seed=self.seed, level=self.level,
            )  # fmt: skip
            entry["difference_rule"] = PAIRED.format(" of identities")
        return Judgement(entry, {name: result.to_dict() for name, result in results.items()})

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
