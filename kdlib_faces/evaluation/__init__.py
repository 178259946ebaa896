"""Evaluation of face embeddings: verification, identification and breakdowns by age, with confidence intervals.

evaluate(embeddings, PairProtocol(left, right, same))        accuracy over folds, as LFW and the `.bin` sets publish it
evaluate(embeddings, LeaveOneOutProtocol(identities))        identification, as FG-NET publishes it
evaluate(embeddings, DistractorProtocol(identities, others)) identification among a million distractors, as MegaFace
evaluate(embeddings, TemplateVerificationProtocol(...))      templates 1:1, as IJB-B and IJB-C publish it
evaluate(embeddings, TemplateIdentificationProtocol(...))    templates 1:N over galleries, likewise
evaluate(embeddings, AgeGapProtocol(identities, ages=ages))  TAR and AUC by the years between two images
evaluate(embeddings, AgeErrorProtocol(identities, ages=...)) FNMR and FMR by gap, by the younger age, and the slope
evaluate(embeddings, CrossGroupProtocol(identities, groups)) one age group against another, as LAG publishes it
evaluate(embeddings, LongitudinalProtocol(identities, ages)) scores of an identity over the years, defined here
"""

from kdlib_faces.evaluation.comparison import compare
from kdlib_faces.evaluation.embedding import embed_images, evaluate_images
from kdlib_faces.evaluation.fold_thresholds import FoldTar
from kdlib_faces.evaluation.identification import identify_with_distractors
from kdlib_faces.evaluation.matching.all_pairs import ScoredPairs
from kdlib_faces.evaluation.matching.distractors import DistractorTrials, GapRates
from kdlib_faces.evaluation.matching.galleries import Gallery, GalleryPoint, GallerySearch
from kdlib_faces.evaluation.matching.templates import Templates, pool_templates
from kdlib_faces.evaluation.protocol import EvaluationProtocol, ProtocolResult, Result, evaluate
from kdlib_faces.evaluation.protocols.age_errors import AgeErrorProtocol, AgeErrorResult, ErrorBin
from kdlib_faces.evaluation.protocols.age_gap import AgeGapProtocol, AgeGapResult
from kdlib_faces.evaluation.protocols.cross_group import CrossGroupProtocol, CrossGroupResult
from kdlib_faces.evaluation.protocols.distractors import DistractorProtocol, DistractorResult
from kdlib_faces.evaluation.protocols.leave_one_out import (
    BinRates,
    LeaveOneOutProtocol,
    LeaveOneOutResult,
    leave_one_out,
)
from kdlib_faces.evaluation.protocols.longitudinal import ElapsedErrors, LongitudinalProtocol, LongitudinalResult
from kdlib_faces.evaluation.protocols.pair_sets import PAIR_SETS, PairSet, pair_set
from kdlib_faces.evaluation.protocols.pairs import PairProtocol, PairResult
from kdlib_faces.evaluation.protocols.template_identification import (
    TemplateIdentificationProtocol,
    TemplateIdentificationResult,
    identify_templates,
)
from kdlib_faces.evaluation.protocols.template_verification import (
    TemplateVerificationProtocol,
    TemplateVerificationResult,
    template_verification,
)
from kdlib_faces.evaluation.roc import TarAtFar, auc, roc_points, tar_at_far
from kdlib_faces.evaluation.splits import (
    IdentityOverlapWarning,
    check_identity_disjoint,
    identities_in_several_folds,
    identity_disjoint_split,
    identity_overlap,
    positives_first_folds,
)
from kdlib_faces.evaluation.statistics.clustered import clustered_rate
from kdlib_faces.evaluation.statistics.intervals import (
    Estimate,
    Sampling,
    bootstrap_estimate,
    identity_bootstrap,
    paired_difference,
    wilson,
)
from kdlib_faces.evaluation.statistics.paired import Outcomes, PairedTest, paired_test
from kdlib_faces.evaluation.statistics.resampling import BinResult
from kdlib_faces.evaluation.verification import VerificationResult, verify_pairs

__all__ = [
    "AgeErrorProtocol", "AgeErrorResult", "AgeGapProtocol", "AgeGapResult", "BinRates", "BinResult",
    "CrossGroupProtocol", "CrossGroupResult", "DistractorProtocol", "DistractorResult", "DistractorTrials",
    "ElapsedErrors", "ErrorBin", "Estimate", "EvaluationProtocol", "FoldTar", "Gallery", "GalleryPoint",
    "GallerySearch", "GapRates", "IdentityOverlapWarning", "LeaveOneOutProtocol", "LeaveOneOutResult",
    "LongitudinalProtocol", "LongitudinalResult", "Outcomes", "PAIR_SETS", "PairProtocol", "PairResult", "PairSet",
    "PairedTest", "ProtocolResult", "Result", "Sampling", "ScoredPairs", "TarAtFar", "TemplateIdentificationProtocol",
    "TemplateIdentificationResult", "TemplateVerificationProtocol", "TemplateVerificationResult", "Templates",
    "VerificationResult", "auc", "bootstrap_estimate", "check_identity_disjoint", "clustered_rate", "compare",
    "embed_images", "evaluate", "evaluate_images", "identify_templates", "identify_with_distractors",
    "identities_in_several_folds", "identity_bootstrap", "identity_disjoint_split", "identity_overlap", "leave_one_out",
    "pair_set", "paired_difference", "paired_test", "pool_templates", "positives_first_folds", "roc_points",
    "tar_at_far", "template_verification", "verify_pairs", "wilson",
]  # fmt: skip
