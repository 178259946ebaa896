"""Margin softmax heads, which map embeddings and identities to a classification loss.

A head contains the class centers and is used in training only. Each head is a function and a Module, and is the loss of
a `Term`: `Term(ArcFaceHead(512, n), student="embedding", target="identity")`.
"""

from kdlib_faces.heads.arcface import ArcFaceHead, arcface_loss
from kdlib_faces.heads.cosface import CosFaceHead, cosface_loss
from kdlib_faces.heads.partial_fc import load_partial_fc, merge_partial_fc

__all__ = ["ArcFaceHead", "CosFaceHead", "arcface_loss", "cosface_loss", "load_partial_fc", "merge_partial_fc"]
