"""Every loss as a function of tensors."""

from kdlib.losses.activation_boundary import activation_boundary
from kdlib.losses.angular import angular_distill
from kdlib.losses.attention import attention_map, attention_transfer
from kdlib.losses.attentive_similarity import attentive_similarity, channel_attention_map
from kdlib.losses.contrastive_representation import contrastive_representation
from kdlib.losses.correlation_congruence import correlation_congruence
from kdlib.losses.dark_rank import dark_rank
from kdlib.losses.decoupled_kd import decoupled_kd
from kdlib.losses.dist import dist
from kdlib.losses.hierarchical_context import hierarchical_context
from kdlib.losses.hint import hint
from kdlib.losses.nst import nst
from kdlib.losses.overhaul import overhaul, overhaul_margin
from kdlib.losses.pkt import pkt
from kdlib.losses.rkd import rkd_angle, rkd_distance
from kdlib.losses.similarity_preserving import similarity_preserving
from kdlib.losses.soft_target import soft_target
from kdlib.losses.variational_information import variational_information

__all__ = [
    "activation_boundary", "angular_distill", "attention_map", "attention_transfer", "attentive_similarity",
    "channel_attention_map", "contrastive_representation", "correlation_congruence", "dark_rank", "decoupled_kd",
    "dist", "hierarchical_context", "hint", "nst", "overhaul", "overhaul_margin", "pkt", "rkd_angle", "rkd_distance",
    "similarity_preserving", "soft_target", "variational_information",
]  # fmt: skip
