"""Evaluate any face model by age gap: three ways to turn a synthetic face into numbers."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tutorial import COLORS, Lesson, Row, axes, legend, main

from kdlib_faces.data import SyntheticFaces
from kdlib_faces.evaluation import AgeGapProtocol, AgeGapResult, compare, embed_images, evaluate

SIZE = 32


# [models]
def principal_components(pixels: torch.Tensor) -> nn.Module:
    """Eigenfaces: the projection on the 32 directions in which the training pixels vary most."""
    flat = (pixels.flatten(1).float() - 127.5) / 127.5
    center = flat.mean(dim=0)
    directions = torch.linalg.svd(flat - center, full_matrices=False).Vh[:32]
    layer = nn.Linear(flat.shape[1], 32)
    with torch.no_grad():
        layer.weight.copy_(directions)
        layer.bias.copy_(-directions @ center)
    return nn.Sequential(nn.Flatten(), layer)


def discriminant(pixels: torch.Tensor, identities: torch.Tensor) -> nn.Module:
    """Eigenfaces whose directions are scaled down by how much they vary within an identity."""
    model = principal_components(pixels)
    with torch.no_grad():
        found = model((pixels.float() - 127.5) / 127.5)
        centers = torch.stack([found[identities == identity].mean(dim=0) for identity in identities.unique()])
        within = (found - centers[identities]).T @ (found - centers[identities]) / len(found)
        whitening = torch.linalg.cholesky(torch.linalg.inv(within + 1e-3 * torch.eye(32))).T
        model[1].weight.copy_(whitening @ model[1].weight)
        model[1].bias.copy_(whitening @ model[1].bias)
    return model


# [embed]
def embeddings(model: nn.Module | None, images: torch.Tensor) -> np.ndarray:
    """Embeddings `(n, d)`: of a network, or of any other program that returns an array."""
    if model is None:
        small = F.avg_pool2d(images.float(), 4).flatten(1)
        return (small - small.mean(dim=1, keepdim=True)).numpy()
    return embed_images(model, images, batch_size=256)


# [run]
def run(quick: bool) -> Lesson:
    identities = 20 if quick else 100
    known = SyntheticFaces(identities, 8, SIZE, seed=1)
    new = SyntheticFaces(identities, 8, SIZE, seed=2)  # no identity of the training set
    images, pixels = new.images(), known.images()
    protocol = AgeGapProtocol(new.labels, ages=new.ages, fars=(0.01,), replicates=20 if quick else 200)
    models = {
        "small pixels": None,
        "eigenfaces": principal_components(pixels),
        "discriminant": discriminant(pixels, known.labels),
    }
    results: dict[str, AgeGapResult] = {
        name: evaluate(embeddings(model, images), protocol) for name, model in models.items()
    }
    return lesson(results)


# [read]
def lesson(results: dict[str, AgeGapResult]) -> Lesson:
    rows, curves, numbers = [], {}, {}
    for name, result in results.items():
        rows.append(Row(name, [100 * result.all.auc.value]))
        curves["gaps"] = [str(entry.name) for entry in result.bins]
        for key in ("value", "low", "high"):
            curves[f"{name}, {key}"] = [round(100 * float(getattr(entry.auc, key)), 4) for entry in result.bins]
    for entry in compare(results, "discriminant", "eigenfaces"):
        if entry["bin"] in ("all", "30+") and entry["metric"] == "auc":
            for key in ("value", "low", "high"):
                name = f"discriminant minus eigenfaces, {entry['bin']}, {key}"
                numbers[name] = round(100 * entry["difference"][key], 4)
    return Lesson("AUC of all pairs, %", rows, curves, numbers)


# [draw]
def draw(figure: Figure, lesson: Lesson) -> None:
    place = axes(figure, x="years between the two images", y="AUC, %")
    gaps = lesson.curves["gaps"]
    for at, row in enumerate(lesson.rows):
        value, low, high = (lesson.curves[f"{row.model}, {key}"] for key in ("value", "low", "high"))
        shifted = [position + 0.08 * (at - 1) for position in range(len(gaps))]
        errors = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        place.errorbar(shifted, value, errors, fmt="o-", color=COLORS[at], label=row.model, capsize=3)
    place.set_xticks(range(len(gaps)), gaps)
    legend(place)


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 3.2))
