"""Evaluation room: embeddings in, numbers with intervals out. NumPy only; knows no model, no image and no file.

evaluate(embeddings, PairProtocol(left, right, same))       accuracy over folds, as LFW and the `.bin` sets publish it
evaluate(embeddings, LeaveOneOutProtocol(identities))       identification, as FG-NET publishes it
evaluate(embeddings, AgeGapProtocol(identities, ages=ages)) TAR and AUC by the years between two images
"""

from kdlib_faces.evaluation.age import AgeGapProtocol
from kdlib_faces.evaluation.age_result import AgeGapResult, BinResult
from kdlib_faces.evaluation.comparison import compare
from kdlib_faces.evaluation.hardest import hardest_pairs
from kdlib_faces.evaluation.identification import LeaveOneOutResult, leave_one_out, leave_one_out_result
from kdlib_faces.evaluation.intervals import (
    Estimate,
    bootstrap_estimate,
    identity_bootstrap,
    paired_difference,
    wilson,
)
from kdlib_faces.evaluation.protocols import EvaluationProtocol, LeaveOneOutProtocol, PairProtocol, Result, evaluate
from kdlib_faces.evaluation.roc import TarAtFar, auc, roc_points, tar_at_far
from kdlib_faces.evaluation.splits import check_identity_disjoint, identity_disjoint_split
from kdlib_faces.evaluation.verification import VerificationResult, verify_pairs

__all__ = [
    "AgeGapProtocol",
    "AgeGapResult",
    "BinResult",
    "Estimate",
    "EvaluationProtocol",
    "LeaveOneOutProtocol",
    "LeaveOneOutResult",
    "PairProtocol",
    "Result",
    "TarAtFar",
    "VerificationResult",
    "auc",
    "bootstrap_estimate",
    "check_identity_disjoint",
    "compare",
    "evaluate",
    "hardest_pairs",
    "identity_bootstrap",
    "identity_disjoint_split",
    "leave_one_out",
    "leave_one_out_result",
    "paired_difference",
    "roc_points",
    "tar_at_far",
    "verify_pairs",
    "wilson",
]
