"""Recipes room: the whole main job. Two teachers, a student alone, a student distilled, evaluation by age gap, a report.

`run` without lists draws its own faces and trains its own teachers; with lists of real faces it takes ONNX teachers. Every
stage leaves its result under `OUTPUT/work`, so the same command after a kill goes on where it was.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib import __version__
from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.backbones import save_backbone
from kdlib_faces.demo.pictures import pictures_of
from kdlib_faces.demo.stages import DemoData, describe, embed, train_student
from kdlib_faces.evaluation import (
    AgeGapResult,
    LeaveOneOutProtocol,
    PairProtocol,
    compare,
    evaluate,
)
from kdlib_faces.progress import say
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig
from kdlib_faces.recipes.liaad import LIAADConfig, build
from kdlib_faces.report import Picture, write

__all__ = ["DemoConfig", "faces_config", "run"]

ALONE, DISTILLED = "student_alone", "student_distilled"
LABELS = {
    "general_teacher": "general teacher",
    "age_teacher": "age-invariant teacher",
    ALONE: "student alone",
    DISTILLED: "student distilled",
}


def _drawn_age_teacher() -> AgeTeacherConfig:
    """DAL's terms on the whole network; the far pairs do most, see `benchmarks/study_age_teacher_drawn.py`."""
    return AgeTeacherConfig(
        trainable="all",
        freeze_batch_norm=False,
        identity_weight=1.0,
        margin_scale=32.0,
        margin=0.2,
        pair_weight=1.0,
        l2_sp_weight=0.0,
    )


def _drawn_student() -> LIAADConfig:
    return LIAADConfig(embedding_dim=128, width=0.5, input_size=40)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes and lengths of the demo.

    Attributes:
        size: side of the images in pixels, drawn and real.
        general_identities: drawn people of the general set, whose images lie within `general_window` years.
        general_images: images of each.
        general_window: years.
        age_identities: drawn people of the set with ages, whose images lie all over a life.
        age_images: images of each.
        test_identities: drawn people of the test set, seen by no training.
        test_images: images of each.
        teacher_width: factor on the channels of the drawn set's teachers.
        general_steps: training steps of the general teacher.
        age_steps: of the age-invariant teacher, which starts from it.
        student_steps: of each student.
        batch_size: images a step.
        lr: of the students.
        teacher_lr: of the general teacher; the age-invariant one has half.
        age_teacher: how the drawn set's age-invariant teacher is trained.
        test_fraction: of the people with images in two age groups, how many are kept for the test (real faces).
        replicates: resamples of the identities behind every interval.
        amp: `"none"` or `"bfloat16"`: precision of the students' forward.
        student: the recipe; its `num_identities`, `input_size` and `seed` are set by the demo.
    """

    size: int = 40
    general_identities: int = 400
    general_images: int = 12
    general_window: float = 8.0
    age_identities: int = 250
    age_images: int = 12
    test_identities: int = 160
    test_images: int = 8
    teacher_width: float = 0.25
    general_steps: int = 700
    age_steps: int = 600
    student_steps: int = 600
    batch_size: int = 64
    lr: float = 0.1
    teacher_lr: float = 0.1
    age_teacher: AgeTeacherConfig = field(default_factory=_drawn_age_teacher)
    test_fraction: float = 0.5
    replicates: int = 500
    amp: str = "none"
    student: LIAADConfig = field(default_factory=_drawn_student)

    def __post_init__(self) -> None:
        for name in ("general_identities", "age_identities", "test_identities"):
            check_number("DemoConfig", name, getattr(self, name), min=2, integer=True)
        for name in ("general_images", "age_images", "test_images"):
            check_number("DemoConfig", name, getattr(self, name), min=2, integer=True)
        for name in ("general_steps", "age_steps", "student_steps", "batch_size"):
            check_number("DemoConfig", name, getattr(self, name), min=1, integer=True)
        check_number("DemoConfig", "size", self.size, min=16, max=512, integer=True)
        check_number("DemoConfig", "test_fraction", self.test_fraction, above=0, max=0.9)
        if self.amp not in ("none", "bfloat16"):
            raise ValueError(f"DemoConfig: amp must be 'none' or 'bfloat16', got {self.amp!r}")


def faces_config() -> DemoConfig:
    """The defaults for real faces: larger images, embeddings as wide as the teachers', a longer training."""
    student = LIAADConfig(embedding_dim=512, width=0.5, input_size=56)
    return DemoConfig(size=56, student_steps=8000, lr=0.2, student=student)


