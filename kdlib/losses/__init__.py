"""Losses: stage 3, `(student, teacher)` tensors to a scalar or `(b,)`. Imports only the shared checks.

One method a file, the function and its Module together. The Modules are gathered here; the functions in
`kdlib.functional`.
"""

from kdlib.losses.angular import AngularDistillLoss
from kdlib.losses.attention import AttentionTransferLoss
from kdlib.losses.attentive_similarity import AttentiveSimilarityLoss
from kdlib.losses.contrastive_representation import ContrastiveRepresentationLoss
from kdlib.losses.correlation_congruence import CorrelationCongruenceLoss
from kdlib.losses.decoupled_kd import DecoupledKDLoss
from kdlib.losses.dist import DISTLoss
from kdlib.losses.hint import HintLoss
from kdlib.losses.nst import NSTLoss
from kdlib.losses.pkt import PKTLoss
from kdlib.losses.rkd import RKDAngleLoss, RKDDistanceLoss
from kdlib.losses.similarity_preserving import SimilarityPreservingLoss
from kdlib.losses.soft_target import SoftTargetLoss
from kdlib.losses.variational_information import VariationalInformationLoss

__all__ = [
    "AngularDistillLoss",
    "AttentionTransferLoss",
    "AttentiveSimilarityLoss",
    "ContrastiveRepresentationLoss",
    "CorrelationCongruenceLoss",
    "DISTLoss",
    "DecoupledKDLoss",
    "HintLoss",
    "NSTLoss",
    "PKTLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "SimilarityPreservingLoss",
    "SoftTargetLoss",
    "VariationalInformationLoss",
]
