"""The command `kdlib-faces train`: one of the recipes on face lists."""

from collections.abc import Sequence
from pathlib import Path

from kdlib_faces._checks import InputError
from kdlib_faces.config import load_config
from kdlib_faces.recipes import age_teacher, liaad

__all__ = ["RECIPES", "run"]

RECIPES = {
    "liaad": "two teachers, the general one first",
    "student": "no teacher",
    "general_teacher": "no teacher",
    "age_teacher": "one pretrained network, or none",
}
"""Names of the recipes, and the teachers that each takes."""

_COUNTS = {"liaad": (2,), "age_teacher": (0, 1)}


def run(
    recipe: str,
    *,
    output: Path,
    faces: Sequence[str],
    teachers: Sequence[str] = (),
    config: Path | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Train by a recipe.

    Args:
        recipe: A name of `RECIPES`.
        output: Folder of the run.
        faces: Lists or folders.
        teachers: Files of the teachers.
        config: A TOML file of settings.
        settings: `KEY=VALUE` each; they override the file.
        seed: Seed of weights, order and views.
        progress: Show progress.

    Returns:
        The file of the trained network.

    Raises:
        InputError: An unknown recipe or setting, or files that cannot be used.
    """
    if recipe not in RECIPES:
        raise InputError(f"train: recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    if len(teachers) not in _COUNTS.get(recipe, (0,)):
        raise InputError(f"train: recipe {recipe!r} takes {RECIPES[recipe]}, got {len(teachers)}")
    if recipe == "age_teacher":
        age_config = load_config(age_teacher.AgeTeacherRunConfig, config, settings)
        return age_teacher.train(
            age_config, output=output, faces=faces, teachers=teachers, seed=seed, progress=progress
        )
    liaad_config = load_config(liaad.LIAADRunConfig, config, settings)
    return liaad.train(
        liaad_config, output=output, faces=faces, teachers=teachers, seed=seed, progress=progress, name=recipe
    )
