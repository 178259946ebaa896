"""Recipe: all pairs of a set by age gap or by age groups, judged for all models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import AgeGapProtocol, AgeGapResult, BinResult, compare, evaluate, hardest_pairs
from kdlib_faces.evaluation.roc import allowed_false_accepts
from kdlib_faces.harness.panels import (
    Arrays,
    HardPair,
    ProtocolResult,
    ScoreTable,
    estimate,
    far_words,
    measure,
    pairs_of_models,
)

__all__ = ["AgesPanel", "every_pair"]

BLOCK = 512


@dataclass(frozen=True, eq=False)
class AgesPanel:
    """Judges an `AgeGapProtocol` for several models.

    Attributes:
        name: of the entry.
        title: its heading.
        protocol: says the identities and ages.
        labels: what each row is called.
        convention: what else a reader must know.
        notes: what was left out.
        num_failures: how many pairs of each kind to show.
    """

    name: str
    title: str
    protocol: AgeGapProtocol
    labels: Callable[[int], str]
    convention: dict[str, str]
    notes: tuple[str, ...] = ()
    num_failures: int = 6

    def judge(self, embeddings: Arrays) -> ProtocolResult:
        """All models on all pairs."""
        protocol = self.protocol
        results = {name: evaluate(array, protocol) for name, array in embeddings.items()}
        first = next(iter(results.values()))
        large = first.large_gap
        gap = "age gap" if protocol.kind == "gap" else "age groups"
        entry: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "question": "Are the pairs of one person still accepted when years lie between the two images? All pairs of "
            "the set, with one threshold for all.",
            "convention": self._convention(large),
            "counts": {
                "images": protocol.codes.size,
                "identities": int(protocol.codes.max()) + 1,
                "genuine pairs": first.all.genuine,
                "impostor pairs": first.all.impostor,
            },
            "notes": list(self.notes),
            "measures": self._measures(large, gap),
            "bins": self._bins(first, gap),
            "models": {name: self._found(result, large) for name, result in results.items()},
        }
        entry["notes"] += [
            f"{name}: {line} resolves no such rate" for name, r in results.items() for line in r.unresolved()
        ]
        if len(results) > 1:
            entry["differences"] = list(self._differences(results, large))
            entry["difference_rule"] = "Paired bootstrap over identities; the threshold is set anew in each resample."
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: self._hardest(array) for name, array in embeddings.items()},
            scores=ScoreTable(
                ("left", "right", "same", "score"),
                lambda name: every_pair(embeddings[name], protocol.codes, self.labels),
                protocol.codes.size * (protocol.codes.size - 1) // 2,
            ),
        )

    def _convention(self, large: str | None) -> dict[str, str]:
        drawn = "all pairs" if large is None else f"{large} pairs against impostor pairs of the same kind"
        return {
            "Threshold": "one for all bins, the (k+1)-th largest of all impostor scores, k = floor(FAR x impostors)",
            "Own impostors": "different people whose pair falls into the same bin, with a threshold of its own",
            "Curves drawn": drawn,
            "Score": "cosine",
            **self.convention,
            "Intervals": "bootstrap over identities, threshold set anew in each resample",
        }

    def _measures(self, large: str | None, gap: str) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        fars = self.protocol.fars
        if large is not None:
            where = f"{gap} {large}"
            rows |= {f"large_tar_{far:g}": measure(f"TAR, {far_words(far)}", note=where) for far in fars}
            rows["large_own_auc"] = measure("AUC, own impostors", "auc", where)
            rows |= {f"large_own_{far:g}": measure(f"TAR, {far_words(far)}, own", note=where) for far in fars}
        rows |= {f"tar_{far:g}": measure(f"TAR, {far_words(far)}", note="all pairs") for far in fars}
        return rows | {"auc": measure("AUC", "auc", "all pairs")}

    def _bins(self, first: AgeGapResult, gap: str) -> dict[str, Any]:
        shared = {
            "axis": "age gap, years" if self.protocol.kind == "gap" else "",
            "labels": [entry.name for entry in first.bins],
            "counts": [entry.genuine for entry in first.bins],
        }
        if self.protocol.kind == "gap":
            shared["at"] = self.protocol.starts.tolist()
        rows = {f"fnmr_{far:g}": {"title": f"FNMR at {far_words(far, 'FMR')}"} for far in self.protocol.fars}
        rows["own_auc"] = {"title": f"AUC against impostors of the same {gap}", "unit": "auc"}
        return {key: {**shared, **row} for key, row in rows.items()}

    def _found(self, result: AgeGapResult, large: str | None) -> dict[str, Any]:
        sure = {far: point.resolvable for far, point in result.operating_points.items()}
        measures: dict[str, Any] = {}
        if large is not None:
            found = result.bin(large)
            measures |= {f"large_tar_{far:g}": estimate(e, resolvable=sure[far]) for far, e in found.tar.items()}
            measures["large_own_auc"] = estimate(found.own_auc)
            measures |= {
                f"large_own_{far:g}": estimate(e, resolvable=_resolves(far, found)) for far, e in found.own_tar.items()
            }
        measures |= {f"tar_{far:g}": estimate(e, resolvable=sure[far]) for far, e in result.all.tar.items()}
        measures["auc"] = estimate(result.all.auc)
        bins: dict[str, Any] = {
            f"fnmr_{far:g}": [estimate(entry.fnmr[far], resolvable=sure[far]) for entry in result.bins] for far in sure
        }
        bins["own_auc"] = [estimate(entry.own_auc) for entry in result.bins]
        drawn = large if large in result.roc else "all"
        far, tar = result.roc[drawn or "all"]
        genuine = [result.genuine_counts[large]] if large is not None else list(result.genuine_counts.values())
        histogram: dict[str, Any] = {
            "edges": result.edges.tolist(),
            "genuine": np.sum(genuine, axis=0).tolist(),
            "impostor": list(result.impostor_counts),
        }
        threshold = next((point.threshold for point in result.operating_points.values()), -np.inf)
        if np.isfinite(threshold):
            histogram["threshold"] = float(threshold)
        return {
            "measures": measures,
            "bins": bins,
            "roc": {"far": far.tolist(), "tar": tar.tolist()},
            "histogram": histogram,
        }

    def _differences(self, results: dict[str, AgeGapResult], large: str | None) -> Iterator[dict[str, Any]]:
        keys = {("all", f"tar@{far:g}"): f"tar_{far:g}" for far in self.protocol.fars} | {("all", "auc"): "auc"}
        if large is not None:
            keys |= {(large, f"tar@{far:g}"): f"large_tar_{far:g}" for far in self.protocol.fars}
            keys |= {(large, f"own_tar@{far:g}"): f"large_own_{far:g}" for far in self.protocol.fars}
            keys[large, "own_auc"] = "large_own_auc"
        if not self.protocol.replicates:
            return
        for a, b in pairs_of_models(list(results)):
            for row in compare(results, a, b):
                key = keys.get((row["bin"], row["metric"]))
                if key is not None:
                    yield {"a": a, "b": b, "measure": key, "difference": dict(row["difference"])}

    def _hardest(self, array: NDArray[Any]) -> list[HardPair]:
        if not self.num_failures:
            return []
        return [HardPair(*pair) for pair in hardest_pairs(array, self.protocol, count=self.num_failures)]


def _resolves(far: float, found: BinResult) -> bool:
    return found.own_tar[far].value is None or allowed_false_accepts(far, found.impostor) >= 1


def every_pair(
    array: NDArray[Any], codes: NDArray[np.int64], labels: Callable[[int], str]
) -> Iterator[tuple[Any, ...]]:
    """Rows of a file of scores for all pairs i < j, in blocks of a few hundred images."""
    unit = np.asarray(array, dtype=np.float32)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    for start in range(0, len(unit), BLOCK):
        scores = unit[start : start + BLOCK] @ unit[start:].T
        for i in range(len(scores)):
            row = start + i
            left = labels(row)
            for j in range(row + 1, len(unit)):
                yield left, labels(j), int(codes[row] == codes[j]), f"{scores[i, j - start]:.8f}"
