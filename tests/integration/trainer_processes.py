"""Trains in two processes that one process forks, with DDP and FSDP2 on the CPU, and prints what became of them.

Each scenario is a function `(rank, folder)` that both processes run. Its result, or the text of its error, is printed as
JSON for both ranks.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it, which takes a second per process unless it is loaded before the fork
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kdlib import (
    OUTPUT,
    Distiller,
    HintLoss,
    Objective,
    RKDDistanceLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    TrainConfig,
    UncertaintyWeighting,
    train,
)
from tests.processes import run_group

STEPS = 6
IMAGES = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))


def network(width: int, *between: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), *between, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def build(*, relation: bool = False, gather: bool = False, norm: type[nn.Module] = nn.BatchNorm1d) -> Distiller:
    """A student with a projection and two teachers with running statistics, weighted by learned weights."""
    torch.manual_seed(0)
    terms = {
        "hint": Term(HintLoss(), student="out", teacher="out"),
        "middle": Term(HintLoss(), student="middle", teacher="middle", project="auto", weight=0.5),
    }
    if relation:
        terms["relation"] = Term(RKDDistanceLoss(gather=gather), student="out", teacher="out")
    student = StudentAdapter(network(8), {"middle": "2", "out": OUTPUT})
    teachers = {name: TeacherAdapter(network(16, norm(16)), {"middle": "3", "out": OUTPUT}) for name in ("one", "two")}
    return Distiller(student, teachers, Objective(terms, UncertaintyWeighting(2))).infer(IMAGES)


def optimizer_of(distiller: Distiller) -> torch.optim.Optimizer:
    return torch.optim.Adam(distiller.trainable_parameters(), lr=1e-2)


def losses(
    forward: Callable[[Tensor], Any], optimizer: torch.optim.Optimizer, images: Tensor, steps: int = STEPS
) -> list[float]:
    """Train; return the loss of each step, averaged over processes."""
    found = []
    for _ in range(steps):
        total = forward(images).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        mean = total.detach().clone()
        dist.all_reduce(mean)
        found.append(mean.item() / dist.get_world_size())
    return found


def alone(**options: Any) -> list[float]:
    """The losses of one process with the whole batch."""
    distiller = build(**options)
    return losses(distiller, optimizer_of(distiller), IMAGES)


def half(rank: int) -> Tensor:
    return IMAGES.chunk(2)[rank]


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(distiller: Distiller, *, teacher: dict[str, Any] | None = None, **options: Any) -> Distiller:
    """Shard the layers of the student, the rest of the distiller, and the teacher "one"."""
    devices = mesh()
    big = distiller.teachers["one"].model
    for layer in big:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=devices, **(teacher or {}))
    fully_shard(big, mesh=devices, reshard_after_forward=True, **(teacher or {}))
    for layer in distiller.student.model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=devices, **options)
    fully_shard(distiller, mesh=devices, **options)
    return distiller


def outcome(distiller: Distiller, **found: Any) -> dict[str, Any]:
    """What every sharded run reports: which weights are sharded, and which of the teachers got a gradient."""
    teachers = {name: list(teacher.model.parameters()) for name, teacher in distiller.teachers.items()}
    return {
        "trained_sharded": all(isinstance(p, DTensor) for p in distiller.parameters()),
        "teacher_sharded": all(isinstance(p, DTensor) for p in teachers["one"]),
        "teacher_on_cpu": all(p.device.type == "cpu" for p in teachers["one"]),
        "teacher_gradients": sum(p.grad is not None for each in teachers.values() for p in each),
        **found,
    }


def ddp(rank: int, folder: Path) -> Any:
    """DistributedDataParallel around the distiller, with a relation loss over the samples of both processes."""
    distiller = build(relation=True, gather=True)
    wrapped = DistributedDataParallel(distiller)
    return {"losses": losses(wrapped, optimizer_of(distiller), half(rank)), "alone": alone(relation=True)}


def fsdp(rank: int, folder: Path) -> Any:
    distiller = shard(build(relation=True, gather=True))
    found = losses(distiller, optimizer_of(distiller), half(rank))
    return outcome(distiller, losses=found, alone=alone(relation=True))


def fsdp_features(rank: int, folder: Path) -> Any:
    """The student and the distiller are both sharded, so that the features can be computed on their own."""
    distiller = build()
    fully_shard(distiller.student.model, mesh=mesh())
    fully_shard(distiller, mesh=mesh())
    found = losses(distiller, optimizer_of(distiller), half(rank))
    with torch.no_grad():
        student, teachers = distiller.features(half(rank))
    distiller.unshard()  # the projections and the weighting
    shares = distiller.report(half(rank)).terms
    distiller.reshard()
    again = losses(distiller, optimizer_of(distiller), half(rank), steps=1)
    return {
        "losses": [*found, *again],
        "shapes": [list(student["out"].shape), list(teachers["one"]["out"].shape)],
        "report": list(shares),
    }


def fsdp_mixed_precision(rank: int, folder: Path) -> Any:
    """The student, a teacher and the projections compute in bfloat16; the other teacher gets the inputs in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    distiller = build(norm=nn.LayerNorm)
    fully_shard(distiller.teachers["one"].model, mesh=mesh(), mp_policy=policy)
    fully_shard(distiller.student.model, mesh=mesh(), mp_policy=policy)
    fully_shard(distiller, mesh=mesh(), mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
    found = losses(distiller, optimizer_of(distiller), half(rank))
    with torch.no_grad():
        student, teachers = distiller.features(half(rank))
    kinds = [
        str(x.dtype) for x in (student["out"], teachers["one"]["out"], teachers["two"]["out"], *distiller.parameters())
    ]
    return {"losses": found, "alone": alone(norm=nn.LayerNorm), "kinds": kinds}


def fsdp_activation_checkpointing(rank: int, folder: Path) -> Any:
    distiller = build()
    apply_activation_checkpointing(distiller.student.model, check_fn=lambda layer: isinstance(layer, nn.Linear))
    shard(distiller)
    return outcome(distiller, losses=losses(distiller, optimizer_of(distiller), half(rank)), alone=alone())


def fsdp_offloaded_teacher(rank: int, folder: Path) -> Any:
    distiller = shard(build(), teacher={"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    return outcome(distiller, losses=losses(distiller, optimizer_of(distiller), half(rank)), alone=alone())


def fsdp_full_weights(rank: int, folder: Path) -> Any:
    """The whole weights of a sharded distiller fit a distiller in one process."""
    distiller = shard(build())
    optimizer = optimizer_of(distiller)
    losses(distiller, optimizer, half(rank))
    weights = get_model_state_dict(distiller, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    following = losses(distiller, optimizer, half(rank), steps=1)
    expected = None
    if rank == 0:
        plain = build()
        plain.load_state_dict(weights)
        expected = plain(IMAGES).total.item()
    return {"next": following[0], "expected": expected, "names": sorted(weights)}


def fsdp_checkpoint(rank: int, folder: Path) -> Any:
    """A distributed checkpoint of weights and optimizer, in the middle of a run."""

    def start() -> tuple[Distiller, torch.optim.Optimizer]:
        distiller = shard(build())
        return distiller, optimizer_of(distiller)

    distiller, optimizer = start()
    losses(distiller, optimizer, half(rank), steps=3)
    weights, state = get_state_dict(distiller, optimizer)
    dcp.save({"weights": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    straight = losses(distiller, optimizer, half(rank), steps=3)

    distiller, optimizer = start()
    weights, state = get_state_dict(distiller, optimizer)
    both = {"weights": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=folder / "checkpoint")
    set_state_dict(distiller, optimizer, model_state_dict=both["weights"], optim_state_dict=both["optimizer"])
    return {"straight": straight, "resumed": losses(distiller, optimizer, half(rank), steps=3)}


def train_with_sharded_teacher(rank: int, folder: Path) -> Any:
    """`kdlib.train` wraps the distiller in DDP; a teacher may be sharded."""
    distiller = build()
    fully_shard(distiller.teachers["one"].model, mesh=mesh(), reshard_after_forward=True)
    first = distiller(IMAGES).total.item()
    result = train(distiller, [(half(rank), {})] * 4, TrainConfig(epochs=3, lr=0.01))
    return {
        "losses": [first, result.total],
        "sharded": isinstance(next(distiller.teachers["one"].model.parameters()), DTensor),
    }


def train_sharded(rank: int, folder: Path) -> Any:
    """`kdlib.train` with sharded layers, and projections and weightings that are not; accumulation over two batches."""
    distiller = build()
    fully_shard(distiller.student.model, mesh=mesh())
    config = TrainConfig(epochs=3, lr=0.01, accumulate=2, clip_norm=0.1)
    plain = build()
    expected = train(plain, [(half(rank), {})] * 4, config).total
    return {"total": train(distiller, [(half(rank), {})] * 4, config).total, "expected": expected}


SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    each.__name__: each
    for each in (
        ddp,
        fsdp,
        fsdp_features,
        fsdp_mixed_precision,
        fsdp_activation_checkpointing,
        fsdp_offloaded_teacher,
        fsdp_full_weights,
        fsdp_checkpoint,
        train_with_sharded_teacher,
        train_sharded,
    )
}


def main(place: Path, names: list[str]) -> None:
    """Run scenarios and print their outcomes."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in names or SCENARIOS:
        folder = place / name
        folder.mkdir()
        found[name] = run_group(2, partial(SCENARIOS[name], folder=folder)).outcomes
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
