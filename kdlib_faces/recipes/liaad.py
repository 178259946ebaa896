"""The LIAAD-style recipe: two frozen teachers, one general and one age-invariant, distilled into a light student."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from kdlib import AngularDistillLoss, AttentionTransferLoss, CenterConfidenceWeighting, StudentAdapter, UniformWeighting
from kdlib._checks import check_choice, check_number
from kdlib.cache import model_fingerprint
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib.types import Teacher
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import BACKBONES, Backbone
from kdlib_faces.caching.teachers import TeacherSource, open_teachers
from kdlib_faces.config import load_config
from kdlib_faces.data.lists import FaceList
from kdlib_faces.progress import say
from kdlib_faces.recipes.joint_target import cache_live_teachers, join_teachers
from kdlib_faces.recipes.spaces import check_one_space
from kdlib_faces.recipes.start import StartConfig, start_student
from kdlib_faces.recipes.student import StudentConfig, refuse_unused
from kdlib_faces.teachers.input_options import InputOptions, inputs_of_models
from kdlib_faces.teachers.open import open_teacher, stage_taps
from kdlib_faces.training import RunConfig, RunOptions, TrainingSetup, load_training_images, train_on_faces

__all__ = ["AGE", "GENERAL", "JOINT", "LIAADConfig", "LIAADRunConfig", "LIAADSettings", "build", "features_read", "main", "train"]  # fmt: skip

GENERAL, AGE, JOINT = "general", "age", "joint"

AngularForm = Literal["squared", "cosine", "chord", "angle"]


@dataclass(frozen=True, kw_only=True)
class LIAADSettings(StudentConfig):
    """The terms of the LIAAD-style recipe, and the student that they train.

        L = w_id   * margin softmax(f_S, y)                         identity, from labels
          + w_emb  * mean_i sum_k a_ki * ang(f_S, f_Tk)             angular distillation of both embeddings
          + w_map  * mean_i ang(G(F_S), F_T1)                       angular distillation of the general teacher's map
          + w_att  * mean_i ||A(F_S) - A(F_T2)||^2                  attention transfer from the age-invariant teacher

    `f` are embeddings and `F` maps of a middle stage; `ang` is `1 - cos`, `(1 - cos)^2`, the squared chord or the angle; `A` is
    the unit-norm activation map; `G` a 1x1 convolution with BatchNorm on the student's side; `a_ki` the weight of teacher k for
    sample i. Ages are not used: only the age-invariant teacher was trained with them. The published abstract
    (arXiv 2004.05085) names the two teachers and the attentive and angular distillation. Which layer, which transform and
    all numbers here are our definition, since its equations are not public.

    Attributes:
        identity_weight: w_id.
        target: Embeddings that the student learns: `"each"` teacher's own, or the `"joint"` space of both, to which an age
            map brings them (`kdlib_faces.teachers.fit_joint_space`).
        joint_dim: Dimensions of the joint space, and so of the student's embedding.
        age_map_weight: Weight of the distance of the joint space's age map from the identity matrix; 0 fits no map.
        embedding_weight: w_emb; 0 removes the term, as for the next two weights.
        embedding_form: Form of `ang` at the embedding: `"cosine"`, `"squared"`, `"chord"` or `"angle"`.
        embedding_projection: `"none"` where student and teachers share one space, `"linear"` for a learned map to each.
        map_weight: w_map.
        map_form: Form of `ang` at the middle stage.
        attention_weight: w_att.
        stage: Number of the middle stage, 0 to 3.
        weighting: `"uniform"`, or `"center"`: by the cosine of each teacher to its own center of the sample's identity.
        temperature: Temperature of the `"center"` weighting.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    identity_weight: float = 1.0
    target: Literal["each", "joint"] = "each"
    joint_dim: int = 256
    age_map_weight: float = 100.0
    embedding_weight: float = 40.0
    embedding_form: AngularForm = "cosine"
    embedding_projection: str = "none"
    map_weight: float = 2.0
    map_form: AngularForm = "cosine"
    attention_weight: float = 2.0
    stage: int = 2
    weighting: str = "center"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        for name in ("identity_weight", "embedding_weight", "map_weight", "attention_weight", "age_map_weight"):
            check_number(owner, name, getattr(self, name), min=0)
        check_number(owner, "temperature", self.temperature, above=0)
        check_number(owner, "stage", self.stage, min=0, max=3, integer=True)
        check_number(owner, "joint_dim", self.joint_dim, min=1, max=65_536, integer=True)
        check_choice(owner, "target", self.target, ("each", "joint"))
        check_choice(owner, "weighting", self.weighting, ("uniform", "center"))
        check_choice(owner, "embedding_projection", self.embedding_projection, ("none", "linear"))
        for name in ("embedding_form", "map_form"):
            check_choice(owner, name, getattr(self, name), ("cosine", "squared", "chord", "angle"))


