"""`run.toml`: what a run folder was started with, so that a run can be repeated and is never resumed by another one."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tomli_w
import torch

from kdlib import __version__
from kdlib._atomic import atomic_write
from kdlib_faces._checks import InputError, show_name
from kdlib_faces.config import load_config, read_toml, to_toml
from kdlib_faces.data.lists import FaceList
from kdlib_faces.training.settings import RunConfig, RunOptions

__all__ = [
    "FILE",
    "TABLE",
    "RecordedRun",
    "check_expected",
    "check_same_run",
    "describe_run",
    "read_run",
    "write_run_record",
]

FILE = "run.toml"
TABLE = "run"
"""Name of the table of options; the other tables of the file are settings."""

SHOWN = 5
# These do not change the weights of a step, or the fingerprints of lists and teachers represent them.
NOT_COMPARED = ("run.data", "run.teachers", "run.inputs", "run.on_error", "run.versions.", "training.keep",
                "training.checkpoint_seconds")  # fmt: skip


@dataclass(frozen=True)
class RecordedRun:
    """The options of a recorded run, with its versions and the fingerprints of its lists and teachers."""

    recipe: str | None = None
    data: list[str] = field(default_factory=list)
    teachers: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    seed: int | None = None
    start: str | None = None
    on_error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    def other_versions(self) -> str:
        """Describe the versions that differ from those of this process; an empty text for none."""
        now = _versions()
        texts = [f"{name} {old} (now {now[name]})" for name, old in self.versions.items() if now.get(name, old) != old]
        return ", ".join(texts)


def describe_run(
    config: RunConfig, options: RunOptions, recipe: str, faces: FaceList, fingerprints: Mapping[str, str]
) -> dict[str, object]:
    """Describe everything that determines a run, as the content of `run.toml`.

    Args:
        config: The settings.
        options: Inputs of the run.
        recipe: Name of the recipe.
        faces: The training images.
        fingerprints: Names of the teachers, or of the pretrained network, to their fingerprints.
    """
    prints = {"faces": _digest(faces), **{name: text[:16] for name, text in fingerprints.items()}}
    recorded = RecordedRun(
        recipe, _absolute(options.data), _absolute(options.teachers), [str(each) for each in options.inputs], options.seed,
        options.start, options.on_error, _versions(), prints,
    )  # fmt: skip
    return {TABLE: to_toml(recorded), **to_toml(config)}


def _digest(faces: FaceList) -> str:
    digest = hashlib.sha256(faces.identities.tobytes())
    for column in (faces.ages, faces.age_groups):
        digest.update(b"-" if column is None else column.tobytes())
    for part in faces.images.layout(np.arange(len(faces))):
        digest.update(part)
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    return {"kdlib": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _absolute(paths: Sequence[str]) -> list[str]:
    return [os.path.abspath(path) if os.path.exists(path) else path for path in paths]


def read_run(path: Path) -> RecordedRun:
    """Read the options of a run from its `run.toml`; a file of settings alone has none.

    Raises:
        InputError: The file is not readable, or a value has another type.
    """
    table = read_toml(path).get(TABLE, {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: {TABLE} must be a table of the options of a run, got {show_name(table)}")
    return load_config(RecordedRun, overrides=table)


def check_expected(options: RunOptions, run: Mapping[str, object]) -> None:
    """Check that a repeated run has the lists and teachers of the recorded one.

    Raises:
        InputError: Fingerprints differ; the message names them.
    """
    now = _flat(run)
    for name, old in options.expected.items():
        new = now.get(f"{TABLE}.fingerprints.{name}")
        if new != old:
            raise InputError(
                f"train: --config describes a run with other data: the fingerprint of {show_name(name)} was {show_name(old)}, "
                f"now {show_name(new)}; give the same lists and teachers, or remove [run.fingerprints] from the file"
            )


def check_same_run(output: Path, run: Mapping[str, object]) -> None:
    """Check that the checkpoints in `output`, if there are any, belong to this run.

    Raises:
        InputError: They belong to another run (the message lists the differences), or their record cannot be read.
    """
    checkpoints = output / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        return
    try:
        recorded = _flat(read_toml(output / FILE))
    except InputError as error:
        raise InputError(
            f"train: {output} holds checkpoints without a readable {FILE}; choose another output"
        ) from error
    current = _flat(run)
    changed = [
        name
        for name in {**recorded, **current}
        if recorded.get(name) != current.get(name) and not name.startswith(NOT_COMPARED)
    ]
    if changed:
        texts = [
            f"{show_name(name.removeprefix('run.').removeprefix('fingerprints.'))} ({_show(recorded.get(name))}, now "
            f"{_show(current.get(name))})"
            for name in changed
        ]
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise InputError(
            f"train: {output} holds another run: what differs is {', '.join(texts[:SHOWN])}{more}; restore the settings "
            "or choose another output"
        )


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the dotted names and the values of nested tables."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _show(value: object) -> str:
    return "none" if value is None else show_name(value)


def write_run_record(output: Path, run: Mapping[str, object]) -> None:
    """Write the record of a run into its folder."""
    with atomic_write(output / FILE) as file:
        file.write(tomli_w.dumps(run).encode())
