"""Teachers of a recipe with cached outputs, the joint space of their embeddings, and the student that learns them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib import Teacher
from kdlib.types import TeacherInputs
from kdlib_faces._hardware import Hardware
from kdlib_faces.backbones import Backbone
from kdlib_faces.caching.teachers import targets_read
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.samplers import count_cross_age_identities
from kdlib_faces.progress import say
from kdlib_faces.recipes.liaad_settings import JOINT, LIAADConfig, features_read
from kdlib_faces.recipes.start import ONE_PROCESS, StartConfig, start_student
from kdlib_faces.teachers import FusedTeacher, cache_outputs, fit_joint_space, read_outputs

__all__ = ["cache_live_teachers", "join_teachers", "prepare_student"]

MIN_AGE_GAP = 10.0
"""Minimum age difference of a cross-age pair, years."""


def cache_live_teachers(
    teachers: Mapping[str, nn.Module], images: FaceImages, folder: Path, *, quiet: bool, device: torch.device
) -> dict[str, nn.Module]:
    """Replace teachers that read images by caches of their outputs for the plain and the mirrored images.

    Args:
        teachers: Teachers by role.
        images: The training images.
        folder: Folder of the caches, one subfolder for each role.
        quiet: Show no progress.
        device: Device of the teachers.

    Returns:
        Cached teachers by role; teachers that read cached outputs already are returned as they are.
    """
    cached: dict[str, nn.Module] = {}
    for role, teacher in teachers.items():
        reads_targets = isinstance(teacher, Teacher) and bool(teacher.inputs)
        label = f"outputs of the {role} teacher"
        cached[role] = (
            teacher
            if reads_targets
            else cache_outputs(teacher, images, folder / role, label=label, quiet=quiet, device=device)
        )
    return cached


def prepare_student(
    recipe: LIAADConfig,
    start: StartConfig,
    network: Backbone | None,
    teachers: Mapping[str, nn.Module],
    faces: FaceList,
    images: Tensor | FaceImages,
    *,
    folder: Path,
    quiet: bool,
    hardware: Hardware = ONE_PROCESS,
) -> tuple[LIAADConfig, dict[str, nn.Module], Backbone]:
    """Make the target of a recipe from cached teachers, and the student that starts as a narrower copy of a network.

    Args:
        recipe: The recipe. Its `target` selects the joint space of the teachers.
        start: Settings of the narrower copy.
        network: The network of `load_start`; None builds the student of the recipe with random weights.
        teachers: Cached teachers by role.
        faces: The training images.
        images: Their pixels as the student receives them, `(n, 3, h, w)` uint8.
        folder: Folder of the run, where the start is stored.
        quiet: Show no progress.
        hardware: The process of the run; the first one makes the start.

    Returns:
        The recipe with the embedding dimensions of the student, the teachers that its terms read, and the student.

    Raises:
        InputError: As `start_student`.
    """
    targets = dict(teachers)
    if recipe.target == "joint":
        joint = join_teachers(
            teachers, faces, recipe.joint_dim, recipe.age_map_weight, seed=recipe.seed, quiet=quiet,
            both_views=recipe.both_views,
        )  # fmt: skip
        with_maps = [role for role, features in features_read(recipe).items() if "map" in features]
        targets = {JOINT: joint, **{role: teachers[role] for role in teachers if role in with_maps}}
        recipe = replace(recipe, embedding_dim=recipe.joint_dim)
    if network is None:
        return recipe, targets, recipe.build(recipe.seed)
    student = start_student(
        network, images, start, folder=folder, seed=recipe.seed, quiet=quiet, joint=targets.get(JOINT),
        hardware=hardware,
    )  # fmt: skip
    return replace(recipe, embedding_dim=student.embedding_dim), targets, student


class BothViews(nn.Module):
    """A cached teacher whose embedding is the sum for the plain and the mirrored image, so that it does not depend on the view.

    Args:
        teacher: Reads the targets `"sample"` and `"view"`.
    """

    inputs: TeacherInputs = ("sample",)

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, samples: Tensor) -> dict[str, Tensor]:
        """Return the features for the plain images `(n,)`, with the embedding `(n, d)` of both views."""
        plain, mirrored = (self.teacher(*_targets(self.teacher, samples, view)) for view in (0, 1))
        return {**plain, "embedding": plain["embedding"] + mirrored["embedding"]}


def join_teachers(
    teachers: Mapping[str, nn.Module],
    faces: FaceList,
    dim: int,
    age_map_weight: float,
    *,
    seed: int,
    quiet: bool,
    both_views: bool = False,
) -> FusedTeacher:
    """Return the joint teacher of cached teachers, with the age map fitted on the cross-age pairs of the lists.

    Args:
        teachers: Cached teachers by role.
        faces: The training images. Images without age, or alone with their identity, do not enter the age map.
        dim: Dimensions of the joint space.
        age_map_weight: Weight of the distance of the age map from the identity matrix; 0 fits no map.
        seed: Seed of the order and choice of pairs.
        quiet: Show no progress.
        both_views: Target of each image: the sum of the embeddings of both views, in place of that of the view at hand.
    """
    say("fitting the joint space of the teachers", quiet=quiet)
    rows = torch.arange(len(faces))
    embeddings = [_embeddings(teacher, rows, 0) + _embeddings(teacher, rows, 1) for teacher in teachers.values()]
    ages = None if faces.ages is None else torch.from_numpy(faces.ages)
    groups = None if faces.age_groups is None else torch.from_numpy(faces.age_groups)
    columns = ((faces.ages, MIN_AGE_GAP), (faces.age_groups, 1.0))
    pairs = sum(count_cross_age_identities(faces.identities, x, gap) for x, gap in columns if x is not None)
    if not age_map_weight or pairs < 2:
        reason = f"{pairs} identities have images of different ages" if age_map_weight else "recipe.age_map_weight is 0"
        say(f"no age map is fitted: {reason}", quiet=quiet)
        ages = groups = None
    matrix = fit_joint_space(
        embeddings, torch.from_numpy(faces.identities), ages=ages, age_groups=groups, dim=dim,
        l2_sp_weight=age_map_weight, min_age_gap=MIN_AGE_GAP, seed=seed,
    )  # fmt: skip
    return FusedTeacher({role: BothViews(each) for role, each in teachers.items()} if both_views else teachers, matrix)


def _embeddings(teacher: nn.Module, rows: Tensor, view: int) -> Tensor:
    return read_outputs(lambda rows, view: teacher(*_targets(teacher, rows, view)), "embedding", rows, view)


def _targets(teacher: nn.Module, rows: Tensor, view: int | Tensor) -> list[Tensor]:
    views = torch.full_like(rows, view) if isinstance(view, int) else view
    return targets_read(teacher, {"sample": rows, "view": views})
