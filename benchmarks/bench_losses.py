"""Speed and memory of the losses: `python benchmarks/bench_losses.py [--only NAME] [--threads 2]`.

`bench_margin_heads.py` measures the margin heads in the same way.

Measures forward and backward of each loss, of the same loss in torchdistill 1.1.5 if it has it
(`pip install --no-deps torchdistill==1.1.5`), and of the plain formula as in most public code. The faster of the two is the
peer. Time is measured in turns and reported as the median of the ratios; memory is the peak above the inputs in a separate
process. Values are compared first. Where no peer fits into memory, ours is compared with a limit. Writes
`results/losses.json`.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from learned_losses import CASES, learned
from torch import Tensor
from torch.nn import functional as F

import kdlib.functional as kd

try:
    mid_level: Any = importlib.import_module("torchdistill.losses.mid_level")
except ImportError:
    mid_level = None

Pair = Callable[[Tensor, Tensor], Tensor]
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    ours: Pair
    peers: dict[str, Pair]
    shape: tuple[int, ...]
    factor: float = 1.0
    """Ratio of our value to that of the peers, if the conventions differ."""
    rounds: int = 9
    fixed: bool = False
    """Whether only the batch size may change."""
    limit_mib: float | None = None
    """Without peers: upper limit of the extra memory."""


def naive_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Difference vectors `(b, b, d)`, as in all peers."""
    angles = []
    for x in (student, teacher):
        e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        angles.append(torch.bmm(e, e.transpose(1, 2)))
    return F.smooth_l1_loss(angles[0], angles[1].detach())


def naive_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Expanded squares, as in the peers."""
    out = []
    for x in (student, teacher):
        square = x.pow(2).sum(1)
        d = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x)))
        out.append(d / d[d > 0].mean())
    return F.smooth_l1_loss(out[0], out[1].detach())


def naive_nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Broadcasting over pairs of channels, as in the peers."""
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) * y.unsqueeze(1)).sum(-1).pow(2).mean()

    return kernel(t, t).detach() + kernel(s, s) - 2 * kernel(t.detach(), s)


def naive_soft(student: Tensor, teacher: Tensor) -> Tensor:
    """Two softmaxes and a divergence."""
    return 16 * F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")


def naive_dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Masks of the size of the logits, as in the authors' code."""
    mask = torch.zeros_like(student).scatter_(1, target[:, None], 1).bool()
    p_s, p_t = (student / 4).softmax(1), (teacher / 4).softmax(1)

    def rest(p: Tensor) -> Tensor:
        return torch.stack([(p * mask).sum(1), (p * ~mask).sum(1)], 1)

    tckd = F.kl_div(rest(p_s).log(), rest(p_t), reduction="batchmean")
    n_s, n_t = (student / 4 - 1000.0 * mask).log_softmax(1), (teacher / 4 - 1000.0 * mask).softmax(1)
    return 16 * (tckd + 8 * F.kl_div(n_s, n_t, reduction="batchmean"))


def naive_gaussian(student: Tensor, teacher: Tensor) -> Tensor:
    """Row by row, as in the peers."""
    out = []
    for x in (F.normalize(student), F.normalize(teacher.detach())):
        rows = [sum((0.8**p) / (1, 1, 2)[p] * (row @ x.T) ** p for p in range(3)) for row in x]
        out.append(torch.exp(torch.tensor(-0.8)) * torch.stack(rows))
    return (out[0] - out[1]).pow(2).mean()


def naive_pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine matrices to probabilities."""
    out = []
    for x in (student, teacher.detach()):
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        p = (x @ x.T + 1) / 2
        out.append(p / p.sum(1, keepdim=True))
    return (out[1] * ((out[1] + 1e-7) / (out[0] + 1e-7)).log()).mean()


def naive_sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram matrices of unit rows."""
    g_s, g_t = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (student, teacher.detach()))
    return (g_s - g_t).pow(2).sum() / len(student) ** 2


def naive_at(student: Tensor, teacher: Tensor) -> Tensor:
    """Unit maps of squared activations."""
    a_s, a_t = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher.detach()))
    return (a_s - a_t).pow(2).mean()


def of_torchdistill(module: Any) -> Pair:
    """Adapt a loss of torchdistill, which takes dictionaries of dictionaries."""
    return lambda student, teacher: module({"x": {"output": student}}, {"x": {"output": teacher.detach()}})


