"""Recipe: templates, 1:1 and 1:N, judged for all models: IJB-B and IJB-C."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import (
    Templates,
    identify_templates,
    pool_templates,
    verify_templates,
)
from kdlib_faces.evaluation.pair_scores import pair_cosines
from kdlib_faces.recipes.panels import (
    PAIRED,
    Arrays,
    Judgement,
    curve,
    differences,
    estimate,
    far_words,
    histogram,
    measure,
    operating_point,
)

__all__ = ["TemplatesPanel"]


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

    def _pooled(self, array: NDArray[Any]) -> Any:
        return pool_templates(
            array,
            self.template_ids,
            self.media_ids,
            detector_scores=self.detector_scores,
            feature_norm=self.feature_norm,
        )

    def verify(self, embeddings: Arrays) -> Judgement:
        """1:1: given pairs of templates."""
        assert self.pairs is not None
        left, right, same = self.pairs
        flags = np.asarray(same, dtype=bool)
        models: dict[str, Any] = {}
        results: dict[str, dict[str, Any]] = {}
        hits: dict[str, dict[str, NDArray[np.bool_]]] = {f"tar_{far:g}": {} for far in self.fars}
        found: Any = None
        for name, array in embeddings.items():
            templates = self._pooled(array)
            found = verify_templates(templates, left, right, same, fars=self.fars, mode=self.mode, level=self.level)
            i, j = (np.searchsorted(templates.ids, ids) for ids in (left, right))
            scores = pair_cosines(templates.features.astype(np.float32), i, j)
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
            "measures": {f"tar_{far:g}": measure(f"TAR, {far_words(far)}") for far in sorted(self.fars, reverse=True)},
            "models": models,
        }  # fmt: skip
        if len(embeddings) > 1:
            owner = dict.fromkeys(hits, (left[flags], left[flags]))
            entry["differences"] = differences(
                hits, owner, replicates=self.replicates, seed=self.seed, level=self.level
            )
            entry["difference_rule"] = PAIRED.format(" of enrolled templates")
        return Judgement(entry, results)

    def identify(self, embeddings: Arrays) -> Judgement:
        """1:N: probes searched in each gallery on its own."""
        assert self.galleries is not None
        assert self.probes is not None
        pooled = {name: self._pooled(array) for name, array in embeddings.items()}
        results = {
            name: identify_templates(
                templates, self.galleries, self.probes, fpirs=self.fpirs, ranks=self.ranks,
                replicates=self.replicates, seed=self.seed, level=self.level,
            )
            for name, templates in pooled.items()
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
            hits = {name: self._first(templates) for name, templates in pooled.items()}
            who = next(iter(hits.values()))[1]
            entry["differences"] = differences(
                {f"rank{self.ranks[0]}": {name: right for name, (right, _) in hits.items()}} if self.ranks[0] == 1 else {},
                {f"rank{self.ranks[0]}": (who, who)}, replicates=self.replicates, seed=self.seed, level=self.level,
            )  # fmt: skip
            entry["difference_rule"] = PAIRED.format(" of subjects")
        return Judgement(entry, {name: result.to_dict() for name, result in results.items()})

    def _first(self, templates: Templates) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Of the mated searches of all galleries: whether the mate comes first, and whose probe it is."""
        assert self.galleries is not None
        assert self.probes is not None
        right, who = [], []
        subjects = np.asarray(self.probes[1])
        probes = templates.features[np.searchsorted(templates.ids, self.probes[0])]
        for ids, people in self.galleries:
            mated = np.isin(subjects, people)
            gallery = templates.features[np.searchsorted(templates.ids, ids)]
            right.append(np.asarray(people)[(probes[mated] @ gallery.T).argmax(axis=1)] == subjects[mated])
            who.append(subjects[mated])
        return np.concatenate(right), np.concatenate(who)
