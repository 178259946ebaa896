"""A check that the embeddings of two teachers can be averaged by one student."""

import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.caching.teachers import OpenTeachers, targets_read
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import FaceList
from kdlib_faces.recipes.student import StudentConfig
from kdlib_faces.teachers.mapped import space_agreement

__all__ = ["check_one_space"]

IMAGES = 64
MIN_AGREEMENT = 0.2
"""Two public teachers of 512 dimensions agree by .00, after a rotation of one onto the other by .54; a teacher and its
fine-tuned copy by about .8."""

REMEDY = (
    "--set recipe.embedding_projection=linear learns a projection to each teacher, --set recipe.embedding_weight=0 leaves the "
    "embeddings out"
)


def check_one_space(opened: OpenTeachers, faces: FaceList, config: StudentConfig, *, compare: bool = True) -> None:
    """Check that all teachers embed images in the space of the student: same dimensions, same directions.

    Args:
        opened: The teachers, all with the feature `"embedding"`, and the views that they require.
        faces: The training images.
        config: The student.
        compare: Compare directions too; those of untrained teachers mean nothing.

    Raises:
        InputError: They do not; the message names the setting to change.
    """
    rows = torch.linspace(0, len(faces) - 1, min(IMAGES, len(faces))).long()
    pixels = FaceImages(faces.images, config.input_size, threads=2, on_error="skip")[rows]
    images = to_float(pixels) if opened.views is None else opened.views(pixels, rows, 0)
    targets = {"sample": rows, "view": torch.zeros_like(rows)}
    embeddings: dict[str, Tensor] = {}
    for name, teacher in opened.teachers.items():
        embeddings[name] = teacher(*(targets_read(teacher, targets) or [images]))["embedding"].float()
    dims = {name: embedding.shape[1] for name, embedding in embeddings.items()}
    if set(dims.values()) != {config.embedding_dim}:
        found = ", ".join(f"the {name} teacher {dim}" for name, dim in dims.items())
        raise InputError(
            f"train: recipe.embedding_projection=none needs embeddings of equal dimensions; the student has {config.embedding_dim}, "
            f"{found}; {REMEDY}"
        )
    if not compare or len(embeddings) < 2 or len(rows) < 8:
        return
    agreement = space_agreement(*embeddings.values())
    if agreement < MIN_AGREEMENT:
        raise InputError(
            f"train: the embeddings of the two teachers lie in different spaces: on {len(rows)} training images their mean "
            f"cosine is {agreement:.2f}, where 0 is chance and one space gives {MIN_AGREEMENT} or more; {REMEDY}"
        )
