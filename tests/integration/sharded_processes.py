"""Trains sharded distillers with `kdlib.train` in processes that one process forks, and prints what became of them.

Each phase runs in one, two or three processes with the same global batches, so every run computes the same weights.
"""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it, which takes a second per process unless it is loaded before the fork
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term, TrainConfig, train
from kdlib.training import load_checkpoint
from kdlib_faces.heads import CosFaceHead, shard_head
from tests.processes import run_group

SAMPLES, PER_STEP, IDENTITIES = 36, 12, 7


def build(kind: str) -> Distiller:
    """A student with a sharded head, and in the kind "fsdp" with sharded layers."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    head: nn.Module = CosFaceHead(5, IDENTITIES, 8.0)
    teacher = TeacherAdapter(nn.Linear(6, 5), {"out": OUTPUT})
    if kind != "plain":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shard_head(head, mesh)
        if kind == "fsdp":
            fully_shard(student[0], mesh=mesh)
            fully_shard(student, mesh=mesh)
    terms = {
        "hint": Term(HintLoss(), student="out", teacher="out"),
        "identity": Term(head, student="out", target="identity", weight=0.3),
    }
    return Distiller(StudentAdapter(student, {"out": OUTPUT}), {"one": teacher}, Objective(terms))


def batches() -> list[Any]:
    """The part of this process of three global batches."""
    several = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    rng = torch.Generator().manual_seed(5)
    images, identities = torch.randn(SAMPLES, 6, generator=rng), torch.arange(SAMPLES) * 5 % IDENTITIES
    pairs = zip(images.split(PER_STEP), identities.split(PER_STEP), strict=True)
    return [(x.chunk(world)[rank], {"identity": y.chunk(world)[rank]}) for x, y in pairs]


def whole(value: Any) -> list[float]:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.double().flatten().tolist()


def run(kind: str, folder: Path, steps: int, **options: Any) -> dict[str, Any]:
    """Train up to a step; return the weights, the averages and what was written."""
    distiller = build(kind)
    given = {"optimizer": "adamw", "lr": 0.02, "clip_norm": 0.05, "ema_decay": 0.9, "schedule": "constant", **options}
    config = TrainConfig(max_steps=steps, checkpoint_dir=folder / "run", checkpoint_every_steps=1, **given)
    result = train(distiller, batches(), config)
    weights = {name: whole(x) for name, x in distiller.state_dict().items() if x.is_floating_point()}
    best = None if result.best is None else {name: whole(x) for name, x in result.best.weights.items()}
    return {
        "weights": [x for name in sorted(weights) for x in weights[name]],
        "averages": [x for name in sorted(result.ema or {}) for x in whole((result.ema or {})[name])],
        "resumed_from": result.resumed_from,
        "sharded": sum(isinstance(p, DTensor) for p in distiller.parameters()),
        "files": sorted(path.name for path in (folder / "run").iterdir()),
        "best": None if best is None else [x for name in sorted(best) for x in best[name]],
    }


def damage(folder: Path) -> None:
    """Change a byte in a shard of the newest checkpoint."""
    file = sorted((folder / "run").glob("shards-000000004-*/*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def point_outside(folder: Path) -> None:
    """Make all checkpoints name a file outside of their folder."""
    for path in (folder / "run").glob("*.pt"):
        state = load_checkpoint(path)
        for entry in state["shards"]["tensors"]:
            for part in entry["parts"]:
                part["file"] = "../../secret"
        torch.save(state, path)


def nan(folder: Path) -> dict[str, Any]:
    """A weight of one process becomes NaN."""
    config = TrainConfig(max_steps=3, optimizer=Spoiled, checkpoint_dir=folder / "run", checkpoint_every_steps=1)
    train(build("head"), batches(), config)
    return {}


class Spoiled(torch.optim.SGD):
    """Sets a weight of the head in the last process to NaN in the second step."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps += 1
        if self.steps == 2 and dist.get_rank() == dist.get_world_size() - 1:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if isinstance(parameter, DTensor):
                        parameter.detach().to_local().fill_(torch.nan)


def phases(folder: Path) -> dict[str, Any]:
    """Run all phases."""
    found: dict[str, Any] = {"plain": [run("plain", folder / "plain", 6)]}
    for kind in ("head", "fsdp"):
        place = folder / kind
        found[f"{kind}_straight"] = together(2, partial(run, kind, place / "straight", 6))
        found[f"{kind}_saved"] = together(2, partial(run, kind, place / "saved", 4))
        for world in (1, 2, 3):
            copy = place / f"resumed_{world}"
            shutil.copytree(place / "saved", copy)
            found[f"{kind}_resumed_{world}"] = together(world, partial(run, kind, copy, 6))
    place = folder / "head"
    shutil.copytree(place / "saved", place / "damaged")
    damage(place / "damaged")
    found["damaged"] = together(2, partial(run, "head", place / "damaged", 6))
    shutil.copytree(place / "saved", place / "hostile")
    point_outside(place / "hostile")
    found["hostile"] = together(2, partial(run, "head", place / "hostile", 6))
    shutil.copytree(place / "saved", place / "other")
    found["other_settings"] = together(2, partial(run, "fsdp", place / "other", 6, lr=0.03))
    index = load_checkpoint(place / "saved" / "run" / "step-000000004.pt")["shards"]
    found["index"] = [[*each["keys"], *each["shape"]] for each in index["tensors"]]
    place = folder / "more"
    evaluate = {
        "evaluate": lambda distiller: -float(distiller.objective.step),
        "evaluate_every": 2,
        "monitor": "metric",
    }
    found["best"] = together(2, partial(run, "fsdp", place / "best", 6, **evaluate))
    found["nan"] = together(2, partial(nan, place / "nan"))
    found["float16"] = together(2, partial(run, "head", place / "float16", 2, amp="float16"))
    return found


def together(world: int, task: Callable[[], object]) -> list[Any]:
    """Run a task in a process group; return what each process returned, or the text of its error."""
    return run_group(world, lambda rank: task()).outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(phases(Path(sys.argv[1]))))
