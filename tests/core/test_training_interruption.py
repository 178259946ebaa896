"""Training that is interrupted by SIGKILL, and training in two processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term, TrainConfig, train
from kdlib.training import TrainEvent, load_checkpoint, read_log

STEPS = 120


def build(dropout: float = 0.2) -> Distiller:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.PReLU(16), nn.Dropout(dropout), nn.Linear(16, 5)]
        if not dropout:
            del layers[1]
        student = StudentAdapter(nn.Sequential(*layers), {"out": OUTPUT})
        teacher = TeacherAdapter(nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)), {"out": OUTPUT})
    hint = Term(HintLoss(), student="out", teacher="out", project="auto")
    return Distiller(student, {"teacher": teacher}, Objective({"hint": hint}))


def loader() -> Any:
    images = torch.randn(56, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images), batch_size=8, shuffle=True, collate_fn=_collate)


def _collate(items: Any) -> Any:
    return torch.stack([item[0] for item in items]), {}


def config(directory: Path) -> TrainConfig:
    return TrainConfig(
        max_steps=STEPS, accumulate=2, lr=0.05, ema_decay=0.9, warmup_steps=5, clip_norm=1.0, log_every=1,
        checkpoint_dir=directory / "run", checkpoint_every_steps=1, log_path=directory / "log.jsonl",
    )  # fmt: skip


def child(directory: Path) -> None:
    """Train slowly, print each completed step, and save the result."""

    def slow(event: TrainEvent) -> None:
        print(event.step, flush=True)
        time.sleep(0.004)

    distiller = build()
    result = train(distiller, loader(), config(directory), hooks=[slow])
    last = {"epoch": result.epoch, "total": result.total, "terms": result.terms}
    torch.save({"weights": distiller.state_dict(), "ema": result.ema, "last": last}, directory / "end.pt")


def pair(rank: int, directory: Path) -> None:
    """Train as one of two processes, each with half of every batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    distiller = build(dropout=0.0)
    train(distiller, halves(rank), TrainConfig(epochs=2, lr=0.05, accumulate=2, checkpoint_dir=directory / "run"))
    torch.save(distiller.state_dict(), directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def halves(rank: int | None) -> list[Any]:
    images = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(2))
    return [(batch if rank is None else batch.chunk(2)[rank], {}) for batch in images]


def start(task: str, directory: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error::UserWarning", __file__, task, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: "subprocess.Popen[str]") -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_repeated_interruption_gives_the_same_weights(tmp_path: Path) -> None:
    generator = random.Random(int(time.time()))  # other times in each run, because any time must do
    interruptions = 0
    for _ in range(7):
        process = start("child", tmp_path)
        assert process.stdout is not None
        first = process.stdout.readline()
        if interruptions == 4 or not first:
            finish(process)
            break
        time.sleep(generator.uniform(0.0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        interruptions += process.returncode == -signal.SIGKILL
    assert interruptions >= 3

    # The reference is a process with the same number of threads, which affects rounding.
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(start("child", whole))
    end, reference = (torch.load(place / "end.pt", weights_only=True) for place in (tmp_path, whole))
    checkpoint = load_checkpoint(tmp_path / "run" / f"step-{STEPS:09d}.pt")
    assert same(end["weights"], reference["weights"])
    assert same(checkpoint["distiller"], reference["weights"])
    assert not same(end["weights"], build().state_dict())
    assert same(end["ema"], reference["ema"])
    assert same(checkpoint["ema"], reference["ema"])
    assert checkpoint["last"] == reference["last"]
    rows, expected = ([{**row, "seconds": 0} for row in read_log(place / "log.jsonl")] for place in (tmp_path, whole))
    assert rows == expected
    assert len(list((tmp_path / "run").glob("step-*.pt"))) == 2


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    for process in [start(f"pair{rank}", tmp_path) for rank in (0, 1)]:
        finish(process)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    alone = build(dropout=0.0)
    train(alone, halves(None), TrainConfig(epochs=2, lr=0.05, accumulate=2))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value)
    assert load_checkpoint(tmp_path / "run" / "step-000000004.pt")["fingerprint"]["processes"] == 2


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "child":
        child(place)
    else:
        pair(int(task.removeprefix("pair")), place)
