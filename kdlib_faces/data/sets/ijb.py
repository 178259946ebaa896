"""Data room: a whole IJB-B or IJB-C, its lists read and held against each other. Touches the file system and NumPy."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.data.sets.ijb_lists import (
    IJBLandmarks,
    IJBPairs,
    IJBSubjects,
    IJBTemplates,
    read_ijb_landmarks,
    read_ijb_pairs,
    read_ijb_subjects,
    read_ijb_templates,
)

__all__ = ["IJBSet", "read_ijb"]


@dataclass(frozen=True, eq=False)
class IJBSet:
    """Everything that the protocols of IJB-B and IJB-C need to know, besides the embeddings of `templates.images`.

    Attributes:
        name: `IJB-B` or `IJB-C`.
        templates: template and medium of each image.
        landmarks: five points and the detector's score of each image, in the same order; None where the file is absent.
        pairs: the 1:1 comparisons; None where not asked for or absent.
        galleries: the two 1:N galleries, searched one at a time; None where absent.
        probes: the 1:N probes; those whose subject is not in a gallery are its non-mated searches. None where absent.
    """

    name: str
    templates: IJBTemplates
    landmarks: IJBLandmarks | None
    pairs: IJBPairs | None
    galleries: tuple[IJBSubjects, IJBSubjects] | None
    probes: IJBSubjects | None

    def __repr__(self) -> str:
        pairs = "no pairs" if self.pairs is None else f"{len(self.pairs):,} pairs"
        search = (
            "" if self.galleries is None else f", galleries of {' and '.join(f'{len(g):,}' for g in self.galleries)}"
        )
        return f"<IJBSet: {self.name}, {len(self.templates):,} images, {pairs}{search}>"


def read_ijb(
    folder: str | PathLike[str],
    name: Literal["IJB-B", "IJB-C"] = "IJB-C",
    *,
    pairs: bool = True,
    published: bool = True,
) -> IJBSet:
    """Read the lists of IJB-B or IJB-C from the set's folder, or from the folder `meta` in it.

    Every list is held against the templates: the same images in the same order, no template without an image.

    Args:
        folder: where the lists are.
        name: which set; its file names start with `ijbb` or `ijbc`.
        pairs: whether to read the pairs of the 1:1 protocol, the largest list.
        published: all counts must be the published ones; False takes a part of the set.

    Raises:
        InputError: no template list, or what the readers of the lists say.
    """
    check_choice("read_ijb", "name", name, ("IJB-B", "IJB-C"))
    short = name.replace("-", "").lower()
    letter = "S" if name == "IJB-B" else "G"
    base = Path(folder, "meta") if Path(folder, "meta").is_dir() else Path(folder)
    which = name if published else None
    templates = read_ijb_templates(base / f"{short}_face_tid_mid.txt", published=which)

    def subjects(file: str, part: str) -> IJBSubjects | None:
        path = base / f"{short}_1N_{file}.csv"
        wanted: Any = f"{name} {part}" if published and name == "IJB-C" else None
        return read_ijb_subjects(path, templates=templates, published=wanted) if path.is_file() else None

    points, compared = base / f"{short}_name_5pts_score.txt", base / f"{short}_template_pair_label.txt"
    first, second = (subjects(f"gallery_{letter}{number}", f"G{number}") for number in (1, 2))
    if (first is None) != (second is None):
        raise InputError(
            f"{base}: one of the two galleries {short}_1N_gallery_{letter}1.csv and _{letter}2.csv is missing"
        )
    return IJBSet(
        name,
        templates,
        read_ijb_landmarks(points, templates=templates, published=which) if points.is_file() else None,
        read_ijb_pairs(compared, templates=templates, published=which) if pairs and compared.is_file() else None,
        None if first is None or second is None else (first, second),
        subjects("probe_mixed", "probes"),
    )
