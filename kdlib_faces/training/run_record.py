"""A record of what a run folder was started with, so that checkpoints are never resumed by another run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdlib._atomic import atomic_write
from kdlib_faces._checks import InputError, show_name
from kdlib_faces.config import walk_settings
from kdlib_faces.data.lists import FaceList

__all__ = ["check_same_run", "describe_run", "write_run_record"]

FILE = "run.json"
MAX_BYTES = 1 << 20
SHOWN = 5


def describe_run(config: Any, recipe: str, faces: FaceList, fingerprints: Mapping[str, str]) -> dict[str, str]:
    """Describe everything that determines a run as short texts: recipe, lists, source networks and settings.

    Args:
        config: The settings, a dataclass. Paths of teachers are left out, since their fingerprints count.
        recipe: Name of the recipe.
        faces: The training images.
        fingerprints: Names of the teachers, or of the pretrained network, to their fingerprints.
    """
    digest = hashlib.sha256(faces.identities.tobytes())
    for column in (faces.ages, faces.age_groups):
        digest.update(b"-" if column is None else column.tobytes())
    for part in faces.images.layout(np.arange(len(faces))):
        digest.update(part)
    values = {name: fingerprint[:16] for name, fingerprint in fingerprints.items()}
    paths = ("general_teacher", "age_teacher")
    settings = {name: repr(value) for name, value in walk_settings(config) if name.rpartition(".")[2] not in paths}
    return {"recipe": recipe, "faces": digest.hexdigest()[:16], **values, **settings}


def check_same_run(output: Path, run: Mapping[str, str]) -> None:
    """Check that the checkpoints in `output`, if there are any, belong to this run.

    Raises:
        InputError: They belong to another run (the message lists the differences), or their record cannot be read.
    """
    checkpoints = output / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        return
    try:
        with (output / FILE).open("rb") as file:
            recorded = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(f"train: {output} holds checkpoints without a readable {FILE}; choose another output")
    changed = [name for name in {**recorded, **run} if recorded.get(name) != run.get(name)]
    if changed:
        texts = [f"{show_name(name)} ({_show(recorded.get(name))}, now {_show(run.get(name))})" for name in changed]
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise InputError(
            f"train: {output} holds another run: what differs is {', '.join(texts[:SHOWN])}{more}; restore the settings "
            "or choose another output"
        )


def _show(value: object) -> str:
    return "none" if value is None else show_name(value)


def write_run_record(output: Path, run: Mapping[str, str]) -> None:
    """Write the record of a run into its folder."""
    with atomic_write(output / FILE) as file:
        file.write(f"{json.dumps(dict(run), indent=1)}\n".encode())
