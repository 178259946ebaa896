"""kdlib: knowledge distillation as composable Modules. Data flows one way:

inputs -> adapters     a model and its taps become named features
       -> projections  student features enter the teacher's space
       -> losses       (student, teacher) tensors become a value a sample
       -> weighting    k teachers become one weight a teacher and sample
       -> objective    named terms become one scalar; Distiller runs it all
       -> training     one loop that survives kills
       -> evaluation   is the student like its teacher?

`kdlib.functional` holds every loss as a plain function.
"""

from typing import TYPE_CHECKING

from kdlib.adapters import OUTPUT, StudentAdapter, Tap, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.influence import InfluenceReport
from kdlib.losses import (
    ActivationBoundaryLoss,
    AngularDistillLoss,
    AttentionTransferLoss,
    AttentiveSimilarityLoss,
    ContrastiveRepresentationLoss,
    CorrelationCongruenceLoss,
    DarkRankLoss,
    DecoupledKDLoss,
    DISTLoss,
    HierarchicalContextLoss,
    HintLoss,
    NSTLoss,
    OverhaulLoss,
    PKTLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
    VariationalInformationLoss,
)
from kdlib.objective import Objective, ObjectiveOutput, Term
from kdlib.projections import ConvProjection, LinearProjection, TokenProjection, infer_projection
from kdlib.training import TrainConfig, TrainResult, train
from kdlib.types import Features, Loss, Projection, Targets, Weighting
from kdlib.weighting import (
    CenterConfidenceWeighting,
    ConfidenceWeighting,
    EntropyWeighting,
    FixedWeighting,
    GateWeighting,
    GradientWeighting,
    UncertaintyWeighting,
    UniformWeighting,
)

if TYPE_CHECKING:
    from kdlib.cache import CachedTeacher, TeacherCache

__version__ = "0.1.0"

__all__ = [
    "ActivationBoundaryLoss",
    "AngularDistillLoss",
    "AttentionTransferLoss",
    "AttentiveSimilarityLoss",
    "CachedTeacher",
    "CenterConfidenceWeighting",
    "ConfidenceWeighting",
    "ContrastiveRepresentationLoss",
    "ConvProjection",
    "CorrelationCongruenceLoss",
    "DISTLoss",
    "DarkRankLoss",
    "DecoupledKDLoss",
    "Distiller",
    "EntropyWeighting",
    "Features",
    "FixedWeighting",
    "GateWeighting",
    "GradientWeighting",
    "HierarchicalContextLoss",
    "HintLoss",
    "InfluenceReport",
    "LinearProjection",
    "Loss",
    "NSTLoss",
    "OUTPUT",
    "Objective",
    "ObjectiveOutput",
    "OverhaulLoss",
    "PKTLoss",
    "Projection",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "SimilarityPreservingLoss",
    "SoftTargetLoss",
    "StudentAdapter",
    "Tap",
    "Targets",
    "TeacherAdapter",
    "TeacherCache",
    "Term",
    "TokenProjection",
    "TrainConfig",
    "TrainResult",
    "UncertaintyWeighting",
    "UniformWeighting",
    "VariationalInformationLoss",
    "Weighting",
    "__version__",
    "infer_projection",
    "train",
]


def __getattr__(name: str) -> object:
    # Keeping a cache out of compiled graphs loads torch's compiler, which takes as long as torch itself.
    if name in ("CachedTeacher", "TeacherCache"):
        from kdlib import cache

        value: object = getattr(cache, name)
        return value
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}")
