"""Runs sharded heads in processes that one process forks, and prints what they computed as JSON.

Each scenario is a function `(rank, folder)` that all processes run. Its result is that of every rank, or the text of its
error.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it, which takes a second per process unless it is loaded before the fork
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from kdlib_faces import heads
from kdlib_faces.heads import (
    ArcFaceHead,
    CosFaceHead,
    ElasticFaceHead,
    SampledHead,
    shard_head,
    skip_rows_without_gradient,
)
from tests.processes import run_group

N, D, B = 11, 6, 10
KINDS = [getattr(heads, name) for name in heads.__all__ if name.endswith("Head") and name != "SampledHead"]


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return 15 * torch.randn(B, D, generator=rng), torch.arange(B) * 3 % N, torch.rand(B, generator=rng)


def mine(x: Tensor) -> Tensor:
    """Parts of different length: the first process has three samples more."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [B // world] * world
    sizes[0], sizes[-1] = sizes[0] + 2, sizes[-1] - 2 + B % world
    return x.split(sizes)[rank]


def whole(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)
    return x.full_tensor()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def build(kind: Any, **options: Any) -> Any:
    return kind(D, N, 16.0, generator=torch.Generator().manual_seed(1), **options)


def every_head(rank: int, folder: Path) -> Any:
    """Each head against one process with the whole batch: losses, gradients and running statistics, over two batches."""
    found = {}
    for kind in KINDS:
        alone, head = build(kind), shard_head(build(kind, chunk_size=2), mesh())
        assert list(head.state_dict()) == list(alone.state_dict())
        if kind is ElasticFaceHead:
            alone.seed -= rank * 2**40  # the margins of the first process
        worst = []
        for seed in range(2):
            embeddings, identities, weight = batch(seed)
            expected, got = embeddings.clone().requires_grad_(), mine(embeddings).clone().requires_grad_()
            losses = alone(expected, identities, weight=weight, reduction="none")
            losses.sum().backward()
            own = head(got, mine(identities), weight=mine(weight), reduction="none")
            own.sum().backward()
            gradient = whole(head.weight.grad) * dist.get_world_size()
            worst += [distance(own, mine(losses)), distance(got.grad, mine(expected.grad))]
            worst += [distance(gradient, alone.weight.grad)]
            worst += [distance(x, y) for x, y in zip(head.buffers(), alone.buffers(), strict=True)]
        found[kind.__name__] = max(worst)
    return found


def drawn_centers(rank: int, folder: Path) -> Any:
    """A head from the meta device holds only its part, which does not depend on the number of processes."""
    with torch.device("meta"):
        head = heads.AdaFaceHead(4, 9001)
    shard_head(head, mesh(), seed=7)
    local = head.weight.to_local()
    rows = whole(head.weight)
    return {
        "local": list(local.shape), "values": local.untyped_storage().nbytes() // 4, "sum": rows.double().sum().item(),
        "std": rows.std().item(), "equal_rows": len(rows) - len(rows.unique(dim=0)), "norm_mean": head.norm_mean.item(),
    }  # fmt: skip


def fewer_identities_than_processes(rank: int, folder: Path) -> Any:
    """Processes without centers take part."""
    alone = ArcFaceHead(D, 1 + dist.get_world_size() // 2)
    head = shard_head(ArcFaceHead(D, alone.num_identities), mesh())
    torch.manual_seed(0)
    weight = torch.randn(alone.weight.shape)
    with torch.no_grad():
        alone.weight.copy_(weight)
        head.weight.to_local().copy_(weight.chunk(dist.get_world_size())[rank] if len(head.weight.to_local()) else 0)
    embeddings, identities, _ = batch()
    identities = identities % alone.num_identities
    expected = alone(embeddings, identities, reduction="none")
    return distance(head(mine(embeddings), mine(identities), reduction="none"), mine(expected))


def sampled(rank: int, folder: Path) -> Any:
    """Positives of all processes are kept, the number of negatives is the rate, and the loss is that of the kept rows."""
    head = SampledHead(shard_head(CosFaceHead(D, 40, 16.0, generator=torch.Generator().manual_seed(1)), mesh()), 0.6)
    embeddings, identities, _ = batch()
    identities = identities * 3
    got = mine(embeddings).requires_grad_()
    rows = head.sample(mine(identities))
    first = sum(len(x) for x in head.head.weight.detach().full_tensor().chunk(dist.get_world_size())[:rank])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (rows + first).tolist())
    kept = torch.tensor(sorted(row for each in gathered for row in each))
    loss = head(got, mine(identities), reduction="none")
    loss.sum().backward()
    alone = CosFaceHead(D, len(kept), 16.0)
    with torch.no_grad():
        alone.weight.copy_(whole(head.head.weight)[kept])
    expected = alone(embeddings, torch.searchsorted(kept, identities), reduction="none")
    active = whole(head.head.weight.grad).any(1).nonzero().flatten()
    again = head.sample(mine(identities))
    return {
        "positives": bool(torch.isin(identities, kept).all()),
        "kept": [len(x) for x in gathered],
        "difference": distance(loss, mine(expected)),
        "only_kept": torch.equal(active, kept),
        "redrawn": not torch.equal(again, rows),
    }


def optimizers(rank: int, folder: Path) -> Any:
    """Rows that are skipped by an optimizer of sharded centers are those of one process; the others do not move."""
    found = {}
    for name, create in (
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
    ):
        alone, head = build(CosFaceHead), shard_head(build(CosFaceHead), mesh())
        pair = [create([each.weight]) for each in (alone, head)]
        for each, optimizer in zip((alone, head), pair, strict=True):
            skip_rows_without_gradient(optimizer, each.weight)
        start, still = whole(head.weight).clone(), torch.ones(N, dtype=torch.bool)
        for step in range(4):
            embeddings, _, _ = batch(step)
            identities = torch.arange(B) % 2 + 2 * step
            still[identities] = False
            kept = torch.unique(identities)
            alone(embeddings, identities, negatives=kept).backward()
            local = kept - sum(len(x) for x in start.chunk(dist.get_world_size())[:rank])
            local = local[(local >= 0) & (local < len(head.weight.to_local()))]
            size = len(mine(identities)) * dist.get_world_size() / B  # the mean of means of batches of other lengths
            (size * head(mine(embeddings), mine(identities), negatives=local)).backward()
            for optimizer in pair:
                optimizer.step()
                optimizer.zero_grad()
        moved = whole(head.weight)
        found[name] = {
            "difference": distance(moved, alone.weight),
            "still": torch.equal(moved[still], start[still]),
            "moved": (moved[~still] - start[~still]).abs().amax(1).min().item(),
        }
    return found


SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    each.__name__: each for each in (every_head, drawn_centers, fewer_identities_than_processes, sampled, optimizers)
}


def main(place: Path, world: int, names: list[str]) -> None:
    """Run scenarios and print their outcomes."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in names or SCENARIOS:
        folder = place / name
        folder.mkdir()
        found[name] = run_group(world, partial(SCENARIOS[name], folder=folder)).outcomes
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
