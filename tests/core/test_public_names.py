"""The public names and signatures as text, so that a commit shows every change of the public interface.

After an intended change, `python tests/core/test_public_names.py` rewrites `public_names.txt`.
"""

import importlib
import inspect
import re
from pathlib import Path

PACKAGES = [
    "kdlib", "kdlib.functional", "kdlib.adapters", "kdlib.cache", "kdlib.projections", "kdlib.losses",
    "kdlib.weighting", "kdlib.objective", "kdlib.influence", "kdlib.distiller", "kdlib.training", "kdlib.evaluation",
    "kdlib.testing", "kdlib.types", "kdlib.compression", "kdlib_faces.data", "kdlib_faces.backbones", "kdlib_faces.heads", "kdlib_faces.losses",
    "kdlib_faces.teachers", "kdlib_faces.evaluation", "kdlib_faces.report", "kdlib_faces.recipes",
]  # fmt: skip
FILE = Path(__file__).with_name("public_names.txt")


def describe(name: str, value: object) -> str:
    """Return the name, with parameters and defaults if it is callable; mypy checks the types."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return name
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return name + re.sub(r"<(\w+)[^<>]*>", r"<\1>", text)


def listing() -> str:
    lines = []
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = sorted(name for name in module.__all__ if name != "__version__")
        lines += [f"{package}.{describe(name, getattr(module, name))}" for name in names]
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_agree_with_the_file() -> None:
    assert listing() == FILE.read_text("utf-8")


if __name__ == "__main__":
    FILE.write_text(listing(), "utf-8")