@dataclass(frozen=True, kw_only=True)
class LIAADConfig(LIAADSettings):
    """Configuration of the LIAAD-style recipe: its settings, and what a run takes from its lists and options.

    Attributes:
        num_identities: Identities of the student's training images.
        general_teacher: A checkpoint or `.onnx` file, or the name of a backbone for an untrained teacher (dry runs).
        age_teacher: Likewise.
        seed: Seed of the initial weights.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    num_identities: int = 1000
    general_teacher: str = "iresnet18"
    age_teacher: str = "iresnet18"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("LIAADConfig", "num_identities", self.num_identities, min=1, max=10**9, integer=True)
        check_number("LIAADConfig", "seed", self.seed, min=0, integer=True)


@dataclass(frozen=True, kw_only=True)
class LIAADRunConfig(RunConfig):
    """Settings of `kdlib-faces train --recipe liaad`.

    Attributes:
        recipe: The recipe.
        start: How a student that starts as a narrower copy of a teacher is made, for `--start shrink:FILE`.
    """

    recipe: LIAADSettings = field(default_factory=LIAADSettings)
    start: StartConfig = field(default_factory=StartConfig)


def features_read(config: LIAADConfig) -> dict[str, dict[str, str]]:
    """Return the features of each teacher that the active terms read, each with the setting that removes its term.

    Examples:
        >>> features_read(LIAADConfig(attention_weight=0.0))["age"]
        {'embedding': 'recipe.embedding_weight'}
    """
    weights = {GENERAL: ("embedding_weight", "map_weight"), AGE: ("embedding_weight", "attention_weight")}
    return {
        role: {
            feature: f"recipe.{name}"
            for feature, name in zip(("embedding", "map"), names, strict=True)
            if getattr(config, name)
        }
        for role, names in weights.items()
    }


def build(
    config: LIAADConfig, *, teachers: Mapping[str, nn.Module] | None = None, student: Backbone | None = None
) -> Distiller:
    """Assemble the recipe.

    Args:
        config: The configuration.
        teachers: `"general"` and `"age"` to frozen teachers that return `"embedding"` and, for the map and attention terms,
            `"map"`; either may be absent. A teacher `"joint"` takes the place of both in the term of the embedding. None opens those of the configuration; an empty mapping trains the student alone,
            on identities.
        student: A network instead of the configured one.

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
        sources = _sources(config, config.general_teacher, config.age_teacher)
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
        terms = _terms(config, set(teachers))
    weighting: nn.Module = UniformWeighting()
    lead = "embedding" if "embedding" in terms and JOINT not in teachers else None
    if config.weighting == "center" and len(teachers) > 1 and lead:
        weighting = CenterConfidenceWeighting(config.num_identities, temperature=config.temperature)
    objective = Objective(terms, weighting if lead else None, weigh_by=lead)
    adapter = StudentAdapter(student, stage_taps(student, config.stage))
    return Distiller(adapter, cast(Mapping[str, Teacher], teachers), objective)


def _terms(config: LIAADConfig, teachers: set[str]) -> dict[str, Term]:
    terms: dict[str, Term] = {}
    if config.identity_weight or not teachers:
        terms["identity"] = config.identity_term(config.num_identities, config.identity_weight or 1.0)
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


def _sources(config: LIAADConfig, general: str, age: str) -> list[TeacherSource]:
    reads = features_read(config)
    return [TeacherSource(role, path, reads[role], config.stage) for role, path in ((GENERAL, general), (AGE, age))]


def _open(source: TeacherSource, config: LIAADConfig, images: InputOptions) -> nn.Module:
    untrained = {"input_size": config.input_size, "embedding_dim": config.embedding_dim, "seed": config.seed}
    return open_teacher(source.path, source.reads, stage=source.stage, images=images, **untrained)


