"""Lists of the study: identities in three parts, and training images without the identities that are judged."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.identities import identity_key
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.progress import progress
from kdlib_faces.teachers import OnnxTeacher

PARTS = {"train": 50, "choose": 75, "report": 100}
"""Upper bounds of the hash of an identity, in percent."""

SAME_FAR = 1e-5
"""A training image is removed if its cosine to a judged image is one that this share of impostor pairs exceeds."""


def part_of(name: str) -> str:
    """Return the part of an identity, which depends on its name only."""
    value = int(hashlib.sha256(identity_key(name).encode()).hexdigest(), 16) % 100
    return next(part for part, bound in PARTS.items() if value < bound)


def write_lists(judged: str, others: list[str], teacher: str, work: Path) -> dict[str, Path]:
    """Write `train-*.csv`, `choose.csv` and `report.csv`, and `lists.json` with the numbers of images.

    Training images whose identity has the name of a judged identity are removed, and those whose embedding is as close to
    a judged image as almost no impostor pair is: the same identity may have another name in another list.

    Args:
        judged: List with age groups, of which half of the identities are judged.
        others: Further training lists; identities and ages may be missing.
        teacher: ONNX file whose embeddings are compared.
        work: Folder of the lists.
    """
    target = work / "lists"
    if (target / "lists.json").exists():
        return {path.stem: path for path in sorted(target.glob("*.csv"))}
    target.mkdir(parents=True, exist_ok=True)
    faces = read_faces([judged])
    parts = np.array([part_of(faces.identity_names[number]) for number in faces.identities])
    embeddings = _embed(faces, teacher)
    held = parts != "train"
    names = {identity_key(faces.identity_names[number]) for number in faces.identities[held]}
    cosines = embeddings[held] @ embeddings[held].T
    impostors = cosines[faces.identities[held][:, None] != faces.identities[held][None, :]]
    threshold = float(np.quantile(impostors, 1 - SAME_FAR))
    counts: dict[str, object] = {"threshold": round(threshold, 4)}
    for part in PARTS:
        counts[part] = _write(
            target / (f"train-{Path(judged).stem}.csv" if part == "train" else f"{part}.csv"), faces, parts == part
        )
    for path in others:
        listed = read_faces([path], unlabeled=True)
        same_name = np.array(
            [number >= 0 and identity_key(listed.identity_names[number]) in names for number in listed.identities]
        )
        close = (_embed(listed, teacher) @ embeddings[held].T).max(1) >= threshold
        counts[Path(path).stem] = {
            **_write(target / f"train-{Path(path).stem}.csv", listed, ~(same_name | close)),
            "removed_by_name": int(same_name.sum()),
            "removed_by_cosine": int((close & ~same_name).sum()),
        }
    (target / "lists.json").write_text(json.dumps(counts, indent=1) + "\n")
    return {path.stem: path for path in sorted(target.glob("*.csv"))}


def _embed(faces: FaceList, path: str) -> np.ndarray:
    """The unit embeddings of the plain images."""
    teacher, images = OnnxTeacher(path), load_images(faces, 112)
    parts = progress(torch.split(images, 64), f"embeddings of {len(faces)} images")
    return F.normalize(torch.cat([teacher(to_float(part))["embedding"] for part in parts]), dim=1).numpy()


def _write(path: Path, faces: FaceList, kept: np.ndarray) -> dict[str, int]:
    rows = np.flatnonzero(kept)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "age", "age_group"])
        for row in rows:
            number = faces.identities[row]
            age = "" if faces.ages is None or not np.isfinite(faces.ages[row]) else f"{faces.ages[row]:g}"
            group = "" if faces.age_groups is None else faces.group_names[faces.age_groups[row]]
            name = faces.identity_names[number] if number >= 0 else ""
            writer.writerow([faces.paths[row].resolve(), name, age, group])
    known = faces.identities[rows]
    return {"images": len(rows), "identities": len(np.unique(known[known >= 0]))}
