"""Margin softmax heads, which map embeddings and identities to a classification loss.

A head contains the class centers and is used in training only. Each head is a function and a Module, and is the loss of
a `Term`: `Term(ArcFaceHead(512, n), student="embedding", target="identity")`.
"""

from kdlib_faces.heads.adaface import AdaFaceHead, adaface_loss
from kdlib_faces.heads.arcface import ArcFaceHead, arcface_loss
from kdlib_faces.heads.combined import CombinedMarginHead, combined_margin_loss
from kdlib_faces.heads.cosface import CosFaceHead, cosface_loss
from kdlib_faces.heads.curricular import CurricularFaceHead, curricularface_loss
from kdlib_faces.heads.elastic import ElasticFaceHead, elasticface_loss
from kdlib_faces.heads.magface import MagFaceHead, magface_loss
from kdlib_faces.heads.partial_fc import load_partial_fc, merge_partial_fc
from kdlib_faces.heads.sampled import SampledHead, skip_rows_without_gradient
from kdlib_faces.heads.shard import shard_head
from kdlib_faces.heads.sub_center import SubCenterArcFaceHead, sub_center_arcface_loss

__all__ = [
    "AdaFaceHead", "ArcFaceHead", "CombinedMarginHead", "CosFaceHead", "CurricularFaceHead", "ElasticFaceHead",
    "MagFaceHead", "SampledHead", "SubCenterArcFaceHead", "adaface_loss", "arcface_loss", "combined_margin_loss", "cosface_loss",
    "curricularface_loss", "elasticface_loss", "load_partial_fc", "magface_loss", "merge_partial_fc",
    "shard_head", "skip_rows_without_gradient", "sub_center_arcface_loss",
]  # fmt: skip
