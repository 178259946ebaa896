"""A training run on face lists: reads them, checks the run folder, trains, and writes the network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from kdlib._checks import check_number
from kdlib.distiller import Distiller
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.config import dump_toml
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import load_images
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.samplers import choose_samples_per_identity
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.progress import progress, say
from kdlib_faces.teachers import TeacherNet, save_teacher
from kdlib_faces.teachers.input_options import InputOptions
from kdlib_faces.training.depthwise import replace_strided_depthwise
from kdlib_faces.training.fit import Amp, Optimizer, fit
from kdlib_faces.training.run_record import check_same_run, describe_run, write_run_record

__all__ = ["RunConfig", "RunOptions", "TrainingConfig", "TrainingSetup", "load_training_images", "train_on_faces"]

MAX_MEMORY = 8 * 2**30
"""Bytes of pixels that are held in memory; larger lists are stored in `OUTPUT/images.npy`."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, learning rate, batches and precision of a training run.

    Attributes:
        steps: Number of weight updates; None takes 10,000, or 200 when a pretrained network is fine-tuned.
        lr: Peak learning rate; None takes 0.1 (SGD), or 0.0005 (AdamW) for fine-tuning.
        batch_size: Images per step. With cross-age pairs these are 4 images of each identity.
        amp: `"none"` or `"bfloat16"`.
        compile: Run the networks through `torch.compile`, which takes half a minute at the start.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    steps: int | None = None
    lr: float | None = None
    batch_size: int = 64
    amp: Amp = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_number("TrainingConfig", "steps", self.steps, min=1, integer=True)
        if self.lr is not None:
            check_number("TrainingConfig", "lr", self.lr, above=0)
        check_number("TrainingConfig", "batch_size", self.batch_size, min=2, integer=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every recipe has; each recipe adds its own.

    Attributes:
        training: Length, learning rate, batches and precision.
        augment: Views of the training images. Caches of random views replace them.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Inputs and outputs of a training run.

    Attributes:
        output: Folder of the run.
        faces: Lists or folders of training images.
        teachers: Files of the teachers, in the order of the recipe.
        inputs: What is stated about the images that each teacher takes; empty for what their files imply.
        seed: Seed of weights, order and views.
        progress: Show progress.
        on_error: See `read_faces`.
        start: `"scratch"`, or `"shrink:FILE"` for a student that starts as a narrower copy of a teacher.
    """

    output: Path
    faces: Sequence[str]
    teachers: Sequence[str] = ()
    inputs: Sequence[InputOptions] = ()
    seed: int = 0
    progress: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    start: str = "scratch"


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What a recipe makes of its settings and the face lists.

    Attributes:
        config: All settings of the run, as they are recorded and written to `config.toml`.
        distiller: The distiller to train.
        network: The network in it that is saved.
        input_size: Side of the training images, pixels.
        fingerprints: Names of the teachers, or of the pretrained network, to their fingerprints.
        views: Views that caches of teacher outputs hold and that replace random augmentation.
        pair_ages: The target that holds the ages of cross-age pairs; None trains without pairs.
        optimizer: `"sgd"` from scratch, `"adamw"` for fine-tuning.
        steps: Number of weight updates where the configuration sets none.
        lr: Peak learning rate where the configuration sets none.
        images: The training images `(n, 3, h, w)` uint8 if the recipe has read them already.
    """

    config: RunConfig
    distiller: Distiller
    network: TeacherNet
    input_size: int
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    views: SeededViews | None = None
    pair_ages: Literal["age", "age_group"] | None = None
    optimizer: Optimizer = "sgd"
    steps: int = 10_000
    lr: float = 0.1
    images: Tensor | None = None


def train_on_faces(
    build: Callable[[FaceList], TrainingSetup], options: RunOptions, *, recipe: str, unlabeled: bool = False
) -> Path:
    """Train on face lists and write `student.safetensors` and `config.toml`; the same call resumes an interrupted run.

    Pixels beyond 8 GiB (228,000 images of 112 pixels) are decoded once to `OUTPUT/images.npy` and read from there.

    Args:
        build: The recipe: face lists to everything that it decides.
        options: Inputs and outputs.
        recipe: Name of the recipe in the record of the run.
        unlabeled: Whether the recipe accepts images without identity; see `read_faces`.

    Returns:
        The file of the trained network, `OUTPUT/student.safetensors`, or `OUTPUT/teacher.safetensors` of a teacher's recipe.

    Raises:
        InputError: Lists, teachers or output cannot be used, or the output holds another run.
    """
    quiet, output = not options.progress, options.output
    if not options.faces:
        raise InputError("train: --faces must be given, a CSV list or a folder")
    check_output(output, "checkpoints", "config.toml", "images.npy", "images.npy.part", "log.jsonl", "run.json")
    listed = read_faces(options.faces, on_error=options.on_error, unlabeled=unlabeled)
    setup = build(listed)
    training = setup.config.training
    record = describe_run(setup.config, recipe, listed, setup.fingerprints)
    check_same_run(output, record)
    if len(listed) < training.batch_size:
        raise InputError(f"train: batch_size must be at most the {len(listed)} images, got {training.batch_size}")

    images = setup.images
    if images is None:
        images = load_training_images(listed, setup.input_size, options)
    size, identities = training.batch_size, listed.num_identities
    batches = FaceBatches(
        images,
        listed.identities,
        batch_size=size,
        seed=options.seed,
        ages=listed.ages,
        age_groups=listed.age_groups,
        augment=setup.config.augment if setup.views is None else None,
        views=setup.views,
        samples_per_identity=choose_samples_per_identity(size, identities) if setup.pair_ages else None,
        identity_age=setup.pair_ages,
    )
    replace_strided_depthwise(setup.network)
    output.mkdir(parents=True, exist_ok=True)
    write_run_record(output, record)
    (output / "config.toml").write_text(dump_toml(setup.config))
    fit(
        setup.distiller,
        batches,
        output,
        steps=training.steps or setup.steps,
        lr=training.lr or setup.lr,
        seed=options.seed,
        label=recipe,
        quiet=quiet,
        amp=training.amp,
        compile=training.compile,
        optimizer=setup.optimizer,
    )
    target = output / f"{'teacher' if recipe.endswith('teacher') else 'student'}.safetensors"
    steps = training.steps or setup.steps
    summary = {"recipe": recipe, "steps": steps, "images": len(listed), "identities": identities, "seed": options.seed}
    save_teacher(setup.network, target, training=summary)
    say(f"weights: {target}", quiet=quiet)
    return target


def load_training_images(faces: FaceList, size: int, options: RunOptions) -> Tensor:
    """Decode all images of a list, into memory or, beyond 8 GiB, into `OUTPUT/images.npy`.

    Args:
        faces: The list.
        size: Side of the images, pixels.
        options: Output and progress.

    Returns:
        `(n, 3, size, size)` uint8.
    """
    large = len(faces) * 3 * size**2 > MAX_MEMORY
    if large:
        options.output.mkdir(parents=True, exist_ok=True)
    bar = partial(progress, quiet=not options.progress)
    return load_images(faces, size, progress=bar, memory_map=options.output / "images.npy" if large else None)
