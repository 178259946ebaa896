"""Knowledge distillation as composable PyTorch Modules.

Data flows through the packages in this order, and each package imports only packages above it:

- `kdlib.adapters`, `kdlib.cache`: turn a model and its taps, or stored teacher outputs, into named features;
- `kdlib.projections`: map student features into the teacher's feature space;
- `kdlib.losses`: compare a student tensor with a teacher tensor; `kdlib.functional` has the same losses as functions;
- `kdlib.weighting`: compute one weight per teacher and sample from the losses of several teachers;
- `kdlib.schedules`: functions of the step for weights of terms, temperatures and the learning rate;
- `kdlib.objective`: add named terms up to one scalar (`Objective`);
- `kdlib.distiller`: run student, teachers and objective on a batch (`Distiller`);
- `kdlib.online`: teachers that change during training: running mean, peers, the student itself;
- `kdlib.training`: a training loop with exact resume after interruption (`train`);
- `kdlib.evaluation`: measure how similar student and teacher are.
"""

import sys
from typing import TYPE_CHECKING

from kdlib import (
    adapters,
    distiller,
    functional,
    influence,
    losses,
    objective,
    online,
    projections,
    schedules,
    weighting,
)
from kdlib._arguments import prepare_arguments
from kdlib._checks import nearest
from kdlib.adapters import OUTPUT, StudentAdapter, Tap, TeacherAdapter, list_taps, match_taps
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
    FactorTransferLoss,
    HierarchicalContextLoss,
    HintLoss,
    LinearSoftTargetLoss,
    LogSumLoss,
    MaskedGenerativeLoss,
    NSTLoss,
    OverhaulLoss,
    Paraphraser,
    PKTLoss,
    ReviewKDLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SemCKDLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
    VariationalInformationLoss,
)
from kdlib.objective import Objective, ObjectiveOutput, Term
from kdlib.online import AuxiliaryHeads, EMATeacher, MutualDistiller, SelfTeacher
from kdlib.projections import ConvProjection, LinearProjection, TokenProjection, infer_projection
from kdlib.types import Features, Loss, Projection, Schedule, Targets, Teacher, Weighting
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
    from kdlib.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "ActivationBoundaryLoss", "AngularDistillLoss", "AttentionTransferLoss", "AttentiveSimilarityLoss",
    "AuxiliaryHeads", "CachedTeacher", "CenterConfidenceWeighting", "ConfidenceWeighting",
    "ContrastiveRepresentationLoss", "ConvProjection", "CorrelationCongruenceLoss", "DISTLoss", "DarkRankLoss",
    "DecoupledKDLoss", "Distiller", "EMATeacher", "EntropyWeighting", "FactorTransferLoss", "Features",
    "FixedWeighting", "GateWeighting", "GradientWeighting", "HierarchicalContextLoss", "HintLoss", "InfluenceReport",
    "LinearProjection", "LinearSoftTargetLoss", "LogSumLoss", "Loss", "MaskedGenerativeLoss", "MutualDistiller",
    "NSTLoss", "OUTPUT", "Objective", "ObjectiveOutput", "OverhaulLoss", "PKTLoss", "Paraphraser", "Projection",
    "RKDAngleLoss", "RKDDistanceLoss", "ReviewKDLoss", "Schedule", "SelfTeacher", "SemCKDLoss",
    "SimilarityPreservingLoss", "SoftTargetLoss", "StudentAdapter", "Tap", "Targets", "Teacher", "TeacherAdapter",
    "TeacherCache", "Term", "TokenProjection", "TrainConfig", "TrainResult", "UncertaintyWeighting",
    "UniformWeighting", "VariationalInformationLoss", "Weighting", "__version__", "infer_projection", "list_taps",
    "match_taps", "train",
]  # fmt: skip

for _module in (
    adapters,
    distiller,
    functional,
    influence,
    losses,
    objective,
    online,
    projections,
    schedules,
    weighting,
):
    prepare_arguments(vars(_module), _module.__all__)
prepare_arguments(globals(), __all__)


def __getattr__(name: str) -> object:
    # Keeping a cache out of compiled graphs loads torch's compiler, which takes as long as torch itself.
    if name in ("CachedTeacher", "TeacherCache"):
        from kdlib import cache

        value: object = getattr(cache, name)
        return value
    # Many users have a loop of their own, and this package takes a large part of the time of `import kdlib`.
    if name in ("TrainConfig", "TrainResult", "train", "training"):
        import kdlib.training as training

        value = training if name == "training" else getattr(training, name)
        return value
    hint = "" if name.startswith("_") else nearest(name, __all__)
    if name in getattr(sys.modules.get("kdlib.functional"), "__all__", ()):
        hint = f"; functions are in kdlib.functional: kdlib.functional.{name}"
    raise AttributeError(f"module 'kdlib' has no attribute {name!r}{hint}")
