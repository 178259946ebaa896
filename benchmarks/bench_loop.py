"""Overhead of `kdlib.train` over a training loop written by hand, on one small network.

Both loops run the same distiller, optimizer, schedule, clipping and loss values. The rounds alternate and the ratio is the median over pairs
of rounds. Times are those of the processor, with one thread, so that other load on the machine changes them little. The hand-written loop has no
checkpoints, no log and no checks.

    python benchmarks/bench_loop.py --output benchmarks/results/loop.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term, TrainConfig, train
from kdlib.training.schedules import build_optimizer, lr_factor, set_lr

LIMIT = 1.03


def network(width: int) -> nn.Sequential:
    convolutions = [nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.PReLU(width)]
    more = [nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.PReLU(width)]
    return nn.Sequential(*convolutions, *more, nn.Flatten(), nn.LazyLinear(64))


def build(images: Tensor) -> Distiller:
    torch.manual_seed(0)
    student, teacher = network(16), network(32)
    for each in (student, teacher):
        each(images)
    terms = {"hint": Term(HintLoss(), student="out", teacher="out")}
    return Distiller(
        StudentAdapter(student, {"out": OUTPUT}), {"big": TeacherAdapter(teacher, {"out": OUTPUT})}, Objective(terms)
    )


def by_hand(distiller: Distiller, loader: list[tuple[Tensor, dict[str, Tensor]]], config: TrainConfig) -> float:
    """Train with a short loop; return the seconds of the processor."""
    parameters = list(distiller.trainable_parameters())
    optimizer = build_optimizer(parameters, config)
    distiller.train()
    began, total = time.process_time(), len(loader)
    for step, (images, targets) in enumerate(loader):
        set_lr(optimizer, lr_factor(step, total, config))
        output = distiller(images, targets, step=step)
        output.total.backward()
        output.total.item()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.process_time() - began


def by_kdlib(distiller: Distiller, loader: list[tuple[Tensor, dict[str, Tensor]]], config: TrainConfig) -> float:
    """Train with `train`; return the seconds of the processor."""
    began = time.process_time()
    train(distiller, loader, config)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps of a round (100)")
    parser.add_argument("--rounds", type=int, default=31, help="pairs of rounds (31)")
    parser.add_argument("--batch", type=int, default=16, help="images per step (16)")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(options.batch, 3, 56, 56)
    loader: list[tuple[Tensor, dict[str, Tensor]]] = [(images, {})] * options.steps
    config = TrainConfig(max_steps=options.steps, lr=0.01, clip_norm=5.0)
    ratios, milliseconds = [], []
    for number in range(options.rounds + 1):  # the first round warms up
        first, second = (by_kdlib, by_hand) if number % 2 else (by_hand, by_kdlib)
        times = {each: each(build(images), loader, config) for each in (first, second)}
        if number:
            ratios.append(times[by_kdlib] / times[by_hand])
            milliseconds.append(1000 * times[by_hand] / options.steps)
    result = {
        "ratio": round(statistics.median(ratios), 4),
        "limit": LIMIT,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "hand_written_ms_per_step": round(statistics.median(milliseconds), 3),
        "steps": options.steps,
        "batch": options.batch,
        "torch": str(torch.__version__),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
