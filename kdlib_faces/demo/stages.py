"""Recipes room: the steps that all recipes share. What a run trains on (`DemoData`), one training, one pass over images."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.distiller import Distiller
from kdlib_faces.backbones import complexity
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import to_float
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.evaluation import AgeGapProtocol
from kdlib_faces.training import LossCurve, fit

__all__ = ["DemoData", "Model", "Trained", "describe", "embed", "maps_of", "train_student"]

Embed = Callable[[Tensor], Tensor]


@dataclass
class Model:
    """A model as the evaluation and the report see it."""

    embed: Embed
    """Images `(b, 3, h, w)` in [-1, 1] to `(b, d)`."""
    maps: Embed
    """The same images to the middle stage `(b, c, h, w)`."""
    role: str
    backbone: str
    parameters: int
    macs: int | None
    input_size: int
    network: nn.Module | None = None
    train_seconds: float | None = None
    train_steps: int | None = None
    test_images: Tensor | None = None
    """The test images at this model's own size, where that is not the student's."""


@dataclass
class DemoData:
    """What both students are trained and tested on."""

    title: str
    train_images: Tensor
    train_identities: np.ndarray
    num_identities: int
    test_images: Tensor
    test_identities: np.ndarray
    teachers: dict[str, Model]
    recorded: dict[str, nn.Module]
    data: dict[str, Any]
    test_ages: np.ndarray | None = None
    test_groups: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    curves: dict[str, Any] = field(default_factory=dict)

    def protocol(self, *, replicates: int) -> AgeGapProtocol:
        """By years where ages are known, else by pairs of age groups."""
        if self.test_ages is not None:
            return AgeGapProtocol(self.test_identities, ages=self.test_ages, replicates=replicates)
        names = np.asarray(self.group_names)[np.asarray(self.test_groups)]
        return AgeGapProtocol(self.test_identities, age_groups=names, replicates=replicates)

    def is_cross_age(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Which pairs of test images lie far apart in age."""
        if self.test_ages is not None:
            return np.asarray(np.abs(self.test_ages[i] - self.test_ages[j]) >= 30)
        groups = np.asarray(self.test_groups)
        return np.asarray(groups[i] != groups[j])

    def caption(self, i: int, j: int) -> str:
        """Ages or groups of a pair."""
        if self.test_ages is not None:
            return f"{self.test_ages[i]:.0f} and {self.test_ages[j]:.0f} years"
        groups = np.asarray(self.test_groups)
        return f"{self.group_names[groups[i]]} and {self.group_names[groups[j]]}"


@dataclass
class Trained:
    """What a training leaves."""

    model: Model
    curve: LossCurve
    shares: dict[str, Any]


def train_student(
    distiller: Distiller, material: DemoData, config: Any, folder: Path, *, label: str, seed: int, quiet: bool
) -> Trained:
    """One student on the material; alone and distilled see the very same batches."""
    batches = FaceBatches(
        material.train_images,
        material.train_identities,
        batch_size=config.batch_size,
        seed=seed,
        augment=AugmentConfig(),
    )
    fitted = fit(
        distiller,
        batches,
        folder,
        steps=config.student_steps,
        lr=config.lr,
        seed=seed,
        label=label,
        quiet=quiet,
        amp=config.amp,
    )
    student = distiller.student.eval()
    model = native(student.model, student, config.size, role="student")
    model.train_seconds, model.train_steps = round(fitted.seconds, 1), config.student_steps
    # The epoch that the training ended in, where a run that was finished before has not been.
    batches.set_epoch((config.student_steps - 1) // len(batches))
    return Trained(model, fitted.curve, _shares(distiller, batches))


def native(network: Any, adapter: nn.Module, size: int, *, role: str) -> Model:
    """A torch network behind an adapter with the taps `embedding` and `map`."""
    backbone = getattr(network, "backbone", network)
    return Model(
        embed=lambda images: adapter(images)["embedding"],
        maps=lambda images: adapter(images)["map"],
        role=role,
        backbone=getattr(backbone, "name", type(backbone).__name__),
        parameters=complexity.count_parameters(network),
        macs=complexity.count_macs(network, size),
        input_size=size,
        network=network,
    )


@torch.no_grad()
def _shares(distiller: Distiller, batches: FaceBatches, count: int = 8) -> dict[str, Any]:
    """Mean weight of each teacher in each term, over some training batches."""
    names = list(distiller.teachers)
    if not names:
        return {}
    count = min(count, len(batches))
    total: dict[str, Tensor] = {}
    for _, (inputs, targets) in zip(range(count), batches, strict=False):
        for term, weights in distiller(inputs, targets).weights.items():
            total[term] = total.get(term, torch.zeros(len(weights))) + weights.mean(1) / count
    shares = {}
    for term, weights in total.items():
        who = distiller.objective.terms[term].teachers or tuple(names)
        shares[term] = {name: float(value) for name, value in zip(who, weights, strict=True)}
    return shares


@torch.no_grad()
def embed(model: Embed, images: Tensor, *, batch: int = 128) -> np.ndarray:
    """Embeddings with the flip test: plain plus mirrored, not normalized before the sum, unit length after.

    Args:
        model: images in [-1, 1] to embeddings.
        images: `(n, 3, h, w)` uint8.
        batch: images at a time.

    Returns:
        `(n, d)` float32.
    """
    rows = []
    for start in range(0, len(images), batch):
        pixels = to_float(images[start : start + batch])
        both = model(pixels).float() + model(pixels.flip(3)).float()
        rows.append(torch.nn.functional.normalize(both, dim=1))
    embeddings: np.ndarray = torch.cat(rows).numpy()
    return embeddings


@torch.no_grad()
def maps_of(model: Model, images: Tensor) -> Tensor:
    """Middle-stage maps of some images."""
    return model.maps(to_float(images)).float()


def describe(model: Model, name: str, label: str) -> dict[str, Any]:
    """The report's row for a model, without its protocols."""
    latency: float | None = None
    if model.network is not None:
        latency = round(complexity.latency_ms(model.network, model.input_size, repeats=10), 3)
    else:
        image = torch.zeros(1, 3, model.input_size, model.input_size)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            model.embed(image)
            times.append(time.perf_counter() - began)
        latency = round(1000 * sorted(times)[len(times) // 2], 3)
    return {
        "role": model.role,
        "label": label,
        "backbone": model.backbone,
        "parameters": model.parameters,
        "macs": model.macs,
        "latency_ms": latency,
        "input_size": model.input_size,
        "train_seconds": model.train_seconds,
        "train_steps": model.train_steps,
    }
