"""Interrupt work at random times and resume it: `python -m tests.fuzz.kills --kills 50`.

Each job runs once without an interruption, then until enough processes were ended by SIGKILL at random times; the result must be
the same. A full disk and a folder that is not writable must end a job with one line, and leave it resumable.
"""

import argparse
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import torch
import torch._dynamo  # the optimizers import it, which takes seconds unless it is loaded before the fork
from torch import nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term, TrainConfig, train
from kdlib.training import load_checkpoint, read_log
from kdlib_faces.cli import main as command_line
from tests.core.training_toys import Toy, batches
from tests.faces.cache_files import make_faces, settings
from tests.faces.detector_graph import detector, put_photograph

NOBODY = 65534
DISK = 3000
"""Bytes that a file may have on a disk that is called full."""


def train_toy(inputs: Path, output: Path) -> None:
    """Many short steps, each followed by a checkpoint."""
    config = TrainConfig(
        epochs=10, lr=0.05, ema_decay=0.9, checkpoint_dir=output / "run", log_path=output / "log.jsonl",
        checkpoint_every_steps=1,
    )  # fmt: skip
    train(Toy(), batches(6), config)


def train_large(inputs: Path, output: Path) -> None:
    """Few steps with checkpoints of 5 MB, so that most interruptions come while one is written."""
    torch.manual_seed(0)
    taps = {"out": OUTPUT}
    student = StudentAdapter(nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 400), nn.Linear(400, 3)), taps)
    teacher = TeacherAdapter(nn.Linear(6, 3), taps)
    distiller = Distiller(
        student, {"big": teacher}, Objective({"hint": Term(HintLoss(), student="out", teacher="out")})
    )
    config = TrainConfig(
        epochs=2, optimizer="adamw", lr=1e-3, ema_decay=0.9, checkpoint_dir=output / "run", checkpoint_every_steps=1
    )
    train(distiller, batches(6), config)


def run_command(*words: object) -> None:
    """Run a command in this process; its error message goes to standard error."""
    if code := command_line([*map(str, words), "--quiet", "--threads", "1"]):
        raise SystemExit(code)


def train_student(inputs: Path, output: Path) -> None:
    """The command `train`."""
    sizes = ("training.steps=4", "training.batch_size=4", "recipe.input_size=32", "recipe.width=0.25")
    words = ("train", "--recipe", "student", "--data", inputs / "faces.csv", "--output", output)
    run_command(*words, *settings(*sizes, "recipe.embedding_dim=16"))


def build_cache(inputs: Path, output: Path) -> None:
    """The command `cache build`, with many small blocks."""
    words = ("cache", "build", "--data", inputs / "faces.csv", "--teacher", inputs / "general.pt", "--output", output)
    given = ("augment.rotate=5", "batch_size=1", "sync_seconds=0", "shard_bytes=2000")
    run_command(*words, "--views", 8, *settings(*given))


def align(inputs: Path, output: Path) -> None:
    """The command `align`."""
    words = ("align", inputs / "photographs", "--detector", inputs / "net.onnx", "--output", output)
    run_command(*words, "--several", "all", "--on-error", "skip")


