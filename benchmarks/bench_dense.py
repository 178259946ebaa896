"""Tokens, pixels and large vocabularies: `python benchmarks/bench_dense.py [--tokens 8192] [--threads 2] [--only NAME]`.

Measures forward and backward of `linear_soft_target` against whole logits, and of `soft_target` on the logits of pixels
against `F.kl_div`. Time is measured in turns and reported as the median of the ratios; memory is the peak above the
inputs and their gradients in a separate process. Where whole logits do not fit into memory, they are measured on a part
of the tokens and on half of that, and time and memory are continued in a straight line. Values are compared first.
Writes `results/dense.json`, with the targets beside the figures.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.functional import linear_soft_target, soft_target

VOCABULARY, STUDENT, TEACHER = 128_256, 1024, 2048
MIB = 2**20
MATRICES = 5
"""Matrices of the size of the logits that the formula on whole logits holds at its peak, rounded up."""
TARGETS = {"linear_soft_target": {"time": 1.15, "memory": 1 / 8}, "soft_target, pixels": {"time": 1.0, "memory": 1 / 2}}


def linear_case(tokens: int) -> tuple[list[Tensor], dict[str, Callable[..., Tensor]]]:
    """Return hidden states and output matrices of both sides, and the loss by both ways."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    hidden, weight = draw(tokens, STUDENT).requires_grad_(), (draw(VOCABULARY, STUDENT) / 32).requires_grad_()
    inputs = [hidden, weight, draw(tokens, TEACHER), draw(VOCABULARY, TEACHER) / 45]

    def whole(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        with torch.no_grad():
            target = (h_t @ w_t.T).softmax(1)
        return F.kl_div((h_s @ w_s.T).log_softmax(1), target, reduction="batchmean")

    return inputs, {"ours": linear_soft_target, "by hand": whole}


def pixel_case(size: int) -> tuple[list[Tensor], dict[str, Callable[..., Tensor]]]:
    """Return logits of 19 classes and 8 images, and the loss by both ways."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 19, size, size, generator=rng) for _ in range(2))

    def by_hand(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="sum") / (s.numel() // s.shape[1])

    ours = lambda s, t: soft_target(s, t, temperature=1.0)  # noqa: E731
    return [student.requires_grad_(), teacher], {"ours": ours, "by hand": by_hand}


CASES = {"linear_soft_target": linear_case, "soft_target, pixels": pixel_case}


def resident(field: str) -> int:
    """Return a field of the status of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def available() -> int:
    """Return the memory of the machine that can be used, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


def run(loss: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Return the seconds of a forward and a backward pass."""
    for x in inputs:
        x.grad = None
    began = time.perf_counter()
    loss(*inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return time.perf_counter() - began


def memory(name: str, side: str, size: int) -> None:
    """Print the peak memory above the inputs and their gradients; runs in a separate process."""
    few, losses = CASES[name](16)
    run(losses[side], few)
    del few
    inputs, losses = CASES[name](size)
    for x in inputs:
        x.grad = torch.zeros_like(x) if x.requires_grad else None
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    losses[side](*inputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    print(resident("VmHWM") - before)


def extra(name: str, side: str, size: int, threads: int) -> int:
    """Return the peak memory of one side in bytes, in a new process."""
    command = [
        sys.executable,
        __file__,
        "--memory",
        side,
        "--only",
        name,
        "--size",
        str(size),
        "--threads",
        str(threads),
    ]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(name: str, size: int, part: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return times and memory of both sides, that by hand on the `part` and on half of it, continued to `size`."""
    sizes = (part,) if part == size else (part, part // 2)

    def continued(values: list[float]) -> float:
        return (
            values[0] if len(values) == 1 else values[0] + (values[0] - values[1]) * (size - part) / (part - part // 2)
        )

    losses = CASES[name](16)[1]
    inputs = {each: CASES[name](each)[0] for each in {size, *sizes}}
    ours, by_hand = (float(losses[side](*inputs[part]).detach()) for side in ("ours", "by hand"))
    if abs(ours - by_hand) > 1e-4 * abs(by_hand):
        raise SystemExit(f"{name}: ours is {ours}, by hand it is {by_hand}: not the same loss")
    times = []
    for number in range(rounds):
        calls = {"ours": lambda: [run(losses["ours"], inputs[size])]}
        calls["by hand"] = lambda: [run(losses["by hand"], inputs[each]) for each in sizes]
        order = ("ours", "by hand") if number % 2 else ("by hand", "ours")  # so that neither is always first
        pair = {side: continued(calls[side]()) if side == "by hand" else calls[side]()[0] for side in order}
        times.append((pair["ours"], pair["by hand"]))
    bytes_ours = extra(name, "ours", size, threads)
    bytes_by_hand = continued([extra(name, "by hand", each, threads) for each in sizes])
    result = {
        "size": size,
        "size_by_hand": part,
        "seconds": round(statistics.median(a for a, _ in times), 3),
        "by_hand_seconds": round(statistics.median(b for _, b in times), 3),
        "time_ratio": round(statistics.median(a / b for a, b in times), 3),
        "extra_mib": round(bytes_ours / MIB, 1),
        "by_hand_extra_mib": round(bytes_by_hand / MIB, 1),
        "memory_ratio": round(bytes_ours / bytes_by_hand, 4),
        "targets": TARGETS[name],
    }
    print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return result


def main() -> None:
    """Print the ratios and write them."""
    parser = argparse.ArgumentParser(description="Speed and memory of losses of tokens and pixels.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pixels", type=int, default=512, help="width and height of the maps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=tuple(CASES))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return memory(options.only, options.memory, options.size)
    fitting = int(0.8 * available() / (4 * VOCABULARY * MATRICES))
    part = next(size for size in (options.tokens // 2**k for k in range(20)) if size <= fitting)
    rows = {}
    if options.only in (None, "soft_target, pixels"):
        rows["soft_target, pixels"] = measure(
            "soft_target, pixels", options.pixels, options.pixels, 3 * options.rounds, options.threads
        )
    if options.only in (None, "linear_soft_target"):
        rows["linear_soft_target"] = measure(
            "linear_soft_target", options.tokens, part, options.rounds, options.threads
        )
    if options.only is None:
        kept = {"torch": torch.__version__, "threads": options.threads, "cores": os.cpu_count()}
        kept |= {"platform": platform.machine(), "rows": rows}
        (Path(__file__).parent / "results" / "dense.json").write_text(json.dumps(kept, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
