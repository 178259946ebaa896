"""Evaluation room: embeddings in, numbers with intervals out. NumPy only, and torch where a model is to be run; reads no file.

evaluate(embeddings, PairProtocol(left, right, same))        accuracy over folds, as LFW and the `.bin` sets publish it
evaluate(embeddings, LeaveOneOutProtocol(identities))        identification, as FG-NET publishes it
evaluate(embeddings, DistractorProtocol(identities, others)) among a million strangers, as MegaFace publishes it
evaluate(embeddings, TemplateVerificationProtocol(...))      templates 1:1, as IJB-B and IJB-C publish it
evaluate(embeddings, TemplateIdentificationProtocol(...))    templates 1:N over galleries, likewise
evaluate(embeddings, AgeGapProtocol(identities, ages=ages))  TAR and AUC by the years between two images
evaluate(embeddings, AgeErrorProtocol(identities, ages=...)) FNMR and FMR by gap, by the younger age, and the slope
evaluate(embeddings, CrossGroupProtocol(identities, groups)) young against adult, as LAG
evaluate(embeddings, LongitudinalProtocol(identities, ages)) a person's score over the years; a protocol of our own
"""

from kdlib_faces.evaluation.all_pairs import ScoredPairs
from kdlib_faces.evaluation.comparison import compare
from kdlib_faces.evaluation.embedding import embed_images, evaluate_images
from kdlib_faces.evaluation.fold_thresholds import FoldTar
from kdlib_faces.evaluation.hardest import hardest_pairs
from kdlib_faces.evaluation.protocol import EvaluationProtocol, LeaveOneOutProtocol, Result, evaluate
from kdlib_faces.evaluation.protocols.age_errors import AgeErrorProtocol, AgeErrorResult, ErrorBin
from kdlib_faces.evaluation.protocols.age_gap import AgeGapProtocol
from kdlib_faces.evaluation.protocols.age_gap_result import AgeGapResult, BinResult
from kdlib_faces.evaluation.protocols.cross_group import CrossGroupProtocol, CrossGroupResult
from kdlib_faces.evaluation.protocols.distractor_result import DistractorResult, DistractorTrials, GapRates
from kdlib_faces.evaluation.protocols.distractors import DistractorProtocol, identify_with_distractors
from kdlib_faces.evaluation.protocols.leave_one_out import (
    BinRates,
    LeaveOneOutResult,
    leave_one_out,
    leave_one_out_result,
)
from kdlib_faces.evaluation.protocols.longitudinal import ElapsedErrors, LongitudinalProtocol, LongitudinalResult
from kdlib_faces.evaluation.protocols.pairs import PAIR_SETS, PairProtocol, PairSet, pair_set
from kdlib_faces.evaluation.protocols.template_identification import (
    GalleryPoint,
    GallerySearch,
    TemplateIdentificationProtocol,
    TemplateIdentificationResult,
    identify_templates,
)
from kdlib_faces.evaluation.protocols.template_verification import (
    TemplateVerificationProtocol,
    TemplateVerificationResult,
    template_verification,
    verify_templates,
)
from kdlib_faces.evaluation.roc import TarAtFar, auc, roc_points, tar_at_far
from kdlib_faces.evaluation.splits import (
    IdentityOverlapWarning,
    check_identity_disjoint,
    identities_in_several_folds,
    identity_disjoint_split,
    identity_overlap,
    positives_first_folds,
    warn_identity_overlap,
)
from kdlib_faces.evaluation.statistics.clustered import clustered_rate
from kdlib_faces.evaluation.statistics.intervals import (
    Estimate,
    bootstrap_estimate,
    identity_bootstrap,
    paired_difference,
    wilson,
)
from kdlib_faces.evaluation.statistics.paired import PairedTest, paired_test
from kdlib_faces.evaluation.templates import Templates, pool_templates
from kdlib_faces.evaluation.verification import VerificationResult, verify_pairs

__all__ = [
    "AgeErrorProtocol",
    "AgeErrorResult",
    "AgeGapProtocol",
    "AgeGapResult",
    "BinRates",
    "BinResult",
    "CrossGroupProtocol",
    "CrossGroupResult",
    "DistractorProtocol",
    "DistractorResult",
    "DistractorTrials",
    "ElapsedErrors",
    "ErrorBin",
    "Estimate",
    "EvaluationProtocol",
    "FoldTar",
    "GalleryPoint",
    "GallerySearch",
    "GapRates",
    "IdentityOverlapWarning",
    "LeaveOneOutProtocol",
    "LeaveOneOutResult",
    "LongitudinalProtocol",
    "LongitudinalResult",
    "PAIR_SETS",
    "PairProtocol",
    "PairSet",
    "PairedTest",
    "Result",
    "ScoredPairs",
    "TarAtFar",
    "TemplateIdentificationProtocol",
    "TemplateIdentificationResult",
    "TemplateVerificationProtocol",
    "TemplateVerificationResult",
    "Templates",
    "VerificationResult",
    "auc",
    "bootstrap_estimate",
    "check_identity_disjoint",
    "clustered_rate",
    "compare",
    "embed_images",
    "evaluate",
    "evaluate_images",
    "hardest_pairs",
    "identify_templates",
    "identify_with_distractors",
    "identities_in_several_folds",
    "identity_bootstrap",
    "identity_disjoint_split",
    "identity_overlap",
    "leave_one_out",
    "leave_one_out_result",
    "pair_set",
    "paired_difference",
    "paired_test",
    "pool_templates",
    "positives_first_folds",
    "roc_points",
    "tar_at_far",
    "template_verification",
    "verify_pairs",
    "verify_templates",
    "warn_identity_overlap",
    "wilson",
]