def run(
    config: DemoConfig,
    *,
    output: Path,
    faces: Sequence[str] = (),
    teachers: Sequence[str] = (),
    taps: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    progress: bool = True,
    command: str = "kdlib-faces demo",
) -> dict[str, Any]:
    """Do the whole job and write the report.

    Args:
        config: sizes and lengths.
        output: folder of the report and of the distilled `student.pt`; intermediate results lie in its `work`.
        faces: lists or folders of real faces; none draws faces.
        teachers: two ONNX files, the general teacher and the one that is made age-invariant; with real faces only.
        taps: the tensor of each teacher that is its middle map; none chooses those whose grid is nearest to 14 x 14.
        seeds: one run for each; the report shows the first and the spread of all.
        progress: show progress.
        command: how this run was started, for the report.

    Returns:
        The content of `report.json`.

    Raises:
        InputError: lists, teachers or an output that cannot be used.
    """
    from kdlib_faces.demo.real_faces import real_data
    from kdlib_faces.demo.synthetic import synthetic_data

    check_output(output)
    if bool(faces) != bool(teachers):
        raise InputError("demo: --faces and --teacher go together; give both, or neither for drawn faces")
    if taps and len(taps) != len(teachers):
        raise InputError(
            f"demo: --tap must be given once for each teacher ({len(teachers)}) or not at all, got {len(taps)}"
        )
    if not seeds:
        raise InputError("demo: at least one seed must be given, got none")
    began = time.monotonic()
    reports: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    for seed in seeds:
        work = output / "work" / f"seed{seed}"
        work.mkdir(parents=True, exist_ok=True)
        if faces:
            material = real_data(config, work, faces, teachers, taps, seed=seed, quiet=not progress)
        else:
            material = synthetic_data(config, work, seed=seed, quiet=not progress)
        report, shown = _students(config, material, work, seed=seed, quiet=not progress)
        reports.append(report)
        pictures = pictures or shown
    first = dict(reports[0])
    first["command"], first["seeds"] = command, list(seeds)
    if len(reports) > 1:
        first["per_seed"] = [
            {"seed": seed, "models": each["models"]} for seed, each in zip(seeds, reports, strict=True)
        ]
    first["environment"]["seconds"] = round(time.monotonic() - began, 1)
    write(output, first, pictures=pictures)
    part = output / "student.pt.part"
    shutil.copyfile(output / "work" / f"seed{seeds[0]}" / DISTILLED / "student.pt", part)
    os.replace(part, output / "student.pt")
    say(f"report: {output / 'report.html'}", quiet=not progress)
    return first


