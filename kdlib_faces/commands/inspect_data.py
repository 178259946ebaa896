"""Descriptions of face lists, pair lists, `.bin` sets and RecordIO files for `kdlib-faces inspect`."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.bin import load_bin
from kdlib_faces.data.formats.record_reader import RecordReader
from kdlib_faces.data.formats.text import read_lines, split_row
from kdlib_faces.data.image_files import describe_far_sizes, open_rgb, spaced_rows
from kdlib_faces.data.image_pairs import ImagePairs
from kdlib_faces.data.lists import read_faces
from kdlib_faces.data.sets.agedb import read_agedb_pairs
from kdlib_faces.data.sets.calfw import read_calfw_pairs
from kdlib_faces.data.sets.lfw import read_lfw_pairs
from kdlib_faces.data.sources.base import ImageSource

__all__ = ["describe_data"]


def describe_data(path: Path, size: int) -> str | None:
    """Describe a file or folder of face data, with a sample of its images decoded for a network of `size`.

    Returns None for another kind of file.

    Raises:
        InputError: The file is of a known kind, and broken.
    """
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind in ("folder", ".tar") or (kind == ".csv" and _is_face_list(path)):
        rows = _faces(path, size)
    elif kind == ".bin" and not _is_checkpoint(path):
        rows = _bin_set(path, size)
    elif kind == ".rec":
        rows = _records(path, size)
    elif kind in (".csv", ".txt", ".mat"):
        rows = _pairs(path)
    else:
        return None
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


_Rows = list[tuple[str, str]]


def _faces(path: Path, size: int) -> _Rows:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The notes are printed below.
        faces = read_faces([path])
    rows = [("images", f"{len(faces):,}"), ("identities", f"{faces.num_identities:,}")]
    if faces.ages is not None:
        known = faces.ages[np.isfinite(faces.ages)]
        rows.append(("ages", f"{len(known):,} known, {known.min():g} to {known.max():g} years"))
    if faces.age_groups is not None:
        counts = {name: int((faces.age_groups == at).sum()) for at, name in enumerate(faces.group_names)}
        rows.append(("age groups", ", ".join(f"{name} {count:,}" for name, count in counts.items())))
    rows += [("note", note) for note in faces.notes]
    return rows + _sample(faces.images, size)


def _bin_set(path: Path, size: int) -> _Rows:
    pairs = load_bin(path)
    rows = [("pairs", f"{len(pairs):,}, {int(pairs.same.sum()):,} genuine"), ("images", f"{len(pairs.images):,}")]
    return rows + _sample(pairs.images, size)


def _records(path: Path, size: int) -> _Rows:
    with RecordReader(path) as reader:
        labels = reader.labels()
        rows = [
            ("images", f"{len(reader):,}"),
            ("identities", f"{len(np.unique(labels)):,}, numbered {labels.min()} to {labels.max()}"),
            ("index", str(reader.index_path or "none: keys are those of the records")),
        ]
        if (properties := reader.properties) is not None:
            stated = f"{properties.num_identities:,} identities, {properties.height} x {properties.width} pixels"
            rows.append(("property", stated))
        try:
            ranges = reader.ranges()
            rows.append(("ranges", "none" if ranges is None else f"{len(ranges):,}, as the labels of the images"))
        except InputError as error:
            rows.append(("ranges", f"wrong: {error}; the labels of the images are used"))
        sampled = [reader[int(row)].image for row in spaced_rows(len(reader))]
        return rows + _sample(sampled, size)


def _pairs(path: Path) -> _Rows:
    pairs = _read_pairs(path)
    genuine = int(pairs.same.sum())
    folds = len(np.unique(pairs.fold_ids))
    rows = [
        ("list", pairs.name),
        ("pairs", f"{len(pairs):,}, {genuine:,} genuine"),
        ("images", f"{len(pairs.images):,}, such as {pairs.images[0]}"),
        ("identities", "not in the list" if pairs.identities is None else f"{len(set(pairs.identities)):,}"),
        ("folds", f"{folds}, {'assigned' if pairs.assigned_folds else 'of the list'}"),
    ]
    if pairs.ages is not None:
        rows.append(("ages", f"{np.nanmin(pairs.ages):g} to {np.nanmax(pairs.ages):g} years"))
    return rows


def _read_pairs(path: Path) -> ImagePairs:
    if path.suffix.lower() == ".mat":
        return read_agedb_pairs(path, published=False)
    lines = [text for _, (_, text) in zip(range(2), read_lines(path, what="pairs file"), strict=False)]
    if len(lines) == 2 and all(len(text.split()) == 2 and "," not in text for text in lines):
        return replace(read_calfw_pairs(path, published=False), name="two lines per pair, as CALFW and CPLFW have")
    return read_lfw_pairs(path)


def _is_checkpoint(path: Path) -> bool:
    """Whether a file starts as those of `torch.save` do, in the present or the former format."""
    with path.open("rb") as stream:
        head = stream.read(15)
    return head.startswith(b"PK") or head == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _is_face_list(path: Path) -> bool:
    number, text = next(read_lines(path, what="face list"), (1, ""))
    return (
        bool({"path", "identity"} & {name.casefold() for name in split_row(text, f"{path} line {number}")}) or not text
    )


def _sample(sources: ImageSource | Sequence[bytes], size: int) -> _Rows:
    """Decode a sample: sizes, broken images, and images far from the network's size."""
    sizes: Counter[tuple[int, int]] = Counter()
    errors: list[str] = []
    for row in (spaced := spaced_rows(len(sources))):
        name = sources.name(row) if isinstance(sources, ImageSource) else f"image {row}"
        try:
            sizes[open_rgb(sources[row], name).size] += 1
        except InputError as error:
            errors.append(str(error))
    shown = ", ".join(f"{width} x {height} ({count:,})" for (width, height), count in sizes.most_common(5))
    more = f", {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
    rows = [("sample", f"{len(spaced):,} images decoded, {len(errors):,} broken")]
    rows += [("sizes", f"{shown}{more} (width x height)")] if sizes else []
    rows += [("broken", error) for error in errors]
    far = describe_far_sizes(sources, size)
    return rows + ([("warning", far)] if far else [])
