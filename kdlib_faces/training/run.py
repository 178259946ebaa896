"""A training run on face lists: reads them, checks the run folder, trains, and writes the network."""

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from kdlib.distiller import Distiller
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import FaceImages, list_errors
from kdlib_faces.data.image_files import describe_far_sizes
from kdlib_faces.data.lists import FaceList, read_faces, warn
from kdlib_faces.data.samplers import choose_samples_per_identity
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.progress import progress, say
from kdlib_faces.teachers import TeacherNet, save_teacher
from kdlib_faces.training.depthwise import replace_strided_depthwise
from kdlib_faces.training.fit import Optimizer, fit
from kdlib_faces.training.run_record import FILE, check_expected, check_same_run, describe_run, write_run_record
from kdlib_faces.training.settings import RunConfig, RunOptions
from kdlib_faces.training.speed import check_tensorboard

__all__ = ["TrainingSetup", "open_training_images", "train_on_faces"]

MAX_MEMORY = 2**30
"""Bytes of pixels up to which all images are decoded once and held in memory; others are decoded in every epoch."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The distiller, the network and the settings that a recipe builds from its configuration and the face lists.

    Attributes:
        config: All settings of the run, as they are recorded in `run.toml`.
        distiller: The distiller to train.
        network: The network in it that is saved.
        input_size: Side of the training images, pixels.
        fingerprints: Names of the teachers, or of the pretrained network, to their fingerprints.
        views: Views that caches of teacher outputs hold and that replace random augmentation.
        pair_ages: The target that holds the ages of cross-age pairs; None trains without pairs.
        min_age_gap: Minimum age difference of a cross-age pair, years; 1 for age groups.
        optimizer: `"sgd"` from scratch, `"adamw"` for fine-tuning.
        steps: Number of weight updates where the configuration sets none.
        lr: Peak learning rate where the configuration sets none.
        images: The training images if the recipe has opened them already.
        prepare_optimizer: Called with the optimizer when it is created.

    Examples:
        >>> from kdlib_faces.recipes.student import StudentConfig, build_student
        >>> config = StudentConfig(embedding_dim=16, width=0.25, input_size=32)
        >>> network = config.build(seed=0)
        >>> distiller = build_student(config, network, num_identities=2)
        >>> setup = TrainingSetup(config=RunConfig(), distiller=distiller, network=network, input_size=32)
        >>> setup.optimizer, setup.steps, setup.lr
        ('sgd', 10000, 0.1)
    """

    config: RunConfig
    distiller: Distiller
    network: TeacherNet
    input_size: int
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    views: SeededViews | None = None
    pair_ages: Literal["age", "age_group"] | None = None
    min_age_gap: float = 10.0
    optimizer: Optimizer = "sgd"
    steps: int = 10_000
    lr: float = 0.1
    images: FaceImages | None = None
    prepare_optimizer: Callable[[torch.optim.Optimizer], None] | None = None


