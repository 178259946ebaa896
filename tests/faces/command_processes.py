"""Runs commands in processes that one process forks, as `torchrun` would start them, and prints what became of them."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # DDP imports it, which takes a second per process unless it is loaded before the fork
from torch import Tensor
from torch.distributed.tensor import DTensor

import kdlib_faces.commands.cache
import kdlib_faces.commands.evaluate
import kdlib_faces.commands.train  # noqa: F401  # these are imported before the fork
from kdlib import TeacherAdapter
from kdlib_faces._hardware import find_hardware
from kdlib_faces.backbones import load_backbone
from kdlib_faces.cli import main as run_command
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.lists import read_faces
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.recipes.liaad import LIAADConfig, build
from kdlib_faces.recipes.student import head_mesh
from kdlib_faces.teachers.open import stage_taps
from kdlib_faces.training import fit
from tests.faces.cache_files import COUNT, SIZE, make_faces, settings

SETTINGS = (
    "training.steps=6", "training.lr=0.02", "training.batch_size=8", "training.checkpoint_seconds=1e-6", "recipe.width=0.25",
    "recipe.input_size=32", "recipe.embedding_dim=16", "recipe.weighting=center",
)  # fmt: skip


class WideBatches:
    """Batches in float64; before batch `stop`, counted over all epochs, the process sends SIGTERM to itself."""

    def __init__(self, batches: FaceBatches, stop: int | None) -> None:
        self.batches, self.stop, self.epoch = batches, stop, 0
        self.shard = batches.shard

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for number, (inputs, targets) in enumerate(self.batches, self.epoch * len(self)):
            if number == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            yield inputs.double(), targets


def train_wide(
    faces: Path, output: Path, *, batch_size: int = 8, sharded: bool = False, stop: int | None = None
) -> int:
    """Train by the recipe of the commands, in float64; return 0."""
    config = LIAADConfig(
        width=0.25, input_size=SIZE, embedding_dim=16, num_identities=COUNT // 2, head_sharded=sharded
    )  # fmt: skip
    networks = {name: load_backbone(faces / f"{name}.pt").double() for name in ("general", "age")}
    teachers = {name: TeacherAdapter(each, stage_taps(each, config.stage)) for name, each in networks.items()}
    listed, hardware = read_faces(faces / "faces.csv"), find_hardware("cpu")
    batches = FaceBatches(
        load_images(listed, SIZE), listed.identities, batch_size=batch_size, seed=0, augment=AugmentConfig(erase=0.5)
    )
    with hardware.process_group(20), head_mesh(config, hardware) as mesh:
        distiller = build(config, teachers=teachers, mesh=mesh).double()
        start = {f"student.{name}": value.detach() for name, value in distiller.student.named_parameters()}
        torch.save(start, faces / "wide_start.pt")
        fit(distiller, WideBatches(batches, stop), output, steps=6, lr=0.02, seed=0, label="wide", quiet=True)
        if hardware.first:
            whole = {
                name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in distiller.state_dict().items()
            }
            torch.save(whole, output / "wide.pt")
    return 0


def start(words: list[str] | Callable[[], int], rank: int, count: int, port: int, errors: Path) -> int:
    """Fork a process that runs a command or calls a function, and return its id."""
    child = os.fork()
    if child:
        return child
    signal.alarm(400)
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    code = 1
    try:
        with errors.open("a") as stream:
            os.dup2(stream.fileno(), 2)
            os.dup2(stream.fileno(), 1)
            code = words() if callable(words) else run_command(words)
    finally:
        os._exit(code)


def run(
    words: list[object] | Callable[[], int],
    count: int,
    errors: Path,
    meanwhile: Callable[[list[int]], object] = len,
) -> list[int]:
    """Run a command or a function in `count` processes and return their exit codes; `meanwhile` gets their ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    made = words if callable(words) else [str(word) for word in words]
    children = [start(made, rank, count, port, errors) for rank in range(count)]
    meanwhile(children)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_second(folder: Path, children: list[int]) -> None:
    """Kill the second process as soon as there is a checkpoint of step 2 or later."""
    while not any(int(path.stem.split("-")[1]) >= 2 for path in folder.glob("checkpoints/step-*.pt")):
        time.sleep(0.005)
    os.kill(children[1], signal.SIGKILL)


def main(place: Path) -> None:
    """Run all scenarios; print their exit codes and the seconds in which the others noticed a killed process."""
    torch.set_num_threads(1)
    faces = make_faces(place)
    found: dict[str, object] = {}
    common = ["train", "--data", faces / "faces.csv", "--teacher", faces / "general.pt", "--teacher", faces / "age.pt"]
    common += [*settings(*SETTINGS), "--device", "cpu", "--timeout", 20, "--output"]
    for name, count in (("one", 1), ("two", 2)):
        found[name] = run([*common, place / name], count, place / f"{name}.txt")
    for name, count in (("wide_one", 1), ("wide_two", 2)):
        found[name] = run(partial(train_wide, faces, place / name), count, place / f"{name}.txt")
    wide = partial(train_wide, faces, batch_size=6, sharded=True)
    found["chain_one"] = run(partial(wide, place / "chain_one"), 1, place / "chain.txt")
    found["chain"] = [
        run(partial(wide, place / "chain", stop=stop), count, place / "chain.txt")
        for count, stop in ((1, 2), (2, 3), (3, 5), (1, None))
    ]
    output, began = place / "killed", time.monotonic()
    found["killed"] = run([*common, output], 2, place / "killed.txt", lambda ids: kill_second(output, ids))
    found["seconds"] = time.monotonic() - began
    found["resumed"] = run([*common, output], 1, place / "resumed.txt")
    sharded = settings("recipe.head_sharded=true", "recipe.head_chunk=3", "training.steps=2")
    for name, count in (("sharded_one", 1), ("sharded_two", 2)):
        found[name] = run([*common, place / name, *sharded], count, place / f"{name}.txt")
    output = place / "sampled"
    sampled = [*common, output, *settings("recipe.head_sharded=true", "recipe.head_sample_rate=0.5")]
    found["sampled"] = [
        run(sampled, 2, place / "sampled.txt", lambda ids: kill_second(output, ids)),
        run(sampled, 1, place / "sampled.txt"),
    ]
    wrong = [*common, place / "wrong", *settings("training.batch_size=7")]
    found["wrong"] = run(wrong, 2, place / "wrong.txt")
    for name, count in (("cache_one", 1), ("cache_two", 2)):
        words = [
            "cache",
            "build",
            "--data",
            faces / "faces.csv",
            "--teacher",
            faces / "general.pt",
            "--output",
            place / name,
        ]
        found[name] = run([*words, *settings("batch_size=2")], count, place / f"{name}.txt")
    for name, count in (("report_one", 1), ("report_two", 2)):
        words = ["evaluate", "--data", faces / "faces.csv", "--model", faces / "general.pt", "--output", place / name]
        found[name] = run([*words, *settings("replicates=10")], count, place / f"{name}.txt")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
