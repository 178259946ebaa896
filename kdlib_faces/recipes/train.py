"""Recipes room: one training on the user's own face lists. A student alone or distilled, or a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from kdlib import OUTPUT, StudentAdapter
from kdlib._checks import check_number
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output
from kdlib_faces.backbones import build_backbone, save_backbone
from kdlib_faces.config import dump_toml
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import load_images
from kdlib_faces.data.listing import FaceList, read_faces
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.progress import progress as shown
from kdlib_faces.progress import say
from kdlib_faces.recipes.liaad import LIAADConfig, build
from kdlib_faces.recipes.stages import fit

__all__ = ["RECIPES", "TrainRecipeConfig", "run"]

RECIPES = ("liaad", "student", "general_teacher", "age_teacher")


@dataclass(frozen=True, kw_only=True)
class TrainRecipeConfig:
    """What `kdlib-faces train` can be told.

    Attributes:
        steps: updates of the weights.
        lr: learning rate.
        batch_size: images a step.
        amp: `"none"` or `"bfloat16"`.
        decorrelation: of the age teacher's two parts.
        age_weight: of the age teacher's age term.
        augment: views of the training images.
        network: the network and the recipe; `num_identities` is taken from the lists.
    """

    steps: int = 10_000
    lr: float = 0.1
    batch_size: int = 64
    amp: Literal["none", "bfloat16"] = "none"
    decorrelation: float = 0.1
    age_weight: float = 0.1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    network: LIAADConfig = field(default_factory=LIAADConfig)

    def __post_init__(self) -> None:
        check_number("TrainRecipeConfig", "steps", self.steps, least=1, integer=True)
        check_number("TrainRecipeConfig", "batch_size", self.batch_size, least=2, integer=True)
        check_number("TrainRecipeConfig", "lr", self.lr, above=0)
        check_number("TrainRecipeConfig", "decorrelation", self.decorrelation, least=0)
        check_number("TrainRecipeConfig", "age_weight", self.age_weight, least=0)


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

    Args:
        config: how.
        output: folder of the run.
        recipe: one of `RECIPES`.
        faces: lists or folders.
        teachers: for `"liaad"`: the general and the age-invariant teacher, checkpoints or ONNX files.
        seed: of weights, order and views.
        progress: show progress.

    Returns:
        The weights, `OUTPUT/model.pt`.

    Raises:
        InputError: lists, teachers or an output that cannot be used.
    """
    if recipe not in RECIPES:
        raise InputError(f"train: recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if (recipe == "liaad") != (len(teachers) == 2):
        wanted = "two teachers, the general one first" if recipe == "liaad" else "no teacher"
        raise InputError(f"train: recipe {recipe!r} takes {wanted}, got {len(teachers)}")
    check_output(output)
    listed = read_faces(faces)
    network = replace(config.network, num_identities=listed.num_identities, seed=seed)
    if teachers:
        network = replace(network, general_teacher=teachers[0], age_teacher=teachers[1])
    distiller = (
        _age_teacher(config, network, listed)
        if recipe == "age_teacher"
        else build(network, teachers=None if recipe == "liaad" else {})
    )

    def meter(items: Any, label: str) -> Any:
        return shown(items, label, quiet=not progress)

    images = load_images(listed, network.input_size, progress=meter)
    if len(images) < config.batch_size:
        raise InputError(f"train: batch_size must be at most the {len(images)} images, got {config.batch_size}")
    ages, groups = listed.ages, listed.age_groups
    batches = FaceBatches(
        images,
        listed.identities,
        batch_size=config.batch_size,
        seed=seed,
        augment=config.augment,
        ages=ages,
        age_groups=groups,
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(dump_toml(replace(config, network=network)))
    fit(
        distiller,
        batches,
        output,
        steps=config.steps,
        lr=config.lr,
        seed=seed,
        label=recipe,
        quiet=not progress,
        amp=config.amp,
    )
    model: Any = distiller.student.model
    target = output / "model.pt"
    save_backbone(getattr(model, "backbone", model), target)
    say(f"weights: {target}", quiet=not progress)
    return target


def _age_teacher(config: TrainRecipeConfig, network: LIAADConfig, listed: FaceList) -> Distiller:
    """Identity and age, decorrelated; ages where the lists have them, else age groups."""
    from kdlib_faces.heads import CosFaceHead
    from kdlib_faces.teachers import AgeFactorLoss, AgeInvariantNet

    years = listed.ages is not None and bool(np.isfinite(listed.ages).any())
    if not years and listed.age_groups is None:
        raise InputError("train: recipe 'age_teacher' needs ages or age groups, the lists have neither")
    size = {"embedding_dim": network.embedding_dim, "width": network.width, "input_size": network.input_size}
    backbone = build_backbone(network.backbone, seed=network.seed, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed + 1)
        net: nn.Module = AgeInvariantNet(backbone)
        head = CosFaceHead(network.embedding_dim, network.num_identities, network.head_scale, network.head_margin)
        groups = None if years else len(listed.group_names)
        age = AgeFactorLoss(network.embedding_dim, groups=groups, decorrelation=config.decorrelation)
    terms = {
        "identity": Term(head, student="embedding", target="identity"),
        "age": Term(age, student="parts", target="age" if years else "age_group", weight=config.age_weight),
    }
    taps = {"embedding": OUTPUT["embedding"], "parts": OUTPUT["parts"]}
    return Distiller(StudentAdapter(net, taps), {}, Objective(terms))
