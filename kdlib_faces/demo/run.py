"""The demo: two teachers, a student alone and a student distilled, evaluated and reported."""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlib import Distiller, StudentAdapter, __version__
from kdlib._atomic import atomic_write
from kdlib.functional import attention_map
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import CPU
from kdlib_faces._output import check_output, describe_environment
from kdlib_faces.backbones import Backbone, save_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.demo.config import DemoConfig
from kdlib_faces.demo.data import DemoData, DemoModel, native_model
from kdlib_faces.demo.deployment import deploy
from kdlib_faces.demo.start import DemoStart
from kdlib_faces.demo.synthetic import synthetic_data
from kdlib_faces.evaluation import LeaveOneOutProtocol, Sampling
from kdlib_faces.evaluation.summary import ModelEntry, ProtocolSummary
from kdlib_faces.harness.evaluate import EvaluatedModel, evaluate_models
from kdlib_faces.harness.image_sets import images_of_tensor
from kdlib_faces.harness.tasks import EvaluationTask, task_of_protocol
from kdlib_faces.progress import say
from kdlib_faces.recipes.liaad import build
from kdlib_faces.report import (
    Picture,
    Report,
    SeedEntry,
    StudentPair,
    TrainingCurve,
    attention_picture,
    pairs_picture,
    write,
)
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.teachers.open import stage_taps
from kdlib_faces.training import LossCurve, TrainingConfig, fit
from kdlib_faces.training.depthwise import replace_strided_depthwise

__all__ = ["run", "train_student"]

ALONE, DISTILLED, START, JOINT_TARGET = "student_alone", "student_distilled", "student_start", "joint_target"
LABELS = {
    DISTILLED: "student distilled",
    ALONE: "student alone",
    START: "start, untrained",
    "general_teacher": "general teacher",
    "age_teacher": "age-invariant teacher",
    JOINT_TARGET: "joint target",
}
_FAILURES = 9
_FACES = 8


def run(
    config: DemoConfig,
    *,
    output: Path,
    faces: Sequence[str] = (),
    teachers: Sequence[str] = (),
    taps: Sequence[str] = (),
    inputs: Sequence[str] = (),
    start: DemoStart | None = None,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
    command: str = "kdlib-faces demo",
    device: torch.device = CPU,
    workers: int = 0,
) -> Report:
    """Train all models, evaluate them and write the report.

    Args:
        config: The configuration.
        output: Folder of the report and of the distilled student `student.safetensors`. Intermediate results are kept in its folder
            `work`; an interrupted run continues from them.
        faces: Lists or folders of real faces; without any, faces are synthetic.
        teachers: Two ONNX files, the general teacher and the one to be made age-invariant; for real faces only.
        taps: Tensor of each teacher that is its middle map; without any, the map with the grid nearest to 14 x 14.
        inputs: Input options of the teachers, as `InputOptions.parse` reads them: one text for both, or one for each.
        start: The network of which the students start as a narrower copy, for a configuration of `start_config`; None for
            random weights. For real faces only.
        seeds: Seeds; the report shows the first run and the spread over all.
        progress: Show progress.
        command: The command line, noted in the report.
        device: Device of the training, and of ONNX teachers; networks are evaluated on the CPU.
        workers: Processes that augment the training images ahead; 0 does so when a batch is taken.

    Raises:
        InputError: Lists, teachers or the output cannot be used.
    """
    check_output(output, "work", "figures")
    if bool(faces) != bool(teachers):
        raise InputError("demo: --faces and --teacher must be given together, or neither for synthetic faces")
    inputs_of_models(inputs, len(teachers))
    if taps and len(taps) != len(teachers):
        count = f"once for each teacher ({len(teachers)}) or not at all"
        raise InputError(f"demo: --tap must be given {count}, got {len(taps)}")
    if not seeds:
        raise InputError("demo: at least one seed must be given, got none")
    began = time.monotonic()
    results: list[tuple[Report, list[Picture]]] = []
    for seed in seeds:
        work = output / "work" / f"seed{seed}"
        work.mkdir(parents=True, exist_ok=True)
        if faces:
            from kdlib_faces.demo.real_faces import real_data

            data = real_data(
                config, work, faces, teachers, taps, inputs, start=start, seed=seed, quiet=not progress, device=device
            )
        else:
            data = synthetic_data(config, work, seed=seed, quiet=not progress, device=device, workers=workers)
        if results:  # the report states the exported student of the first seed only
            config = replace(config, deployment="none")
        results.append(
            _train_and_evaluate(config, data, work, seed=seed, quiet=not progress, device=device, workers=workers)
        )
    report, pictures = results[0]
    report.command, report.seeds = command, list(seeds)
    if len(results) > 1:
        report.per_seed = [_seed_entry(seed, each) for seed, (each, _) in zip(seeds, results, strict=True)]
    report.environment["seconds"] = round(time.monotonic() - began, 1)
    write(output, report, pictures=pictures)
    with atomic_write(output / "student.safetensors") as stream:
        stream.write((output / "work" / f"seed{seeds[0]}" / DISTILLED / "student.safetensors").read_bytes())
    say(f"report: {output / 'report.html'}", quiet=not progress)
    return report


