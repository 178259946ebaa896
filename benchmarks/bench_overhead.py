"""Overhead of adapters and the Distiller: `python benchmarks/bench_overhead.py [--threads 2]`.

Measures an adapter against the forward pass of the bare model, `Distiller` against the same maths written by hand, also
with the whole step compiled, and `import kdlib` after `import torch`. The two sides alternate, and the median ratio is reported. Writes
`results/overhead.json`.
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
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    AttentionTransferLoss,
    Distiller,
    HintLoss,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
)


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.one_norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.two_norm = nn.BatchNorm2d(channels)
        self.short = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and the shortcut."""
        return F.relu(self.two_norm(self.two(F.relu(self.one_norm(self.one(x))))) + self.short(x))


def resnet(width: int) -> nn.Sequential:
    """Build the layout of ResNet-18 without its first pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False)]
    for stage in range(4):
        channels = width * 2**stage
        before = width if stage == 0 else channels // 2
        layers.append(nn.Sequential(Block(before, channels, 1 if stage == 0 else 2), Block(channels, channels, 1)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, 128))


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each side, and the median of the ratios of consecutive runs."""
    one(), other()
    times = []
    for number in range(rounds):
        pair = [0.0, 0.0]
        for at in (0, 1) if number % 2 else (1, 0):  # so that neither is always first
            began = time.perf_counter()
            (one, other)[at]()
            pair[at] = time.perf_counter() - began
        times.append(pair)
    a, b = (1000 * statistics.median(pair[at] for pair in times) for at in (0, 1))
    return {
        "milliseconds": round(a, 3),
        "other_milliseconds": round(b, 3),
        "ratio": round(statistics.median(x / y for x, y in times), 4),
    }


def adapter(rounds: int) -> dict[str, float]:
    """Time four taps and the output against none."""
    model = resnet(64).eval()
    tapped = StudentAdapter(model, {"embedding": OUTPUT, **{f"stage{n}": str(n) for n in (1, 2, 3, 4)}})
    images = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def ours() -> None:
        tapped(images)

    @torch.no_grad()
    def bare() -> None:
        model(images)

    return paired(ours, bare, rounds)


def step(rounds: int) -> dict[str, float]:
    """Time the forward and backward pass of a student with two teachers and three terms."""
    student, teachers = resnet(16), [resnet(32).eval(), resnet(32).eval()]
    for teacher in teachers:
        teacher.requires_grad_(False)
    images = torch.randn(16, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    taps: dict[str, Any] = {"embedding": OUTPUT, "map": "3"}
    terms = {
        "embedding": Term(AngularDistillLoss(form="cosine"), student="embedding", teacher="embedding", weight=2.0),
        "attention": Term(AttentionTransferLoss(), student="map", teacher="map", teachers=["second"]),
    }
    adapted = {name: TeacherAdapter(each, taps) for name, each in zip(("first", "second"), teachers, strict=True)}
    distiller = Distiller(StudentAdapter(student, taps), adapted, Objective(terms))
    angular, attention = AngularDistillLoss(form="cosine"), AttentionTransferLoss()

    def ours() -> None:
        student.zero_grad(set_to_none=True)
        distiller(images, {}).total.backward()

    def head(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = x
        for at, layer in enumerate(model):
            x = layer(x)
            feature = x if at == 3 else feature
        return feature, x

    def by_hand() -> None:
        student.zero_grad(set_to_none=True)
        student.train()
        feature, embedding = head(student, images)
        with torch.no_grad():
            seen = [head(each, images) for each in teachers]
        total = sum(angular(embedding, each[1]) for each in seen) + attention(feature, seen[1][0])
        total.backward()

    return paired(ours, by_hand, rounds)


def compiled_step(rounds: int) -> dict[str, float]:
    """Time the compiled forward and backward pass with two teachers and four terms against the same, compiled by hand.

    The target is a ratio of at most 1.02.
    """
    models = [resnet(16), resnet(32).eval(), resnet(32).eval()]
    for teacher in models[1:]:
        teacher.requires_grad_(False)
    student = models[0]
    images = torch.randn(16, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    taps: dict[str, Any] = {"embedding": OUTPUT, "map": "3"}
    losses = {"angular": AngularDistillLoss(form="cosine"), "soft": SoftTargetLoss(), "hint": HintLoss()}
    attention = AttentionTransferLoss()
    terms = {name: Term(loss, student="embedding", teacher="embedding") for name, loss in losses.items()}
    terms["attention"] = Term(attention, student="map", teacher="map", weight=2.0)
    adapted = {name: TeacherAdapter(each, taps) for name, each in zip(("one", "two"), models[1:], strict=True)}
    distiller = torch.compile(Distiller(StudentAdapter(student, taps), adapted, Objective(terms)))

    def head(model: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = x
        for at, layer in enumerate(model):
            x = layer(x)
            feature = x if at == 3 else feature
        return feature, x

    @torch.compile
    def total(x: Tensor) -> Tensor:
        feature, embedding = head(student, x)
        with torch.no_grad():
            seen = [head(each, x) for each in models[1:]]
        values = [
            sum(loss(embedding, seen_embedding) for loss in losses.values()) + 2.0 * attention(feature, seen_map)
            for seen_map, seen_embedding in seen
        ]
        return (values[0] + values[1]) / 2

    def ours() -> None:
        student.zero_grad(set_to_none=True)
        distiller(images, {}).total.backward()

    def by_hand() -> None:
        student.zero_grad(set_to_none=True)
        student.train()
        total(images).backward()

    difference = abs(float(distiller(images, {}).total.detach()) - float(total(images).detach()))
    if difference > 1e-3:
        raise SystemExit(f"compiled step: the totals differ by {difference}")
    return paired(ours, by_hand, rounds)


def imported(rounds: int) -> dict[str, float]:
    """Measure the milliseconds of `import kdlib` after `import torch`, in new processes."""
    code = "import torch, time; t = time.perf_counter(); import kdlib; print(time.perf_counter() - t)"
    run = [sys.executable, "-c", code]
    found = [float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)]
    return {"milliseconds": round(1000 * statistics.median(found), 1)}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description="What the composition costs.")
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    rows = {"adapter over bare forward": adapter(41), "Distiller over by hand": step(31)}
    rows |= {"compiled Distiller over by hand": compiled_step(31), "import kdlib": imported(7)}
    for name, row in rows.items():
        print(f"{name:33}" + "  ".join(f"{key} {value:g}" for key, value in row.items()))
    kept = {"torch": torch.__version__, "threads": threads, "cores": os.cpu_count(), "platform": platform.machine()}
    (Path(__file__).parent / "results" / "overhead.json").write_text(json.dumps(kept | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
