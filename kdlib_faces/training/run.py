"""A training run on face lists: reads them, checks the run folder, trains, and writes the network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from kdlib.distiller import Distiller
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import load_images
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.samplers import choose_samples_per_identity
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.progress import progress, say
from kdlib_faces.teachers import TeacherNet, save_teacher
from kdlib_faces.training.depthwise import replace_strided_depthwise
from kdlib_faces.training.fit import Optimizer, fit
from kdlib_faces.training.run_record import FILE, check_expected, check_same_run, describe_run, write_run_record
from kdlib_faces.training.settings import RunConfig, RunOptions
from kdlib_faces.training.speed import check_tensorboard

__all__ = ["TrainingSetup", "load_training_images", "train_on_faces"]

MAX_MEMORY = 8 * 2**30
"""Bytes of pixels that are held in memory; larger lists are stored in `OUTPUT/images.npy`."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What a recipe makes of its settings and the face lists.

    Attributes:
        config: All settings of the run, as they are recorded in `run.toml`.
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
    """Train on face lists and write `model.pt` and `run.toml`; the same call resumes an interrupted run.

    Pixels beyond 8 GiB (228,000 images of 112 pixels) are decoded once to `OUTPUT/images.npy` and read from there.

    Args:
        build: The recipe: face lists to everything that it decides.
        options: Inputs and outputs.
        recipe: Name of the recipe in the record of the run.
        unlabeled: Whether the recipe accepts images without identity; see `read_faces`.

    Returns:
        The file of the trained network, `OUTPUT/model.pt`.

    Raises:
        InputError: Lists, teachers or output cannot be used, or the output holds another run.
    """
    quiet, output = not options.progress, options.output
    if not options.faces:
        raise InputError("train: --faces must be given, a CSV list or a folder")
    if options.tensorboard:
        check_tensorboard()
    check_output(output, "checkpoints", FILE, "images.npy", "images.npy.part", "log.jsonl", "tensorboard")
    listed = read_faces(options.faces, on_error=options.on_error, unlabeled=unlabeled)
    setup = build(listed)
    training = setup.config.training
    record = describe_run(setup.config, options, recipe, listed, setup.fingerprints)
    check_expected(options, record)
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
    hardware = options.hardware
    if hardware.first:
        output.mkdir(parents=True, exist_ok=True)
        write_run_record(output, record)
    hardware.wait_for_all()
    fit(
        setup.distiller,
        batches,
        output,
        steps=training.steps or setup.steps,
        lr=training.lr or setup.lr,
        seed=options.seed,
        label=recipe,
        quiet=quiet,
        settings=training,
        optimizer=setup.optimizer,
        device=hardware.device,
        tensorboard=options.tensorboard and hardware.first,
        workers=options.workers,
    )
    target = output / "model.pt"
    if hardware.first:
        save_teacher(setup.network, target)
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
    if not large:
        return load_images(faces, size, progress=partial(progress, quiet=not options.progress), workers=options.workers)
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / "images.npy"
    if options.hardware.first:
        bar = partial(progress, quiet=not options.progress)
        load_images(faces, size, progress=bar, memory_map=target, workers=options.workers)
    options.hardware.wait_for_all()
    return load_images(faces, size, memory_map=target)
