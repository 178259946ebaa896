"""Distillation losses as Modules; the functions are in `kdlib.functional`."""

from kdlib.losses.cross_layer.review_kd import ReviewKDLoss
from kdlib.losses.cross_layer.semckd import SemCKDLoss
from kdlib.losses.features.activation_boundary import ActivationBoundaryLoss
from kdlib.losses.features.angular import AngularDistillLoss
from kdlib.losses.features.attention import AttentionTransferLoss
from kdlib.losses.features.attentive_similarity import AttentiveSimilarityLoss
from kdlib.losses.features.contrastive_representation import ContrastiveRepresentationLoss
from kdlib.losses.features.factor_transfer import FactorTransferLoss, Paraphraser
from kdlib.losses.features.hierarchical_context import HierarchicalContextLoss
from kdlib.losses.features.hint import HintLoss
from kdlib.losses.features.masked_generative import MaskedGenerativeLoss
from kdlib.losses.features.nst import NSTLoss
from kdlib.losses.features.overhaul import OverhaulLoss
from kdlib.losses.features.variational_information import VariationalInformationLoss
from kdlib.losses.logits.decoupled_kd import DecoupledKDLoss
from kdlib.losses.logits.dist import DISTLoss
from kdlib.losses.logits.linear_soft_target import LinearSoftTargetLoss
from kdlib.losses.logits.soft_target import SoftTargetLoss
from kdlib.losses.relations.correlation_congruence import CorrelationCongruenceLoss
from kdlib.losses.relations.dark_rank import DarkRankLoss
from kdlib.losses.relations.log_sum import LogSumLoss
from kdlib.losses.relations.pkt import PKTLoss
from kdlib.losses.relations.rkd import RKDAngleLoss, RKDDistanceLoss
from kdlib.losses.relations.similarity_preserving import SimilarityPreservingLoss

__all__ = [
    "ActivationBoundaryLoss", "AngularDistillLoss", "AttentionTransferLoss", "AttentiveSimilarityLoss",
    "ContrastiveRepresentationLoss", "CorrelationCongruenceLoss", "DISTLoss", "DarkRankLoss", "DecoupledKDLoss",
    "FactorTransferLoss", "HierarchicalContextLoss", "HintLoss", "LinearSoftTargetLoss", "LogSumLoss",
    "MaskedGenerativeLoss", "NSTLoss", "OverhaulLoss", "PKTLoss", "Paraphraser", "RKDAngleLoss", "RKDDistanceLoss",
    "ReviewKDLoss", "SemCKDLoss", "SimilarityPreservingLoss", "SoftTargetLoss", "VariationalInformationLoss",
]  # fmt: skip
