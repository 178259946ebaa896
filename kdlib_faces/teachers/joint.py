"""One target of several teachers: their joined embeddings, brought across ages, in fewer dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.teachers.fused import join_embeddings, principal_directions
from kdlib_faces.teachers.mapped import fit_age_map

__all__ = ["fit_joint_space"]


def fit_joint_space(
    embeddings: Sequence[Tensor],
    identities: Tensor,
    *,
    ages: Tensor | None = None,
    age_groups: Tensor | None = None,
    dim: int = 256,
    l2_sp_weight: float = 100.0,
    min_age_gap: float = 10.0,
    seed: int = 0,
) -> Tensor:
    """Fit the projection of joined embeddings to the space in which a student is distilled: `W = A V`.

    `A` is the map of `fit_age_map` on the joined embeddings, which brings the images of an identity at different ages
    together. `V` holds the `dim` principal directions of the mapped embeddings (not centered), which preserve their cosines
    as well as `dim` numbers can. Images of unknown identity or age enter `V` only. Without ages, `A` is the identity matrix.

    Args:
        embeddings: `(n, d_k)` of each teacher; row i of each belongs to the same image.
        identities: `(n,)` int64, -1 where unknown.
        ages: `(n,)` years, NaN where unknown.
        age_groups: `(n,)` int64, -1 where unknown.
        dim: Dimensions of the joint space, at most the sum of the `d_k`.
        l2_sp_weight: Weight of the distance of `A` from the identity matrix.
        min_age_gap: Minimum age difference of a cross-age pair, years.
        seed: Seed of the order and choice of pairs.

    Returns:
        `(d_1 + ... + d_k, dim)`, the matrix of a `FusedTeacher`.

    Raises:
        InputError: No embeddings, or more dimensions than there are.
        ValueError, TypeError: An argument is out of range, or the embeddings do not match.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> one, two = (torch.randn(12, 4, generator=generator) for _ in range(2))
        >>> fit_joint_space([one, two], torch.arange(12) // 3, age_groups=torch.arange(12) % 2, dim=6).shape
        torch.Size([8, 6])
    """
    if not embeddings:
        raise InputError("fit_joint_space: embeddings must hold those of at least one teacher, got none")
    check_number("fit_joint_space", "dim", dim, min=1, integer=True)
    rows = join_embeddings([each.detach() for each in embeddings])
    if dim > rows.shape[1]:
        raise InputError(
            f"fit_joint_space: dim must be at most the {rows.shape[1]} dimensions of all teachers, got {dim}"
        )
    matrix = torch.eye(rows.shape[1])
    if ages is not None or age_groups is not None:
        matrix = fit_age_map(
            rows, identities, ages=ages, age_groups=age_groups, min_age_gap=min_age_gap, l2_sp_weight=l2_sp_weight, seed=seed
        )  # fmt: skip
    mapped = torch.nn.functional.normalize(rows @ matrix, dim=1)
    projection: Tensor = matrix @ principal_directions(mapped, dim)
    return projection
