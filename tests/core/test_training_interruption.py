"""Training that is killed at any moment, and training in two processes: the weights are those of one quiet process."""

import json
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
from kdlib.training import load_checkpoint, read_log
from kdlib.training.events import TrainEvent

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
        max_steps=STEPS,
        accumulate=2,
        lr=0.05,
        ema_decay=0.9,
        warmup_steps=5,
        clip_norm=1.0,
        checkpoint_dir=directory / "run",
        checkpoint_every_steps=1,
        log_path=directory / "log.jsonl",
        log_every=1,
    )


def child(directory: Path) -> None:
    """Train, a step or so in ten milliseconds, and tell when a step is done; keep what a finished run returns."""

    def slow(event: TrainEvent) -> None:
        print(event.step, flush=True)
        time.sleep(0.004)

    distiller = build()
    result = train(distiller, loader(), config(directory), hooks=[slow])
    told = {"weights": distiller.state_dict(), "ema": result.ema, "last": result.terms, "total": result.total}
    torch.save({**told, "epoch": result.epoch}, directory / "end.pt")


def pair(rank: int, directory: Path) -> None:
    """One of two processes that share each batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    distiller = build(dropout=0.0)
    train(distiller, halves(rank), shared(directory))
    torch.save(distiller.state_dict(), directory / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def halves(rank: int | None) -> list[Any]:
    images = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(2))
    return [(batch if rank is None else batch.chunk(2)[rank], {}) for batch in images]


def shared(directory: Path) -> TrainConfig:
    return TrainConfig(epochs=2, lr=0.05, accumulate=2, checkpoint_dir=directory / "run")


def start(task: str, directory: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "error::UserWarning", __file__, task, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    draw = random.Random(int(time.time()))  # another moment in each run: all of them must do
    kills = 0
    for _ in range(7):
        process = start("child", tmp_path)
        assert process.stdout is not None
        first = process.stdout.readline()
        if kills == 4 or not first:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            break
        time.sleep(draw.uniform(0.0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3

    # The quiet run is a process of the same kind: another number of threads rounds otherwise.
    whole = tmp_path / "whole"
    whole.mkdir()
    process = start("child", whole)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    end, quiet = (torch.load(place / "end.pt", weights_only=True) for place in (tmp_path, whole))
    assert same(end["weights"], quiet["weights"])
    assert not same(end["weights"], build().state_dict())
    assert same(end["ema"], quiet["ema"])
    found = load_checkpoint(tmp_path / "run" / f"step-{STEPS:09d}.pt")
    assert same(found["distiller"], quiet["weights"])
    assert same(found["ema"], quiet["ema"])
    assert found["last"] == {"epoch": quiet["epoch"], "total": quiet["total"], "terms": quiet["last"]}
    rows = [json.dumps({**row, "seconds": 0}) for row in read_log(tmp_path / "log.jsonl")]
    assert rows == [json.dumps({**row, "seconds": 0}) for row in read_log(whole / "log.jsonl")]
    assert len(list((tmp_path / "run").glob("step-*.pt"))) == 2


def test_two_processes_are_one(tmp_path: Path) -> None:
    processes = [start(f"pair{rank}", tmp_path) for rank in (0, 1)]
    ends = [process.communicate(timeout=60)[1] for process in processes]
    for process, errors in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors
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
