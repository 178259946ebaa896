"""Face networks, (b, 3, h, w) images to (b, d) embeddings, and their checkpoint files.

`MobileFaceNet`, `mbf` and the MobileNets are lightweight students; `iresnet18` to `iresnet200`, the IR networks and
MTLFace's are teachers. `load_backbone` reads a checkpoint of this package or of a public project, `describe_checkpoint`
describes a file, and `describe_backbones` lists the cost of each network.
"""

from kdlib_faces.backbones.checkpoints.describe import CheckpointInfo, describe_checkpoint
from kdlib_faces.backbones.checkpoints.load import load_backbone
from kdlib_faces.backbones.checkpoints.save import save_backbone
from kdlib_faces.backbones.complexity import BackboneRow, count_macs, count_parameters, describe_backbones, latency_ms
from kdlib_faces.backbones.input_spec import InputSpec
from kdlib_faces.backbones.networks.base import Backbone
from kdlib_faces.backbones.networks.ir import (
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
from kdlib_faces.backbones.networks.iresnet import IResNet, iresnet18, iresnet34, iresnet50, iresnet100, iresnet200
from kdlib_faces.backbones.networks.mbf import MBF, MBFFlat, mbf
from kdlib_faces.backbones.networks.mobilefacenet import MobileFaceNet
from kdlib_faces.backbones.networks.mobilenet_v1 import MobileNetV1, mobilenet_v1_025
from kdlib_faces.backbones.networks.mobilenet_v2 import MobileNetV2
from kdlib_faces.backbones.networks.mtlface import MTLFaceNet
from kdlib_faces.backbones.registry import BACKBONES, build_backbone

__all__ = [
    "BACKBONES", "Backbone", "BackboneRow", "CheckpointInfo", "IRNet", "IResNet", "InputSpec", "MBF", "MBFFlat",
    "MTLFaceNet", "MobileFaceNet", "MobileNetV1", "MobileNetV2", "adaface_ir_101", "adaface_ir_18", "adaface_ir_50",
    "build_backbone", "count_macs", "count_parameters", "describe_backbones", "describe_checkpoint", "ir_101", "ir_152",
    "ir_50", "ir_se_101", "ir_se_152", "ir_se_50", "iresnet100", "iresnet18", "iresnet200", "iresnet34", "iresnet50",
    "latency_ms", "load_backbone", "mbf", "mobilenet_v1_025", "save_backbone",
]  # fmt: skip
