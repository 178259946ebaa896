"""Recipe: given pairs of images, judged for all models: accuracy, operating points, curves, worst pairs, differences."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import (
    Estimate,
    PairProtocol,
    TarAtFar,
    VerificationResult,
    auc,
    clustered_rate,
    wilson,
)
from kdlib_faces.evaluation.statistics.bins import bin_names, check_starts, place
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
    operating_point,
)

__all__ = ["PairsPanel", "worst_pairs"]


@dataclass(frozen=True, eq=False)
class PairsPanel:
    """Judges a `PairProtocol` for several models.

    Attributes:
        name: of the entry.
        title: its heading.
        protocol: says the pairs.
        labels: what each row is called.
        convention: what else a reader must know, such as the flip.
        ages: (n,) years, NaN where unknown; gives FNMR by age gap.
        bins: lower ends of the bins of gaps.
        replicates: of the intervals.
        seed: of the resamples.
        level: confidence.
        notes: what was left out.
        num_failures: how many pairs of each kind to show.
    """

    name: str
    title: str
    protocol: PairProtocol
    labels: Any
    convention: dict[str, str]
    ages: NDArray[Any] | None = None
    bins: tuple[float, ...] = (0, 5, 10, 20, 30)
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    notes: tuple[str, ...] = ()
    num_failures: int = 6

    def judge(self, embeddings: Arrays) -> ProtocolResult:
        """All models on the same pairs."""
        protocol, same = self.protocol, self.protocol.same
        results = {name: protocol.evaluate(array) for name, array in embeddings.items()}
        scores = {name: _cosines(array, protocol) for name, array in embeddings.items()}
        first = next(iter(results.values()))
        who = None if protocol.codes is None else (protocol.codes[protocol.left], protocol.codes[protocol.right])
        measures: dict[str, Any] = {"accuracy": measure("Accuracy", note=f"over {len(first.fold_accuracies)} folds")}
        measures |= {f"tar_{far:g}": measure(f"TAR, {far_words(far)}") for far in protocol.fars}
        measures |= {f"val_{far:g}": measure(f"TAR, {far_words(far)}", note="over folds") for far in protocol.val_fars}
        measures["auc"] = measure("AUC", "auc")
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": "Do two images show one person? Given pairs, a threshold that other pairs have set.",
            "convention": self._convention(first),
            "counts": {
                "genuine pairs": int(same.sum()),
                "impostor pairs": int((~same).sum()),
                "images": int(np.unique(np.r_[protocol.left, protocol.right]).size),
            },
            "notes": [*self.notes, *first.notes],
            "measures": measures,
            "models": {name: self._found(results[name], scores[name]) for name in embeddings},
        }
        hits: dict[str, Any] = {"accuracy": {name: result.correct for name, result in results.items()}}
        owners: dict[str, Any] = {"accuracy": who}
        for far in protocol.fars:
            key = f"tar_{far:g}"
            hits[key] = {name: scores[name][same] > results[name].tar[far].threshold for name in results}
            owners[key] = None if who is None else (who[0][same], who[1][same])
        if len(results) > 1:
            entry["differences"] = differences(
                hits, owners, replicates=self.replicates, seed=self.seed, level=self.level
            )
            over = " of identities" if who is not None else " of pairs, as identities are not known"
            entry["difference_rule"] = PAIRED.format(over)
        if self.ages is not None and protocol.fars:
            self._by_gap(entry, {name: hits[f"tar_{protocol.fars[0]:g}"][name] for name in results})
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: worst_pairs(protocol, scores[name], self.num_failures) for name in scores},
            scores=ScoreTable(("left", "right", "same", "score"), lambda name: self._rows(scores[name]), same.size),
        )

    def _convention(self, first: VerificationResult) -> dict[str, str]:
        rule = {
            "exact": "threshold at the (k+1)-th largest impostor score, k = floor(FAR x impostors), accepted above it",
            "nearest": "the point of the curve whose FAR is nearest, as insightface's scripts; it may exceed the target",
        }[self.protocol.tar_mode]
        over = (
            "bootstrap over identities, of TAR at thresholds kept as they are"
            if self.protocol.codes is not None
            else "accuracy: Wilson's, over pairs; TAR: Wilson's, over genuine pairs"
        )
        found = {"Accuracy": first.convention}
        if self.protocol.fars:
            found["TAR at FAR"] = rule
        return found | {"Score": "cosine", **self.convention, "Intervals": over}

    def _found(self, result: VerificationResult, scores: NDArray[np.float64]) -> dict[str, Any]:
        same = self.protocol.same
        genuine, impostor = scores[same], scores[~same]
        if self.protocol.codes is not None:
            told = self.protocol.accuracy_estimate(result, replicates=self.replicates, seed=self.seed, level=self.level)
            interval = Estimate(result.accuracy, told.low, told.high, result.pairs)
        else:
            interval = Estimate(
                result.accuracy, *wilson(result.accuracy * result.pairs, result.pairs, level=self.level), result.pairs
            )
        found = {"accuracy": estimate(interval, note=f"± {100 * result.std:.2f} over folds")}
        found |= {f"tar_{far:g}": self._tar(point, genuine) for far, point in result.tar.items()}
        for far, fold in result.val.items():
            found[f"val_{far:g}"] = {"value": fold.tar, "note": f"± {100 * fold.std:.2f} over folds"}
        found["auc"] = {"value": auc(genuine, impostor), "n": int(same.sum())}
        threshold = next(iter(result.tar.values())).threshold if result.tar else None
        return {
            "measures": found,
            "roc": curve(genuine, impostor),
            "histogram": histogram(genuine, impostor, threshold),
        }

    def _tar(self, point: TarAtFar, genuine: NDArray[np.float64]) -> dict[str, Any]:
        """An operating point, with its interval over identities where they are known."""
        protocol = self.protocol
        if protocol.codes is None:
            return operating_point(point)
        who = protocol.codes[protocol.left[protocol.same]]
        told = clustered_rate(
            genuine > point.threshold, who, replicates=self.replicates, seed=self.seed, level=self.level
        )
        return estimate(told, resolvable=point.resolvable)

    def _by_gap(self, entry: dict[str, Any], accepted: dict[str, NDArray[np.bool_]]) -> None:
        """FNMR of the genuine pairs whose two ages are known, at the first FAR's threshold."""
        assert self.ages is not None
        same = self.protocol.same
        starts = check_starts("evaluate", "bins", self.bins)
        gap = np.abs(self.ages[self.protocol.left[same]] - self.ages[self.protocol.right[same]])
        known = np.isfinite(gap)
        if not known.any():
            return
        of = np.where(known, place(starts, np.where(known, gap, 0)), -1)
        far = self.protocol.fars[0]
        entry["bins"] = {
            "fnmr": {
                "title": f"FNMR at {far_words(far, 'FMR')}",
                "axis": "age gap, years",
                "labels": bin_names(starts),
                "at": starts.tolist(),
                "counts": [int((of == number).sum()) for number in range(len(starts))],
            }
        }
        for name, right in accepted.items():
            rows = [_missed(right[of == number], self.level) for number in range(len(starts))]
            entry["models"][name]["bins"] = {"fnmr": rows}

    def _rows(self, scores: NDArray[np.float64]) -> Iterator[tuple[Any, ...]]:
        pairs = zip(self.protocol.left, self.protocol.right, self.protocol.same, scores, strict=True)
        for left, right, same, score in pairs:
            yield self.labels(int(left)), self.labels(int(right)), int(same), f"{score:.8f}"


