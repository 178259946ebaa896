"""The command `kdlib-faces train`: one of the recipes on face lists."""

from argparse import Namespace

from kdlib_faces._checks import InputError
from kdlib_faces.config import load_config
from kdlib_faces.recipes import age_teacher, liaad, student
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.training import RunOptions

__all__ = ["main"]

RECIPES = ("liaad", "student", "general_teacher", "age_teacher")


def main(options: Namespace, command: str) -> None:
    """Train by a recipe of `RECIPES` with the options of the command line; `--set` overrides the TOML file `--config`."""
    recipe, sources = options.recipe, (options.config, options.settings)
    if recipe not in RECIPES:
        raise InputError(f"train: recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if options.start != "scratch" and recipe != "liaad":
        raise InputError(f"train: --start applies to recipe 'liaad' only, got recipe {recipe!r}")
    run = RunOptions(
        output=options.output, data=options.data, teachers=options.teacher, seed=options.seed, progress=not options.quiet,
        on_error=options.on_error, start=options.start, inputs=inputs_of_models(options.input, len(options.teacher)),
    )  # fmt: skip
    if recipe == "age_teacher":
        age_teacher.train(load_config(age_teacher.AgeTeacherRunConfig, *sources), run)
    elif recipe == "liaad":
        liaad.train(load_config(liaad.LIAADRunConfig, *sources), run)
    else:
        student.train(load_config(student.StudentRunConfig, *sources), run, name=recipe)
