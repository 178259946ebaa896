"""Caches of teacher outputs for the study: one of all training images, and parts of it for the lists of a run."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdlib.cache import CachedTeacher, Fingerprint, TeacherCache
from kdlib_faces.caching.source import data_digest
from kdlib_faces.data.lists import read_faces
from kdlib_faces.data.seeded_views import SeededViews


def command(*words: object) -> None:
    """Run a command of `kdlib-faces`."""
    print("kdlib-faces", *words, flush=True)
    subprocess.run([sys.executable, "-m", "kdlib_faces", *map(str, words)], check=True)


def cache_of(teacher: str, lists: Sequence[Path], everything: Sequence[Path], work: Path, *, maps: bool) -> Path:
    """Return the folder with the outputs of a teacher for the lists of a run, in the order of `lists`.

    Embeddings are computed once for all lists and copied; maps are large and computed for the lists of the run.
    """
    if maps:
        return _build(teacher, lists, work, ("--tap", "map=stage2"))
    whole = _build(teacher, everything, work, ())
    if list(lists) == list(everything):
        return whole
    folder = work / "caches" / _name(teacher, lists)
    source, faces = TeacherCache.open(whole), read_faces(list(map(str, lists)), unlabeled=True)
    rows = {path: row for row, path in enumerate(read_faces(list(map(str, everything)), unlabeled=True).paths)}
    chosen = torch.from_numpy(np.array([rows[path] for path in faces.paths]))

    def fetch(samples: Tensor, view: int) -> tuple[Tensor, Tensor]:
        return chosen[samples], torch.full_like(samples, view)

    views = SeededViews.from_text(source.notes["views"])
    parts = {**source.parts, "data": data_digest(faces, views)}
    TeacherCache.build(
        folder, CachedTeacher(source), fetch, samples=len(faces), views=source.views,
        fingerprint=Fingerprint(parts["teacher"], parts["preprocessing"], parts["data"]), notes=source.notes,
    )  # fmt: skip
    return folder


def _build(teacher: str, lists: Sequence[Path], work: Path, options: Sequence[str]) -> Path:
    folder = work / "caches" / (_name(teacher, lists) + ("-maps" if options else ""))
    if not (folder / "complete").exists():
        given = [word for path in lists for word in ("--data", path)]
        command("cache", "build", "--teacher", teacher, *given, *options, "--output", folder)
        (folder / "complete").touch()
    return folder


def _name(teacher: str, lists: Sequence[Path]) -> str:
    return f"{Path(teacher).stem}-{'+'.join(path.stem.removeprefix('train-') for path in lists)}"
