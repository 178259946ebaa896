"""The LIAAD-style recipe: two frozen teachers, one general and one age-invariant, distilled into a light student."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from kdlib import AngularDistillLoss, AttentionTransferLoss, CenterConfidenceWeighting, StudentAdapter, UniformWeighting
from kdlib.cache import model_fingerprint
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib.types import Teacher
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import CPU
from kdlib_faces.backbones import BACKBONES, Backbone
from kdlib_faces.caching.teachers import OpenTeachers, TeacherSource, open_teachers
from kdlib_faces.config import load_config, refuse_unused
from kdlib_faces.data.lists import FaceList
from kdlib_faces.progress import say
from kdlib_faces.recipes.joint_target import cache_live_teachers, prepare_student
from kdlib_faces.recipes.liaad_settings import (
    AGE,
    GENERAL,
    JOINT,
    LIAADConfig,
    LIAADRunConfig,
    LIAADSettings,
    features_read,
)
from kdlib_faces.recipes.spaces import check_one_space
from kdlib_faces.recipes.start import load_start
from kdlib_faces.recipes.student import head_mesh, prepare_optimizer
from kdlib_faces.teachers.input_options import InputOptions, inputs_of_models
from kdlib_faces.teachers.open import open_teacher, stage_taps
from kdlib_faces.training import RunOptions, TrainingSetup, open_training_images, train_on_faces

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["AGE", "GENERAL", "JOINT", "LIAADConfig", "LIAADRunConfig", "LIAADSettings", "build", "features_read", "main", "train"]  # fmt: skip


def build(
    config: LIAADConfig,
    *,
    teachers: Mapping[str, nn.Module] | None = None,
    student: Backbone | None = None,
    mesh: "DeviceMesh | None" = None,
) -> Distiller:
    """Assemble the recipe.

    Args:
        config: The configuration.
        teachers: `"general"` and `"age"` to frozen teachers that return `"embedding"` and, for the map and attention terms,
            `"map"`; either may be absent. A teacher `"joint"` takes the place of both in the term of the embedding. None
            opens those of the configuration; an empty mapping trains the student alone, on identities.
        student: A network instead of the configured one.
        mesh: Processes over which the class centers are distributed; None leaves them whole.

    Returns:
        A distiller whose student returns `"embedding"` and `"map"`.

    Raises:
        InputError: A teacher's file cannot be used, or the name of a teacher is unknown.

    Examples:
        >>> config = LIAADConfig(num_identities=4, embedding_dim=16, width=0.25, input_size=32)
        >>> alone = build(config, teachers={})
        >>> sorted(alone.objective.terms)
        ['identity']
        >>> sorted(build(config).objective.terms)
        ['attention', 'embedding', 'identity', 'map']
    """
    if teachers is None:
        sources = _sources(config)
        teachers = {source.role: _open(source, config, InputOptions()) for source in sources}
    unknown = sorted(set(teachers) - {GENERAL, AGE, JOINT})
    if unknown:
        raise InputError(
            f"liaad: teachers must be named {GENERAL!r}, {AGE!r} or {JOINT!r}, got {', '.join(map(repr, unknown))}"
        )
    if student is None:
        student = config.build(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        terms = _terms(config, set(teachers), mesh)
    weighting: nn.Module = UniformWeighting()
    lead = "embedding" if "embedding" in terms and JOINT not in teachers else None
    if config.weighting == "center" and len(teachers) > 1 and lead:
        weighting = CenterConfidenceWeighting(config.num_identities, temperature=config.temperature, gather=True)
    objective = Objective(terms, weighting if lead else None, weigh_by=lead)
    adapter = StudentAdapter(student, stage_taps(student, config.stage))
    return Distiller(adapter, cast(Mapping[str, Teacher], teachers), objective)


def _terms(config: LIAADConfig, teachers: set[str], mesh: "DeviceMesh | None") -> dict[str, Term]:
    terms: dict[str, Term] = {}
    if config.identity_weight or not teachers:
        terms["identity"] = config.identity_term(
            config.num_identities,
            config.identity_weight or 1.0,
            all_labeled=config.all_labeled,
            mesh=mesh,
            seed=config.seed + 1,
        )
    if teachers and config.embedding_weight:
        project = "auto" if config.embedding_projection == "linear" else None
        angular = AngularDistillLoss(form=config.embedding_form)
        terms["embedding"] = Term(
            angular, student="embedding", teacher="embedding", project=project, weight=config.embedding_weight,
            teachers=[JOINT] if JOINT in teachers else None,
        )  # fmt: skip
    maps = {"student": "map", "teacher": "map"}
    if config.map_weight and GENERAL in teachers:
        angular = AngularDistillLoss(form=config.map_form)
        terms["map"] = Term(angular, **maps, teachers=[GENERAL], project="auto", weight=config.map_weight)
    if config.attention_weight and AGE in teachers:
        terms["attention"] = Term(AttentionTransferLoss(), **maps, teachers=[AGE], weight=config.attention_weight)
    return terms


def _sources(config: LIAADConfig) -> list[TeacherSource]:
    paths = {GENERAL: config.general_teacher, AGE: config.age_teacher}
    reads = features_read(config)
    return [TeacherSource(role, path, reads[role], config.stage) for role, path in paths.items()]


def _open(
    source: TeacherSource, config: LIAADConfig, input_options: InputOptions, device: torch.device = CPU
) -> nn.Module:
    untrained = {"input_size": config.input_size, "embedding_dim": config.embedding_dim, "seed": config.seed}
    return open_teacher(
        source.path, source.reads, stage=source.stage, input_options=input_options, device=device, **untrained
    )


def train(config: LIAADRunConfig, options: RunOptions) -> Path:
    """Train a student on face lists, distilled from two teachers.

    Args:
        config: The settings.
        options: Inputs and outputs. The teachers are the general and the age-invariant one: each a checkpoint, an ONNX file
            or the folder of a cache of the same lists.

    Returns:
        The file of the student, `OUTPUT/student.safetensors`.

    Raises:
        InputError: A list, file or folder cannot be used, there are not two teachers, or their embeddings lie in different
            spaces and are not projected.
    """
    if len(options.teachers) != 2:
        raise InputError(
            f"train: recipe 'liaad' takes two teachers, the general one first, got {len(options.teachers)}; "
            "pass --teacher FILE once for each"
        )
    for path, given in zip(options.teachers, options.inputs, strict=False):
        if given != InputOptions() and (Path(path).is_dir() or path in BACKBONES):
            raise InputError(
                f"train: {path} is no model file; --input {given} does not apply to it, give 'auto' for it"
            )
    paths = dict(zip(options.teachers, options.inputs, strict=False))
    # Before the teachers run over all images.
    network = load_start(options.start, paths, size=config.recipe.input_size)
    with head_mesh(config.recipe, options.hardware) as mesh:
        set_up = partial(_set_up, config=config, options=options, network=network, mesh=mesh)
        return train_on_faces(set_up, options, recipe="liaad", unlabeled=True)


def _set_up(
    faces: FaceList,
    *,
    config: LIAADRunConfig,
    options: RunOptions,
    network: Backbone | None,
    mesh: "DeviceMesh | None",
) -> TrainingSetup:
    """Open the teachers, and make the student and the distiller of a run on the lists; `network` is that of `load_start`."""
    if config.recipe.identity_weight and faces.num_identities < 2:
        raise InputError(
            f"train: the lists hold {faces.num_identities} identities, and recipe.identity_weight needs at least two; "
            "--set recipe.identity_weight=0 trains on the teachers alone"
        )
    general, age = options.teachers
    recipe = LIAADConfig(
        **vars(config.recipe), num_identities=max(1, faces.num_identities), all_labeled=faces.all_labeled,
        seed=options.seed, general_teacher=general, age_teacher=age,
    )  # fmt: skip
    opened = _open_for_run(recipe, options, faces, mirrored=config.augment.mirror > 0)
    if opened.views is not None:
        refuse_unused(config, {"augment": "the caches hold the outputs for their own random views"})
    prints = {f"{role} teacher": model_fingerprint(each) for role, each in opened.teachers.items()}
    teachers, pixels = dict(opened.teachers), None
    started = network is not None
    if recipe.target == "each" and recipe.embedding_weight and recipe.embedding_projection == "none":
        untrained = BACKBONES.keys() & set(options.teachers)
        own = recipe if network is None else replace(recipe, embedding_dim=network.embedding_dim)
        check_one_space(opened, faces, own, compare=not untrained)
    if recipe.target == "joint" or started:
        quiet, hardware = not options.progress, options.hardware
        pixels = open_training_images(faces, recipe.input_size, options)
        teachers = cache_live_teachers(
            teachers, pixels, options.output / "teachers", quiet=quiet, device=hardware.device
        )
        recipe, teachers, student = prepare_student(
            recipe, config.start, network, teachers, faces, pixels, folder=options.output, quiet=quiet, hardware=hardware
        )  # fmt: skip
    else:
        student = recipe.build(options.seed)
    if started:
        prints["start"] = model_fingerprint(student)
    distiller = build(recipe, teachers=teachers, student=student, mesh=mesh)
    return TrainingSetup(
        config=config,
        distiller=distiller,
        network=student,
        input_size=recipe.input_size,
        fingerprints={**prints, "seed": str(options.seed)},
        views=opened.views,
        optimizer="adamw" if started else "sgd",
        steps=3000 if started else 10_000,
        lr=1.2e-3 if started else 0.1,
        images=pixels,
        prepare_optimizer=prepare_optimizer(distiller),
    )


def _open_for_run(recipe: LIAADConfig, options: RunOptions, faces: FaceList, *, mirrored: bool) -> OpenTeachers:
    """Open both teachers, each a file or a cache of the lists, on the device of the run."""
    inputs = dict(zip((GENERAL, AGE), options.inputs, strict=False))
    opened = open_teachers(
        _sources(recipe),
        faces,
        open_file=lambda source: _open(
            source, recipe, inputs.get(source.role, InputOptions()), options.hardware.device
        ),
        mirrored=mirrored,
    )
    for line in opened.messages:
        say(line, quiet=not options.progress)
    return opened


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe on face lists: `python -m kdlib_faces.recipes.liaad --teacher A --teacher B --data LIST`.

    Args:
        arguments: The command line after the program's name; None takes that of the process.

    Returns:
        The exit code: 0, or 2 after an error of use.
    """
    parser = argparse.ArgumentParser(prog="python -m kdlib_faces.recipes.liaad", description=__doc__)
    for name, text in (
        ("data", "CSV list, folder, .rec file or tar shards"), ("teacher", "general first, then age-invariant"), ("set", "setting KEY=VALUE"),
        ("input", "images of the teachers, as `InputOptions.parse` reads them"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", action="append", default=[], help=f"{text}; repeatable")
    parser.add_argument("--output", type=Path, default=Path("runs/train"), help="folder of the run (runs/train)")
    parser.add_argument("--config", type=Path, help="TOML file of settings; --set overrides them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    given = parser.parse_args(arguments)
    try:
        run = RunOptions(
            output=given.output, data=given.data, teachers=given.teacher, seed=given.seed, progress=not given.quiet,
            inputs=inputs_of_models(given.input, len(given.teacher)),
        )  # fmt: skip
        train(load_config(LIAADRunConfig, given.config, given.set), run)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
