"""Teachers room: what can be learned on top of frozen embeddings in seconds. Touches tensors alone.

`fit_age_map`: a linear map under which a person's images of far ages meet. `fit_rotation`: the rotation that brings one
teacher's sphere onto another's, so that one student can follow both. `MappedTeacher`: a teacher with such a matrix behind it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch
from kdlib_faces._checks import InputError

__all__ = ["MappedTeacher", "fit_age_map", "fit_rotation"]


def fit_rotation(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal matrix `R` that minimizes the squared distance of `source R` and `target` (Procrustes).

    A rotation leaves every cosine within `source` as it was: the teacher says the same, in the other's coordinates. Where
    the source has fewer dimensions than the target, the matrix has orthonormal rows.

    Args:
        source: `(n, d)` embeddings of one teacher, unit rows.
        target: `(n, D)` of the other for the same images, `D >= d`.

    Returns:
        `(d, D)`.

    Raises:
        ValueError: other shapes.

    Examples:
        >>> x = torch.eye(3)[[0, 1, 2, 0]]
        >>> turned = x[:, [1, 2, 0]]
        >>> bool(torch.allclose(x @ fit_rotation(x, turned), turned, atol=1e-6))
        True

    References:
        Schönemann: A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
    """
    check_floating("fit_rotation", source=source, target=target)
    check_rank("fit_rotation", "source", source, "n d")
    check_rank("fit_rotation", "target", target, "n d")
    check_same_batch("fit_rotation", "source", source, "target", target)
    if source.shape[1] > target.shape[1]:
        raise ValueError(
            f"fit_rotation: target must have at least the {source.shape[1]} dimensions of source, got {target.shape[1]}"
        )
    left, _, right = torch.linalg.svd(source.double().T @ target.double(), full_matrices=False)
    rotation: Tensor = (left @ right).to(source.dtype)
    return rotation


def fit_age_map(
    embeddings: Tensor,
    identities: Tensor,
    *,
    ages: Tensor | None = None,
    age_groups: Tensor | None = None,
    min_age_gap: float = 10.0,
    l2_sp_weight: float = 100.0,
    scale: float = 16.0,
    steps: int = 300,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Learn a linear map of frozen embeddings that brings a person's far ages together and keeps all else near.

    `min_W CE(scale * cos(a_i W, b_j W), i = j) + l2_sp_weight * mean (W - 1)^2 * d`, where `a_i`, `b_i` are two images of person i
    from different age groups (or at least `min_age_gap` years apart) and the other people of the batch are the wrong answers.

    Args:
        embeddings: `(n, d)`; rows are normalized here.
        identities: `(n,)` int64.
        ages: `(n,)` years, NaN where unknown; or
        age_groups: `(n,)` int64, -1 where unknown.
        min_age_gap: least years between the two images of a pair.
        l2_sp_weight: how strongly the map is held to the identity matrix. On a few hundred people 100 was best or next to it for
            two teachers; at 10 one of them was worse on unseen people than without a map (`benchmarks/study_age_map.py`).
        scale: inverse temperature.
        steps: of Adam.
        batch: people a step.
        lr: learning rate.
        seed: of the pairs drawn.

    Returns:
        `(d, d)`, to be multiplied from the right.

    Raises:
        InputError: neither ages nor groups, or fewer than two people with a far pair.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(8, 4, generator=generator)
        >>> fit_age_map(x, torch.arange(8) // 2, age_groups=torch.arange(8) % 2, steps=2).shape
        torch.Size([4, 4])
    """
    check_floating("fit_age_map", embeddings=embeddings)
    check_rank("fit_age_map", "embeddings", embeddings, "n d")
    check_same_batch("fit_age_map", "embeddings", embeddings, "identities", identities)
    check_number("fit_age_map", "steps", steps, min=1, integer=True)
    if ages is None and age_groups is None:
        raise InputError("fit_age_map: ages or age_groups must be given, got neither")
    pairs = _cross_age_pairs(identities, ages, age_groups, min_age_gap)
    if len(pairs) < 2:
        raise InputError(
            f"fit_age_map: at least two people must have images of different ages, got {len(pairs)}; "
            "an age-invariant teacher cannot be fitted without"
        )
    unit = F.normalize(embeddings.detach().float(), dim=1)
    eye = torch.eye(unit.shape[1])
    matrix = eye.clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        people = torch.randperm(len(pairs), generator=generator)[:batch].tolist()
        drawn = [pairs[p][int(torch.randint(len(pairs[p]), (1,), generator=generator))] for p in people]
        rows = torch.tensor(drawn)
        first, second = (F.normalize(unit[rows[:, side]] @ matrix, dim=1) for side in (0, 1))
        logits = scale * first @ second.T
        truth = torch.arange(len(rows))
        contrast = 0.5 * (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth))
        loss = contrast + l2_sp_weight * (matrix - eye).square().sum() / len(eye)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    return matrix.detach()


def _cross_age_pairs(
    identities: Tensor, ages: Tensor | None, age_groups: Tensor | None, min_age_gap: float
) -> list[list[tuple[int, int]]]:
    """For each person who has some, the pairs of rows that lie far apart in age."""
    rows: dict[int, list[int]] = {}
    for row, person in enumerate(identities.tolist()):
        rows.setdefault(person, []).append(row)
    groups = None if age_groups is None else age_groups.tolist()
    years = None if ages is None else ages.tolist()

    def far(i: int, j: int) -> bool:
        if years is not None and abs(years[i] - years[j]) >= min_age_gap:  # a NaN compares as not far
            return True
        return groups is not None and min(groups[i], groups[j]) >= 0 and groups[i] != groups[j]

    found = [[(i, j) for i in own for j in own if i != j and far(i, j)] for own in rows.values()]
    return [pairs for pairs in found if pairs]


class MappedTeacher(nn.Module):
    """A teacher with a matrix behind its embedding; all its other features pass through.

    Args:
        teacher: images to named features.
        matrices: feature name to `(d, D)`; the feature's rows are normalized, then multiplied.

    Examples:
        >>> class Plain(nn.Module):
        ...     def forward(self, x):
        ...         return {"embedding": x}
        >>> MappedTeacher(Plain(), {"embedding": 2 * torch.eye(2)})(torch.tensor([[3.0, 4.0]]))["embedding"]
        tensor([[1.2000, 1.6000]])
    """

    def __init__(self, teacher: nn.Module, matrices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.teacher = teacher
        self.matrices = {name: matrix.detach() for name, matrix in matrices.items()}
        self.reads: tuple[str, ...] | None = getattr(teacher, "reads", None)

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Features of the teacher, mapped where there is a matrix."""
        features = dict(self.teacher(*inputs))
        for name, matrix in self.matrices.items():
            features[name] = F.normalize(features[name].float(), dim=1) @ matrix.to(features[name].device)
        return features