def _students(
    config: DemoConfig, material: DemoData, work: Path, *, seed: int, quiet: bool
) -> tuple[dict[str, Any], list[Picture]]:
    """Train the student twice on the same batches, evaluate all models, assemble the report."""
    recipe = replace(config.student, num_identities=material.num_identities, input_size=config.size, seed=seed)
    models = dict(material.teachers)
    curves: dict[str, Any] = dict(material.curves)
    shares: dict[str, Any] = {}
    for name, recorded in ((ALONE, {}), (DISTILLED, material.recorded)):
        distiller = build(recipe, teachers=recorded)
        trained = train_student(distiller, material, config, work / name, label=LABELS[name], seed=seed, quiet=quiet)
        models[name] = trained.model
        curves[name] = trained.curve
        shares.update(trained.shares)
        network: Any = trained.model.network
        save_backbone(network, work / name / "student.pt")
    say("evaluating", quiet=quiet)
    protocol = material.protocol(replicates=config.replicates)
    ranks = LeaveOneOutProtocol(material.test_identities, ranks=(1, 5))
    folds = _fold_pairs(material, seed)
    results: dict[str, AgeGapResult] = {}
    rows: dict[str, Any] = {}
    embeddings: dict[str, np.ndarray] = {}
    for name, model in models.items():
        own = material.test_images if model.test_images is None else model.test_images
        embeddings[name] = embed(model.embed, own)
        results[name] = evaluate(embeddings[name], protocol)
        rows[name] = describe(model, name, LABELS.get(name, name))
        rows[name]["protocols"] = {
            "age_gap": results[name].to_dict(),
            "leave_one_out": evaluate(embeddings[name], ranks).to_dict(),
            "verification": evaluate(embeddings[name], folds).to_dict(),
        }
    report: dict[str, Any] = {
        "format": 1,
        "title": material.title,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "config": asdict(config),
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), **_machine()},
        "data": material.data,
        "models": rows,
        "comparisons": sorted(compare(results, DISTILLED, ALONE), key=_telling(results[ALONE])),
        "teachers_kept": _kept(results),
        "weights": shares,
        "training": curves,
    }
    return report, pictures_of(material, models, embeddings, protocol, distilled=DISTILLED, labels=LABELS)


def _fold_pairs(material: DemoData, seed: int) -> PairProtocol:
    """Ten folds, fewer for few people, of genuine pairs across age and as many impostor pairs; no identity in two folds."""
    rng = np.random.default_rng(seed)
    identities = material.test_identities
    people = rng.permutation(np.unique(identities))
    left: list[int] = []
    right: list[int] = []
    same: list[bool] = []
    fold: list[int] = []
    for number, group in enumerate(np.array_split(people, min(10, len(people) // 2))):
        rows = np.flatnonzero(np.isin(identities, group))
        i, j = np.triu_indices(len(rows), 1)
        i, j = rows[i], rows[j]
        equal = identities[i] == identities[j]
        genuine = np.flatnonzero(equal & material.is_cross_age(i, j))
        if not len(genuine):
            genuine = np.flatnonzero(equal)
        impostor = np.flatnonzero(~equal)
        take = min(len(genuine), len(impostor), 300)
        for chosen, truth in ((rng.permutation(genuine)[:take], True), (rng.permutation(impostor)[:take], False)):
            left += i[chosen].tolist()
            right += j[chosen].tolist()
            same += [truth] * len(chosen)
            fold += [number] * len(chosen)
    return PairProtocol(left, right, same, fold_ids=fold, threshold="exact")


def _telling(result: AgeGapResult) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """Sort key of comparisons: the rate at the headline's threshold first, and in it the largest gap."""
    bins = ["all", *(entry.name for entry in result.bins)][::-1]
    metrics = ["tar@0.01", "own_auc"]

    def key(entry: dict[str, Any]) -> tuple[int, int]:
        metric = metrics.index(entry["metric"]) if entry["metric"] in metrics else len(metrics)
        return metric, bins.index(entry["bin"])

    return key


def _kept(results: dict[str, AgeGapResult]) -> dict[str, float]:
    """Share of the best teacher's TAR at the smallest FAR shown that the distilled student keeps, by bin."""
    kept: dict[str, float] = {}
    student = results[DISTILLED]
    for position, mine in enumerate(student.bins):
        far = max(mine.tar)
        best = max((r.bins[position].tar[far].value or 0.0) for name, r in results.items() if name.endswith("_teacher"))
        value = mine.tar[far].value
        if value is not None and best and np.isfinite(value) and np.isfinite(best):
            kept[mine.name] = float(value / best)
    return kept


def _machine() -> dict[str, Any]:
    return {"python": platform.python_version(), "platform": platform.machine(), "cores": os.cpu_count() or 1}
