"""The command `kdlib-faces demo`: train all models, evaluate them and write a report."""

from argparse import Namespace

from kdlib_faces._checks import InputError
from kdlib_faces._hardware import find_hardware
from kdlib_faces._output import locked, swept
from kdlib_faces.config import load_config
from kdlib_faces.demo.config import DemoConfig, faces_config
from kdlib_faces.demo.run import run
from kdlib_faces.progress import say

__all__ = ["main"]

QUICK_STEPS = 300


def main(options: Namespace, command: str) -> None:
    """Run the demo with the options of the command line; see `kdlib_faces.demo.run.run`.

    `--steps` is `quick`, `full`, or the number of steps of each student; `--seed` is the first of `--seeds` seeds; `--set`
    overrides the TOML file `--config`.
    """
    hardware = find_hardware(options.device)
    if hardware.count > 1:
        raise InputError("demo: runs in one process; start it without torchrun")
    values, steps, seed = list(options.settings), options.steps, options.seed or 0
    values[:0] = [] if options.amp is None else [f"amp={options.amp}"]
    if steps not in (None, "full"):
        number = str(QUICK_STEPS) if steps == "quick" else str(steps)
        if not number.isdigit():
            raise InputError(f"--steps must be quick, full or a number of steps, got {number!r}")
        values.insert(0, f"student_steps={number}")
    config = load_config(DemoConfig, options.config, values, base=faces_config() if options.faces else None)
    say(f"device: {hardware.describe(config.amp)}", quiet=options.quiet)
    with swept(options.output), locked(options.output):
        run(
            config, output=options.output, faces=options.faces, teachers=options.teacher, taps=options.tap,
            inputs=options.input, seeds=range(seed, seed + options.seeds), progress=not options.quiet, command=command,
            device=hardware.device,
        )  # fmt: skip