JOBS: dict[str, Callable[[Path, Path], None]] = {
    "training": train_toy, "checkpoints": train_large, "train": train_student, "cache build": build_cache, "align": align,
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Write faces, a teacher, photographs and a detector."""
    make_faces(folder)
    detector(folder / "net.onnx", side=128)
    rng = random.Random(0)
    for number in range(30):
        cells = {(rng.randrange(4), rng.randrange(4)): 250 for _ in range(number % 3)}
        put_photograph(
            folder / "photographs" / f"p{number % 5}" / f"{number}.png", cells, seed=number, height=128, width=128
        )
    (folder / "photographs" / "p0" / "broken.png").write_bytes(b"broken")


def contents(folder: Path) -> dict[str, object]:
    """The files of a result without what differs between runs: seconds, and names of processes."""
    found: dict[str, object] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"):
        name = file.relative_to(folder).as_posix()
        if name.endswith("log.jsonl"):
            found[name] = json.dumps([{**row, "seconds": 0, "speed": None} for row in read_log(file)])
        elif file.parent.name in ("run", "checkpoints"):
            state = load_checkpoint(file)
            found[name] = str([(key, digest(value)) for key, value in sorted(state.items()) if key != "seconds"])
        else:
            found[name] = digest(torch.load(file, weights_only=True)) if file.suffix == ".pt" else file.read_bytes()
    return found


def digest(value: object) -> str:
    """Text that any difference of a nested value changes."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.flatten().view(torch.uint8).numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return str([(str(key), digest(item)) for key, item in value.items() if key != "seconds"])
    if isinstance(value, (list, tuple)):
        return str([digest(item) for item in value])
    return repr(value)


def start(job: Callable[[Path, Path], None], inputs: Path, output: Path, log: Path, prepare: Callable[[], None]) -> int:
    """Fork a process that runs a job; its error message goes to a file."""
    child = os.fork()
    if child:
        return child
    code, text = 1, io.StringIO()
    try:
        torch.set_num_threads(1)
        prepare()
        with redirect_stderr(text), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job(inputs, output)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        text.write(f"{type(error).__name__}: {error}\n")
    log.write_text(text.getvalue()[:4000])
    os._exit(code)


def wait(child: int) -> int:
    """Return the exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupt(name: str, inputs: Path, folder: Path, kills: int, rng: random.Random) -> str:
    """Interrupt a job `kills` times and complete it; return what is wrong with the result, or nothing."""
    job, log = JOBS[name], folder / "log.txt"
    began = time.monotonic()
    code = wait(start(job, inputs, folder / "whole", log, lambda: None))
    if code:
        return f"{name}: exit code {code}: {log.read_text()}"
    longest = max(0.05, time.monotonic() - began)
    wanted, done, runs = contents(folder / "whole"), 0, 0
    while done < kills:
        output = folder / f"part{runs}"
        runs += 1
        code, attempts = -signal.SIGKILL, 0
        while code == -signal.SIGKILL:
            child = start(job, inputs, output, log, lambda: None)
            if done < kills and attempts < 12:
                time.sleep(rng.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            done += code == -signal.SIGKILL
            attempts += 1
        if code:
            return f"{name}: after {attempts} interruptions: exit code {code}: {log.read_text()}"
        found = contents(output)
        if found != wanted:
            names = [each for each in {**found, **wanted} if found.get(each) != wanted.get(each)]
            return f"{name}: after {attempts} interruptions these files differ: {', '.join(names[:9])} ({output})"
    return ""


def fill_disk(name: str, inputs: Path, folder: Path) -> str:
    """Run a job on a disk where no file can grow, then complete it; return what is wrong, or nothing."""
    job, log = JOBS[name], folder / "log.txt"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing raises an error instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, DISK))

    # The log is written under the same limit, which it is far below.
    code = wait(start(job, inputs, folder / "full", log, limit))
    fault = check_message(
        name, code, log, ("File too large", "cannot be written", "PytorchStreamWriter", "unexpected pos")
    )
    if fault:
        return fault
    if any(file.suffix == ".part" for file in folder.rglob("*")):
        return f"{name}: a temporary file is left of a full disk"
    if code := wait(start(job, inputs, folder / "full", log, lambda: None)):
        return f"{name}: after a full disk: exit code {code}: {log.read_text()}"
    return "" if contents(folder / "full") == contents(folder / "whole") else f"{name}: differs after a full disk"


def deny(name: str, inputs: Path, folder: Path) -> str:
    """Run a job in a folder that its user may not write; return what is wrong, or nothing."""
    job, log = JOBS[name], folder / "denied.txt"
    (folder / "denied").mkdir(mode=0o555)
    log.write_text("")
    log.chmod(0o666)

    def become_nobody() -> None:
        if os.getuid() == 0:  # which may write everywhere
            os.setuid(NOBODY)

    code = wait(start(job, inputs, folder / "denied" / "output", log, become_nobody))
    return check_message(name, code, log, ("not writable", "ermission denied", "writable"))


def check_message(name: str, code: int, log: Path, expected: tuple[str, ...]) -> str:
    """What is wrong with the end of a job that must fail with one line."""
    lines = log.read_text().splitlines()
    if code <= 0 or len(lines) != 1 or not any(text in lines[0] for text in expected):
        return f"{name}: exit code {code}, expected one line with {expected[0]!r}, got {lines}"
    return ""


def run(kills: int, seed: int = 0, jobs: tuple[str, ...] = tuple(JOBS), show: bool = False) -> list[str]:
    """Run all jobs with `kills` interruptions each; return what is wrong."""
    rng, faults = random.Random(seed), []
    for name in ("onnxruntime", *(f"kdlib_faces.commands.{command}" for command in ("align", "cache", "train"))):
        import_module(name)  # before the processes are forked
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        root = Path(place)
        root.chmod(0o755)
        (root / "inputs").mkdir()
        make_inputs(root / "inputs")
        for name in jobs:
            folder = root / name.replace(" ", "-")
            folder.mkdir()
            found = [fault for fault in (interrupt(name, root / "inputs", folder, kills, rng),) if fault]
            found += [fault for check in (fill_disk, deny) if (fault := check(name, root / "inputs", folder))]
            faults += found
            if show:
                print(f"{name}: {kills} interruptions, {len(found)} faults", flush=True)
    return faults


def main() -> int:
    """Run the command line; exit code 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="interruptions of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", choices=list(JOBS), action="append", help="only this job")
    options = parser.parse_args()
    faults = run(options.kills, options.seed, tuple(options.job or JOBS), show=True)
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
