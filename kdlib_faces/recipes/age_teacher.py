"""Recipe of an age-invariant teacher, fine-tuned from a pretrained network or trained from scratch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from kdlib import OUTPUT, StudentAdapter, Tap
from kdlib._checks import check_choice, check_number
from kdlib.cache import model_fingerprint
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces._checks import InputError
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.config import refuse_unused
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.samplers import count_cross_age_identities
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.recipes.network import NetworkConfig
from kdlib_faces.teachers import (
    AgeEstimationLoss,
    AgeFactorLoss,
    AgeInvariantNet,
    AttentiveAgeNet,
    CrossAgePairLoss,
    L2SPLoss,
    TeacherNet,
)
from kdlib_faces.teachers.fine_tuning import FrozenBatchNorm, Part, freeze_all_but
from kdlib_faces.teachers.open import load_pretrained
from kdlib_faces.training import RunConfig, RunOptions, TrainingSetup, train_on_faces

__all__ = ["AgeTeacherConfig", "AgeTeacherRunConfig", "build_age_teacher", "train"]


@dataclass(frozen=True, kw_only=True)
class AgeTeacherConfig:
    """Configuration of an age-invariant teacher.

        L = w_id * margin softmax(x_id, identity) + w_pair * cross-age pairs(x_id) + w_age * age terms + w_l2_sp * L2-SP

    `method` selects how age is removed. `"dal"` subtracts a branch that estimates age from the embedding and is decorrelated
    from the rest. `"mtlface"` subtracts an attended part of the last map, which estimates age, while age estimation on the
    rest is made to fail. `"pairs"` adds no parts. Images of unknown age take part in the identity terms alone. With few images,
    L2-SP regularization and training the end of the network alone preserve the quality of the teacher
    (`benchmarks/study_age_teacher.py`). Margins and weights of the two published methods are theirs where known.

    A None depends on the start. From scratch: the whole network, BatchNorm as usual, the margin softmax alone, no L2-SP.
    From a pretrained network: the embedding layer and the added parts, BatchNorm statistics frozen, cross-age pairs instead of
    the margin softmax, L2-SP weight 100.

    Attributes:
        method: `"dal"`, `"mtlface"` or `"pairs"`.
        trainable: Trainable part: `"all"`, the `"tail"` behind the last stage, or the `"embedding"` layer.
        freeze_batch_norm: Keep the BatchNorm statistics, as a backbone with folded BatchNorm requires.
        identity_weight: w_id; 0 removes the margin softmax.
        margin_scale: Scale s of the margin softmax.
        margin: Margin m of the margin softmax (CosFace).
        pair_weight: w_pair; 0 removes the cross-age pairs.
        pair_scale: Inverse temperature of the cross-age pairs.
        min_age_gap: Minimum age difference of a cross-age pair in years, where ages are years.
        l2_sp_weight: w_l2_sp, weight of the relative squared distance of the trainable weights from the start.
        age_weight: w_age; None takes 0.1 for `"dal"` and MTLFace's 0.001 for `"mtlface"`.
        decorrelation: Weight of DAL's decorrelation within the age terms.
        adversary_weight: Weight of MTLFace's reversed age estimation on the identity part.
        age_scale: Years that count as an error of 1 in age estimation.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    method: Literal["dal", "mtlface", "pairs"] = "dal"
    trainable: Part | None = None
    freeze_batch_norm: bool | None = None
    identity_weight: float | None = None
    margin_scale: float = 64.0
    margin: float = 0.35
    pair_weight: float | None = None
    pair_scale: float = 16.0
    min_age_gap: float = 10.0
    l2_sp_weight: float | None = None
    age_weight: float | None = None
    decorrelation: float = 0.1
    adversary_weight: float = 0.002
    age_scale: float = 1.0

    def __post_init__(self) -> None:
        owner = "AgeTeacherConfig"
        check_choice(owner, "method", self.method, ("dal", "mtlface", "pairs"))
        if self.trainable is not None:
            check_choice(owner, "trainable", self.trainable, ("all", "tail", "embedding"))
        for name in ("identity_weight", "pair_weight", "l2_sp_weight", "age_weight"):
            if getattr(self, name) is not None:
                check_number(owner, name, getattr(self, name), min=0)
        for name in ("margin", "min_age_gap", "decorrelation", "adversary_weight"):
            check_number(owner, name, getattr(self, name), min=0)
        for name in ("margin_scale", "pair_scale", "age_scale"):
            check_number(owner, name, getattr(self, name), above=0)


