"""The public names and signatures as text: a change of `public_names.txt` in a commit is a change that users feel.

After a change that is meant: `python tests/core/test_public_names.py` writes the file anew.
"""

import importlib
import inspect
import re
from pathlib import Path

ROOMS = [
    *(
        "kdlib",
        "kdlib.functional",
        "kdlib.adapters",
        "kdlib.cache",
        "kdlib.projections",
        "kdlib.losses",
        "kdlib.weighting",
    ),
    *("kdlib.objective", "kdlib.influence", "kdlib.distiller", "kdlib.training", "kdlib.evaluation", "kdlib.testing"),
    *("kdlib_faces.data", "kdlib_faces.backbones", "kdlib_faces.heads", "kdlib_faces.losses", "kdlib_faces.teachers"),
    *("kdlib_faces.evaluation", "kdlib_faces.report", "kdlib_faces.recipes"),
]
FILE = Path(__file__).with_name("public_names.txt")


def shown(name: str, value: object) -> str:
    """A name, with the parameters and defaults of what can be called; types are mypy's business."""
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
    for room in ROOMS:
        module = importlib.import_module(room)
        lines += [
            f"{room}.{shown(name, getattr(module, name))}" for name in sorted(module.__all__) if name != "__version__"
        ]
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_those_written_down() -> None:
    assert listing() == FILE.read_text("utf-8")


if __name__ == "__main__":
    FILE.write_text(listing(), "utf-8")
