"""Recipes room: an age-invariant teacher, from a loaded backbone or from scratch. A config, `build`, and what is saved.

    L = w_id * margin softmax(x_id, identity) + w_pair * far pairs(x_id) + w_age * age terms + w_pull * distance from the start

`method` says how age is taken out: `"dal"` subtracts a branch that reads age from the embedding and is decorrelated from the rest;
`"mtlface"` subtracts an attended part of the last map, which estimates age, while what remains must not be able to; `"pairs"`
changes nothing but the weights. Images of unknown age take part in the identity terms alone. With few images, what keeps the
teacher good is the pull to its start and training the end of the network alone: see `benchmarks/study_age_teacher.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlib import OUTPUT, StudentAdapter, TrainConfig, train
from kdlib._checks import check_choice, check_number
from kdlib.distiller import Distiller
from kdlib.objective import Objective, Term
from kdlib_faces._checks import InputError
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import TrainProgress
from kdlib_faces.teachers import (
    AgeEstimationLoss,
    AgeFactorLoss,
    AgeInvariantNet,
    AttentiveAgeNet,
    CrossAgePairLoss,
    L2SPLoss,
)

__all__ = [
    "AgeTeacherConfig",
    "FrozenBatchNorm",
    "build_age_teacher",
    "trained_parts",
    "tune",
]

METHODS = ("dal", "mtlface", "pairs")
PARTS = ("all", "tail", "embedding")


@dataclass(frozen=True, kw_only=True)
class AgeTeacherConfig:
    """How an age-invariant teacher is trained. Margins and weights of the two published ways are theirs where known.

    What is None depends on the start. From scratch: the whole network, BatchNorm as usual, the margin softmax alone, no pull.
    From a loaded backbone: the embedding layer and what the method adds, BatchNorm statistics kept, far pairs in place of
    the margin softmax, pull 100.

    Attributes:
        method: `"dal"`, `"mtlface"` or `"pairs"`.
        trained: which part: `"all"`, the `"tail"` behind the last stage, or the `"embedding"` layer.
        steady: keep BatchNorm statistics as they are, which a backbone with folded BatchNorm needs.
        identity_weight: w_id; 0 leaves the margin softmax out.
        margin_scale: its s.
        margin: its m (CosFace).
        pair_weight: w_pair; 0 leaves the far pairs out.
        pair_scale: inverse temperature of the far pairs.
        gap: least years between the images of a far pair, where ages are years.
        pull: w_pull, on the relative squared distance of the trained weights from the start.
        age_weight: w_age; None takes 0.1 for `"dal"` and MTLFace's 0.001 for `"mtlface"`.
        decorrelation: of DAL's two parts, within the age terms.
        adversary_weight: of MTLFace's reversed age estimation on the identity part.
        age_scale: years that make an error of 1 in age estimation.

    Raises:
        ValueError, TypeError: a value out of range.
    """

    method: Literal["dal", "mtlface", "pairs"] = "dal"
    trained: Literal["all", "tail", "embedding"] | None = None
    steady: bool | None = None
    identity_weight: float | None = None
    margin_scale: float = 64.0
    margin: float = 0.35
    pair_weight: float | None = None
    pair_scale: float = 16.0
    gap: float = 10.0
    pull: float | None = None
    age_weight: float | None = None
    decorrelation: float = 0.1
    adversary_weight: float = 0.002
    age_scale: float = 1.0

    def __post_init__(self) -> None:
        owner = "AgeTeacherConfig"
        check_choice(owner, "method", self.method, METHODS)
        if self.trained is not None:
            check_choice(owner, "trained", self.trained, PARTS)
        for name in (
            "identity_weight",
            "pair_weight",
            "pull",
            "age_weight",
            "margin",
            "gap",
            "decorrelation",
            "adversary_weight",
        ):
            if getattr(self, name) is not None:
                check_number(owner, name, getattr(self, name), min=0)
        for name in ("margin_scale", "pair_scale", "age_scale"):
            check_number(owner, name, getattr(self, name), above=0)

    def settled(self, *, loaded: bool) -> dict[str, Any]:
        """What each None stands for, from a loaded backbone or from scratch.

        Examples:
            >>> AgeTeacherConfig().settled(loaded=True)["trained"]
            'embedding'
        """
        usual = {
            "trained": "embedding" if loaded else "all",
            "steady": loaded,
            "identity_weight": 0.0 if loaded else 1.0,
            "pair_weight": 1.0 if loaded else 0.0,
            "pull": 100.0 if loaded else 0.0,
            "age_weight": 0.001 if self.method == "mtlface" else 0.1,
        }
        chosen = {name: value if getattr(self, name) is None else getattr(self, name) for name, value in usual.items()}
        if chosen["identity_weight"] == 0 and chosen["pair_weight"] == 0:
            raise InputError("age teacher: identity_weight or pair_weight must be above 0, got 0 and 0")
        return chosen


class FrozenBatchNorm(nn.Module):
    """A network whose BatchNorms stay in eval mode while the rest trains; it gets the images as its `input_spec` wants them.

    Args:
        net: the network; its own paths get `net.` before them.
        steady: whether to hold them.
    """

    def __init__(self, net: nn.Module, *, steady: bool = True) -> None:
        super().__init__()
        self.net, self.steady = net, steady

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Train mode for all but the BatchNorms."""
        super().train(mode)
        if self.steady:
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Any:
        """What the network gives."""
        spec: Any = getattr(self.net, "input_spec", None)
        return self.net(images if spec is None else spec(images))


