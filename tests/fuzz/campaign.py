"""Damage files at random and read them: `python -m tests.fuzz.campaign --cases 200000`.

Every case must end within the limits of time and memory with a result, or with a documented error of one line. A case is
repeated by `python -m tests.fuzz.campaign --target NAME --seed N`.
"""

import argparse
import io
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import TARGETS, Target

SECONDS, HANG = 5.0, 120.0
"""Computing time of a case, and time after which its process is ended: other processes may slow it down."""
MEMORY = 1 << 30
"""Bytes that a worker may allocate beyond those that it starts with."""


def choose(seed: int) -> str:
    """The target of a case."""
    names = list(TARGETS)
    return random.Random(f"target {seed}").choices(names, [TARGETS[name].share for name in names])[0]


def damage(target: Target, name: str, seed: int) -> dict[str, bytes]:
    """The files of a case, one of them damaged."""
    rng = random.Random(f"{name} {seed}")
    files = target.files()
    chosen = rng.choice([file for file, content in files.items() if content])
    return {file: mutate(content, rng) if file == chosen else content for file, content in files.items()}


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of a case into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def fault_of(folder: Path, name: str, seed: int) -> str:
    """What is wrong with the end of a case; empty if nothing is."""
    target = TARGETS[name]
    put(folder, damage(target, name, seed))
    started = time.process_time()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            target.read(folder)
    except target.errors as error:
        if len(str(error).splitlines()) != 1:
            return f"a message of several lines: {str(error)[:200]!r}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({place.filename}:{place.lineno})"
    seconds = time.process_time() - started
    return f"{seconds:.1f} s of computing" if seconds > SECONDS else ""


def limit_memory() -> None:
    """Limit the memory of this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


class Worker:
    """A forked process that runs the cases `first`, `first + step` and so on."""

    def __init__(self, folder: Path, first: int, end: int, step: int, target: str | None) -> None:
        self.folder, self.end, self.step, self.target = folder, end, step, target
        self.place = mmap.mmap(-1, 16)  # the case in work, and the time of its start
        self.faults = folder.with_suffix(".faults")
        self.start(first)

    def start(self, first: int) -> None:
        """Fork the process."""
        self.place[:] = struct.pack("<qd", first, time.monotonic())
        self.process = os.fork()
        if self.process == 0:
            try:
                self.run(first)
            except BaseException:
                traceback.print_exc()
                os._exit(3)
            os._exit(0)

    def run(self, first: int) -> None:
        """Run the cases in this process."""
        torch.set_num_threads(1)
        limit_memory()
        for seed in range(first, self.end, self.step):
            self.place[:] = struct.pack("<qd", seed, time.monotonic())
            name = self.target or choose(seed)
            if fault := fault_of(self.folder, name, seed):
                self.report(name, seed, fault)

    def report(self, name: str, seed: int, fault: str) -> None:
        """Add a fault to the file of this worker."""
        with self.faults.open("a") as file:
            file.write(f"--target {name!r} --seed {seed}: {' '.join(fault.split())}\n")

    def check(self) -> bool:
        """Whether the process is still running; one that crashed or hangs is replaced after its case is reported."""
        seed, started = struct.unpack("<qd", self.place[:])
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if not ended and time.monotonic() - started > HANG:
            os.kill(self.process, signal.SIGKILL)
            ended, status = os.waitpid(self.process, 0)
        if not ended:
            return True
        if status == 0:
            return False
        code = os.waitstatus_to_exitcode(status)
        self.report(self.target or choose(seed), seed, f"the process ended with code {code} (hung or crashed)")
        self.start(seed + self.step)
        return True

    @property
    def done(self) -> int:
        """The case in work."""
        return int(struct.unpack("<qd", self.place[:])[0])


def run(cases: int, *, first: int = 0, workers: int = 1, target: str | None = None, show: bool = True) -> list[str]:
    """Run cases and return the faults, one line each."""
    for each in TARGETS.values() if target is None else [TARGETS[target]]:
        each.files()  # made once, before the processes are forked
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        team = [
            Worker(Path(name) / str(number), first + number, first + cases, workers, target)
            for number in range(workers)
        ]
        started = shown = time.monotonic()
        while [worker for worker in team if worker.check()]:
            time.sleep(0.05)
            if show and time.monotonic() - shown > 30:
                shown = time.monotonic()
                done = min(worker.done for worker in team) - first
                faults = sum(len(worker.faults.read_text().splitlines()) for worker in team if worker.faults.exists())
                print(f"{done:,} of {cases:,} cases, {faults} faults, {shown - started:.0f} s", flush=True)
        return [line for worker in team if worker.faults.exists() for line in worker.faults.read_text().splitlines()]


def main() -> int:
    """Run the cases of the command line; exit code 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--target", choices=list(TARGETS), help="only this reader")
    parser.add_argument("--seed", type=int, help="repeat one case in this process, with its traceback")
    options = parser.parse_args()
    if options.seed is not None:
        name = options.target or choose(options.seed)
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        put(folder, damage(TARGETS[name], name, options.seed))
        print(f"{name}: {folder}", flush=True)
        limit_memory()
        TARGETS[name].read(folder)
        return 0
    found = run(options.cases, first=options.first, workers=options.workers, target=options.target)
    print("\n".join(found))
    counts = Counter(choose(seed) for seed in range(options.first, options.first + min(options.cases, 100_000)))
    print(f"{options.cases:,} cases of {len(counts) if options.target is None else 1} readers: {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
