"""Heads room: margin heads, embeddings and identities to a classification loss. Imports the core's checks and maths.

A head holds the class centers and is part of training only; it is not exported. Each is a function and a Module, and
stands in a `Term` as its loss: `Term(ArcFaceHead(512, n), student="embedding", target="identity")`.
"""

from kdlib_faces.heads.arcface import ArcFaceHead, arcface_loss
from kdlib_faces.heads.cosface import CosFaceHead, cosface_loss
from kdlib_faces.heads.partial_fc import load_partial_fc, merge_partial_fc

__all__ = ["ArcFaceHead", "CosFaceHead", "arcface_loss", "cosface_loss", "load_partial_fc", "merge_partial_fc"]
