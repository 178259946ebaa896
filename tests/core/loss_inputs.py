"""All losses with their hyper-parameters and references, and the inputs that their tests share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdlib.functional
from kdlib import losses
from tests.core import reference_features, reference_logits, reference_relations

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_mode = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])

VECTOR, MAP, TALL_MAP = (12,), (3, 2, 2), (3, 4, 1)
MARGIN = torch.tensor([-0.1, -0.5, -2.0], dtype=torch.float64)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss: Callable[..., Tensor], student: Tensor, *rest: Tensor, **kwargs: Any) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **kwargs), leaf)[0]


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


@dataclass(frozen=True)
class Case:
    """A loss with the shape of a sample of 12 values."""

    module: type[nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()
    classes: int = 0  # a loss of logits that needs targets

    def build(self, **more: Any) -> Any:
        loss = seeded(lambda: self.module(*self.arguments, **self.options, **more))
        if isinstance(loss, losses.FactorTransferLoss):
            loss.paraphraser.freeze()
        return loss

    def sides(self, batch: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return noise(batch, *self.shape, seed=seed, dtype=dtype), noise(batch, *self.shape, seed=seed + 1, dtype=dtype)

    def targets(self, batch: int) -> dict[str, Tensor]:
        return {"target": torch.arange(batch) % self.classes} if self.classes else {}


PER_SAMPLE = {
    "activation_boundary": Case(losses.ActivationBoundaryLoss, MAP),
    "activation_boundary, margin 0": Case(losses.ActivationBoundaryLoss, MAP, {"margin": 0}),
    "angular_distill": Case(losses.AngularDistillLoss, VECTOR),
    "angular_distill, cosine": Case(losses.AngularDistillLoss, VECTOR, {"form": "cosine"}),
    "angular_distill, chord": Case(losses.AngularDistillLoss, VECTOR, {"form": "chord"}),
    "angular_distill, angle": Case(losses.AngularDistillLoss, VECTOR, {"form": "angle"}),
    "attention_transfer": Case(losses.AttentionTransferLoss, MAP),
    "attention_transfer, p=1": Case(losses.AttentionTransferLoss, MAP, {"p": 1}),
    "attention_transfer, p=4": Case(losses.AttentionTransferLoss, MAP, {"p": 4.0}),
    "attentive_similarity": Case(losses.AttentiveSimilarityLoss, MAP),
    "attentive_similarity, channels": Case(losses.AttentiveSimilarityLoss, MAP, {"channel": 0.5, "spatial": 0}),
    "decoupled_kd": Case(losses.DecoupledKDLoss, VECTOR, classes=12),
    "decoupled_kd, T=1": Case(losses.DecoupledKDLoss, VECTOR, {"alpha": 0.3, "temperature": 1.0}, classes=12),
    "hierarchical_context": Case(losses.HierarchicalContextLoss, MAP),
    "hierarchical_context, uneven": Case(losses.HierarchicalContextLoss, TALL_MAP, {"levels": (3, 2)}),
    "hint": Case(losses.HintLoss, VECTOR),
    "nst": Case(losses.NSTLoss, MAP),
    "overhaul": Case(losses.OverhaulLoss, MAP, {"margin": -0.3}),
    "overhaul, by channel": Case(losses.OverhaulLoss, TALL_MAP, {"margin": MARGIN}),
    "soft_target": Case(losses.SoftTargetLoss, VECTOR),
    "soft_target, standardized": Case(losses.SoftTargetLoss, VECTOR, {"standardize": True}),
    "soft_target, T=1": Case(losses.SoftTargetLoss, VECTOR, {"temperature": 1.0}),
}
RELATIONS = {
    "correlation_congruence": Case(losses.CorrelationCongruenceLoss, VECTOR),
    "correlation_congruence, order 4": Case(losses.CorrelationCongruenceLoss, VECTOR, {"order": 4, "gamma": 1.5}),
    "correlation_congruence, order 1": Case(losses.CorrelationCongruenceLoss, VECTOR, {"order": 1}),
    "correlation_congruence, exact": Case(losses.CorrelationCongruenceLoss, VECTOR, {"order": None}),
    "dark_rank": Case(losses.DarkRankLoss, VECTOR),
    "dark_rank, beta=1": Case(losses.DarkRankLoss, VECTOR, {"alpha": 0.5, "beta": 1.0}),
    "dark_rank, beta=0.5": Case(losses.DarkRankLoss, VECTOR, {"beta": 0.5, "length": 3}),
    "dark_rank, unit rows": Case(losses.DarkRankLoss, VECTOR, {"normalize": True, "length": 2}),
    "dark_rank, all": Case(losses.DarkRankLoss, VECTOR, {"normalize": True, "length": 50}),
    "dist": Case(losses.DISTLoss, VECTOR),
    "dist, T=4": Case(losses.DISTLoss, VECTOR, {"beta": 0.5, "gamma": 2.0, "temperature": 4.0}),
    "pkt": Case(losses.PKTLoss, VECTOR),
    "rkd_angle": Case(losses.RKDAngleLoss, VECTOR),
    "rkd_angle, chunks": Case(losses.RKDAngleLoss, VECTOR, {"chunk_size": 2}),
    "rkd_distance": Case(losses.RKDDistanceLoss, VECTOR),
    "rkd_distance, chunks": Case(losses.RKDDistanceLoss, VECTOR, {"chunk_size": 2}),
    "similarity_preserving": Case(losses.SimilarityPreservingLoss, VECTOR),
}
VID, CRD = losses.VariationalInformationLoss, losses.ContrastiveRepresentationLoss
FT, MGD = losses.FactorTransferLoss, losses.MaskedGenerativeLoss
LEARNED = {
    "variational_information": Case(VID, MAP, arguments=(3, 3)),
    "variational_information, vectors": Case(VID, VECTOR, arguments=(12, 12)),
    "variational_information, variance 1000": Case(VID, MAP, {"initial_variance": 1000}, (3, 3)),
    "contrastive_representation": Case(CRD, VECTOR, {"feature_dim": 4}, (12, 12)),
    "contrastive_representation, queue": Case(CRD, VECTOR, {"feature_dim": 4, "queue_size": 6}, (12, 12)),
    "factor_transfer": Case(FT, MAP, arguments=(3, 3)),
    "factor_transfer, p=2": Case(FT, TALL_MAP, {"p": 2, "rate": 1.5}, (3, 3)),
    "masked_generative": Case(MGD, MAP, {"mask_ratio": 0.4}, (3, 3)),
    "masked_generative, channels": Case(MGD, TALL_MAP, {"mask": "channel", "seed": 3}, (3, 3)),
}
FUNCTIONS = PER_SAMPLE | RELATIONS
LOSSES = FUNCTIONS | LEARNED
each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_relation = pytest.mark.parametrize("name", [name for name in RELATIONS if not name.startswith("dist")])
each_loss = pytest.mark.parametrize("name", LOSSES)
HAND_WRITTEN = ("rkd_distance", "rkd_angle", "pkt", "correlation_congruence")
"""Losses whose gradient has no graph."""


def function_of(name: str) -> Callable[..., Tensor]:
    """Return the function with the hyper-parameters of a case."""
    function = getattr(kdlib.functional, name.split(",")[0])
    return lambda student, teacher, **more: function(student, teacher, **{**LOSSES[name].options, **more})


def reference_of(name: str, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Any:
    """Return the losses `(b,)`, or one value for a relation loss, by loops over NumPy numbers."""
    case, short = LOSSES[name], name.split(",")[0]
    s, t = (x.detach().double().numpy() for x in (student, teacher))
    options = {key: x.numpy() if isinstance(x, Tensor) else x for key, x in case.options.items() if key != "chunk_size"}
    for module in (reference_features, reference_logits):
        if name in PER_SAMPLE and hasattr(module, short):
            return getattr(module, short)(s, t, **options, **case.targets(len(s)))
    w = np.ones(len(s)) if weight is None else weight.double().numpy()
    if short == "dist":
        return reference_logits.dist(s, t, w, **options)
    s, t = s.reshape(len(s), -1), t.reshape(len(t), -1)
    if short != "dark_rank":
        # These losses do not depend on scale, but squares in the loops could overflow. Powers of two divide exactly.
        s, t = (np.ldexp(x, -np.frexp(np.abs(x).max(initial=0))[1]) for x in (s, t))
    return getattr(reference_relations, short)(s, t, w, **options)


def edge_cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Students and teachers `(8, 12)` in float64, to be converted to `dtype`."""
    s, t = noise(8, 12), noise(8, 12, seed=1)
    limits = torch.finfo(dtype)
    large, small = min(1e30, limits.max / 4), limits.smallest_normal
    large_s, large_t = large * s / s.abs().max(), large * t / t.abs().max()
    row, pairs = torch.arange(8).unsqueeze(1), torch.arange(8) // 2
    peaks = 120 * torch.eye(8, 12)
    return {
        "noise": (s, t),
        "zero student rows": (s * (row > 1), t),
        "zero teacher rows": (s, t * (row > 1)),
        "zero rows": (s * (row > 3), t * (row > 1)),
        "all zero": (0 * s, 0 * t),
        "student all equal": (torch.ones(8, 12), t),
        "teacher all equal": (s, torch.ones(8, 12)),
        "constant": (torch.ones(8, 12), torch.ones(8, 12)),
        "equal rows": (s[:1].expand(8, 12), t[:1].expand(8, 12)),
        "equal pairs": (s[pairs], t),
        "equal pairs of both": (s[pairs], t[pairs]),
        "equal to the teacher": (s, s),
        "equal up to length": (s, 3 * s),
        "nearly equal": (s, s + 1e-3 * t),
        "opposite": (s, -s),
        "dead units": (s.clamp(min=0) * (torch.arange(12) % 3 == 0), t.clamp(min=0)),
        "three hundred": (300 * s.sign(), 300 * t),
        "large": (large_s, large_t),
        "large and small": (large_s, 1e-6 * t),
        "at the end": (limits.max * s.sign(), limits.max * t.sign()),
        "at both ends": (limits.max * t.sign(), -limits.max * t.sign()),
        "smallest": (small * s, t),
        "both smallest": (small * s, small * t),
        "one large row": (torch.where(row == 0, large_s, s), t),
        "one tiny row": (torch.where(row == 0, small * s, s), t),
        "offset of 1000": (s + 1000, t + 1000),
        "near": (s[pairs] + limits.eps * t, t),
        "difference of 120": (peaks, peaks.flip(0)),
        "one row": (s[:1], t[:1]),
        "one row of zeros": (0 * s[:1], t[:1]),
        "negative zeros": (-0.0 * s, t),
    }
