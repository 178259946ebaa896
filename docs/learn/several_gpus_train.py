"""Distill on one or several processes: `python several_gpus_train.py`, or `torchrun --nproc-per-node 8 several_gpus_train.py`."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tutorial import accuracy, digits

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term, TrainConfig, train

TAPS, BATCH = {"logits": OUTPUT}, 64


def network(width: int) -> nn.Sequential:
    body = [nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)]
    return nn.Sequential(*body, nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten(), nn.Linear(8 * width, 10))


# [processes]
def start_processes() -> tuple[torch.device, int]:
    """The device of this process and the number of processes; `torchrun` sets the environment variables."""
    if "WORLD_SIZE" not in os.environ:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device, dist.get_world_size()


# [train]
def fit(distiller: Distiller, data: TensorDataset, steps: int, device: torch.device, processes: int) -> None:
    # Each process reads its own part of the data, and its part of each batch of 64.
    sampler = DistributedSampler(data) if processes > 1 else None
    loader = DataLoader(data, BATCH // processes, shuffle=sampler is None, sampler=sampler, drop_last=True)
    settings = {"optimizer": "adamw", "lr": 1e-2, "warmup_steps": 20, "sync_batch_norm": processes > 1}
    train(distiller, loader, TrainConfig(max_steps=steps, device=device, **settings))


# [main]
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, help="file for the accuracies in percent")
    options = parser.parse_args()
    device, processes = start_processes()
    images, labels, *new = digits(1000)
    data = TensorDataset(images, labels)

    torch.manual_seed(options.seed)  # the same weights in every process
    teacher, student = network(16).to(device), network(4).to(device)
    label = Term(nn.CrossEntropyLoss(), student="logits", target="target")
    fit(
        Distiller(StudentAdapter(teacher, TAPS), {}, Objective({"label": label})),
        data,
        options.steps,
        device,
        processes,
    )
    soft = Term(SoftTargetLoss(temperature=4.0), student="logits", teacher="logits")
    adapters = StudentAdapter(student, TAPS), {"large": TeacherAdapter(teacher, TAPS)}
    fit(Distiller(*adapters, Objective({"soft": soft})), data, options.steps, device, processes)

    if processes == 1 or dist.get_rank() == 0:
        found = [accuracy(model.cpu(), *new) for model in (teacher, student)]
        print(f"processes: {processes}, teacher {found[0]:.1f} %, student {found[1]:.1f} %")
        if options.result is not None:
            options.result.write_text(f"{found[0]} {found[1]}", encoding="utf-8")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
