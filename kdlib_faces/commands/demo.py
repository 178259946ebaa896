"""The command `kdlib-faces demo`: train all models, evaluate them and write a report."""

from argparse import Namespace

from kdlib_faces._checks import InputError
from kdlib_faces._output import locked, remove_empty_on_error
from kdlib_faces.commands._options import one_process, precision
from kdlib_faces.config import load_config, refuse_unused
from kdlib_faces.demo.config import DemoConfig, faces_config, start_config, unused_settings
from kdlib_faces.demo.run import run
from kdlib_faces.progress import say
from kdlib_faces.teachers.input_options import inputs_of_models

__all__ = ["main"]

QUICK_STEPS, QUICK_START_STEPS = 300, 800


def main(options: Namespace, command: str) -> None:
    """Run the demo with the options of the command line; see `kdlib_faces.demo.run.run`.

    `--steps` is `quick`, `full`, or the number of steps of each student; `--seed` is the first of `--seeds` seeds; `--set`
    overrides the TOML file `--config`. `--start` is that of the students on real faces.
    """
    hardware = one_process("demo", options.device)
    values, steps, seed, start, base = list(options.settings), options.steps, options.seed or 0, None, DemoConfig()
    values[:0] = precision(options)
    if bool(options.faces) != bool(options.teacher):
        raise InputError("demo: --faces and --teacher must be given together, or neither for synthetic faces")
    if options.faces:
        from kdlib_faces.demo.start import choose_start

        inputs = inputs_of_models(options.input, len(options.teacher))
        start = choose_start(options.start, options.teacher, inputs, quiet=options.quiet)
        base = faces_config() if start is None else start_config(start.size)
    elif options.start is not None:
        raise InputError(f"demo: --start {options.start} applies to real faces only, give --faces and --teacher")
    if steps not in (None, "full"):
        quick = QUICK_STEPS if start is None else QUICK_START_STEPS
        number = str(quick) if steps == "quick" else str(steps)
        if not number.isdigit():
            raise InputError(f"--steps must be quick, full or a number of steps, got {number!r}")
        values.insert(0, f"student_steps={number}")
    config = load_config(DemoConfig, options.config, values, base=base)
    refuse_unused(
        config, unused_settings(faces=bool(options.faces), start=start is not None), base=base, command="demo"
    )  # fmt: skip
    say(f"device: {hardware.describe(config.amp)}", quiet=options.quiet)
    with remove_empty_on_error(options.output), locked(options.output):
        run(
            config, output=options.output, faces=options.faces, teachers=options.teacher, taps=options.tap,
            inputs=options.input, start=start, seeds=range(seed, seed + options.seeds), progress=not options.quiet,
            command=command, device=hardware.device, workers=options.workers,
        )  # fmt: skip