def train_on_faces(
    build: Callable[[FaceList], TrainingSetup], options: RunOptions, *, recipe: str, unlabeled: bool = False
) -> Path:
    """Train on face lists and write `student.safetensors` and `run.toml`; the same call resumes an interrupted run.

    Images are decoded in every epoch, by `options.workers` processes; up to 1 GiB of pixels (28,000 images of 112 x 112) are
    decoded once and held in memory.

    Args:
        build: The recipe, a function of the face lists.
        options: Inputs and outputs.
        recipe: Name of the recipe in the record of the run.
        unlabeled: Whether the recipe accepts images without identity; see `read_faces`.

    Returns:
        The file of the trained network, `OUTPUT/student.safetensors`, or `OUTPUT/teacher.safetensors` of a teacher's recipe.

    Raises:
        InputError: Lists, teachers or output cannot be used, or the output holds another run.

    Examples:
        A recipe of your own:

        >>> import tempfile
        >>> from PIL import Image
        >>> from kdlib_faces.recipes.student import StudentConfig, build_student
        >>> from kdlib_faces.training import TrainingConfig
        >>> def build(faces):
        ...     config = StudentConfig(embedding_dim=16, width=0.25, input_size=32)
        ...     network = config.build(seed=0)
        ...     distiller = build_student(config, network, num_identities=faces.num_identities)
        ...     settings = RunConfig(training=TrainingConfig(steps=2, batch_size=4))
        ...     return TrainingSetup(config=settings, distiller=distiller, network=network, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("Ann/1.png", "Ann/2.png", "Bob/1.png", "Bob/2.png"):
        ...         Path(folder, "faces", name).parent.mkdir(parents=True, exist_ok=True)
        ...         Image.effect_noise((32, 32), 64).save(Path(folder, "faces", name))
        ...     options = RunOptions(output=Path(folder, "run"), data=[f"{folder}/faces"], progress=False)
        ...     train_on_faces(build, options, recipe="mine").name
        'student.safetensors'
    """
    quiet, output = not options.progress, options.output
    if not options.data:
        raise InputError("train: --data must be given: a CSV list, a folder, a .rec file or tar shards")
    if options.tensorboard:
        check_tensorboard()
    check_output(output, "checkpoints", FILE, "log.jsonl", "tensorboard")
    listed = read_faces(options.data, on_error="stop" if options.on_error == "stop" else "keep", unlabeled=unlabeled)
    setup = build(listed)
    training = setup.config.training
    record = describe_run(setup.config, options, recipe, listed, setup.fingerprints)
    check_expected(options, record)
    check_same_run(output, record)
    if len(listed) < training.batch_size:
        raise InputError(
            f"train: training.batch_size must be at most the {len(listed)} images, got {training.batch_size}; "
            f"--set training.batch_size={min(32, len(listed))} makes smaller batches"
        )

    images = setup.images or open_training_images(listed, setup.input_size, options)
    batches = _batches(images, listed, setup, options)
    replace_strided_depthwise(setup.network)
    hardware = options.hardware
    if hardware.first:
        output.mkdir(parents=True, exist_ok=True)
        write_run_record(output, record)
    hardware.wait_for_all()
    with closing(batches):
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
            prepare_optimizer=setup.prepare_optimizer,
            device=hardware.device,
            tensorboard=options.tensorboard and hardware.first,
            workers=batches.workers,
        )
    if batches.unreadable:
        warn(f"train: skipped what cannot be read: {list_errors(list(batches.unreadable.values()), len(listed))}")
    target = output / f"{'teacher' if recipe.endswith('teacher') else 'student'}.safetensors"
    if hardware.first:
        summary = {
            "recipe": recipe,
            "steps": training.steps or setup.steps,
            "images": len(listed),
            "seed": options.seed,
        }
        save_teacher(setup.network, target, training={**summary, "identities": listed.num_identities})
    say(f"weights: {target}", quiet=quiet)
    return target


def open_training_images(faces: FaceList, size: int, options: RunOptions) -> FaceImages:
    """Open the images of a list; up to 1 GiB of pixels are decoded now and held in memory.

    Args:
        faces: The list.
        size: Side of the images, pixels.
        options: Progress, and what to do about images that cannot be read.

    Returns:
        The images in the order of the list.

    Raises:
        InputError: Images cannot be read and are not skipped; the message lists all of them.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("Ann", "Bob"):
        ...         Path(folder, name).mkdir()
        ...         Image.new("RGB", (40, 40)).save(Path(folder, name, "1.png"))
        ...     options = RunOptions(output=Path(folder), data=[folder], progress=False)
        ...     images = open_training_images(read_faces(folder), 32, options)
        >>> images.shape
        torch.Size([2, 3, 32, 32])
    """
    images = FaceImages(faces.images, size, threads=2, on_error=options.on_error)
    warn(describe_far_sizes(faces.images, size))
    if images.shape.numel() <= MAX_MEMORY:
        images.preload(progress=partial(progress, quiet=not options.progress))
    return images


def _batches(images: FaceImages, listed: FaceList, setup: TrainingSetup, options: RunOptions) -> FaceBatches:
    training, identities = setup.config.training, listed.num_identities
    sampler = training.sampler
    if sampler == "auto":
        sampler = "balanced" if setup.pair_ages else "shuffled"
    ages = setup.pair_ages
    if sampler == "cross_age":
        ages = ages or ("age" if listed.ages is not None else "age_group")
        if (listed.ages if ages == "age" else listed.age_groups) is None:
            raise InputError("train: training.sampler=cross_age needs ages or age groups, the lists have neither")
    workers = options.workers
    if workers is None:
        workers = 0 if images.preloaded else min(4, os.cpu_count() or 1)
    return FaceBatches(
        images,
        listed.identities,
        batch_size=training.batch_size,
        seed=options.seed,
        ages=listed.ages,
        age_groups=listed.age_groups,
        augment=setup.config.augment if setup.views is None else None,
        views=setup.views,
        samples_per_identity=None
        if sampler == "shuffled"
        else choose_samples_per_identity(training.batch_size, identities),
        min_age_gap=(setup.min_age_gap if ages == "age" else 1.0) if sampler == "cross_age" else None,
        identity_age=ages,
        workers=workers,
    )