def _missed(accepted: NDArray[np.bool_], level: float) -> dict[str, Any] | None:
    if not accepted.size:
        return None
    missed = int((~accepted).sum())
    return estimate(Estimate(missed / accepted.size, *wilson(missed, accepted.size, level=level), accepted.size))


def _cosines(array: NDArray[Any], protocol: PairProtocol) -> NDArray[np.float64]:
    """Cosines of the pairs in blocks, so that float64 copies of the embeddings stay small."""
    parts = []
    for start in range(0, protocol.same.size, 8192):
        left, right = (
            np.asarray(array[side[start : start + 8192]], dtype=np.float64) for side in (protocol.left, protocol.right)
        )
        length = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        parts.append(np.einsum("pd,pd->p", left, right) / length)
    return np.concatenate(parts)


def worst_pairs(protocol: PairProtocol, scores: NDArray[np.float64], count: int) -> list[HardPair]:
    """The least alike genuine pairs, then the most alike impostor pairs; an image is shown once of each kind."""
    found = []
    ends = np.stack([protocol.left, protocol.right], axis=1)
    for same, order in ((True, np.argsort(scores, kind="stable")), (False, np.argsort(-scores, kind="stable"))):
        for pair in once_each(order[protocol.same[order] == same], lambda item: ends[item].tolist(), count):
            left, right = ends[pair].tolist()
            found.append(HardPair(left, right, float(scores[pair]), same))
    return found