@dataclass(frozen=True, kw_only=True)
class AgeTeacherRunConfig(RunConfig):
    """Settings of `kdlib-faces train --recipe age_teacher`.

    Attributes:
        age_teacher: The recipe.
        network: The network to train from scratch, where no pretrained one is given.
    """

    age_teacher: AgeTeacherConfig = field(default_factory=AgeTeacherConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)


def build_age_teacher(
    backbone: TeacherNet,
    config: AgeTeacherConfig,
    *,
    num_identities: int,
    groups: int | None = None,
    pretrained: bool = True,
    seed: int = 0,
) -> Distiller:
    """Assemble the training of an age-invariant teacher.

    Args:
        backbone: The network to start from, trained in place. An `AgeInvariantNet` or `AttentiveAgeNet` keeps its parts.
        config: The configuration.
        num_identities: Identities of the training images.
        groups: Number of age groups, where ages are groups; None where they are years.
        pretrained: Whether the network is pretrained; new parts then start with little effect.
        seed: Seed of new parts and heads.

    Returns:
        A distiller without teachers. Its targets: `"identity"`; `"age"` or `"age_group"`; `"identity_age"` with cross-age pairs.
        `distiller.student.model.net` is the network for `save_teacher`.

    Raises:
        InputError: The network or the configuration cannot be used.

    Examples:
        >>> from kdlib_faces.backbones import MobileFaceNet
        >>> start = MobileFaceNet(embedding_dim=8, width=0.25, input_size=32)
        >>> config = AgeTeacherConfig(method="mtlface")
        >>> sorted(build_age_teacher(start, config, num_identities=3).objective.terms)
        ['adversary', 'age', 'l2_sp', 'pairs']
    """

    given = (config.identity_weight, config.pair_weight, config.l2_sp_weight, config.age_weight)
    defaults = ((0.0, 1.0, 100.0) if pretrained else (1.0, 0.0, 0.0)) + (0.001 if config.method == "mtlface" else 0.1,)
    identity_weight, pair_weight, l2_sp_weight, age_weight = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    if identity_weight == 0 and pair_weight == 0:
        raise InputError("age teacher: identity_weight or pair_weight must be above 0, got 0 and 0")
    by_age = "age" if groups is None else "age_group"
    taps: dict[str, str | Tap] = {"embedding": OUTPUT}
    terms: dict[str, Term] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        net = _add_parts(backbone, config.method, pretrained)
        parameters = _trainable(net, config.trainable or ("embedding" if pretrained else "all"))
        if identity_weight:
            head = CosFaceHead(net.embedding_dim, num_identities, config.margin_scale, config.margin)
            terms["identity"] = Term(head, student="embedding", target="identity", weight=identity_weight)
        if pair_weight:
            pairs = CrossAgePairLoss(min_age_gap=config.min_age_gap, scale=config.pair_scale, groups=groups is not None)
            terms["pairs"] = Term(pairs, student="embedding", target="identity_age", weight=pair_weight)
        if isinstance(net, AgeInvariantNet):
            taps["parts"] = "net.parts"
            factors = AgeFactorLoss(net.embedding_dim, groups=groups, decorrelation=config.decorrelation)
            terms["age"] = Term(factors, student="parts", target=by_age, weight=age_weight)
        elif isinstance(net, AttentiveAgeNet):
            taps |= {"age_map": f"net.{net.age_tap}", "identity_map": f"net.{net.identity_tap}"}
            estimation = AgeEstimationLoss(net.channels, groups=groups, scale=config.age_scale)
            adversary = AgeEstimationLoss(net.channels, groups=groups, scale=config.age_scale, reverse=True)
            terms["age"] = Term(estimation, student="age_map", target=by_age, weight=age_weight)
            terms["adversary"] = Term(adversary, student="identity_map", target=by_age, weight=config.adversary_weight)
        if l2_sp_weight:
            terms["l2_sp"] = Term(L2SPLoss(parameters), student="embedding", target="identity", weight=l2_sp_weight)
    frozen = pretrained if config.freeze_batch_norm is None else config.freeze_batch_norm
    return Distiller(StudentAdapter(FrozenBatchNorm(net, frozen=frozen), taps), {}, Objective(terms))


