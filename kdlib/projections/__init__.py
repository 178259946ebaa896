"""Projections: stage 2, the student's features into the teacher's space. Imports only the shared checks."""

from kdlib.projections.conv import ConvProjection
from kdlib.projections.infer import infer_projection
from kdlib.projections.linear import LinearProjection
from kdlib.projections.token import TokenProjection

__all__ = ["ConvProjection", "LinearProjection", "TokenProjection", "infer_projection"]