def trained_parts(backbone: Any, trained: str) -> list[nn.Parameter]:
    """The parameters of a backbone that `trained` means; all others are frozen here.

    Args:
        backbone: a network with `stages`; modules must be registered in the order in which they run.
        trained: `"all"`, `"tail"` (behind the last stage) or `"embedding"` (the last linear or convolutional layer and
            what comes behind it).

    Raises:
        InputError: there is no such part.
    """
    named = list(backbone.named_parameters())
    if trained == "tail":
        last = backbone.stages[-1]
        order = [name for name, _ in backbone.named_modules()]
        inside = max((at for at, name in enumerate(order) if f"{name}.".startswith(f"{last}.")), default=len(order))
        behind = set(order[inside + 1 :])
        start = next((at for at, (name, _) in enumerate(named) if name.rpartition(".")[0] in behind), len(named))
    elif trained == "embedding":
        layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        last = f"{layers[-1]}." if layers else "."
        start = next((at for at, (name, _) in enumerate(named) if name.startswith(last)), len(named))
    else:
        start = 0
    if start >= len(named):
        raise InputError(f"age teacher: {type(backbone).__name__} has no parameters in its part {trained!r}")
    for at, (_, parameter) in enumerate(named):
        if at < start:
            parameter.requires_grad_(False)
    return [parameter for _, parameter in named[start:] if parameter.requires_grad]