def _train_and_evaluate(
    config: DemoConfig, data: DemoData, work: Path, *, seed: int, quiet: bool, device: torch.device, workers: int
) -> tuple[Report, list[Picture]]:
    """Train the student twice on the same batches, and evaluate all models."""
    recipe = replace(config.student, num_identities=data.num_identities, input_size=config.size, seed=seed)
    if data.start is not None:
        recipe = replace(recipe, embedding_dim=data.start.embedding_dim)
    students: dict[str, DemoModel] = {}
    curves = dict(data.curves)
    weights: dict[str, dict[str, float | None]] = {}
    for name, outputs in ((ALONE, {}), (DISTILLED, data.teacher_outputs)):
        distiller = build(recipe, teachers=outputs, student=copy.deepcopy(data.start))
        students[name], curves[name], batches = train_student(
            distiller, data, config, work / name, label=LABELS[name], seed=seed, quiet=quiet, device=device,
            workers=workers,
        )  # fmt: skip
        with closing(batches):
            weights |= _teacher_weights(distiller, batches)
        save_backbone(_network(distiller), work / name / "student.safetensors")
    models = {DISTILLED: students[DISTILLED], ALONE: students[ALONE]}
    if data.start is not None:
        adapter = StudentAdapter(data.start, stage_taps(data.start, recipe.stage)).eval()
        models[START] = native_model(data.start, adapter, config.size, "student", 0.0, 0)
    models |= data.teachers
    say("evaluating", quiet=quiet)
    embeddings = {name: model.embed(data.test_images) for name, model in models.items()}
    if data.start is not None:
        data.summary.notes.append(_fit_note(embeddings))
    summaries, entries, pictures = _evaluate(config, data, models, embeddings, seed)
    report = Report(
        title=data.title,
        models=entries,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        config=asdict(config),
        environment=describe_environment(),
        data=data.summary,
        evaluations=summaries,
        pair=StudentPair(DISTILLED, ALONE),
        training={name: _training_curve(curve) for name, curve in curves.items()},
        weights=weights,
    )
    if config.deployment != "none":
        first = {each.name: each.models[DISTILLED].measures[next(iter(each.measures))] for each in summaries}
        report.deployment = deploy(
            data, DISTILLED, work / DISTILLED / "student.safetensors", data.teachers, _tasks(data, seed, 0),
            work / "deployment", embeddings=embeddings[DISTILLED], measures=first,
            compiled=config.deployment == "full", quiet=quiet,
        )  # fmt: skip
    return report, [*pictures, _attention(data, models)]


def _fit_note(embeddings: Mapping[str, NDArray[np.float32]]) -> str:
    """How close each student is to the joint target, on images of unseen identities."""
    target = embeddings[JOINT_TARGET]
    cosines = [f"{LABELS[name]} {(embeddings[name] * target).sum(1).mean():.3f}" for name in (START, DISTILLED)]
    return f"Mean cosine to the joint target on the test images: {', '.join(cosines)}."


def _training_curve(curve: LossCurve) -> TrainingCurve:
    terms: dict[str, list[float | None]] = {name: [*losses] for name, losses in curve["terms"].items()}
    return TrainingCurve([*curve["step"]], [*curve["loss"]], terms)


