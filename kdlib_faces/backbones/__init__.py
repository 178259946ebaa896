"""Backbones room: face networks, (b, 3, h, w) images to (b, d) embeddings. Imports torch and the core's checks.

`MobileFaceNet` and `mbf` are light students; `iresnet18` to `iresnet200` are teachers. Each has `embedding_dim`,
`input_size` and `stages`, the module paths that serve as taps. `load_backbone` reads a checkpoint; `describe_backbones`
says what each costs.
"""

from kdlib_faces.backbones.complexity import (
    BackboneRow,
    count_macs,
    count_parameters,
    describe_backbones,
    latency_ms,
)
from kdlib_faces.backbones.iresnet import IResNet, iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from kdlib_faces.backbones.load import load_backbone, save_backbone
from kdlib_faces.backbones.mbf import MBF, mbf
from kdlib_faces.backbones.mobilefacenet import MobileFaceNet
from kdlib_faces.backbones.registry import BACKBONES, Backbone, build_backbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneRow",
    "IResNet",
    "MBF",
    "MobileFaceNet",
    "build_backbone",
    "count_macs",
    "count_parameters",
    "describe_backbones",
    "iresnet100",
    "iresnet18",
    "iresnet200",
    "iresnet34",
    "iresnet50",
    "latency_ms",
    "load_backbone",
    "mbf",
    "save_backbone",
]
