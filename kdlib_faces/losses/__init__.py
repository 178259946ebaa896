"""Faces losses room: distillation losses that make sense for faces alone. Imports the heads and the core's losses.

Each takes the student's and a teacher's embeddings and, as `target`, the identities; one method a file, the function
and its Module together.
"""

from kdlib_faces.losses.adaptive_centers import AdaptiveCentersLoss, adapted_centers
from kdlib_faces.losses.evaluation_oriented import EvaluationOrientedLoss, evaluation_oriented, negative_thresholds
from kdlib_faces.losses.margin_distill import MarginDistillLoss, centers_from, margin_distill
from kdlib_faces.losses.triplet_distill import TripletDistillLoss, triplet_distill

__all__ = [
    "AdaptiveCentersLoss",
    "EvaluationOrientedLoss",
    "MarginDistillLoss",
    "TripletDistillLoss",
    "adapted_centers",
    "centers_from",
    "evaluation_oriented",
    "margin_distill",
    "negative_thresholds",
    "triplet_distill",
]
