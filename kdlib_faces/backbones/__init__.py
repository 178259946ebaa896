"""Backbones room: face networks, (b, 3, h, w) images to (b, d) embeddings. Imports torch and the core's checks.

`MobileFaceNet`, `mbf` and the MobileNets are light students; `iresnet18` to `iresnet200`, the IR networks and MTLFace's
are teachers. Each has `embedding_dim`, `input_size`, `input_spec`, what its images must be, and `stages`, the module paths
that serve as taps. `load_backbone` reads a checkpoint of ours or of a public project and `describe_checkpoint` says what
one is; `describe_backbones` says what each network costs.
"""

from kdlib_faces.backbones.checkpoint import CheckpointInfo, describe_checkpoint
from kdlib_faces.backbones.complexity import (
    BackboneRow,
    count_macs,
    count_parameters,
    describe_backbones,
    latency_ms,
)
from kdlib_faces.backbones.input_spec import InputSpec
from kdlib_faces.backbones.ir import (
    IRNet,
    adaface_ir_18,
    adaface_ir_50,
    adaface_ir_101,
    ir_50,
    ir_101,
    ir_152,
    ir_se_50,
    ir_se_101,
    ir_se_152,
)
from kdlib_faces.backbones.iresnet import IResNet, iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from kdlib_faces.backbones.load import load_backbone
from kdlib_faces.backbones.mbf import MBF, mbf
from kdlib_faces.backbones.mbf_flat import MBFFlat
from kdlib_faces.backbones.mobilefacenet import MobileFaceNet
from kdlib_faces.backbones.mobilenet_v1 import MobileNetV1, mobilenet_v1, mobilenet_v1_025
from kdlib_faces.backbones.mobilenet_v2 import MobileNetV2, mobilenet_v2
from kdlib_faces.backbones.mtlface import MTLFaceNet
from kdlib_faces.backbones.registry import BACKBONES, Backbone, build_backbone
from kdlib_faces.backbones.save import save_backbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneRow",
    "CheckpointInfo",
    "IRNet",
    "IResNet",
    "InputSpec",
    "MBF",
    "MBFFlat",
    "MTLFaceNet",
    "MobileFaceNet",
    "MobileNetV1",
    "MobileNetV2",
    "adaface_ir_101",
    "adaface_ir_18",
    "adaface_ir_50",
    "build_backbone",
    "count_macs",
    "count_parameters",
    "describe_backbones",
    "describe_checkpoint",
    "ir_101",
    "ir_152",
    "ir_50",
    "ir_se_101",
    "ir_se_152",
    "ir_se_50",
    "iresnet100",
    "iresnet18",
    "iresnet200",
    "iresnet34",
    "iresnet50",
    "latency_ms",
    "load_backbone",
    "mbf",
    "mobilenet_v1",
    "mobilenet_v1_025",
    "mobilenet_v2",
    "save_backbone",
]