def of_torchdistill_squared(module: Any) -> Pair:
    """Adapt its correlation congruence, which takes unit rows and returns the root of ours divided by b."""
    peer = of_torchdistill(module)

    def squared(student: Tensor, teacher: Tensor) -> Tensor:
        return torch.square(peer(F.normalize(student), F.normalize(teacher)) * len(student))

    return squared


def rows() -> dict[str, Row]:
    """Return the cases, with torchdistill where it has the loss."""
    theirs: dict[str, Pair] = {}
    if mid_level is not None:
        relation = partial(mid_level.RKDLoss, "x", "x", reduction="mean")
        kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
        theirs = {
            "rkd_angle": of_torchdistill(relation(dist_factor=0, angle_factor=1)),
            "rkd_distance": of_torchdistill(relation(dist_factor=1, angle_factor=0)),
            "pkt": of_torchdistill(mid_level.PKTLoss("x", "output", "x", "output")),
            "correlation_congruence": of_torchdistill_squared(mid_level.CCKDLoss("x", "x", kernel, "batchmean")),
            "attention_transfer": of_torchdistill(
                mid_level.ATLoss({"one": {side: {"io": "output", "path": "x"} for side in ("student", "teacher")}})
            ),
        }
    target = torch.arange(64)
    dkd_ours: Pair = lambda s, t: kd.decoupled_kd(s, t, target=target)  # noqa: E731
    dkd_naive: Pair = lambda s, t: naive_dkd(s, t, target)  # noqa: E731

    def row(name: str, ours: Pair, naive: Pair, shape: tuple[int, ...], factor: float = 1.0, rounds: int = 9) -> Row:
        peers = {"torchdistill 1.1.5": theirs[name]} if name in theirs else {}
        return Row(ours, peers | {"the formula": naive}, shape, factor, rounds)

    return {
        "rkd_angle": row("rkd_angle", kd.rkd_angle, naive_angle, (512, 512)),
        # The difference vectors alone would take 8 GiB a side.
        "rkd_angle, b = 2048": Row(kd.rkd_angle, {}, (2048, 512), rounds=1, limit_mib=1024),
        "rkd_distance": row("rkd_distance", kd.rkd_distance, naive_distance, (512, 512), rounds=31),
        # torchdistill uses rows of unit L1 norm, which is a different loss.
        "similarity_preserving": row("", kd.similarity_preserving, naive_sp, (256, 128, 7, 7), rounds=31),
        "correlation_congruence": row(
            "correlation_congruence", kd.correlation_congruence, naive_gaussian, (512, 512), rounds=5
        ),
        "pkt": row("pkt", kd.pkt, naive_pkt, (512, 512), rounds=31),
        "nst": row("", kd.nst, naive_nst, (64, 64, 8, 8)),
        "attention_transfer": row(
            "attention_transfer", kd.attention_transfer, naive_at, (64, 256, 28, 28), factor=784.0
        ),
        "soft_target": row("", kd.soft_target, naive_soft, (64, 1_000_000), rounds=3),
        "soft_target, 50,000 classes": row("", kd.soft_target, naive_soft, (64, 50_000), rounds=31),
        "soft_target, 1,000 classes": row("", kd.soft_target, naive_soft, (256, 1000)),
        "decoupled_kd": row("", dkd_ours, dkd_naive, (64, 1_000_000), rounds=3),
        **{name: Row(*learned(name, mid_level), rounds=41, fixed=True) for name in CASES},
        "decoupled_kd, 50,000 classes": row("", dkd_ours, dkd_naive, (64, 50_000), rounds=31),
    }


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return a student that requires a gradient and a teacher."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator).requires_grad_()
    return student, torch.randn(shape, generator=generator)


