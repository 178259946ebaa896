"""Recipe: templates, 1:1 and 1:N, judged for all models: IJB-B and IJB-C."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import (
    TemplateIdentificationResult,
    identify_templates,
    paired_difference,
    pool_templates,
    verify_templates,
)
from kdlib_faces.evaluation.pair_scores import pair_cosines
from kdlib_faces.harness.panels import (
    MISSED,
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
    missed_pairs,
    once_each,
    operating_point,
    pairs_of_models,
)

__all__ = ["TemplatesPanel"]

BLOCK = 1 << 17
"""Pairs scored at a time for a file of scores."""


def _headline_first(far: float) -> tuple[bool, float]:
    """The FAR that tables of IJB-B and IJB-C are compared at, then the others, falling."""
    return far != 1e-4, -far


@dataclass(frozen=True, eq=False)
class TemplatesPanel:
    """Judges IJB's 1:1 and 1:N for several models.

    Attributes:
        name: of the entries; the second has `_1n` behind it.
        title: their heading.
        template_ids: (n,) of each image.
        media_ids: (n,) of each image.
        pairs: ids of both templates and whether they are one person; None for no 1:1.
        galleries: see `identify_templates`; None for no 1:N.
        probes: see `identify_templates`.
        detector_scores: (n,) or None.
        feature_norm: `"keep"` or `"unit"`.
        mode: the rule of the operating points.
        convention: what else a reader must know.
        fars: target false accept rates.
        fpirs: target false positive identification rates.
        ranks: of the table.
        replicates: of the intervals.
        seed: of the resamples.
        level: confidence.
        num_failures: how many of the num_failures pairs of each kind to show, by the first image of each template.
    """

    name: str
    title: str
    template_ids: NDArray[Any]
    media_ids: NDArray[Any]
    convention: dict[str, str]
    pairs: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None
    galleries: Sequence[tuple[Any, Any]] | None = None
    probes: tuple[Any, Any] | None = None
    detector_scores: NDArray[Any] | None = None
    feature_norm: Literal["keep", "unit"] = "keep"
    mode: Literal["exact", "nearest"] = "exact"
    fars: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    fpirs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    ranks: tuple[int, ...] = (1, 5, 10)
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    num_failures: int = 6

    def _pooled(self, array: NDArray[Any]) -> Any:
        return pool_templates(
            array,
            self.template_ids,
            self.media_ids,
            detector_scores=self.detector_scores,
            feature_norm=self.feature_norm,
        )

    def verify(self, embeddings: Arrays) -> ProtocolResult:
        """1:1: given pairs of templates."""
        assert self.pairs is not None
        left, right, same = self.pairs
        flags = np.asarray(same, dtype=bool)
        models: dict[str, Any] = {}
        results: dict[str, dict[str, Any]] = {}
        hits: dict[str, dict[str, NDArray[np.bool_]]] = {f"tar_{far:g}": {} for far in self.fars}
        num_failures: dict[str, list[HardPair]] = {}
        found: Any = None
        for name, array in embeddings.items():
            templates = self._pooled(array)
            found = verify_templates(templates, left, right, same, fars=self.fars, mode=self.mode, level=self.level)
            i, j = (np.searchsorted(templates.ids, ids) for ids in (left, right))
            scores = pair_cosines(templates.features.astype(np.float32, copy=False), i, j)
            genuine, impostor = scores[flags], scores[~flags]
            threshold = next((point.threshold for point in found.tar.values() if point.resolvable), None)
            models[name] = {
                "measures": {f"tar_{far:g}": operating_point(point) for far, point in found.tar.items()},
                "roc": curve(genuine, impostor),
                "histogram": histogram(genuine, impostor, threshold),
            }
            for far, point in found.tar.items():
                hits[f"tar_{far:g}"][name] = genuine > point.threshold
            results[name] = found.to_dict()
            num_failures[name] = self._hardest(scores, flags)
        entry: dict[str, Any] = {
            "name": self.name,
            "title": f"{self.title}, 1:1",
            "question": "Are two templates of one person? A template is several images and frames of somebody.",
            "convention": {
                "Pooling": found.pooling,
                "Threshold": {
                    "exact": "the (k+1)-th largest impostor score, k = floor(FAR x impostors)",
                    "nearest": "the point whose FAR is nearest, as insightface; it may exceed the target",
                }[self.mode],
                "Score": "product of unit templates",
                **self.convention,
                "Intervals": "Wilson's, over genuine pairs",
            },
            "counts": {
                "images": len(self.template_ids), "templates": found.templates, "genuine pairs": found.genuine,
                "impostor pairs": found.impostor,
            },
            "measures": {f"tar_{far:g}": measure(f"TAR, {far_words(far)}") for far in sorted(self.fars, key=_headline_first)},
            "models": models,
        }  # fmt: skip
        if len(embeddings) > 1:
            owner = dict.fromkeys(hits, (left[flags], left[flags]))
            entry["differences"] = differences(
                hits, owner, replicates=self.replicates, seed=self.seed, level=self.level
            )
            entry["difference_rule"] = PAIRED.format(" of enrolled templates")
        table = ScoreTable(
            ("left template", "right template", "same", "score"), lambda name: self._pairs(embeddings[name]), flags.size
        )
        return ProtocolResult(entry, results, num_failures, scores=table)

    def _pairs(self, array: NDArray[Any]) -> Iterator[tuple[Any, ...]]:
        """Scores of all pairs, in their order; pooled and scored again, so that nothing of the pairs' length is kept."""
        assert self.pairs is not None
        templates = self._pooled(array)
        features = templates.features.astype(np.float32, copy=False)
        for start in range(0, len(self.pairs[0]), BLOCK):
            left, right, same = (part[start : start + BLOCK] for part in self.pairs)
            scores = pair_cosines(features, *(np.searchsorted(templates.ids, ids) for ids in (left, right)))
            for row in zip(left.tolist(), right.tolist(), same.tolist(), scores.tolist(), strict=True):
                yield row[0], row[1], int(row[2]), f"{row[3]:.8f}"

    def _hardest(self, scores: NDArray[np.float32], flags: NDArray[np.bool_]) -> list[HardPair]:
        """The least alike genuine pairs, then the most alike impostor pairs; a template is shown once of each kind."""
        assert self.pairs is not None
        left, right, _ = self.pairs
        rows = self._first_rows()
        found: list[HardPair] = []
        for same in (True, False):
            kind = np.flatnonzero(flags == same)
            cost = scores[kind] if same else -scores[kind]
            # More than are shown, as templates come many times.
            most = min(cost.size, 200 * self.num_failures + 1)
            near = np.argpartition(cost, most - 1)[:most]
            order = kind[near[np.lexsort((near, cost[near]))]].tolist()
            found += [
                HardPair(rows[a], rows[b], float(scores[k]), same, f"templates {a}, {b}")
                for k in once_each(order, lambda item: (left[item], right[item]), self.num_failures)
                for a, b in [(left[k].item(), right[k].item())]
            ]
        return found

    def _first_rows(self) -> dict[Any, int]:
        """The first image of each template."""
        ids, rows = np.unique(self.template_ids, return_index=True)
        return dict(zip(ids.tolist(), rows.tolist(), strict=True))

    def identify(self, embeddings: Arrays) -> ProtocolResult:
        """1:N: probes searched in each gallery on its own."""
        assert self.galleries is not None
        assert self.probes is not None
        results = {
            name: identify_templates(
                self._pooled(array), self.galleries, self.probes, fpirs=self.fpirs, ranks=self.ranks,
                replicates=self.replicates, seed=self.seed, level=self.level,
            )
            for name, array in embeddings.items()
        }  # fmt: skip
        first = next(iter(results.values()))
        told = [fpir for fpir in self.fpirs if fpir in (0.01, 0.1)] or list(self.fpirs)
        entry: dict[str, Any] = {
            "name": f"{self.name}_1n",
            "title": f"{self.title}, 1:N",
            "question": "Who is it, and is it anybody at all? Probes are searched in each gallery on its own.",
            "convention": {
                "Definition": str(first.to_dict()["convention"]),
                "Pooling": first.pooling,
                "Score": "product of unit templates",
                **self.convention,
                "Intervals": "bootstrap over subjects, thresholds kept as they are",
            },
            "counts": {
                "probe templates": first.probes, "mated searches": first.mated, "galleries": len(self.galleries),
            },
            "measures": {
                **{f"tpir_{fpir:g}": measure(f"TPIR, {far_words(fpir, 'FPIR')}") for fpir in told},
                **{f"rank{rank}": measure(f"Rank-{rank}", note="closed set") for rank in self.ranks},
            },
            "models": {},
        }  # fmt: skip
        for name, result in results.items():
            sure = {fpir: all(point.resolvable for point in result.galleries[fpir]) for fpir in self.fpirs}
            measures = {f"tpir_{fpir:g}": estimate(result.tpir[fpir], resolvable=sure[fpir]) for fpir in told}
            measures |= {f"rank{rank}": estimate(result.rates[rank]) for rank in self.ranks}
            entry["models"][name] = {
                "measures": measures,
                "cmc": {"rank": list(self.ranks), "rate": [result.rates[rank].value for rank in self.ranks]},
                "search": {"fpir": list(self.fpirs), "tpir": [result.tpir[fpir].value for fpir in self.fpirs]},
            }
        if len(results) > 1:
            hits: dict[str, Any] = {f"rank{rank}": {} for rank in self.ranks}
            for name, result in results.items():
                places = np.concatenate([search.places[search.mated] for search in result.searches])
                for rank in self.ranks:
                    hits[f"rank{rank}"][name] = places <= rank
            subjects = np.asarray(self.probes[1])
            who = np.concatenate([subjects[search.mated] for search in first.searches])
            entry["differences"] = [
                {
                    "a": a,
                    "b": b,
                    "measure": f"tpir_{fpir:g}",
                    "difference": estimate(
                        paired_difference(results[a].tpir[fpir], results[b].tpir[fpir], level=self.level)
                    ),
                }
                for fpir in told
                for a, b in pairs_of_models(list(results))
            ]
            entry["differences"] += differences(
                hits, dict.fromkeys(hits, (who, who)), replicates=self.replicates, seed=self.seed, level=self.level
            )
            entry["difference_rule"] = PAIRED.format(" of subjects")
        return ProtocolResult(
            entry,
            {name: result.to_dict() for name, result in results.items()},
            {name: self._missed(result) for name, result in results.items()},
            MISSED,
            ScoreTable(
                (
                    *("gallery", "probe template", "probe subject", "place of mate", "mate score"),
                    *("best template", "best subject", "best score"),
                ),
                lambda name: self._searches(results[name]),
                len(self.galleries) * first.probes,
            ),
        )

    def _searches(self, result: TemplateIdentificationResult) -> Iterator[tuple[Any, ...]]:
        """Each probe in each gallery; no place and no score of a mate where it has none there."""
        assert self.galleries is not None
        assert self.probes is not None
        for number, (search, gallery) in enumerate(zip(result.searches, self.galleries, strict=True), 1):
            for k, probe in enumerate(zip(*(np.asarray(part).tolist() for part in self.probes), strict=True)):
                mate = (int(search.places[k]), f"{search.mate_scores[k]:.8f}") if search.mated[k] else ("", "")
                best = (np.asarray(part)[search.best[k]] for part in gallery)
                yield number, *probe, *mate, *best, f"{search.best_scores[k]:.8f}"

    def _missed(self, result: TemplateIdentificationResult) -> list[HardPair]:
        """The mated searches whose mate was furthest behind, by the first image of each template."""
        assert self.galleries is not None
        assert self.probes is not None
        rows = self._first_rows()
        probe_ids, subjects = (np.asarray(part) for part in self.probes)
        parts: list[tuple[NDArray[Any], ...]] = []
        for search, (ids, people) in zip(result.searches, self.galleries, strict=True):
            late = np.flatnonzero(search.places > 1)
            enrolled = dict(zip(np.asarray(people).tolist(), np.asarray(ids).tolist(), strict=True))
            mates = [rows[enrolled[subject]] for subject in subjects[late].tolist()]
            ahead = [rows[each] for each in np.asarray(ids)[search.best[late]].tolist()]
            probes = [rows[each] for each in probe_ids[late].tolist()]
            row_parts = (np.asarray(each, dtype=np.int64) for each in (probes, mates, ahead))
            parts.append((*row_parts, search.mate_scores[late], search.best_scores[late], subjects[late]))
        probe, mate, stranger, mate_score, stranger_score, who = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        return missed_pairs(probe, (mate, mate_score), (stranger, stranger_score), who, self.num_failures)