def train_student(
    distiller: Distiller,
    data: DemoData,
    config: DemoConfig,
    folder: Path,
    *,
    label: str,
    seed: int,
    quiet: bool,
    device: torch.device = CPU,
    workers: int = 0,
) -> tuple[DemoModel, LossCurve, FaceBatches]:
    """Train one student; the batches do not depend on the teachers."""
    if data.start is not None:
        replace_strided_depthwise(_network(distiller))
    augment = AugmentConfig()
    batches = FaceBatches(
        data.train_images,
        data.train_identities,
        batch_size=config.batch_size,
        seed=seed,
        augment=augment,
        workers=workers,
    )
    with closing(batches):
        result = fit(
            distiller, batches, folder, steps=config.student_steps, lr=config.lr, seed=seed, label=label, quiet=quiet,
            optimizer="sgd" if data.start is None else "adamw",
            settings=TrainingConfig(amp=config.amp, compile=config.compile), device=device, workers=workers,
        )  # fmt: skip
    distiller.to(CPU)
    adapter = distiller.student.eval()
    model = native_model(_network(distiller), adapter, config.size, "student", result.seconds, config.student_steps)
    # A run that was complete before has made no batches: set the epoch in which the training ended.
    batches.set_epoch((config.student_steps - 1) // len(batches))
    return model, result.curve, batches


def _network(distiller: Distiller) -> Backbone:
    network: Backbone = distiller.student.model  # type: ignore[assignment] # the recipe builds it from a backbone
    return network


@torch.no_grad()
def _teacher_weights(distiller: Distiller, batches: FaceBatches) -> dict[str, dict[str, float | None]]:
    """Mean weight of each teacher in each term over some training batches."""
    if len(distiller.teachers) < 2:
        return {}
    count = min(8, len(batches))
    total: dict[str, Tensor] = {}
    for _, (inputs, targets) in zip(range(count), batches, strict=False):
        for term, weights in distiller(inputs, targets).weights.items():
            total[term] = total.get(term, torch.zeros(len(weights))) + weights.mean(1) / count
    names = {term: distiller.objective.terms[term].teachers or tuple(distiller.teachers) for term in total}
    return {term: dict(zip(names[term], weights.tolist(), strict=True)) for term, weights in total.items()}


def _tasks(data: DemoData, seed: int, replicates: int) -> list[EvaluationTask]:
    """The protocols of the demo."""
    images = images_of_tensor("test", data.test_images, data.labels(), alignment=data.alignment)
    flip = {"Flip": "embedding of the mirrored image added before normalization"}
    return [
        task_of_protocol("age_gap", "By age gap" if data.test_ages is not None else "By age groups",
                         data.age_protocol(replicates=replicates), images, convention=flip),
        task_of_protocol("leave_one_out", "Leave-one-out identification",
                         LeaveOneOutProtocol(data.test_identities, ranks=(1, 5)), images, convention=flip),
        task_of_protocol("verification", "Cross-age pairs", data.pair_protocol(seed), images, convention=flip),
    ]  # fmt: skip


def _evaluate(
    config: DemoConfig,
    data: DemoData,
    models: Mapping[str, DemoModel],
    embeddings: Mapping[str, NDArray[np.float32]],
    seed: int,
) -> tuple[list[ProtocolSummary], dict[str, ModelEntry], list[Picture]]:
    tasks = _tasks(data, seed, config.replicates)
    evaluated = [
        EvaluatedModel(name, model.describe(LABELS[name]), {"test": embeddings[name]}) for name, model in models.items()
    ]
    result = evaluate_models(tasks, evaluated, sampling=Sampling(replicates=config.replicates), num_failures=_FAILURES)
    # The failures of the distilled student by age gap are shown, those of the other models and protocols are left out.
    kept = {f"age_gap_{list(models).index(DISTILLED)}_{kind}" for kind in ("rejects", "accepts")}
    pictures = []
    for each in result.pictures:
        if each.name in kept:
            title = each.title.replace(DISTILLED, LABELS[DISTILLED])
            caption = each.caption.replace(DISTILLED, f"the {LABELS[DISTILLED]}")
            pictures.append(Picture(each.name, title, caption, pairs_picture(each.pairs)))
    for summary in result.summaries:
        summary.pictures = [name for name in summary.pictures if name in kept]
    return result.summaries, result.models, pictures


def _attention(data: DemoData, models: Mapping[str, DemoModel]) -> Picture:
    """Mean squared activation of the middle stage on some test images, one row per model."""
    order = np.argsort(data.test_identities, kind="stable")
    rows = torch.from_numpy(order[:: max(1, len(order) // _FACES)][:_FACES].copy())
    maps = {}
    for name, model in models.items():
        if name == JOINT_TARGET:  # it has an embedding only
            continue
        maps[LABELS[name]] = attention_map(model.maps(model.images_of(data.test_images)[rows])).numpy()
    faces = list(data.test_images[rows].permute(0, 2, 3, 1).contiguous().numpy())
    text = "Mean squared activation of the middle stage, each map scaled to its own range."
    return Picture("attention", "Attention maps", text, attention_picture(faces, maps))


def _seed_entry(seed: int, report: Report) -> SeedEntry:
    values: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in report.models}
    for summary in report.evaluations:
        for name, result in summary.models.items():
            values[name][summary.name] = {key: value.value for key, value in result.measures.items()}
    return SeedEntry(seed, values)
