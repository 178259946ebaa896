"""Registry of backbones by name."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from kdlib._checks import check_name, check_number
from kdlib_faces._checks import InputError
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
from kdlib_faces.backbones.networks.mbf import MBFFlat, mbf
from kdlib_faces.backbones.networks.mobilefacenet import MobileFaceNet
from kdlib_faces.backbones.networks.mobilenet_v1 import MobileNetV1, mobilenet_v1_025
from kdlib_faces.backbones.networks.mobilenet_v2 import MobileNetV2
from kdlib_faces.backbones.networks.mtlface import MTLFaceNet

__all__ = ["BACKBONES", "build_backbone"]

MAX_PARAMETERS = 500_000_000
BACKBONES: dict[str, Callable[..., Backbone]] = {
    "mobilefacenet": MobileFaceNet,
    "mbf": mbf,
    "mbf_flat": MBFFlat,
    "mobilenet_v1_025": mobilenet_v1_025,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    **{each.__name__: each for each in (iresnet18, iresnet34, iresnet50, iresnet100, iresnet200)},
    "iresnet": IResNet,
    **{each.__name__: each for each in (ir_50, ir_101, ir_152, ir_se_50, ir_se_101, ir_se_152)},
    **{each.__name__: each for each in (adaface_ir_18, adaface_ir_50, adaface_ir_101)},
    "ir": IRNet,
    "mtlface": MTLFaceNet,
}
"""Names of backbones for recipes and saved files. `iresnet` and `ir` require the argument `layers`."""


def build_backbone(name: str, *, seed: int | None = None, **arguments: Any) -> Backbone:
    """Build a backbone by its name.

    Args:
        name: a key of `BACKBONES`.
        seed: seed of the initial weights, without changing torch's global generator; None uses the global generator.
        arguments: arguments of the constructor.

    Returns:
        The network, (b, 3, h, w) to (b, d).

    Raises:
        InputError: unknown name or argument, or an invalid value.

    Examples:
        >>> build_backbone("mobilefacenet", embedding_dim=64, width=0.25, input_size=32)
        MobileFaceNet(embedding_dim=64, width=0.25, input_size=32)
        >>> build_backbone("iresnet18", seed=0, width=0.125, input_size=32).layers
        (2, 2, 2, 2)
    """
    try:
        check_name("build_backbone", "backbone", name, BACKBONES)
        construct = BACKBONES[name]
        for argument in arguments:
            check_name("build_backbone", f"argument of {name}", argument, inspect.signature(construct).parameters)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in construct(**arguments).parameters())
        if count > MAX_PARAMETERS:
            sizes = f"{name} of these sizes has {count:,} parameters, more than {MAX_PARAMETERS:,}"
            raise ValueError(f"build_backbone: {sizes}; reduce input_size, width or embedding_dim")
        if seed is None:
            return construct(**arguments)
        check_number("build_backbone", "seed", seed, min=0, integer=True)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return construct(**arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(str(error).splitlines()[0]) from error