def once(loss: Pair, student: Tensor, teacher: Tensor) -> float:
    """Return the seconds of a forward and a backward pass; with one thread, those of the processor.

    Other programs on the machine do not count as time of the processor.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    student.grad = None
    began = clock()
    loss(student, teacher).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return clock() - began


def memory(row: Row, side: str) -> None:
    """Print the peak memory above the inputs and the gradient; runs in a separate process."""
    loss = row.ours if side == "ours" else row.peers[side]
    small = (2, *row.shape[1:]) if row.fixed else tuple(min(n, 64) for n in row.shape)
    once(loss, *inputs(small))
    student, teacher = inputs(row.shape)
    student.grad = torch.zeros_like(student)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    loss(student, teacher).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Return a field of the status of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def extra(name: str, row: Row, side: str, threads: int) -> int:
    """Return the peak memory of one side in bytes, the minimum of three processes."""
    command = [sys.executable, sys.argv[0], "--memory", side, "--only", name, "--threads", str(threads)]
    times = 1 if row.limit_mib else 3
    peaks = [int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(times)]
    return max(min(peaks), 1)


def measure(name: str, row: Row, threads: int) -> dict[str, Any]:
    """Return values, times and memory of our loss and of the fastest peer."""
    student, teacher = inputs(row.shape)
    if not row.peers:
        seconds = statistics.median(once(row.ours, student, teacher) for _ in range(row.rounds))
        mib = extra(name, row, "ours", threads) / MIB
        measured = {"milliseconds": round(1000 * seconds, 3), "extra_mib": round(mib, 2), "limit_mib": row.limit_mib}
        return {"shape": list(row.shape), "peer": "none fits"} | measured
    ours, difference = float(row.ours(student, teacher).detach()), 0.0
    for name_of_peer, peer in row.peers.items():
        other = row.factor * float(peer(student, teacher).detach())
        difference = max(difference, abs(ours - other) / max(abs(ours), 1e-12))
        if difference > 2e-3:
            raise SystemExit(
                f"{name}: ours is {ours}, that of {name_of_peer} times {row.factor} is {other}: not the same loss"
            )
    for loss in (row.ours, *row.peers.values()):
        once(loss, student, teacher)
    rounds = [[once(loss, student, teacher) for loss in (row.ours, *row.peers.values())] for _ in range(row.rounds)]
    mine, *others = zip(*rounds, strict=True)
    times = dict(zip(row.peers, others, strict=True))
    best = min(times, key=lambda peer: statistics.median(times[peer]))
    bytes_ours, bytes_peer = extra(name, row, "ours", threads), extra(name, row, best, threads)
    return {
        "shape": list(row.shape),
        "peer": best,
        "milliseconds": round(1000 * statistics.median(mine), 3),
        "peer_milliseconds": round(1000 * statistics.median(times[best]), 3),
        "times_faster": round(statistics.median(b / a for a, b in zip(mine, times[best], strict=True)), 2),
        "extra_mib": round(bytes_ours / MIB, 2),
        "peer_extra_mib": round(bytes_peer / MIB, 2),
        "times_less_memory": round(bytes_peer / bytes_ours, 2),
        "relative_difference": float(f"{difference:.2g}"),
    }


def line(name: str, result: dict[str, Any]) -> str:
    """Format a row as text."""
    head = f"{name:30}{'x'.join(map(str, result['shape'])):>22}{result['milliseconds']:>10.2f}"
    if "limit_mib" in result:
        return f"{head}{'':>18}{result['extra_mib']:>9.1f}{'':>10}  {'':6}  limit {result['limit_mib']:g} MiB, no peer fits"
    return (
        f"{head}{result['peer_milliseconds']:>10.2f}{result['times_faster']:>7.1f}x{result['extra_mib']:>9.1f}"
        f"{result['peer_extra_mib']:>10.1f}{result['times_less_memory']:>7.1f}x  {result['peer']}"
    )


def main(make_rows: Callable[[], dict[str, Row]], description: str, file: str, *, threads: int = 2) -> None:
    """Measure the rows, print the table and save it as `results/{file}`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", help="one row")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = make_rows()
    if options.memory:
        return memory(rows[options.only], options.memory)
    table = {}
    print(f"{'loss':30}{'shape':>22}{'ms':>10}{'peer ms':>10}{'faster':>8}{'MiB':>9}{'peer MiB':>10}{'less':>8}  peer")
    for name, row in rows.items():
        if options.only not in (None, name):
            continue
        table[name] = result = measure(name, row, options.threads)
        print(line(name, result), flush=True)
        if result["extra_mib"] > result.get("limit_mib", result["extra_mib"]):
            raise SystemExit(f"{name}: takes {result['extra_mib']} MiB, the limit is {result['limit_mib']}")
    if options.only is None:
        kept = {"torch": torch.__version__, "threads": options.threads, "cores": os.cpu_count()}
        kept |= {"platform": platform.machine(), "rows": table}
        (Path(__file__).parent / "results" / file).write_text(json.dumps(kept, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main(rows, "Speed and memory of the losses.", "losses.json")
