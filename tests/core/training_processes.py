"""Trains in processes that one process forks, which takes milliseconds, and prints what became of them.

Each scenario is a function `(rank, folder)` that two processes run. Its result, or the text of its error, is printed as
JSON for both ranks.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it, which takes a second per process unless it is loaded before the fork
import torch.distributed as dist
from torch import nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term, TrainConfig, train
from kdlib.training import TrainEvent
from tests.processes import run_group, start, wait

BATCHES = 6


def build() -> Distiller:
    """A student with dropout and BatchNorm."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.PReLU(16), nn.Dropout(0.3), nn.Linear(16, 5)]
    student = StudentAdapter(nn.Sequential(*layers), {"out": OUTPUT})
    teacher = TeacherAdapter(nn.Linear(6, 5), {"out": OUTPUT})
    return Distiller(student, {"big": teacher}, Objective({"hint": Term(HintLoss(), student="out", teacher="out")}))


class Batches:
    """`count` batches of one rank, in an order drawn from torch's random state."""

    def __init__(self, rank: int, count: int = BATCHES, length: int | None = None) -> None:
        self.length = count if length is None else length
        draw = torch.Generator().manual_seed(rank)
        ids = torch.arange(count * 2).view(count, 2) + 100 * rank
        self.items = [(torch.randn(2, 6, generator=draw), {"sample": each}) for each in ids]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        for at in torch.randperm(len(self.items)).tolist():
            yield self.items[at]


def config(folder: Path, **fields: Any) -> TrainConfig:
    """Two epochs with an average, accumulation and a checkpoint at every step."""
    given = {"epochs": 4, "accumulate": 2, "lr": 0.05, "ema_decay": 0.9, "checkpoint_every_steps": 1, **fields}
    return TrainConfig(checkpoint_dir=folder / "run", log_path=folder / "log.jsonl", **given)


def digest(distiller: Distiller, result: Any) -> list[Any]:
    """Numbers that any difference of a weight changes."""
    tensors = [*distiller.state_dict().values(), *result.ema.values()]
    return [
        result.step,
        result.resumed_from or 0,
        *(float(x.double().pow(2).sum()) for x in tensors if x.is_floating_point()),
    ]


def straight(rank: int, folder: Path) -> Any:
    """Train without an interruption."""
    distiller = build()
    return digest(distiller, train(distiller, Batches(rank), config(folder)))


