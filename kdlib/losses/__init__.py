"""Distillation losses as Modules; the functions are in `kdlib.functional`."""

from kdlib.losses.activation_boundary import ActivationBoundaryLoss
from kdlib.losses.angular import AngularDistillLoss
from kdlib.losses.attention import AttentionTransferLoss
from kdlib.losses.attentive_similarity import AttentiveSimilarityLoss
from kdlib.losses.contrastive_representation import ContrastiveRepresentationLoss
from kdlib.losses.correlation_congruence import CorrelationCongruenceLoss
from kdlib.losses.dark_rank import DarkRankLoss
from kdlib.losses.decoupled_kd import DecoupledKDLoss
from kdlib.losses.dist import DISTLoss
from kdlib.losses.hierarchical_context import HierarchicalContextLoss
from kdlib.losses.hint import HintLoss
from kdlib.losses.nst import NSTLoss
from kdlib.losses.overhaul import OverhaulLoss
from kdlib.losses.pkt import PKTLoss
from kdlib.losses.rkd import RKDAngleLoss, RKDDistanceLoss
from kdlib.losses.similarity_preserving import SimilarityPreservingLoss
from kdlib.losses.soft_target import SoftTargetLoss
from kdlib.losses.variational_information import VariationalInformationLoss

__all__ = [
    "ActivationBoundaryLoss", "AngularDistillLoss", "AttentionTransferLoss", "AttentiveSimilarityLoss",
    "ContrastiveRepresentationLoss", "CorrelationCongruenceLoss", "DISTLoss", "DarkRankLoss", "DecoupledKDLoss",
    "HierarchicalContextLoss", "HintLoss", "NSTLoss", "OverhaulLoss", "PKTLoss", "RKDAngleLoss", "RKDDistanceLoss",
    "SimilarityPreservingLoss", "SoftTargetLoss", "VariationalInformationLoss",
]  # fmt: skip
