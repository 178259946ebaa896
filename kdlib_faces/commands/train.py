"""The command `kdlib-faces train`: one of the recipes on face lists."""

from collections.abc import Sequence
from pathlib import Path

from kdlib_faces._checks import InputError
from kdlib_faces.config import load_config
from kdlib_faces.recipes import age_teacher, liaad, student
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.training import RunOptions

__all__ = ["RECIPES", "RunOptions", "inputs_of_models", "run"]

RECIPES = {
    "liaad": ((2,), "two teachers, the general one first"),
    "student": ((0,), "no teacher"),
    "general_teacher": ((0,), "no teacher"),
    "age_teacher": ((0, 1), "one pretrained network, or none"),
}
"""Names of the recipes, and the teachers that each takes: their possible numbers, and a description."""


def run(recipe: str, options: RunOptions, *, config: Path | None = None, settings: Sequence[str] = ()) -> Path:
    """Train by a recipe of `RECIPES` and return the file of the network; `settings` override the TOML file `config`."""
    if recipe not in RECIPES:
        raise InputError(f"train: recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    counts, description = RECIPES[recipe]
    if len(options.teachers) not in counts:
        given = len(options.teachers)
        raise InputError(
            f"train: recipe {recipe!r} takes {description}, got {given}; pass --teacher FILE once for each"
        )
    if options.start != "scratch" and recipe != "liaad":
        raise InputError(f"train: --start applies to recipe 'liaad' only, got recipe {recipe!r}")
    if recipe == "age_teacher":
        return age_teacher.train(load_config(age_teacher.AgeTeacherRunConfig, config, settings), options)
    if recipe == "liaad":
        return liaad.train(load_config(liaad.LIAADRunConfig, config, settings), options)
    return student.train(load_config(student.StudentRunConfig, config, settings), options, name=recipe)
