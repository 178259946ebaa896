"""Recipes: the LIAAD-style distillation, and the training of an age-invariant teacher."""

from kdlib_faces.recipes.liaad import LIAADConfig, build

__all__ = ["LIAADConfig", "build"]
