"""A small distiller, its batches and interruptions, for the tests of training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.training import TrainConfig, TrainEvent, train


class Toy(Distiller):
    """A small student with dropout and BatchNorm, and a linear teacher."""

    def __init__(self, seed: int = 0, *, dropout: float = 0.2) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Dropout(dropout), nn.Linear(8, 3)
            student = StudentAdapter(nn.Sequential(*layers), {"out": OUTPUT})
            teacher = TeacherAdapter(nn.Linear(6, 3), {"out": OUTPUT})
        super().__init__(student, {"big": teacher}, Objective({"hint": Term(HintLoss(), student="out", teacher="out")}))

    @property
    def layers(self) -> nn.Sequential:
        return self.student.model


def batches(count: int = 5, size: int = 8, seed: int = 1) -> list[tuple[Tensor, dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(count * size).view(count, size)
    return [(torch.randn(size, 6, generator=draw), {"sample": ids[i]}) for i in range(count)]


def weights(distiller: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distiller.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def interrupt(config: TrainConfig, step: int, loader: Any = None) -> None:
    """Train until a hook raises after a step."""

    class Stopped(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if event.step == step:
            raise Stopped

    with pytest.raises(Stopped):
        train(Toy(), batches() if loader is None else loader, config, hooks=[stop])


def measured(distiller: Distiller) -> dict[str, float]:
    """Validation error, a deterministic function of the weights."""
    inputs, _ = batches(1, seed=7)[0]
    wanted = distiller.teachers["big"](inputs)["out"]
    return {"error": nn.functional.mse_loss(distiller.student(inputs)["out"], wanted).item()}


def _collate(items: Any) -> Any:
    return torch.stack([item[0] for item in items]), {}


def shuffled(kind: str) -> Any:
    """A loader whose order depends on torch's randomness, or on a generator of its own."""
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(36, 6, generator=draw))
    own = torch.Generator().manual_seed(9) if kind == "own" else None
    return DataLoader(data, batch_size=8, shuffle=True, generator=own, collate_fn=_collate)