def _trainable(net: TeacherNet, part: Part) -> list[nn.Parameter]:
    """The trainable parameters: a part of the backbone, and whatever the method adds; L2-SP covers both."""
    if not isinstance(net, AgeInvariantNet | AttentiveAgeNet):
        return freeze_all_but(net, part)
    freeze_all_but(net.backbone, part)
    added = net.age_branch if isinstance(net, AgeInvariantNet) else net.get_submodule(f"{net.identity_tap}.1")
    added.requires_grad_(True)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _add_parts(network: TeacherNet, method: str, pretrained: bool) -> TeacherNet:
    """The network with the parts of the method; unchanged where it has them or the method adds none."""
    if method == "pairs":
        return network
    cls = AgeInvariantNet if method == "dal" else AttentiveAgeNet
    if isinstance(network, cls):
        return network
    if isinstance(network, AgeInvariantNet | AttentiveAgeNet):
        raise InputError(
            f"age teacher: the start is a {type(network).__name__} already, method {method!r} needs a backbone"
        )
    if method == "dal":
        return AgeInvariantNet(network, gain=0.01 if pretrained else 1.0)
    return AttentiveAgeNet(network, initial_bias=-4.0 if pretrained else 0.0)


def train(config: AgeTeacherRunConfig, options: RunOptions) -> Path:
    """Train an age-invariant teacher on face lists with ages or age groups.

    Args:
        config: The settings.
        options: Inputs and outputs. At most one teacher: the pretrained network to start from, a checkpoint, a teacher file or
            an `.onnx` file.

    Returns:
        The file of the teacher, `OUTPUT/teacher.safetensors`.

    Raises:
        InputError: A list, file or folder cannot be used, or the lists hold too few ages.
    """
    if len(options.teachers) > 1:
        raise InputError(
            f"train: recipe 'age_teacher' takes one pretrained network, or none, got {len(options.teachers)}"
        )

    method, prefix = config.age_teacher.method, "age_teacher."
    readers = {
        "decorrelation": "dal", "adversary_weight": "mtlface", "age_scale": "mtlface", "age_weight": "dal and mtlface",
    }  # fmt: skip
    unused = {
        f"{prefix}{name}": f"{prefix}method={method} does not read it, only {methods}"
        for name, methods in readers.items()
        if method not in methods
    }
    if options.teachers:
        unused["network"] = "the network is that of --teacher"
    refuse_unused(config, unused)

    def build(listed: FaceList) -> TrainingSetup:
        start = load_pretrained(options.teachers[0], *options.inputs[:1]) if options.teachers else None
        fingerprints = {"seed": str(options.seed)}
        if start is not None:
            fingerprints["pretrained network"] = model_fingerprint(start)
        pair_ages = _age_target(listed)
        distiller = build_age_teacher(
            config.network.build(options.seed) if start is None else start,
            config.age_teacher,
            num_identities=listed.num_identities,
            groups=None if pair_ages == "age" else len(listed.group_names),
            pretrained=start is not None,
            seed=options.seed,
        )
        pairs = "pairs" in distiller.objective.terms
        if pairs:
            _check_pairs(config.age_teacher, listed)
        wrapper = distiller.student.model
        assert isinstance(wrapper, FrozenBatchNorm)
        return TrainingSetup(
            config=config,
            distiller=distiller,
            network=wrapper.net,
            # The input spec of a network that is not square crops the square images.
            input_size=config.network.input_size if start is None else max(height_width("train", start.input_size)),
            fingerprints=fingerprints,
            pair_ages=pair_ages if pairs else None,
            min_age_gap=config.age_teacher.min_age_gap,
            optimizer="sgd" if start is None else "adamw",
            steps=10_000 if start is None else 200,
            lr=0.1 if start is None else 5e-4,
        )

    return train_on_faces(build, options, recipe="age_teacher")


def _age_target(faces: FaceList) -> Literal["age", "age_group"]:
    """Ages where the lists have them, else age groups."""
    if faces.ages is not None and bool(np.isfinite(faces.ages).any()):
        return "age"
    owner = "train: recipe 'age_teacher' needs"
    if faces.age_groups is None:
        raise InputError(f"{owner} ages or age groups, the lists have neither")
    if len(faces.group_names) < 2:
        raise InputError(f"{owner} at least two age groups, the lists have {faces.group_names[0]!r} alone")
    return "age_group"


def _check_pairs(config: AgeTeacherConfig, faces: FaceList) -> None:
    """Without cross-age pairs their loss is 0 at every step, and nothing is learned."""
    years = _age_target(faces) == "age"
    gap = config.min_age_gap if years else 1.0
    wanted = f"at least {gap:g} years apart (min_age_gap)" if years else "of two age groups"
    ages = np.asarray(faces.ages if years else faces.age_groups)
    count = count_cross_age_identities(faces.identities, ages, gap)
    if count < 2:
        raise InputError(
            f"train: cross-age pairs need at least two identities with images {wanted}, the lists have {count}; without "
            "them: --set age_teacher.pair_weight=0 --set age_teacher.identity_weight=1"
        )
