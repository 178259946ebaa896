"""Recipes room: the LIAAD-style recipe. Flat and readable: a config, `build`, `main`.

Two frozen teachers, one general and one age-invariant, into one light student:

    L = w_id   * margin softmax(f_S, y)                         identity, from labels
      + w_emb  * mean_i sum_k a_ki * ang(f_S, f_Tk)             angular knowledge of both teachers at the embedding
      + w_map  * mean_i ang(G(F_S), F_T1)                       angular knowledge of the general teacher at a middle stage
      + w_att  * mean_i ||A(F_S) - A(F_T2)||^2                  where the age-invariant teacher looks

`ang` is `1 - cos`, `(1 - cos)^2` or the squared chord; `A` the unit-norm activation map; `G` a 1x1 convolution with BatchNorm
on the student's side; `a_ki` the weight of teacher k for sample i. Ages never enter: only the age-invariant teacher was
trained with them. The published abstract (arXiv 2004.05085) states the two teachers, the attentive and the angular
knowledge; which layer, which transform and every number here are our definition, since its equations are not public.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    AttentionTransferLoss,
    CenterConfidenceWeighting,
    StudentAdapter,
    UniformWeighting,
)
from kdlib._checks import check_choice, check_number
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib.types import Teacher
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import Backbone, build_backbone
from kdlib_faces.heads import ArcFaceHead, CosFaceHead
from kdlib_faces.teachers.open import open_teacher, teacher_taps

__all__ = [
    "AGE",
    "GENERAL",
    "LIAADConfig",
    "build",
    "features_read",
    "main",
    "new_backbone",
    "student_taps",
    "teacher_from",
    "teacher_taps",
]

GENERAL, AGE = "general", "age"


@dataclass(frozen=True, kw_only=True)
class LIAADConfig:
    """Everything the recipe can be told. All defaults are ours.

    Attributes:
        num_identities: identities of the student's training images.
        backbone: student's network, a name of `kdlib_faces.backbones`.
        embedding_dim: of the student.
        width: factor on the student's channels.
        input_size: side of the student's images in pixels.
        general_teacher: a checkpoint or `.onnx` file, or a backbone's name for an untrained one (dry runs).
        age_teacher: likewise.
        head: `"cosface"` or `"arcface"`.
        head_scale: s of the margin softmax.
        head_margin: its margin m.
        identity_weight: w_id.
        embedding_weight: w_emb; 0 leaves the term out, as do the next two.
        embedding_form: form of `ang` at the embedding: `"cosine"`, `"squared"`, `"chord"` or `"angle"`.
        embedding_projection: `"none"` where student and teachers share one space, `"linear"` for a learned map to each.
        map_weight: w_map.
        map_form: form of `ang` at the middle stage.
        attention_weight: w_att.
        stage: which of the four stages is the middle one, from 0.
        weighting: `"uniform"`, or `"center"`: by each teacher's cosine to its own center of the sample's identity.
        temperature: of the `"center"` weighting.
        seed: of the initial weights.

    Raises:
        ValueError, TypeError: a value out of range.
    """

    num_identities: int = 1000
    backbone: str = "mobilefacenet"
    embedding_dim: int = 512
    width: float = 1.0
    input_size: int = 112
    general_teacher: str = "iresnet18"
    age_teacher: str = "iresnet18"
    head: str = "cosface"
    head_scale: float = 32.0
    head_margin: float = 0.2
    identity_weight: float = 1.0
    embedding_weight: float = 40.0
    embedding_form: Literal["squared", "cosine", "chord", "angle"] = "cosine"
    embedding_projection: str = "none"
    map_weight: float = 2.0
    map_form: Literal["squared", "cosine", "chord", "angle"] = "cosine"
    attention_weight: float = 2.0
    stage: int = 2
    weighting: str = "center"
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        owner = "LIAADConfig"
        for name in ("num_identities", "embedding_dim", "input_size"):
            check_number(owner, name, getattr(self, name), min=1, integer=True)
        for name in ("identity_weight", "embedding_weight", "map_weight", "attention_weight", "head_margin"):
            check_number(owner, name, getattr(self, name), min=0)
        for name in ("width", "head_scale", "temperature"):
            check_number(owner, name, getattr(self, name), above=0)
        check_number(owner, "stage", self.stage, min=0, max=3, integer=True)
        check_number(owner, "seed", self.seed, min=0, integer=True)
        check_choice(owner, "head", self.head, ("cosface", "arcface"))
        check_choice(owner, "weighting", self.weighting, ("uniform", "center"))
        check_choice(owner, "embedding_projection", self.embedding_projection, ("none", "linear"))
        for name in ("embedding_form", "map_form"):
            check_choice(owner, name, getattr(self, name), ("cosine", "squared", "chord", "angle"))


def student_taps(model: Any, stage: int) -> dict[str, Any]:
    """Taps of a student: its embedding and its middle stage."""
    return {"embedding": OUTPUT, "map": model.stages[stage]}


def features_read(config: LIAADConfig) -> dict[str, dict[str, str]]:
    """Of each teacher the features that the active terms read, each with the setting that leaves its term out.

    Examples:
        >>> features_read(LIAADConfig(attention_weight=0.0))
        {'general': {'embedding': 'embedding_weight', 'map': 'map_weight'}, 'age': {'embedding': 'embedding_weight'}}
    """
    general = {"embedding": "embedding_weight", "map": "map_weight"}
    age = {"embedding": "embedding_weight", "map": "attention_weight"}
    return {
        role: {feature: setting for feature, setting in read.items() if getattr(config, setting)}
        for role, read in ((GENERAL, general), (AGE, age))
    }


def teacher_from(source: str, role: str, config: LIAADConfig) -> nn.Module:
    """The frozen teacher of a file or a backbone's name, with the features that the role asks for.

    Raises:
        InputError: a file that cannot be used.
    """
    size = {"input_size": config.input_size, "embedding_dim": config.embedding_dim, "seed": config.seed}
    return open_teacher(source, features_read(config)[role], stage=config.stage, untrained=size)


def new_backbone(config: LIAADConfig) -> Backbone:
    """The network that the config names, with fresh weights; one without a `width` is built at 1."""
    size: dict[str, Any] = {"embedding_dim": config.embedding_dim, "input_size": config.input_size}
    if config.width != 1.0:
        size["width"] = config.width
    return build_backbone(config.backbone, seed=config.seed, **size)


def build(
    config: LIAADConfig, *, teachers: Mapping[str, nn.Module] | None = None, student: nn.Module | None = None
) -> Distiller:
    """Assemble the recipe.

    Args:
        config: what to build.
        teachers: `"general"` and `"age"` to frozen teachers that return `"embedding"` and, for the map and attention
            terms, `"map"`; either may be absent. `None` loads those the config names; an empty mapping trains the
            student alone, on identities.
        student: a network in place of the one the config names; needs `stages`.

    Returns:
        A distiller whose student gives `"embedding"` and `"map"`.

    Raises:
        InputError: a teacher's file that cannot be used, or a name that is not a teacher.

    Examples:
        >>> config = LIAADConfig(num_identities=4, embedding_dim=16, width=0.25, input_size=32)
        >>> alone = build(config, teachers={})
        >>> sorted(alone.objective.terms)
        ['identity']
        >>> sorted(build(config).objective.terms)
        ['attention', 'embedding', 'identity', 'map']
    """
    if teachers is None:
        sources = {GENERAL: config.general_teacher, AGE: config.age_teacher}
        teachers = {role: teacher_from(source, role, config) for role, source in sources.items()}
    unknown = sorted(set(teachers) - {GENERAL, AGE})
    if unknown:
        raise InputError(f"liaad: teachers must be named {GENERAL!r} or {AGE!r}, got {', '.join(map(repr, unknown))}")
    if student is None:
        student = new_backbone(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        terms = _terms(config, set(teachers))
    weighting: nn.Module = UniformWeighting()
    if config.weighting == "center" and len(teachers) > 1:
        weighting = CenterConfidenceWeighting(config.num_identities, temperature=config.temperature)
    lead = "embedding" if "embedding" in terms else None
    objective = Objective(terms, weighting if lead else None, weigh_by=lead)
    return Distiller(
        StudentAdapter(student, student_taps(student, config.stage)), cast(Mapping[str, Teacher], teachers), objective
    )


def _terms(config: LIAADConfig, teachers: set[str]) -> dict[str, Term]:
    head = ArcFaceHead if config.head == "arcface" else CosFaceHead
    terms: dict[str, Term] = {}
    if config.identity_weight or not teachers:
        loss = head(config.embedding_dim, config.num_identities, config.head_scale, config.head_margin)
        terms["identity"] = Term(loss, student="embedding", target="identity", weight=config.identity_weight or 1.0)
    if teachers and config.embedding_weight:
        project = "auto" if config.embedding_projection == "linear" else None
        terms["embedding"] = Term(
            AngularDistillLoss(form=config.embedding_form),
            student="embedding",
            teacher="embedding",
            project=project,
            weight=config.embedding_weight,
        )
    if config.map_weight and GENERAL in teachers:
        terms["map"] = Term(
            AngularDistillLoss(form=config.map_form),
            student="map",
            teacher="map",
            teachers=[GENERAL],
            project="auto",
            weight=config.map_weight,
        )
    if config.attention_weight and AGE in teachers:
        terms["attention"] = Term(
            AttentionTransferLoss(), student="map", teacher="map", teachers=[AGE], weight=config.attention_weight
        )
    return terms


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m kdlib_faces.recipes.liaad`: the same as `kdlib-faces train --recipe liaad`."""
    import sys

    from kdlib_faces.cli import main as command

    given = list(sys.argv[1:] if arguments is None else arguments)
    code: int = command(["train", "--recipe", "liaad", *given])
    return code


if __name__ == "__main__":
    raise SystemExit(main())
