"""The command `kdlib-faces demo`: train all models, evaluate them and write a report."""

from collections.abc import Sequence
from pathlib import Path

from kdlib_faces._checks import InputError
from kdlib_faces._output import swept
from kdlib_faces.config import load_config
from kdlib_faces.demo.config import DemoConfig, faces_config
from kdlib_faces.demo.run import run as run_demo

__all__ = ["run"]

QUICK_STEPS = 300


def run(
    *,
    output: Path,
    faces: Sequence[str],
    teachers: Sequence[str],
    taps: Sequence[str],
    inputs: Sequence[str],
    steps: str | None,
    seed: int,
    num_seeds: int,
    config: Path | None,
    settings: Sequence[str],
    progress: bool,
    command: str,
) -> None:
    """Run the demo with the options of the command line; see `kdlib_faces.demo.run.run`.

    `steps` is `"quick"`, `"full"`, or the number of steps of each student; `seed` is the first of `num_seeds` seeds; the
    `KEY=VALUE` of `settings` override the TOML file `config`.
    """
    values = list(settings)
    if steps not in (None, "full"):
        number = str(QUICK_STEPS) if steps == "quick" else str(steps)
        if not number.isdigit():
            raise InputError(f"--steps must be quick, full or a number of steps, got {number!r}")
        values.insert(0, f"student_steps={number}")
    loaded = load_config(DemoConfig, config, values, base=faces_config() if faces else None)
    with swept(output):
        run_demo(
            loaded, output=output, faces=faces, teachers=teachers, taps=taps, inputs=inputs, seeds=range(seed, seed + num_seeds),
            progress=progress, command=command,
        )  # fmt: skip
