"""Recipe of a network that is trained on identities alone: a student without teachers, or a general teacher."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdlib import OUTPUT, StudentAdapter
from kdlib._checks import check_choice, check_number, check_type
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Hardware
from kdlib_faces.backbones import Backbone
from kdlib_faces.data.lists import FaceList
from kdlib_faces.heads import (
    AdaFaceHead,
    ArcFaceHead,
    CombinedMarginHead,
    CosFaceHead,
    CurricularFaceHead,
    ElasticFaceHead,
    MagFaceHead,
    SampledHead,
    SubCenterArcFaceHead,
    shard_head,
    skip_rows_without_gradient,
)
from kdlib_faces.heads._margin import MarginHead
from kdlib_faces.recipes.network import NetworkConfig
from kdlib_faces.training import RunConfig, RunOptions, TrainingSetup, train_on_faces

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "HEADS",
    "StudentConfig",
    "StudentRunConfig",
    "build_student",
    "head_mesh",
    "prepare_optimizer",
    "train",
]

HEADS: Mapping[str, Callable[..., MarginHead]] = {
    "cosface": CosFaceHead,
    "arcface": ArcFaceHead,
    "combined": CombinedMarginHead,
    "sub_center": SubCenterArcFaceHead,
    "adaface": AdaFaceHead,
    "magface": MagFaceHead,
    "curricular": CurricularFaceHead,
    "elastic": ElasticFaceHead,
}
"""The heads that `StudentConfig.head` names."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(NetworkConfig):
    """A network with a margin softmax over identities.

    Attributes:
        head: `"cosface"`, `"arcface"`, `"combined"`, `"sub_center"`, `"adaface"`, `"magface"`, `"curricular"` or
            `"elastic"`, a head of `kdlib_faces.heads`.
        head_scale: Scale s of the margin softmax; None (`"none"` in a file) for the default of the head, that of its
            paper.
        head_margin: Margin m of the margin softmax; None for the default of the head.
        head_chunk: Identities whose logits are computed at a time, for many identities; None computes all at once.
        head_sample_rate: Part of the identities that each step compares to, as in Partial FC; 1 compares to all.
        head_sharded: `kdlib-faces train` distributes the class centers over its processes.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    head: str = "cosface"
    head_scale: float | None = 32.0
    head_margin: float | None = 0.2
    head_chunk: int | None = None
    head_sample_rate: float = 1.0
    head_sharded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if self.head_scale is not None:
            check_number(owner, "head_scale", self.head_scale, above=0)
        if self.head_margin is not None:
            check_number(owner, "head_margin", self.head_margin, min=0)
        if self.head_chunk is not None:
            check_number(owner, "head_chunk", self.head_chunk, min=1, integer=True)
        check_number(owner, "head_sample_rate", self.head_sample_rate, above=0, max=1)
        check_type(owner, "head_sharded", self.head_sharded, bool, "true or false")
        check_choice(owner, "head", self.head, tuple(HEADS))

    def identity_term(
        self,
        num_identities: int,
        weight: float = 1.0,
        *,
        all_labeled: bool = True,
        mesh: "DeviceMesh | None" = None,
        seed: int = 0,
    ) -> Term:
        """The margin softmax on the student's embedding; images without identity do not enter it.

        Args:
            num_identities: Number of identities.
            weight: Weight of the term.
            all_labeled: Whether the identity of every image is known.
            mesh: Processes over which the class centers are distributed; None leaves them whole.
            seed: Seed of distributed centers and of sampled negatives.
        """
        given = {"scale": self.head_scale, "margin": self.head_margin, "chunk_size": self.head_chunk}
        options = {name: value for name, value in given.items() if value is not None}
        # Distributed centers are never allocated as a whole.
        with nullcontext() if mesh is None else torch.device("meta"):
            head = HEADS[self.head](self.embedding_dim, num_identities, **options)
        if mesh is not None:
            shard_head(head, mesh, seed=seed)
        loss = head if self.head_sample_rate == 1 else SampledHead(head, self.head_sample_rate, seed=seed)
        target, labeled = ("identity", None) if all_labeled else ("known_identity", "labeled")
        return Term(loss, student="embedding", target=target, weight=weight, sample_weight=labeled)


def head_mesh(config: StudentConfig, hardware: Hardware) -> AbstractContextManager["DeviceMesh | None"]:
    """Return a context with the mesh for `identity_term`: that of all processes with `head_sharded`, else None."""
    return hardware.mesh() if config.head_sharded else nullcontext()


def prepare_optimizer(distiller: Distiller) -> Callable[[torch.optim.Optimizer], None] | None:
    """Return a function that makes an optimizer skip centers that were not sampled; None if none are sampled."""
    term = distiller.objective.terms.get("identity")
    loss = None if term is None else term.loss
    if not isinstance(loss, SampledHead):
        return None
    return lambda optimizer: skip_rows_without_gradient(optimizer, loss.head.weight)


@dataclass(frozen=True, kw_only=True)
class StudentRunConfig(RunConfig):
    """Settings of `kdlib-faces train` for the recipes `student` and `general_teacher`.

    Attributes:
        recipe: The recipe.
    """

    recipe: StudentConfig = field(default_factory=StudentConfig)


def build_student(
    config: StudentConfig,
    network: Backbone,
    *,
    num_identities: int,
    seed: int = 0,
    mesh: "DeviceMesh | None" = None,
) -> Distiller:
    """Assemble the training of a network on identities.

    Args:
        config: The configuration.
        network: The network, as `config.build(seed)` makes it.
        num_identities: Identities of the training images.
        seed: Seed of the head.
        mesh: Processes over which the class centers are distributed.

    Returns:
        A distiller without teachers, whose target is `"identity"`.

    Examples:
        >>> config = StudentConfig(embedding_dim=16, width=0.25, input_size=32)
        >>> list(build_student(config, config.build(seed=0), num_identities=4).objective.terms)
        ['identity']
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        terms = {"identity": config.identity_term(num_identities, mesh=mesh, seed=seed + 1)}
    return Distiller(StudentAdapter(network, {"embedding": OUTPUT}), {}, Objective(terms))


def train(config: StudentRunConfig, options: RunOptions, *, name: str = "student") -> Path:
    """Train a network on face lists, on identities alone.

    Args:
        config: The settings.
        options: Inputs and outputs, without teachers.
        name: Name of the recipe in the record of the run.

    Returns:
        The file of the network, `OUTPUT/student.safetensors`, or `OUTPUT/teacher.safetensors` of a general teacher.

    Raises:
        InputError: A list, file or folder cannot be used, or teachers are given.
    """
    if options.teachers:
        raise InputError(f"train: recipe {name!r} takes no teacher, got {len(options.teachers)}")

    def build(faces: FaceList) -> TrainingSetup:
        network = config.recipe.build(options.seed)
        sizes = {"num_identities": faces.num_identities, "seed": options.seed}
        distiller = build_student(config.recipe, network, **sizes, mesh=mesh)
        return TrainingSetup(
            config=config,
            distiller=distiller,
            network=network,
            input_size=config.recipe.input_size,
            fingerprints={"seed": str(options.seed)},
            prepare_optimizer=prepare_optimizer(distiller),
        )

    with head_mesh(config.recipe, options.hardware) as mesh:
        return train_on_faces(build, options, recipe=name)