def build_age_teacher(
    backbone: Any,
    config: AgeTeacherConfig,
    *,
    num_identities: int,
    groups: int | None = None,
    loaded: bool = True,
    seed: int = 0,
) -> Distiller:
    """Assemble the training of an age-invariant teacher.

    Args:
        backbone: the start, `(b, 3, h, w)` to `(b, d)`, with `stages` and `embedding_dim`; trained in place, or, if it
            is an `AgeInvariantNet` or `AttentiveAgeNet` already, gone on with.
        config: how.
        num_identities: identities of the training images.
        groups: number of age groups, where ages are groups; None where they are years.
        loaded: whether the backbone is trained already; new parts then begin small.
        seed: of new parts and heads.

    Returns:
        A distiller without teachers. Its targets: `"identity"`; `"age"` or `"age_group"`; `"identity_age"` with far pairs.
        `distiller.student.model.net` is the network for `save_teacher`.

    Raises:
        InputError: a backbone or configuration that cannot be used.

    Examples:
        >>> from kdlib_faces.backbones import MobileFaceNet
        >>> start = MobileFaceNet(embedding_dim=8, width=0.25, input_size=32)
        >>> sorted(build_age_teacher(start, AgeTeacherConfig(method="mtlface"), num_identities=3).objective.terms)
        ['adversary', 'age', 'pairs', 'pull']
    """
    told = config.settled(loaded=loaded)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        net = _with_parts(backbone, config.method, loaded)
        moved = _moved(net, told["trained"])
        by_age = "age" if groups is None else "age_group"
        terms: dict[str, Term] = {}
        taps: dict[str, Any] = {"embedding": OUTPUT}
        if told["identity_weight"]:
            head = CosFaceHead(net.embedding_dim, num_identities, config.margin_scale, config.margin)
            terms["identity"] = Term(head, student="embedding", target="identity", weight=told["identity_weight"])
        if told["pair_weight"]:
            pairs = CrossAgePairLoss(gap=config.gap, scale=config.pair_scale, groups=groups is not None)
            terms["pairs"] = Term(pairs, student="embedding", target="identity_age", weight=told["pair_weight"])
        if isinstance(net, AgeInvariantNet):
            taps["parts"] = "net.parts"
            factors = AgeFactorLoss(net.embedding_dim, groups=groups, decorrelation=config.decorrelation)
            terms["age"] = Term(factors, student="parts", target=by_age, weight=told["age_weight"])
        elif isinstance(net, AttentiveAgeNet):
            taps |= {"age_map": f"net.{net.age_tap}", "identity_map": f"net.{net.identity_tap}"}
            reading, adversary = (
                AgeEstimationLoss(net.channels, groups=groups, scale=config.age_scale, reverse=reverse)
                for reverse in (False, True)
            )
            terms["age"] = Term(reading, student="age_map", target=by_age, weight=told["age_weight"])
            weight = config.adversary_weight
            terms["adversary"] = Term(adversary, student="identity_map", target=by_age, weight=weight)
        if told["pull"]:
            terms["pull"] = Term(L2SPLoss(moved), student="embedding", target="identity", weight=told["pull"])
    return Distiller(StudentAdapter(FrozenBatchNorm(net, steady=told["steady"]), taps), {}, Objective(terms))


def tune(
    distiller: Distiller,
    batches: Any,
    folder: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    label: str,
    quiet: bool,
    amp: str = "none",
) -> float:
    """Train from a loaded start, by AdamW without decay, which the pull replaces; goes on from a checkpoint in `folder`.

    Returns:
        The seconds it took in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meter = TrainProgress(label, quiet=quiet)
    config = TrainConfig(
        max_steps=steps,
        lr=lr,
        optimizer="adamw",
        weight_decay=0.0,
        warmup_steps=max(1, steps // 20),
        clip_norm=5.0,
        amp=None if amp == "none" else amp,
        channels_last=True,
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every_seconds=60.0,
        log_path=folder / "log.jsonl",
        log_every=max(1, steps // 100),
    )
    try:
        return train(distiller, batches, config, hooks=[meter]).seconds
    finally:
        meter.close()


def _moved(net: Any, trained: str) -> list[nn.Parameter]:
    """All that is trained: a part of the start, and what the method adds, which is always trained.

    The pull holds both. New parts begin small; let loose, they learn the few training people by heart.
    """
    if not isinstance(net, AgeInvariantNet | AttentiveAgeNet):
        return trained_parts(net, trained)
    trained_parts(net.backbone, trained)
    new: Any = net.age_branch if isinstance(net, AgeInvariantNet) else net.get_submodule(f"{net.identity_tap}.1")
    for parameter in new.parameters():
        parameter.requires_grad_(True)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _with_parts(backbone: Any, method: str, loaded: bool) -> Any:
    """The backbone with what the method adds to it, or as it is where it has that already."""
    kinds: dict[str, Any] = {"dal": AgeInvariantNet, "mtlface": AttentiveAgeNet}
    wanted = kinds.get(method, (AgeInvariantNet, AttentiveAgeNet))
    has = isinstance(backbone, AgeInvariantNet | AttentiveAgeNet)
    if has and not isinstance(backbone, wanted):
        raise InputError(
            f"age teacher: the start is a {type(backbone).__name__} already, method {method!r} needs a backbone"
        )
    if has or method == "pairs":
        return backbone
    if method == "dal":
        return AgeInvariantNet(backbone, gain=0.01 if loaded else 1.0)
    return AttentiveAgeNet(backbone, start=-4.0 if loaded else 0.0)
