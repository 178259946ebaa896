"""Recipe: identification judged for all models: each image of a set against all the others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import LeaveOneOutResult, leave_one_out_result
from kdlib_faces.harness.panels import (
    MISSED,
    PAIRED,
    Arrays,
    HardPair,
    ProtocolResult,
    ScoreTable,
    differences,
    estimate,
    measure,
    missed_pairs,
)

__all__ = ["LeaveOneOutPanel"]

MOST_RANKS = 50


@dataclass(frozen=True, eq=False)
class LeaveOneOutPanel:
    """Judges leave-one-image-out identification for several models.

    Attributes:
        name: of the entry.
        title: its heading.
        identities: (n,) of each image.
        labels: what each row is called.
        convention: what else a reader must know.
        ages: (n,) years, all known; None for no breakdown.
        ranks: of the table.
        replicates: of the intervals.
        seed: of the resamples.
        level: confidence.
        notes: what was left out.
        num_failures: how many probes to show.
    """

    name: str
    title: str
    identities: NDArray[Any]
    labels: Callable[[int], str]
    convention: dict[str, str]
    ages: NDArray[Any] | None = None
    ranks: tuple[int, ...] = (1, 5)
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    notes: tuple[str, ...] = ()
    num_failures: int = 6

    def judge(self, embeddings: Arrays) -> ProtocolResult:
        """All models on the same probes."""
        results = {
            name: leave_one_out_result(
                array,
                self.identities,
                self.ranks,
                level=self.level,
                ages=self.ages,
                replicates=self.replicates,
                seed=self.seed,
            )
            for name, array in embeddings.items()
        }
        first = next(iter(results.values()))
        most = min(MOST_RANKS, first.probes - 1)
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": "Who is it? Each image is a probe once, all other images are the gallery.",
            "convention": {
                "Gallery": "all other images; the probe is left out by its row, not by its score",
                "Ties": "the lower row first",
                "Without a mate": f"{first.mateless} {'probe' if first.mateless == 1 else 'probes'}, counted as misses",
                "Network": "as it is: not adapted to the gallery between rounds",
                "Score": "cosine",
                **self.convention,
                "Intervals": "Wilson's, over probes; in bins a bootstrap over identities",
            },
            "counts": {"probes": first.probes, "identities": int(np.unique(self.identities).size)},
            "notes": list(self.notes),
            "measures": {f"rank{rank}": measure(f"Rank-{rank}") for rank in self.ranks},
            "models": {},
        }
        for key, axis in (("by_age", "age of the probe, years"), ("by_gap", "gap to the nearest mate, years")):
            bins = getattr(first, key)
            if bins:
                labels, counts = [each.name for each in bins], [each.probes for each in bins]
                title = f"Rank-{self.ranks[0]} by {'age' if key == 'by_age' else 'gap'}"
                at = list(range(len(bins)))
                entry.setdefault("bins", {})[key] = {
                    "title": title, "axis": axis, "labels": labels, "counts": counts, "at": at,
                }  # fmt: skip
        for name, result in results.items():
            entry["models"][name] = {
                "measures": {f"rank{rank}": estimate(result.rates[rank]) for rank in self.ranks},
                "cmc": {"rank": list(range(1, most + 1)), "rate": result.cmc(most).tolist()},
                "bins": {
                    key: [estimate(each.rates[self.ranks[0]]) for each in getattr(result, key)]
                    for key in entry.get("bins", ())
                },
            }
        places = {name: result.ranks_of_mates for name, result in results.items()}
        if len(results) > 1:
            hits = {f"rank{rank}": {name: (p >= 1) & (p <= rank) for name, p in places.items()} for rank in self.ranks}
            owners = dict.fromkeys(hits, (self.identities, self.identities))
            entry["differences"] = differences(
                hits, owners, replicates=self.replicates, seed=self.seed, level=self.level
            )
            entry["difference_rule"] = PAIRED.format(" of identities")
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: self._missed(result) for name, result in results.items()},
            MISSED,
            ScoreTable(
                ("probe", "place of mate", "mate", "mate score", "stranger", "stranger score"),
                lambda name: self._rows(results[name]),
                first.probes,
            ),
        )

    def _rows(self, result: LeaveOneOutResult) -> Iterator[tuple[Any, ...]]:
        for row, place in enumerate(result.ranks_of_mates.tolist()):
            mate = (self.labels(int(result.mates[row])), f"{result.mate_scores[row]:.8f}") if place else ("", "")
            stranger = self.labels(int(result.strangers[row])), f"{result.stranger_scores[row]:.8f}"
            yield self.labels(row), place, *mate, *stranger

    def _missed(self, result: LeaveOneOutResult) -> list[HardPair]:
        missed = np.flatnonzero(result.ranks_of_mates > 1)
        mates = result.mates[missed], result.mate_scores[missed]
        strangers = result.strangers[missed], result.stranger_scores[missed]
        return missed_pairs(missed, mates, strangers, self.identities[missed], self.num_failures)
