"""Margin softmax of very many identities: `python benchmarks/bench_heads.py [--identities 1000000] [--threads 2]`.

Measures forward and backward of `ArcFaceHead(chunk_size=)` against ArcFace by hand with all logits, and a head sharded
over two processes against one process. Time is measured in turns and reported as the median of the ratios. Memory is
the peak in a process of its own: in chunks and by hand beyond the embeddings, the centers and their gradient; sharded,
all of a process beyond its start, with SGD and momentum. Writes `results/heads.json`, with the targets beside the
figures.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from kdlib_faces.heads import ArcFaceHead, shard_head
from kdlib_faces.heads._streamed import local_part

BATCH, DIM, SCALE, MARGIN = 128, 512, 64.0, 0.5
MIB = 2**20
TARGETS = {"chunks": {"time": 1.2, "memory": 0.1, "difference": 1e-5}, "sharded": {"memory": 0.55, "difference": 1e-5}}


def draw(identities: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return embeddings and identities."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(batch, DIM, generator=rng), torch.randint(identities, (batch,), generator=rng)


def by_hand(embeddings: Tensor, centers: Tensor, identities: Tensor) -> Tensor:
    """ArcFace with all logits."""
    cosines = F.linear(F.normalize(embeddings), F.normalize(centers))
    cosine = cosines.gather(1, identities[:, None])
    sine = (1 - cosine.square()).clamp(min=1e-12).sqrt()
    target = torch.where(
        cosine > math.cos(math.pi - MARGIN), cosine * math.cos(MARGIN) - sine * math.sin(MARGIN), cosine
    )
    return F.cross_entropy(SCALE * cosines.scatter(1, identities[:, None], target), identities)


def resident(field: str) -> int:
    """Return a field of the status of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def run(side: str, head: ArcFaceHead, embeddings: Tensor, identities: Tensor) -> tuple[float, Tensor]:
    """Return the seconds of a forward and a backward pass, and the loss."""
    embeddings.grad = head.weight.grad = None
    began = time.perf_counter()
    loss = head(embeddings, identities) if side == "chunks" else by_hand(embeddings, head.weight, identities)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return time.perf_counter() - began, loss.detach()


def build(identities: int) -> tuple[ArcFaceHead, Tensor, Tensor]:
    """Return a head and a batch."""
    head = ArcFaceHead(DIM, identities, SCALE, MARGIN, chunk_size=8192, generator=torch.Generator().manual_seed(1))
    embeddings, labels = draw(identities)
    return head, embeddings.requires_grad_(), labels


def memory(side: str, identities: int) -> None:
    """Print the peak memory beyond inputs, centers and gradients; runs in a separate process."""
    run(side, *build(64))
    head, embeddings, labels = build(identities)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    run(side, head, embeddings, labels)
    print(resident("VmHWM") - before - head.weight.nbytes - embeddings.nbytes)


def again(*arguments: object) -> str:
    """Run this file in a new process and return what it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def chunks(identities: int, rounds: int, threads: int) -> dict[str, Any]:
    """Measure a head in chunks against all logits."""
    sizes = {
        side: int(again("--memory", side, "--identities", identities, "--threads", threads))
        for side in ("chunks", "by hand")
    }
    head, embeddings, labels = build(identities)
    found, pairs = {}, []
    for number in range(rounds):
        seconds = {}
        for side in ("chunks", "by hand") if number % 2 else ("by hand", "chunks"):  # so that neither is always first
            seconds[side], loss = run(side, head, embeddings, labels)
            if not number:
                projected = head.weight.grad @ torch.linspace(-1, 1, DIM)
                found[side] = (loss, embeddings.grad.clone(), projected, head.weight.grad[labels])
        pairs.append((seconds["chunks"], seconds["by hand"]))
    return {
        "identities": identities,
        "seconds": round(statistics.median(a for a, _ in pairs), 2),
        "by_hand_seconds": round(statistics.median(b for _, b in pairs), 2),
        "time_ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "extra_mib": round(sizes["chunks"] / MIB, 1),
        "by_hand_extra_mib": round(sizes["by hand"] / MIB, 1),
        "memory_ratio": round(sizes["chunks"] / sizes["by hand"], 4),
        "difference": max(distance(a, b) for a, b in zip(found["chunks"], found["by hand"], strict=True)),
    }


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def process(rank: int, world: int, identities: int, folder: Path) -> None:
    """Take one step of a sharded head in one of several processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    peak = 0
    for count in (64, identities):  # the first one imports and allocates
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        with torch.device("meta"):
            head = ArcFaceHead(DIM, count, SCALE, MARGIN, chunk_size=1024)
        shard_head(head, mesh, seed=1)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        embeddings, labels = draw(count, 2 * BATCH)
        part = embeddings.chunk(world)[rank].clone().requires_grad_()
        losses = head(part, labels.chunk(world)[rank], reduction="none")
        losses.mean().backward()
        optimizer.step()
        peak = resident("VmHWM") - before
    gradient = local_part(head.weight.grad).rows @ torch.linspace(-1, 1, DIM)
    torch.save((peak, losses.detach(), part.grad / world, gradient), folder / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded(identities: int, threads: int) -> dict[str, Any]:
    """Measure two processes against one with the same batch."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            options = ["--world", world, "--folder", folder, "--identities", identities, "--threads", threads]
            command = [sys.executable, __file__, *map(str, options), "--rank"]
            running = [subprocess.Popen([*command, str(rank)]) for rank in range(world)]
            if any(each.wait() for each in running):
                raise SystemExit("a process failed")
            files = [Path(folder) / f"{world}-{rank}.pt" for rank in range(world)]
            parts = [torch.load(file, weights_only=True) for file in files]
            found[world] = (
                max(part[0] for part in parts),
                *(torch.cat(each) for each in zip(*(part[1:] for part in parts), strict=True)),
            )
    return {
        "identities": identities,
        "mib_per_process": round(found[2][0] / MIB, 1),
        "one_process_mib": round(found[1][0] / MIB, 1),
        "memory_ratio": round(found[2][0] / found[1][0], 4),
        "difference": max(distance(a, b) for a, b in zip(found[2][1:], found[1][1:], strict=True)),
    }


def main() -> None:
    """Print the figures and write them."""
    parser = argparse.ArgumentParser(description="Speed and memory of margin heads of very many identities.")
    parser.add_argument("--identities", type=int, default=1_000_000)
    parser.add_argument("--sharded-identities", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=("chunks", "by hand"), help=argparse.SUPPRESS)
    for name, kind in (("--rank", int), ("--world", int), ("--folder", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return memory(options.memory, options.identities)
    if options.rank is not None:
        return process(options.rank, options.world, options.identities, options.folder)
    rows: dict[str, dict[str, Any]] = {}
    for name in ("chunks", "sharded"):
        if name == "chunks":
            row = chunks(options.identities, options.rounds, options.threads)
        else:
            row = sharded(options.sharded_identities, options.threads)
        rows[name] = {**row, "targets": TARGETS[name]}
        print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in rows[name].items()), flush=True)
    kept = {"torch": torch.__version__, "threads": options.threads, "cores": os.cpu_count(), "batch": BATCH, "dim": DIM}
    kept |= {"platform": platform.machine(), "rows": rows}
    (Path(__file__).parent / "results" / "heads.json").write_text(json.dumps(kept, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
