"""Attention maps of all models of the demo, as a picture for the report."""

from collections.abc import Mapping

import numpy as np
import torch

from kdlib.functional import attention_map
from kdlib_faces.demo.data import DemoData, DemoModel
from kdlib_faces.report import Picture, attention_picture

__all__ = ["attention"]

_FACES = 8


def attention(data: DemoData, models: Mapping[str, DemoModel], labels: Mapping[str, str]) -> Picture:
    """Mean squared activation of the middle stage on some test images, one row per model."""
    order = np.argsort(data.test_identities, kind="stable")
    rows = torch.from_numpy(order[:: max(1, len(order) // _FACES)][:_FACES].copy())
    maps = {}
    for name, model in models.items():
        images = data.test_images if model.test_images is None else model.test_images
        maps[labels[name]] = attention_map(model.maps(images[rows])).numpy()
    return Picture(
        "attention",
        "Attention maps",
        "Mean squared activation of the middle stage, each map scaled to its own range.",
        attention_picture(list(data.test_images[rows].permute(0, 2, 3, 1).contiguous().numpy()), maps),
    )
