"""Recipes room: flat files that assemble everything to their left. `liaad` is the main one, `demo` runs the whole job."""

from kdlib_faces.recipes.liaad import LIAADConfig, build

__all__ = ["LIAADConfig", "build"]
