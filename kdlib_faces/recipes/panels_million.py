"""Recipe: identification among distractors and of templates, judged for all models: MegaFace, IJB-B and IJB-C."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import (
    DistractorResult,
    identify_templates,
    identify_with_distractors,
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

__all__ = ["DistractorsPanel", "TemplatesPanel"]


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
        return Judgement(entry, {name: result.to_dict() for name, result in results.items()})
