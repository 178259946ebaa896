"""Recipes room: the demo's pictures, what a person would rather see than read. Looks at embeddings and maps already made."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kdlib.functional import attention_map
from kdlib_faces.demo.stages import DemoData, maps_of
from kdlib_faces.evaluation import AgeGapProtocol
from kdlib_faces.report import Picture, attention_picture, pairs_picture

__all__ = ["pictures_of"]


def pictures_of(
    material: DemoData,
    models: dict[str, Any],
    embeddings: dict[str, np.ndarray],
    protocol: AgeGapProtocol,
    *,
    distilled: str,
    labels: Mapping[str, str],
) -> list[Picture]:
    """The pairs that the model named `distilled` gets most wrong, and where each model looks."""

    def pixels(row: int) -> np.ndarray:
        return np.ascontiguousarray(material.test_images[row].permute(1, 2, 0).numpy())

    pictures = []
    hard = protocol.evaluate(embeddings[distilled]).hardest(9)
    for kind, truth in (("missed", True), ("confused", False)):
        chosen = [
            (pixels(p.left), pixels(p.right), f"{material.caption(p.left, p.right)}\ncosine {p.score:.2f}")
            for p in hard
            if p.same is truth
        ]
        if chosen:
            title = "Same person, least alike" if truth else "Different people, most alike"
            pictures.append(
                Picture(f"pairs_{kind}", title, "As the distilled student sees them.", pairs_picture(chosen))
            )
    order = np.argsort(material.test_identities, kind="stable")
    rows = order[:: max(1, len(order) // 8)][:8]
    looks = {}
    for name, model in models.items():
        own = material.test_images if model.test_images is None else model.test_images
        looks[labels.get(name, name)] = attention_map(maps_of(model, own[torch.as_tensor(rows.copy())])).numpy()
    pictures.append(
        Picture(
            "attention",
            "Where each model looks",
            "Mean squared activation of the middle stage, each map scaled to its own range.",
            attention_picture([pixels(int(row)) for row in rows], looks),
        )
    )
    return pictures
