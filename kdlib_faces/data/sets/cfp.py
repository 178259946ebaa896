"""The protocols of CFP, Celebrities in Frontal-Profile."""

from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import is_number, read_lines
from kdlib_faces.data.image_pairs import ImagePairs, check_published, gather_pairs

__all__ = ["read_cfp_pairs"]


def read_cfp_pairs(
    folder: str | PathLike[str], kind: Literal["FP", "FF"] = "FP", *, published: bool = True
) -> ImagePairs:
    """Read the pairs of CFP-FP (frontal against profile) or CFP-FF (frontal against frontal).

    `Protocol/Pair_list_F.txt` and `Pair_list_P.txt` number the images, one line `number path` each. The files `same.txt` and
    `diff.txt` in `Protocol/Split/FP/01` to `10` hold the pairs of each fold, one line `number,number` each. Names of the
    result start at `folder`, such as `Data/Images/001/frontal/01.jpg`.

    Args:
        folder: The folder of the set, which contains `Protocol`.
        kind: `"FP"` or `"FF"`.
        published: Require ten folds of 350 genuine and 350 impostor pairs; False reads a part of the set.

    Returns:
        ImagePairs named `CFP-FP` or `CFP-FF`, without ages.

    Raises:
        InputError: A file is missing, a line has another form, a number belongs to no image, or the counts are not the
            published ones.

    Examples:
        A set of two identities with one frontal and one profile image each, and one fold:

        >>> import tempfile
        >>> protocol = Path(tempfile.mkdtemp()) / "Protocol"
        >>> fold = protocol / "Split" / "FP" / "01"
        >>> fold.mkdir(parents=True)
        >>> for letter, kind in (("F", "frontal"), ("P", "profile")):
        ...     lines = [f"{k} ../Data/Images/00{k}/{kind}/01.jpg\\n" for k in (1, 2)]
        ...     _ = (protocol / f"Pair_list_{letter}.txt").write_text("".join(lines))
        >>> _ = (fold / "same.txt").write_text("1,1\\n2,2\\n"), (fold / "diff.txt").write_text("1,2\\n2,1\\n")
        >>> read_cfp_pairs(protocol.parent, published=False)
        <ImagePairs: CFP-FP, 4 pairs of 4 images, 2 genuine, 1 folds>
    """
    check_choice("read_cfp_pairs", "kind", kind, ("FP", "FF"))
    protocol = Path(folder) / "Protocol"
    frontal = _images(protocol / "Pair_list_F.txt")
    other = _images(protocol / "Pair_list_P.txt") if kind == "FP" else frontal
    splits = protocol / "Split" / kind
    folders = sorted(each for each in splits.iterdir() if each.is_dir()) if splits.is_dir() else []
    if not folders:
        raise InputError(f"{splits}: no folds found; CFP has them in folders 01 to 10")
    pairs: list[tuple[str, str, bool]] = []
    folds: list[int] = []
    for fold, each in enumerate(folders):
        genuine = _pairs(each / "same.txt", frontal, other)
        impostor = _pairs(each / "diff.txt", frontal, other)
        if published:
            counts = {"genuine pairs": len(genuine), "impostor pairs": len(impostor)}
            check_published(each, f"fold of CFP-{kind}", counts, (350, 350))
        pairs += [(*pair, True) for pair in genuine] + [(*pair, False) for pair in impostor]
        folds += [fold] * (len(genuine) + len(impostor))
    if published:
        check_published(splits, f"protocol of CFP-{kind}", {"folds": len(folders)}, (10,))
    return gather_pairs(
        f"CFP-{kind}",
        pairs,
        folds=np.asarray(folds, dtype=np.int64),
        identity=lambda image: image.split("/")[-3],
        source=splits,
        path_parts=3,
    )


def _images(path: Path) -> dict[int, str]:
    images: dict[int, str] = {}
    for number, text in read_lines(path, what="image list of CFP"):
        fields = text.split()
        if len(fields) != 2 or not is_number(fields[0]):
            raise InputError(f"{path} line {number}: must be 'number path', got {text[:60]!r}")
        image = fields[1].removeprefix("../")
        if image.count("/") < 2:
            raise InputError(
                f"{path} line {number}: the path must end in 'identity/frontal/image' or 'identity/profile/image', "
                f"got {fields[1][:60]!r}"
            )
        if images.setdefault(int(fields[0]), image) != image:
            raise InputError(f"{path} line {number}: image {fields[0]} occurs twice")
    return images


def _pairs(path: Path, left: dict[int, str], right: dict[int, str]) -> list[tuple[str, str]]:
    pairs = []
    for number, text in read_lines(path, what="fold of CFP"):
        fields = [field.strip() for field in text.split(",")]
        if len(fields) != 2 or not all(is_number(field) for field in fields):
            raise InputError(f"{path} line {number}: must be 'number,number', got {text[:60]!r}")
        for field, images in zip(fields, (left, right), strict=True):
            if int(field) not in images:
                raise InputError(f"{path} line {number}: no image has number {field}; there are {len(images):,}")
        pairs.append((left[int(fields[0])], right[int(fields[1])]))
    return pairs
