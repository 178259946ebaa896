"""The command `kdlib-faces train`: one of the recipes on face lists."""

from argparse import Namespace
from pathlib import Path

from kdlib_faces._checks import InputError
from kdlib_faces._hardware import find_hardware
from kdlib_faces._output import locked, remove_empty_on_error
from kdlib_faces.commands._options import precision
from kdlib_faces.config import load_config
from kdlib_faces.progress import say
from kdlib_faces.recipes import age_teacher, liaad, student
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.training import RunConfig, RunOptions
from kdlib_faces.training.run_record import TABLE, RecordedRun, read_run

__all__ = ["main"]

CONFIGS: dict[str, type[RunConfig]] = {
    "liaad": liaad.LIAADRunConfig,
    "student": student.StudentRunConfig,
    "general_teacher": student.StudentRunConfig,
    "age_teacher": age_teacher.AgeTeacherRunConfig,
}


def main(options: Namespace, command: str) -> None:
    """Train by a recipe of `CONFIGS` with the options of the command line.

    `--set` overrides the TOML file `--config`. That file may be the `run.toml` of another run, whose options then apply
    where the command line has none.
    """
    hardware = find_hardware(options.device)
    quiet = options.quiet or not hardware.first
    recorded = RecordedRun() if options.config is None else read_run(options.config)
    recipe = options.recipe or recorded.recipe or "liaad"
    if recipe not in CONFIGS:
        raise InputError(f"train: recipe must be one of {', '.join(CONFIGS)}, got {recipe!r}")
    start = options.start or recorded.start or "scratch"
    if start != "scratch" and recipe != "liaad":
        raise InputError(f"train: --start applies to recipe 'liaad' only, got recipe {recipe!r}")
    given = [*precision(options, "training."), *options.settings]
    config = load_config(CONFIGS[recipe], options.config, given, other_tables=[TABLE])
    data, teachers = options.data or recorded.data, options.teacher or recorded.teachers
    recorded_inputs = [] if options.teacher else recorded.inputs
    if versions := recorded.other_versions():
        say(f"the run of {options.config} had other versions: {versions}", quiet=quiet)
    say(f"device: {hardware.describe(config.training.amp)}", quiet=quiet)
    run = RunOptions(
        output=options.output, data=data, teachers=teachers, seed=_first(options.seed, recorded.seed, 0),
        progress=not quiet, on_error=options.on_error or ("skip" if recorded.on_error == "skip" else "stop"), start=start,
        inputs=inputs_of_models(options.input or recorded_inputs, len(teachers)), hardware=hardware, workers=options.workers,
        tensorboard=options.tensorboard, expected={} if options.data or options.teacher else recorded.fingerprints,
    )  # fmt: skip
    with remove_empty_on_error(run.output), locked(run.output, hardware.first), hardware.process_group(options.timeout):
        _train(recipe, config, run)


def _train(recipe: str, config: RunConfig, run: RunOptions) -> Path:
    if isinstance(config, age_teacher.AgeTeacherRunConfig):
        return age_teacher.train(config, run)
    if isinstance(config, liaad.LIAADRunConfig):
        return liaad.train(config, run)
    assert isinstance(config, student.StudentRunConfig)
    return student.train(config, run, name=recipe)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
