"""Distillation losses for face embeddings, which also take the identities as `target`."""

from kdlib_faces.losses.adaptive_centers import AdaptiveCentersLoss, adapted_centers
from kdlib_faces.losses.evaluation_oriented import EvaluationOrientedLoss, evaluation_oriented, negative_thresholds
from kdlib_faces.losses.margin_distill import MarginDistillLoss, centers_from, margin_distill
from kdlib_faces.losses.triplet_distill import TripletDistillLoss, triplet_distill

__all__ = [
    "AdaptiveCentersLoss", "EvaluationOrientedLoss", "MarginDistillLoss", "TripletDistillLoss", "adapted_centers",
    "centers_from", "evaluation_oriented", "margin_distill", "negative_thresholds", "triplet_distill",
]  # fmt: skip
