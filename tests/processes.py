"""Processes that one process forks, which takes milliseconds, alone or as a process group."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = ["Ended", "read_outcomes", "run_group", "start", "wait"]

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """What each process returned, or the text of its error, `None` without either; and the exit codes."""

    outcomes: list[Any]
    codes: list[int]


def read_outcomes(module: str, *words: object, warnings: str = "error::UserWarning") -> Any:
    """Run a module in a process of its own, since one with threads must not fork; return the JSON that it prints."""
    command = [sys.executable, "-W", warnings, "-m", module, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, timeout=600, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def start(task: Callable[[], object]) -> int:
    """Fork a process that runs a task for at most two minutes, and return its id."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            task()
        finally:
            os._exit(0)
    return child


def wait(child: int) -> int:
    """Return the exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_group(world: int, task: Callable[[int], object]) -> Ended:
    """Run a task in `world` processes that form a gloo group; it receives the rank and returns a value for JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [start(partial(_join, task, rank, world, folder)) for rank in range(world)]
        codes = [wait(child) for child in children]
        files = [folder / f"{rank}.json" for rank in range(world)]
        return Ended([json.loads(file.read_text()) if file.exists() else None for file in files], codes)


def _join(task: Callable[[int], object], rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    try:
        outcome = task(rank)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    if dist.is_initialized():
        with suppress(RuntimeError):  # the other process may have failed
            dist.barrier()
        dist.destroy_process_group()
