"""One process and two processes train the same student: `several_gpus_train.py` with and without `torchrun`."""

import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from tutorial import Lesson, Row, dots, main

SCRIPT = Path(__file__).with_name("several_gpus_train.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # the same as `torchrun`


def trained(launcher: list[str], steps: int, seed: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.txt"
        options = ["--steps", str(steps), "--seed", str(seed), "--result", str(result)]
        subprocess.run([sys.executable, *launcher, str(SCRIPT), *options], check=True)
        return [float(value) for value in result.read_text("utf-8").split()]


def run(quick: bool) -> Lesson:
    steps, seeds = (20, 1) if quick else (200, 2)
    rows: dict[str, list[float]] = {}
    launchers = {"2 processes": TORCHRUN} if quick else {"1 process": [], "2 processes": TORCHRUN}
    for name, launcher in launchers.items():
        for seed in range(seeds):
            for model, value in zip(("teacher", "student"), trained(launcher, steps, seed), strict=True):
                rows.setdefault(f"{model}, {name}", []).append(value)
    return Lesson("accuracy, %", [Row(name, values) for name, values in rows.items()])


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 2.2))
