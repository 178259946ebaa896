"""The losses of `study_losses.py` and the features that each compares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

import kdlib

LAYERS = ["stage0", "stage1", "stage2", "stage3"]


@dataclass(frozen=True)
class Setup:
    """A loss and the features it compares.

    `source` is the teacher: the general teacher's cached outputs, a running mean of the student, the student itself, or a
    second student that is trained beside it. `weight` is given where the rule for the weights cannot be applied.
    """

    loss: Callable[[Any], nn.Module]
    student: str | list[str]
    teacher: str | list[str]
    project: str | None = None
    target: str | None = None
    source: Literal["cached", "running mean", "self", "peer"] = "cached"
    weight: float | None = None


SETUPS: dict[str, Setup] = {
    "activation_boundary": Setup(lambda _: kdlib.ActivationBoundaryLoss(), "map", "before", "auto"),
    "angular_distill": Setup(lambda _: kdlib.AngularDistillLoss(), "embedding", "embedding"),
    "attention_transfer": Setup(lambda _: kdlib.AttentionTransferLoss(), "map", "map"),
    "attentive_similarity": Setup(lambda _: kdlib.AttentiveSimilarityLoss(), "map", "map", "auto"),
    "contrastive_representation": Setup(
        lambda faces: kdlib.ContrastiveRepresentationLoss(*2 * [faces.dim]), "embedding", "embedding", target="identity"
    ),
    "correlation_congruence": Setup(lambda _: kdlib.CorrelationCongruenceLoss(), "embedding", "embedding"),
    "dark_rank": Setup(lambda _: kdlib.DarkRankLoss(normalize=True), "embedding", "embedding"),
    "decoupled_kd": Setup(lambda _: kdlib.DecoupledKDLoss(), "logits", "logits", target="identity"),
    "dist": Setup(lambda _: kdlib.DISTLoss(), "logits", "logits"),
    "factor_transfer": Setup(lambda faces: faces.factor_transfer(), "map", "map"),
    "hierarchical_context": Setup(lambda _: kdlib.HierarchicalContextLoss(), "map", "map", "auto"),
    "hint": Setup(lambda _: kdlib.HintLoss(), "map", "map", "auto"),
    "log_sum": Setup(lambda _: kdlib.LogSumLoss(), "embedding", "embedding", "auto"),
    "masked_generative": Setup(lambda faces: kdlib.MaskedGenerativeLoss(*faces.channels), "map", "map"),
    "nst": Setup(lambda _: kdlib.NSTLoss(), "map", "map"),
    "overhaul": Setup(lambda faces: kdlib.OverhaulLoss(faces.margin), "map", "before", "auto"),
    "pkt": Setup(lambda _: kdlib.PKTLoss(), "embedding", "embedding"),
    "review_kd": Setup(lambda faces: kdlib.ReviewKDLoss(*faces.layer_channels), LAYERS, LAYERS),
    "rkd_angle": Setup(lambda _: kdlib.RKDAngleLoss(), "embedding", "embedding"),
    "rkd_distance": Setup(lambda _: kdlib.RKDDistanceLoss(), "embedding", "embedding"),
    "semckd": Setup(lambda faces: kdlib.SemCKDLoss(*faces.layer_channels), LAYERS, LAYERS),
    "similarity_preserving": Setup(lambda _: kdlib.SimilarityPreservingLoss(), "embedding", "embedding"),
    "soft_target": Setup(lambda _: kdlib.SoftTargetLoss(), "logits", "logits"),
    "variational_information": Setup(lambda faces: kdlib.VariationalInformationLoss(*faces.channels), "map", "map"),
    # The gradient of these two is 0 at equal students, where the weights are measured.
    "mutual": Setup(lambda _: kdlib.SoftTargetLoss(temperature=1.0), "logits", "logits", source="peer", weight=1.0),
    "running_mean": Setup(
        lambda _: kdlib.SoftTargetLoss(temperature=1.0), "logits", "logits", source="running mean", weight=1.0
    ),
    "self_distillation": Setup(lambda _: kdlib.HintLoss(), "stage1", "stage2", "auto", source="self"),
}
