"""Photographs of one face each as images of aligned crops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.alignment import AlignConfig
from kdlib_faces.alignment.photographs import PhotographAligner
from kdlib_faces.harness.image_sets import ImageSet, aligned_images, images_of_files

__all__ = ["faces_of_photographs"]


def faces_of_photographs(
    name: str,
    paths: Sequence[Path],
    detector: Path | None,
    several: Literal["refuse", "largest", "center"],
    device: torch.device,
) -> ImageSet:
    """The faces of photographs, aligned by the landmarks of a detector; without a detector, the images as they are.

    Args:
        name: Name of the set.
        paths: The photographs.
        detector: File of the detector, or None.
        several: Which of several faces is taken; `"refuse"` raises.
        device: Device of the detector.

    Raises:
        InputError: A file cannot be read, or has no face, or several with `"refuse"`.
    """
    plain = images_of_files(name, paths)
    if detector is None:
        return plain
    config = AlignConfig(several=several)
    aligner = PhotographAligner(detector, config, device=device)
    points = []
    for path in paths:
        found, _ = aligner(path)
        if found.error:
            raise InputError(found.error)
        if not found.faces:
            raise InputError(
                f"{path}: no face found with a score of at least {config.min_score:g} and {config.min_size:g} pixels; give a "
                "photograph in which the face is larger or less turned, or leave out --detector if the image is an aligned crop"
            )
        if not found.crops:
            raise InputError(
                f"{path}: {found.faces} faces found, expected one; cut the photograph so that it shows one face, or give "
                "--several largest or --several center"
            )
        points.append(np.array(found.crops[0].points, np.float32).reshape(5, 2))
    return aligned_images(name, paths, np.stack(points), f"{detector.name}")
