"""Recipe: one age group against another, and errors by age, judged for all models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import (
    AgeErrorProtocol,
    AgeErrorResult,
    CrossGroupProtocol,
    ErrorBin,
    Estimate,
    ScoredPairs,
)
from kdlib_faces.harness.panels import (
    PAIRED,
    Arrays,
    HardPair,
    ProtocolResult,
    ScoreTable,
    curve,
    differences,
    estimate,
    far_words,
    histogram,
    measure,
    once_each,
    unit_rows,
)

__all__ = ["AgeErrorsPanel", "CrossGroupPanel"]

MOST_RANKS = 50


@dataclass(frozen=True, eq=False)
class CrossGroupPanel:
    """Judges a `CrossGroupProtocol`, LAG's young against adult, for several models.

    Attributes:
        name: of the entry.
        title: its heading.
        protocol: says the groups.
        labels: what each row is called.
        convention: what else a reader must know.
        replicates: of the paired intervals.
        seed: of the resamples.
        level: confidence.
        num_failures: how many pairs of each kind to show.
    """

    name: str
    title: str
    protocol: CrossGroupProtocol
    labels: Callable[[int], str]
    convention: dict[str, str]
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    num_failures: int = 6

    def judge(self, embeddings: Arrays) -> ProtocolResult:
        """All models on all pairs across the groups."""
        protocol = self.protocol
        results = {name: protocol.evaluate(array) for name, array in embeddings.items()}
        first = next(iter(results.values()))
        probe, gallery = first.groups
        who = protocol.codes[protocol.probes], protocol.codes[protocol.gallery]
        same = who[0][:, None] == who[1]
        mated = same.any(axis=1)
        measures = {f"tar_{far:g}": measure(f"TAR, {far_words(far)}") for far in first.tar}
        measures |= {"auc": measure("AUC", "auc")}
        measures |= {f"rank{rank}": measure(f"Rank-{rank}", note=f"{probe} among {gallery}") for rank in first.rates}
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": f"Is a {probe} face recognized among {gallery} ones? Every {probe} image against every {gallery} "
            "one, all impostor pairs across the groups too.",
            "convention": {
                "Threshold": "the (k+1)-th largest score of impostor pairs across the groups, k = floor(FAR x impostors)",
                "Ranks": f"{probe} probes with a mate, gallery of every {gallery} image; ties go to the mate",
                "Score": "cosine",
                **self.convention,
                "Intervals": "bootstrap over identities, threshold set anew in each resample",
            },
            "counts": {
                f"{probe} images": first.probes,
                f"{gallery} images": first.gallery,
                "probes without a mate": first.mateless,
                "genuine pairs": first.genuine,
                "impostor pairs": first.probes * first.gallery - first.genuine,
            },
            "measures": measures,
            "models": {},
        }
        hits: dict[str, Any] = {key: {} for key in measures if key != "auc"}
        num_failures: dict[str, list[HardPair]] = {}
        rows, columns = np.nonzero(same)
        owners: dict[str, Any] = {f"tar_{far:g}": (who[0][rows], who[1][columns]) for far in first.tar}
        owners |= {f"rank{rank}": (who[0][mated], who[0][mated]) for rank in first.rates}
        for name, result in results.items():
            unit = unit_rows(embeddings[name])
            scores = unit[protocol.probes] @ unit[protocol.gallery].T
            best = np.where(same, scores, -np.inf).max(axis=1, keepdims=True)
            places = (1 + ((scores > best) & ~same).sum(axis=1))[mated]
            most = min(MOST_RANKS, first.gallery)
            rate = np.cumsum(np.bincount(np.minimum(places, most + 1), minlength=most + 2)[1 : most + 1]) / places.size
            points = result.operating_points
            found = {
                f"tar_{far:g}": estimate(each, resolvable=points[far].resolvable) for far, each in result.tar.items()
            }
            found["auc"] = estimate(result.auc)
            found |= {f"rank{rank}": estimate(each) for rank, each in result.rates.items()}
            threshold = next((point.threshold for point in points.values()), None)
            entry["models"][name] = {
                "measures": found,
                "roc": curve(scores[same], scores[~same]),
                "cmc": {"rank": list(range(1, most + 1)), "rate": rate.tolist()},
                "histogram": histogram(scores[same], scores[~same], threshold),
            }
            num_failures[name] = self._hardest(scores, same)
            for far, point in points.items():
                hits[f"tar_{far:g}"][name] = scores[same] > point.threshold
            for rank in result.rates:
                hits[f"rank{rank}"][name] = places <= rank
        if len(results) > 1:
            entry["differences"] = differences(
                hits, owners, replicates=self.replicates, seed=self.seed, level=self.level
            )
            entry["difference_rule"] = PAIRED.format(" of identities")
        table = ScoreTable(
            ("probe", "gallery", "same", "score"), lambda name: self._rows(embeddings[name], same), same.size
        )
        return ProtocolResult(
            entry, {name: result.to_dict() for name, result in results.items()}, num_failures, scores=table
        )

    def _hardest(self, scores: NDArray[np.float64], same: NDArray[np.bool_]) -> list[HardPair]:
        """The least alike genuine pairs, then the most alike impostor pairs; a person is shown once of each kind."""
        found: list[HardPair] = []
        for kind in (True, False):
            left = np.where(same == kind, scores if kind else -scores, np.inf)
            for _ in range(self.num_failures):
                i, j = np.unravel_index(int(left.argmin()), left.shape)
                if not np.isfinite(left[i, j]):
                    break
                probe, gallery = int(self.protocol.probes[i]), int(self.protocol.gallery[j])
                found.append(HardPair(probe, gallery, float(scores[i, j]), kind))
                people = self.protocol.codes[[probe, gallery]]
                left[np.isin(self.protocol.codes[self.protocol.probes], people)] = np.inf
                left[:, np.isin(self.protocol.codes[self.protocol.gallery], people)] = np.inf
        return found

    def _rows(self, array: NDArray[Any], same: NDArray[np.bool_]) -> Iterator[tuple[Any, ...]]:
        unit = unit_rows(array)
        for i, probe in enumerate(self.protocol.probes.tolist()):
            scores = unit[self.protocol.gallery] @ unit[probe]
            for j, gallery in enumerate(self.protocol.gallery.tolist()):
                yield self.labels(probe), self.labels(gallery), int(same[i, j]), f"{scores[j]:.8f}"


@dataclass(frozen=True, eq=False)
class AgeErrorsPanel:
    """Judges an `AgeErrorProtocol` for several models: who is refused, and who is taken for whom, by age.

    Attributes:
        name: of the entry.
        title: its heading.
        protocol: says the ages.
        convention: what else a reader must know.
        notes: what was left out.
        seed: of the paired resamples.
        labels: what each row is called.
        num_failures: how many pairs of each kind to show.
    """

    name: str
    title: str
    protocol: AgeErrorProtocol
    convention: dict[str, str]
    notes: tuple[str, ...] = ()
    seed: int = 0
    labels: Callable[[int], str] = str
    num_failures: int = 6

    def judge(self, embeddings: Arrays) -> ProtocolResult:
        """All models at thresholds of their own for one false accept rate."""
        protocol = self.protocol
        results = {name: protocol.evaluate(array) for name, array in embeddings.items()}
        first = next(iter(results.values()))
        fars = list(first.operating_points)
        measures = {f"fnmr_{far:g}": measure(f"FNMR, {far_words(far, 'FMR')}", better="low") for far in fars}
        if first.kind == "gap":
            measures["slope"] = measure(
                "Slope of the genuine score", "score", "over ten years of gap, all pairs", "none"
            )
            measures["slope_within"] = measure("Slope within persons", "score", "over ten years of gap", "none")
        kinds = {
            "fnmr_by_gap": "by age gap" if first.kind == "gap" else "by age groups",
            "fnmr_by_younger_age": "by the younger age",
            "fmr_same_age": "among people of one age",
        }
        axes = {"fnmr_by_gap": "age gap, years", "fnmr_by_younger_age": "age of the younger image, years"}
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": "Who is refused, and who is taken for somebody else, by age, when one threshold serves all?",
            "convention": {
                "Threshold": "one for all bins, the (k+1)-th largest of all impostor scores, k = floor(FMR x impostors)",
                "FMR among people of one age": "impostor pairs whose two images are of one bin of ages",
                "Score": "cosine",
                **self.convention,
                "Intervals": "bootstrap over identities, thresholds kept as they are; of the FNMR of all pairs Wilson's",
            },
            "counts": {"images": protocol.codes.size, "identities": int(protocol.codes.max()) + 1},
            "notes": list(self.notes),
            "measures": measures,
            "bins": {},
            "models": {name: {"measures": {}, "bins": {}} for name in results},
        }
        for kind, words in kinds.items():
            rows: Sequence[ErrorBin] = getattr(first, kind)
            rate = "FMR" if kind == "fmr_same_age" else "FNMR"
            for far in fars if rows else ():
                key = f"{kind}_{far:g}"
                told: dict[str, Any] = {
                    "title": f"{rate} {words} at {far_words(far, 'FMR')}",
                    "labels": [row.name for row in rows],
                    "counts": [row.pairs for row in rows],
                }
                if first.kind == "gap":
                    told |= {"axis": axes.get(kind, "age, years"), "at": list(range(len(rows)))}
                entry["bins"][key] = told
                for name, result in results.items():
                    sure = result.operating_points[far].resolvable
                    entry["models"][name]["bins"][key] = [
                        estimate(row.rates[far], resolvable=sure) for row in getattr(result, kind)
                    ]
        for name, result in results.items():
            entry["models"][name]["measures"] = self._measures(result)
        if len(results) > 1:
            refused: dict[str, Any] = {
                f"fnmr_{far:g}": {
                    name: result.genuine.scores <= result.operating_points[far].threshold
                    for name, result in results.items()
                }
                for far in fars
            }
            who = protocol.codes[first.genuine.left]
            entry["differences"] = differences(
                refused, dict.fromkeys(refused, (who, who)), replicates=len(protocol.draws), seed=self.seed,
                level=protocol.level, right="refused",
            )  # fmt: skip
            entry["difference_rule"] = PAIRED.format(" of identities")
        kind = "age" if protocol.ages is not None else "group"
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: self._hardest(result) for name, result in results.items()},
            scores=ScoreTable(
                ("left", "right", "same", "score", f"left {kind}", f"right {kind}"),
                lambda name: self._rows(results[name]),
                max(r.genuine.scores.size + r.false_accepts.scores.size for r in results.values()),
            ),
        )

    def _rows(self, result: AgeErrorResult) -> Iterator[tuple[Any, ...]]:
        """What the rates are made of: every genuine pair, then every false accept at the loosest threshold."""
        protocol = self.protocol
        names = protocol.image_names
        for same, pairs in ((1, result.genuine), (0, result.false_accepts)):
            for left, right, score in zip(pairs.left, pairs.right, pairs.scores, strict=True):
                if protocol.ages is not None:
                    told = tuple(f"{protocol.ages[row]:g}" for row in (left, right))
                else:
                    told = tuple(names[protocol.image_bin[row]] for row in (left, right))
                yield self.labels(int(left)), self.labels(int(right)), same, f"{score:.8f}", *told

    def _hardest(self, result: AgeErrorResult) -> list[HardPair]:
        """The least alike genuine pairs, then the most alike false accepts; a person is shown once of each kind."""
        return self._first(result.genuine, True) + self._first(result.false_accepts, False)

    def _first(self, pairs: ScoredPairs, same: bool) -> list[HardPair]:
        protocol = self.protocol
        order = np.argsort(pairs.scores if same else -pairs.scores, kind="stable")
        people = protocol.codes[np.stack([pairs.left, pairs.right], axis=1)]
        found = []
        for k in once_each(order, lambda item: people[item].tolist(), self.num_failures):
            left, right = int(pairs.left[k]), int(pairs.right[k])
            ages = "" if protocol.ages is None else f"{protocol.ages[left]:g} and {protocol.ages[right]:g} years"
            found.append(HardPair(left, right, float(pairs.scores[k]), same, ages))
        return found

    @staticmethod
    def _measures(result: AgeErrorResult) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for far, point in result.operating_points.items():
            missed = Estimate(1 - point.tar, 1 - point.high, 1 - point.low, point.genuine)
            found[f"fnmr_{far:g}"] = estimate(missed, resolvable=point.resolvable)
        if result.kind == "gap":
            found["slope"], found["slope_within"] = estimate(result.slope), estimate(result.slope_within)
        return found
