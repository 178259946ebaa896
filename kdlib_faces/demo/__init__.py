"""The demo: train the recipe, evaluate all models, write the report."""

from kdlib_faces.demo.config import DemoConfig, faces_config
from kdlib_faces.demo.run import run

__all__ = ["DemoConfig", "faces_config", "run"]
