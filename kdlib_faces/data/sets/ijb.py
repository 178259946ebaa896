"""The lists of IJB-B and IJB-C as one set, checked against each other."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

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
    """Everything that the protocols of IJB-B and IJB-C need besides the embeddings of `templates.images`.

    Attributes:
        name: `IJB-B` or `IJB-C`.
        templates: Template and medium of each image.
        landmarks: Five points and a detector score of each image, in the same order; None where the file is absent.
        pairs: The 1:1 comparisons; None where not requested or absent.
        galleries: The two 1:N galleries, which are searched separately; None where absent.
        probes: The 1:N probes; those whose subject is not in a gallery are its non-mated searches. None where absent.
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

    Every list is checked against the templates: the same images in the same order, no template without an image.

    Args:
        folder: The folder of the lists.
        name: The set; its file names start with `ijbb` or `ijbc`.
        pairs: Whether to read the pairs of the 1:1 protocol, the largest list.
        published: Require the published counts; False reads a part of the set.

    Returns:
        IJBSet; a list whose file is absent is None, except the templates.

    Raises:
        InputError: There is no template list, or a reader of a list raises it.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "ijbc_face_tid_mid.txt").write_text("1.jpg 10 70\\n2.jpg 10 71\\n3.jpg 25 72\\n")
        >>> _ = (folder / "ijbc_template_pair_label.txt").write_text("10 25 0\\n")
        >>> read_ijb(folder, published=False)
        <IJBSet: IJB-C, 3 images, 1 pairs>
    """
    check_choice("read_ijb", "name", name, ("IJB-B", "IJB-C"))
    short = name.replace("-", "").lower()
    letter = "S" if name == "IJB-B" else "G"
    base = Path(folder, "meta") if Path(folder, "meta").is_dir() else Path(folder)
    which = name if published else None
    templates = read_ijb_templates(base / f"{short}_face_tid_mid.txt", published=which)

    def subjects(file: str, published: Literal["IJB-C G1", "IJB-C G2", "IJB-C probes"]) -> IJBSubjects | None:
        path = base / f"{short}_1N_{file}.csv"
        counts = published if which == "IJB-C" else None
        return read_ijb_subjects(path, templates=templates, published=counts) if path.is_file() else None

    points, compared = base / f"{short}_name_5pts_score.txt", base / f"{short}_template_pair_label.txt"
    first, second = subjects(f"gallery_{letter}1", "IJB-C G1"), subjects(f"gallery_{letter}2", "IJB-C G2")
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
        subjects("probe_mixed", "IJB-C probes"),
    )
