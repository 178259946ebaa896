"""Projections that map student features into the teacher's feature space."""

from kdlib.projections.conv import ConvProjection
from kdlib.projections.infer import infer_projection
from kdlib.projections.linear import LinearProjection
from kdlib.projections.token import TokenProjection

__all__ = ["ConvProjection", "LinearProjection", "TokenProjection", "infer_projection"]
