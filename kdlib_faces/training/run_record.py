"""Recipes room: whether a folder holds the run that is asked for. A checkpoint of another run would go on as if it were this one."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdlib.cache import model_fingerprint
from kdlib_faces._checks import InputError, show_name
from kdlib_faces.data.lists import FaceList

__all__ = ["check_same_run", "describe_run", "note_run"]

NOTE = "run.json"
LARGEST = 1 << 20


def describe_run(config: Any, recipe: str, faces: FaceList, teachers: Mapping[str, nn.Module]) -> dict[str, str]:
    """What decides a run beside its steps: recipe, lists, teachers' outputs and every setting, each as a short text.

    Args:
        config: a dataclass, nested or not.
        recipe: its name.
        faces: the training images.
        teachers: the frozen teachers, or the network that the training starts from.
    """
    digest = hashlib.sha256(faces.identities.tobytes())
    for column in (faces.ages, faces.age_groups):
        digest.update(b"-" if column is None else column.tobytes())
    for path in faces.paths:
        digest.update(f"\n{'/'.join(path.parts[-2:])}".encode("utf-8", "surrogateescape"))
    told = {"recipe": recipe, "faces": digest.hexdigest()[:16]}
    told |= {f"{role} teacher": model_fingerprint(each)[:16] for role, each in teachers.items()}
    return told | _settings(config)


def _settings(config: Any, before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= _settings(value, f"{before}{field.name}.")
        elif field.name not in ("general_teacher", "age_teacher"):  # their outputs count, wherever they lie
            found[f"{before}{field.name}"] = repr(value)
    return found


def check_same_run(output: Path, now: Mapping[str, str]) -> bool:
    """Checkpoints in `output` must be of this run; a folder without, or one of an earlier version, may be gone on with.

    Returns:
        Whether that is certain; what an earlier version left is not noted as ours.

    Raises:
        InputError: they are of another run; the message says what differs.
    """
    if not (output / "checkpoints").is_dir() or not any((output / "checkpoints").iterdir()):
        return True
    try:
        with (output / NOTE).open("rb") as file:
            then = json.loads(file.read(LARGEST))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(then, dict):
        return False
    apart = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if apart:
        shown = [f"{show_name(name)} ({_shown(then.get(name))}, now {_shown(now.get(name))})" for name in apart]
        raise InputError(
            f"train: {output} holds another run: what differs is {', '.join(shown[:5])}"
            f"{f' and {len(shown) - 5} more' if len(shown) > 5 else ''}; restore it, or take another output"
        )
    return True


def _shown(value: object) -> str:
    return "none" if value is None else show_name(value)


def note_run(output: Path, now: Mapping[str, str]) -> None:
    """Write down which run `output` holds; the file is whole or not there."""
    part = output / f".{NOTE}.{os.getpid()}.part"
    part.write_text(json.dumps(dict(now), indent=1) + "\n", encoding="utf-8")
    os.replace(part, output / NOTE)
