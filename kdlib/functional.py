"""Every loss as a function of tensors."""

from kdlib.losses.features.activation_boundary import activation_boundary
from kdlib.losses.features.angular import angular_distill
from kdlib.losses.features.attention import attention_map, attention_transfer
from kdlib.losses.features.attentive_similarity import attentive_similarity, channel_attention_map
from kdlib.losses.features.contrastive_representation import contrastive_representation
from kdlib.losses.features.factor_transfer import factor_transfer
from kdlib.losses.features.hierarchical_context import hierarchical_context
from kdlib.losses.features.hint import hint
from kdlib.losses.features.nst import nst
from kdlib.losses.features.overhaul import overhaul, overhaul_margin
from kdlib.losses.features.variational_information import variational_information
from kdlib.losses.logits.decoupled_kd import decoupled_kd
from kdlib.losses.logits.dist import dist
from kdlib.losses.logits.linear_soft_target import linear_soft_target
from kdlib.losses.logits.soft_target import soft_target
from kdlib.losses.relations.correlation_congruence import correlation_congruence
from kdlib.losses.relations.dark_rank import dark_rank
from kdlib.losses.relations.log_sum import log_sum
from kdlib.losses.relations.pkt import pkt
from kdlib.losses.relations.rkd import rkd_angle, rkd_distance
from kdlib.losses.relations.similarity_preserving import similarity_preserving

__all__ = [
    "activation_boundary", "angular_distill", "attention_map", "attention_transfer", "attentive_similarity",
    "channel_attention_map", "contrastive_representation", "correlation_congruence", "dark_rank", "decoupled_kd",
    "dist", "factor_transfer", "hierarchical_context", "hint", "linear_soft_target", "log_sum", "nst", "overhaul",
    "overhaul_margin", "pkt", "rkd_angle", "rkd_distance", "similarity_preserving", "soft_target",
    "variational_information",
]  # fmt: skip
