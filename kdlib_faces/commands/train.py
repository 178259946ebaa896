"""Recipes room: one training on the user's own face lists. A student alone or distilled, or a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.caching.teachers import open_teachers
from kdlib_faces.config import dump_toml
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import load_images
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.samplers import choose_samples_per_identity, count_cross_age_identities
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.demo.stages import fit
from kdlib_faces.progress import progress as shown
from kdlib_faces.progress import say
from kdlib_faces.recipes.age_teacher import (
    AgeTeacherConfig,
    FrozenBatchNorm,
    build_age_teacher,
    tune,
)
from kdlib_faces.recipes.liaad import LIAADConfig, build, new_backbone
from kdlib_faces.teachers import load_start, save_teacher
from kdlib_faces.training.run_record import check_same_run, describe_run, note_run

__all__ = ["RECIPES", "TrainRecipeConfig", "run"]

STEPS, LR = 10_000, 0.1
START_STEPS, START_LR = 200, 5e-4
MEMORY = 8 * 2**30
"""Bytes of pixels up to which they are held in memory; more are kept in `OUTPUT/images.npy`."""

RECIPES = ("liaad", "student", "general_teacher", "age_teacher")


@dataclass(frozen=True, kw_only=True)
class TrainRecipeConfig(AgeTeacherConfig):
    """What `kdlib-faces train` can be told; what it has of `AgeTeacherConfig` is for the recipe `age_teacher` alone.

    Attributes:
        steps: updates of the weights; None: 10,000, or 200 from a loaded start.
        lr: learning rate; None: 0.1 (SGD), or 0.0005 (AdamW) from a loaded start.
        batch_size: images a step; from a loaded start, four of each of a quarter as many people.
        amp: `"none"` or `"bfloat16"`.
        augment: views of the training images; with caches of random views the student is shown those.
        network: the network and the recipe; `num_identities` is taken from the lists.
    """

    steps: int | None = None
    lr: float | None = None
    batch_size: int = 64
    amp: Literal["none", "bfloat16"] = "none"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: LIAADConfig = field(default_factory=LIAADConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            check_number("TrainRecipeConfig", "steps", self.steps, min=1, integer=True)
        if self.lr is not None:
            check_number("TrainRecipeConfig", "lr", self.lr, above=0)
        check_number("TrainRecipeConfig", "batch_size", self.batch_size, min=2, integer=True)


def run(
    config: TrainRecipeConfig,
    *,
    output: Path,
    recipe: str,
    faces: Sequence[str],
    teachers: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Train, and write `model.pt` and `config.toml`; the same call after a kill goes on where it was.

    Pixels beyond 8 GiB (228,000 images of 112 pixels) are decoded once to `OUTPUT/images.npy` and read from there.

    Args:
        config: how.
        output: folder of the run.
        recipe: one of `RECIPES`.
        faces: lists or folders.
        teachers: for `"liaad"`: the general and the age-invariant teacher, each a checkpoint, an ONNX file or the folder of
            a cache of the same lists; for `"age_teacher"`: the network to start from, or none.
        seed: of weights, order and views.
        progress: show progress.

    Returns:
        The weights, `OUTPUT/model.pt`.

    Raises:
        InputError: lists, teachers or an output that cannot be used, or an output that holds another run.
    """
    if recipe not in RECIPES:
        raise InputError(f"train: recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    counts = {"liaad": (2,), "age_teacher": (0, 1)}.get(recipe, (0,))
    if len(teachers) not in counts:
        asked = {"liaad": "two teachers, the general one first", "age_teacher": "one teacher to start from, or none"}
        wanted = asked.get(recipe, "no teacher")
        raise InputError(f"train: recipe {recipe!r} takes {wanted}, got {len(teachers)}")
    check_output(output)
    listed = read_faces(faces)
    network = replace(config.network, num_identities=listed.num_identities, seed=seed)
    if recipe == "liaad":
        network = replace(network, general_teacher=teachers[0], age_teacher=teachers[1])
    found = None
    if recipe == "liaad":
        found = open_teachers(network, listed, mirrored=config.augment.mirror > 0, quiet=not progress)
        for line in found.told:
            say(line, quiet=not progress)
    start = load_start(teachers[0]) if recipe == "age_teacher" and teachers else None
    frozen = {} if found is None else found.teachers
    here = describe_run(replace(config, network=network), recipe, listed, frozen if start is None else {"first": start})
    certain = check_same_run(output, here)
    by_age = _by_age(listed) if recipe == "age_teacher" else ""
    if recipe == "age_teacher":
        distiller = build_age_teacher(
            start if start is not None else new_backbone(network),
            config,
            num_identities=network.num_identities,
            groups=None if by_age == "age" else len(listed.group_names),
            loaded=start is not None,
            seed=seed,
        )
    else:
        distiller = build(network, teachers=frozen)
    paired = "pairs" in distiller.objective.terms
    if paired:
        _check_pairs(config, listed, by_age)
    size = network.input_size if start is None else _side(start, teachers[0])

    def meter(items: Any, label: str) -> Any:
        return shown(items, label, quiet=not progress)

    if len(listed) < config.batch_size:
        raise InputError(f"train: batch_size must be at most the {len(listed)} images, got {config.batch_size}")
    large = len(listed) * 3 * size * size > MEMORY
    images = load_images(listed, size, progress=meter, memory_map=output / "images.npy" if large else None)
    views = None if found is None else found.views
    batches = _batches(config, images, listed, by_age if paired else None, views, seed)
    output.mkdir(parents=True, exist_ok=True)
    if certain:
        note_run(output, here)
        (output / "config.toml").write_text(dump_toml(replace(config, network=network)))
    go, steps, lr = (fit, STEPS, LR) if start is None else (tune, START_STEPS, START_LR)
    go(
        distiller,
        batches,
        output,
        steps=config.steps or steps,
        lr=config.lr or lr,
        seed=seed,
        label=recipe,
        quiet=not progress,
        amp=config.amp,
    )
    model: Any = distiller.student.model
    target = output / "model.pt"
    save_teacher(model.net if isinstance(model, FrozenBatchNorm) else model, target)
    say(f"weights: {target}", quiet=not progress)
    return target


def _batches(
    config: TrainRecipeConfig,
    images: Tensor,
    listed: FaceList,
    identity_age: Any,
    views: SeededViews | None,
    seed: int,
) -> FaceBatches:
    """Batches of random views, or of those that caches hold; for far pairs with several images of each person."""
    samples = choose_samples_per_identity(config.batch_size, listed.num_identities) if identity_age else None
    return FaceBatches(
        images,
        listed.identities,
        batch_size=config.batch_size,
        seed=seed,
        ages=listed.ages,
        age_groups=listed.age_groups,
        augment=config.augment if views is None else None,
        views=views,
        samples_per_identity=samples,
        identity_age=identity_age,
    )


def _by_age(listed: FaceList) -> str:
    """Ages where the lists have them, else age groups."""
    if listed.ages is not None and bool(np.isfinite(listed.ages).any()):
        return "age"
    if listed.age_groups is None:
        raise InputError("train: recipe 'age_teacher' needs ages or age groups, the lists have neither")
    if len(listed.group_names) < 2:
        raise InputError(
            f"train: recipe 'age_teacher' needs at least two age groups, the lists have {listed.group_names[0]!r} alone"
        )
    return "age_group"


def _check_pairs(config: TrainRecipeConfig, listed: FaceList, by_age: str) -> None:
    """Without far pairs their loss is 0 at every step, and nothing is learned."""
    years = by_age == "age"
    ages: Any = listed.ages if years else listed.age_groups
    people = count_cross_age_identities(listed.identities, ages, config.gap if years else 1.0)
    if people < 2:
        wanted = f"at least {config.gap:g} years apart (gap)" if years else "of two age groups"
        raise InputError(
            f"train: far pairs need at least two people with images {wanted}, the lists have {people}; without them: "
            "--set pair_weight=0 --set identity_weight=1"
        )


def _side(start: Any, path: str) -> int:
    """The side of the square images that a start is given; its `input_spec` cuts them to what it wants."""
    size: Any = start.input_size
    sides: tuple[Any, ...] = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if None in sides or (len(set(sides)) != 1 and getattr(start, "input_spec", None) is None):
        raise InputError(f"train: {path} takes images of {size}, only square ones are loaded")
    return int(max(sides))