def train(config: LIAADRunConfig, options: RunOptions) -> Path:
    """Train a student on face lists, distilled from two teachers.

    Args:
        config: The settings.
        options: Inputs and outputs. The teachers are the general and the age-invariant one: each a checkpoint, an ONNX file
            or the folder of a cache of the same lists.

    Returns:
        The file of the student, `OUTPUT/model.pt`.

    Raises:
        InputError: A list, file or folder cannot be used, there are not two teachers, or their embeddings lie in different
            spaces and are not projected.
    """
    if len(options.teachers) != 2:
        raise InputError(f"train: teachers must be two, the general one first, got {len(options.teachers)}")
    general, age = options.teachers
    inputs = dict(zip((GENERAL, AGE), options.inputs, strict=False))
    for path, stated in zip(options.teachers, options.inputs, strict=False):
        if stated != InputOptions() and (Path(path).is_dir() or path in BACKBONES):
            raise InputError(
                f"train: {path} is no model file; --input {stated} does not apply to it, give 'auto' for it"
            )

    def build_run(faces: FaceList) -> TrainingSetup:
        recipe = LIAADConfig(
            **vars(config.recipe),
            num_identities=faces.num_identities,
            seed=options.seed,
            general_teacher=general,
            age_teacher=age,
        )
        opened = open_teachers(
            _sources(recipe, general, age),
            faces,
            open_file=lambda source: _open(source, recipe, inputs.get(source.role, InputOptions())),
            mirrored=config.augment.mirror > 0,
            quiet=not options.progress,
        )
        for line in opened.messages:
            say(line, quiet=not options.progress)
        if opened.views is not None:
            refuse_unused(config, {"augment": "the caches hold the outputs for their own random views"})
        prints = {f"{role} teacher": model_fingerprint(each) for role, each in opened.teachers.items()}
        teachers, pixels, student = dict(opened.teachers), None, None
        started = options.start != "scratch"
        if recipe.target == "joint" or started:
            pixels = load_training_images(faces, recipe.input_size, options)
            teachers = cache_live_teachers(teachers, pixels, options.output / "teachers", quiet=not options.progress)
        if recipe.target == "joint":
            joint = join_teachers(teachers, faces, recipe.joint_dim, recipe.age_map_weight, options)
            with_maps = {role for role, features in features_read(recipe).items() if "map" in features}
            teachers = {JOINT: joint, **{role: teachers[role] for role in teachers if role in with_maps}}
            recipe = replace(recipe, embedding_dim=recipe.joint_dim)
        if started and pixels is not None:
            student = start_student(pixels, config.start, options, joint=teachers.get(JOINT))
            prints["start"] = model_fingerprint(student)
            recipe = replace(recipe, embedding_dim=student.embedding_dim)
        if recipe.target == "each" and recipe.embedding_weight and recipe.embedding_projection == "none":
            untrained = BACKBONES.keys() & set(options.teachers)
            check_one_space(opened, faces, recipe, compare=not untrained)
        student = student or recipe.build(options.seed)
        return TrainingSetup(
            config=config,
            distiller=build(recipe, teachers=teachers, student=student),
            network=student,
            input_size=recipe.input_size,
            fingerprints={**prints, "seed": str(options.seed)},
            views=opened.views,
            optimizer="adamw" if started else "sgd",
            steps=3000 if started else 10_000,
            lr=2e-4 if started else 0.1,
            images=pixels,
        )

    return train_on_faces(build_run, options, recipe="liaad")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe on face lists: `python -m kdlib_faces.recipes.liaad --teacher A --teacher B --faces LIST`.

    Args:
        arguments: The command line after the program's name; None takes that of the process.

    Returns:
        The exit code: 0, or 2 after an error of use.
    """
    parser = argparse.ArgumentParser(prog="python -m kdlib_faces.recipes.liaad", description=__doc__)
    for name, text in (
        ("faces", "CSV list or folder"), ("teacher", "general first, then age-invariant"), ("set", "setting KEY=VALUE"),
        ("input", "images of the teachers, as `InputOptions.parse` reads them"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", action="append", default=[], help=f"{text}; repeatable")
    parser.add_argument("--output", type=Path, default=Path("runs/train"), help="folder of the run (runs/train)")
    parser.add_argument("--config", type=Path, help="TOML file of settings; --set overrides them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    given = parser.parse_args(arguments)
    try:
        if len(given.teacher) != 2:
            raise InputError(f"--teacher must be given twice, got {len(given.teacher)}")
        run = RunOptions(
            output=given.output, faces=given.faces, teachers=given.teacher, seed=given.seed, progress=not given.quiet,
            inputs=inputs_of_models(given.input, len(given.teacher)),
        )  # fmt: skip
        train(load_config(LIAADRunConfig, given.config, given.set), run)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
