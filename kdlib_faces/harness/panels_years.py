"""Recipe: a person's score over the years, judged for all models: the longitudinal protocol of this project."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlib_faces.evaluation import Estimate, LongitudinalProtocol, LongitudinalResult
from kdlib_faces.harness.panels import (
    PAIRED,
    Arrays,
    HardPair,
    ProtocolResult,
    ScoreTable,
    differences,
    estimate,
    far_words,
    measure,
    once_each,
)

__all__ = ["LongitudinalPanel"]


@dataclass(frozen=True, eq=False)
class LongitudinalPanel:
    """Judges a `LongitudinalProtocol` for several models.

    Attributes:
        name: of the entry.
        title: its heading.
        protocol: says the people and the years.
        convention: what else a reader must know.
        notes: what was left out.
        replicates: of the paired intervals.
        seed: of the resamples.
        level: confidence.
        labels: what each row is called.
        num_failures: how many people to show.
    """

    name: str
    title: str
    protocol: LongitudinalProtocol
    convention: dict[str, str]
    notes: tuple[str, ...] = ()
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    labels: Callable[[int], str] = str
    num_failures: int = 6

    def judge(self, embeddings: Arrays) -> ProtocolResult:
        """All models on the same people."""
        protocol = self.protocol
        results = {name: protocol.evaluate(array) for name, array in embeddings.items()}
        first = next(iter(results.values()))
        fars = list(first.operating_points)
        shared = {
            "axis": "years since the reference, within the window",
            "labels": [f"{each.years:g}" for each in first.after],
            "at": [each.years for each in first.after],
            "counts": [each.pairs for each in first.after],
        }
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": "Is a person still recognized after so many years? A protocol of this project: no published set "
            "fixes one, so its numbers compare with each other and with nobody's table.",
            "convention": {
                "Definition": first.definition,
                "Slope": "within persons: each has a level of their own, all share the change over time",
                "Score": "cosine",
                **self.convention,
                "Intervals": "bootstrap over people, thresholds kept as they are; of the FNMR of all pairs Wilson's",
            },
            "counts": {
                "images": protocol.codes.size,
                "people": int(protocol.codes.max()) + 1,
                "genuine pairs": first.elapsed.size,
            },
            "notes": list(self.notes),
            "measures": {
                **{f"fnmr_{far:g}": measure(f"FNMR, {far_words(far, 'FMR')}", better="low") for far in fars},
                "slope": measure("Slope of the genuine score", "score", "within persons, over ten years"),
                "falling": measure("People whose score falls", note="of those seen at several ages", better="low"),
            },
            "bins": {
                **{f"fnmr_{far:g}": {"title": f"FNMR, {far_words(far, 'FMR')}", **shared} for far in fars},
                "score": {"title": "Mean genuine score", "unit": "score", **shared},
            },
            "models": {name: self._found(result) for name, result in results.items()},
        }
        rows, _ = protocol.pairs()
        if len(results) > 1:
            who = protocol.codes[rows]
            # FNMR is the share refused, so a is better where its difference is below zero.
            hits = {
                f"fnmr_{far:g}": {name: r.scores <= r.operating_points[far].threshold for name, r in results.items()}
                for far in fars
            }
            owners = dict.fromkeys(hits, (who, who))
            entry["differences"] = differences(
                hits, owners, replicates=self.replicates, seed=self.seed, level=self.level, right="refused"
            )
            entry["difference_rule"] = PAIRED.format(" of people")
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: self._hardest(result) for name, result in results.items()},
            scores=ScoreTable(
                ("reference", "image", "years", "score"), lambda name: self._rows(results[name]), rows.size
            ),
        )

    def _rows(self, result: LongitudinalResult) -> Iterator[tuple[Any, ...]]:
        pairs = (part.tolist() for part in (*self.protocol.pairs(), result.elapsed, result.scores))
        for reference, image, years, score in zip(*pairs, strict=True):
            yield self.labels(reference), self.labels(image), f"{years:.6g}", f"{score:.8f}"

    def _hardest(self, result: LongitudinalResult) -> list[HardPair]:
        """The least alike pairs, a person once."""
        rows, later = self.protocol.pairs()
        order = np.argsort(result.scores, kind="stable")
        return [
            HardPair(int(rows[k]), int(later[k]), float(result.scores[k]), True, f"{result.elapsed[k]:.3g} years")
            for k in once_each(order, lambda item: [self.protocol.codes[rows[item]]], self.num_failures)
        ]

    @staticmethod
    def _found(result: LongitudinalResult) -> dict[str, Any]:
        measures: dict[str, Any] = {}
        bins: dict[str, Any] = {}
        for far, point in result.operating_points.items():
            missed = Estimate(1 - point.tar, 1 - point.high, 1 - point.low, point.genuine)
            measures[f"fnmr_{far:g}"] = estimate(missed, resolvable=point.resolvable)
            bins[f"fnmr_{far:g}"] = [estimate(each.fnmr[far], resolvable=point.resolvable) for each in result.after]
        measures["slope"] = estimate(result.slope)
        measures["falling"] = {"value": result.falling, "n": int(np.isfinite(result.person_slopes).sum())}
        bins["score"] = [estimate(each.score) for each in result.after]
        return {"measures": measures, "bins": bins}