def resumed(rank: int, folder: Path) -> Any:
    """Stop after step 5, in the middle of the second epoch, and resume in new objects."""

    class Stopped(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if event.step == 5:
            raise Stopped

    with suppress(Stopped, RuntimeError):  # the other process cannot receive this class
        train(build(), Batches(rank), config(folder), hooks=[stop] if rank == 0 else [])
    torch.manual_seed(rank + 77)
    return straight(rank, folder)


def lengths(rank: int, folder: Path) -> Any:
    """The second process has one batch less."""
    return straight_with(Batches(rank, BATCHES - rank), folder)


def wrong_length(rank: int, folder: Path) -> Any:
    """The second process has one batch less than its length says."""
    return straight_with(Batches(rank, BATCHES - rank, BATCHES), folder)


def settings(rank: int, folder: Path) -> Any:
    """The second process has another number of epochs."""
    return straight_with(Batches(rank), folder, epochs=4 - rank)


def unsized(rank: int, folder: Path) -> Any:
    """The second process has one batch less, and the loaders have no length."""
    return straight_with((item for item in Batches(rank, BATCHES - rank).items), folder, max_steps=6)


def straight_with(loader: Any, folder: Path, **fields: Any) -> Any:
    """Train on a loader."""
    return train(build(), loader, config(folder, **fields)).step


def broken_batch(rank: int, folder: Path) -> Any:
    """The loader of the second process raises an error of its own."""

    class Broken(Batches):
        def __iter__(self) -> Any:
            yield from self.items[:3]
            raise OSError(f"cannot read image 7 of process {rank}")

    return straight_with(Broken(rank) if rank else Batches(rank), folder)


def bad_shape(rank: int, folder: Path) -> Any:
    """One batch of the second process has a wrong shape."""
    data = Batches(rank).items
    if rank:
        data[3] = (torch.zeros(2, 7), {})
    return straight_with(data, folder)


def batch_of_one(rank: int, folder: Path) -> Any:
    """The last batch of the second process has one sample."""
    data = Batches(rank).items
    if rank:
        data[5] = (torch.zeros(1, 6), {})
    return straight_with(data, folder)


def evaluation(rank: int, folder: Path, interruption: str = "") -> Any:
    """Both processes evaluate with the statistics of the first, whose metrics count; the fourth of them is the best."""
    calls: list[float] = []

    def evaluate(distiller: Distiller) -> float:
        calls.append(float(distiller.student(torch.ones(3, 6))["out"].double().sum()))
        if interruption and len(calls) == 3 and rank == 1:
            if interruption == "error":
                raise OSError("cannot read the validation set")
            os.kill(os.getpid(), signal.SIGTERM)
        steps = int(distiller.student.model[1].num_batches_tracked) // 2
        return [5, 4, 3, 6, 2, 1][steps // 2 - 1] if rank == 0 else float("nan")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = {"evaluate": evaluate, "evaluate_every": 2, "monitor": "score", "mode": "max", "patience": 3}
    distiller = build()
    try:
        result = train(distiller, Batches(rank), config(folder, **given, checkpoint_every_steps=None))
    except (KeyboardInterrupt, OSError):
        return evaluation(rank, folder)
    best = [float(x.double().sum()) for x in result.best.weights.values()]
    metrics = [each.metrics["score"] for each in result.evaluations]
    return {"digest": digest(distiller, result), "best": best, "metrics": metrics, "outputs": calls[-3:]}


def nan(rank: int, folder: Path) -> Any:
    """One batch of the second process contains a NaN."""
    data = Batches(rank).items
    if rank:
        data[3][0][0, 0] = float("nan")
    return straight_with(data, folder)


def hook(rank: int, folder: Path) -> Any:
    """A hook of the first process raises an error that cannot be sent to the other."""

    class Unportable(Exception):
        pass

    def fail(event: TrainEvent) -> None:
        raise Unportable("the disk is full")

    return train(build(), Batches(rank), config(folder), hooks=[fail]).step


def halves(rank: int, folder: Path) -> Any:
    """Each process trains on its half of every batch, without dropout and BatchNorm."""
    images = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(2))
    distiller = build()
    distiller.student.model[1] = distiller.student.model[3] = nn.Identity()
    data = [(batch.chunk(dist.get_world_size())[rank], {}) for batch in images]
    return digest(distiller, train(distiller, data, config(folder)))


class Shared:
    """Batches that the processes share, as a loader with `shard` does."""

    def __init__(self) -> None:
        self.images = torch.randn(4, 16, 6, generator=torch.Generator().manual_seed(2))
        self.rank, self.count = 0, 1

    def shard(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Any:
        return ((batch.chunk(self.count)[self.rank], {}) for batch in self.images)


def shared(rank: int, folder: Path, hooks: Any = ()) -> Any:
    """Train with BatchNorm on batches that the processes share."""
    distiller = build()
    distiller.student.model[3] = nn.Identity()
    given = config(folder, sync_batch_norm=True)
    return digest(distiller, train(distiller, Shared(), given, hooks=hooks))


def handed_over(rank: int, folder: Path) -> Any:
    """Both processes stop after step 5, and the first one goes on alone."""

    class Stopped(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if event.step == 5:
            raise Stopped

    with suppress(Stopped, RuntimeError):  # the other process cannot receive this class
        shared(rank, folder, hooks=[stop] if rank == 0 else [])
    dist.destroy_process_group()
    return shared(rank, folder) if rank == 0 else None


def full_disk(rank: int, folder: Path) -> Any:
    """The first process cannot write its second checkpoint."""

    def fail(event: TrainEvent) -> None:
        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = full  # type: ignore[assignment]

    return train(build(), Batches(rank), config(folder), hooks=[fail]).step


def unwritable(rank: int, folder: Path) -> Any:
    """The directory for checkpoints is a file."""
    if rank == 0:
        (folder / "run").write_text("a file")
    time.sleep(0.2)
    return straight_with(Batches(rank), folder)


def stopped_by(
    signum: int, receivers: tuple[int, ...], *, repeat: int = 1, waiting: bool = False
) -> Callable[..., Any]:
    """Return a scenario in which processes receive a signal in the middle of a step, or while they wait for a batch."""

    def scenario(rank: int, folder: Path) -> Any:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def send() -> None:
            for _ in range(repeat if rank in receivers else 0):
                os.kill(os.getpid(), signum)

        class Sending(Batches):
            def __iter__(self) -> Any:
                for at, item in enumerate(super().__iter__()):
                    if at == 3 and waiting:
                        send()
                        time.sleep(0.1)
                    yield item

        class Loss(HintLoss):
            calls = 0

            def forward(self, *features: Any, **options: Any) -> Any:
                Loss.calls += 1
                if Loss.calls == 5 and not waiting:
                    send()
                return super().forward(*features, **options)

        distiller = build()
        distiller.objective = Objective({"hint": Term(Loss(), student="out", teacher="out")})
        try:
            train(distiller, Sending(rank), config(folder, checkpoint_every_steps=None))
        except KeyboardInterrupt:
            return "KeyboardInterrupt"
        return "not stopped"

    return scenario


SCENARIOS = {
    **{f.__name__: f for f in (
        straight, resumed, lengths, settings, wrong_length, unsized, broken_batch, bad_shape, batch_of_one, evaluation,
        nan, hook, full_disk, unwritable,
    )},
    "evaluation_error": partial(evaluation, interruption="error"),
    "evaluation_signal": partial(evaluation, interruption="signal"),
    "halves": halves,
    "whole": halves,
    "shared": shared,
    "handed_over": handed_over,
    "shared_whole": shared,
    "term_one": stopped_by(signal.SIGTERM, (1,)),
    "term_zero": stopped_by(signal.SIGTERM, (0,)),
    "term_both": stopped_by(signal.SIGTERM, (0, 1)),
    "term_repeated": stopped_by(signal.SIGTERM, (0, 1), repeat=3),
    "term_waiting": stopped_by(signal.SIGTERM, (1,), waiting=True),
    "int_both": stopped_by(signal.SIGINT, (0, 1), repeat=2),
}  # fmt: skip


def one_process(folder: Path) -> None:
    """Train slowly, and save the weights and the averages."""
    distiller = build()
    given = config(folder, epochs=40, log_every=1, clip_norm=1.0, warmup_steps=5)
    result = train(distiller, Batches(0), given, hooks=[lambda event: time.sleep(0.004)])
    torch.save({"weights": distiller.state_dict(), "ema": result.ema}, folder / "end.pt")


def interrupt_often(place: Path) -> int:
    """Train once without an interruption and once with several, at other times in each run; return their number."""
    generator, interruptions = random.Random(time.time()), 0
    for name in ("straight", "interrupted"):
        (place / name).mkdir(parents=True)
    wait(start(partial(one_process, place / "straight")))
    for _ in range(6):
        child = start(partial(one_process, place / "interrupted"))
        time.sleep(generator.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        interruptions += wait(child) == -signal.SIGKILL
    wait(start(partial(one_process, place / "interrupted")))
    return interruptions


def main(place: Path) -> None:
    """Run all scenarios and print their outcomes, exit codes and checkpoints."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"interruptions": interrupt_often(place / "one process")}
    for name in SCENARIOS:
        folder = place / name
        folder.mkdir()
        outcomes, codes = run_group(1 if name.endswith("whole") else 2, partial(SCENARIOS[name], folder=folder))
        run_folder = folder / "run"
        left = sorted(path.name for path in run_folder.iterdir()) if run_folder.is_dir() else []
        found[name] = {"outcomes": outcomes, "codes": codes, "left": left, "run": str(run_folder)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
