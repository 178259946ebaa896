"""Linear maps on frozen embeddings: a rotation between two teachers, an age map, and a teacher with such a matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import Teacher
from kdlib._checks import check_batches, check_floating, check_number, check_pair, check_rank, check_same_batch
from kdlib.types import TeacherInputs
from kdlib_faces._checks import InputError

__all__ = ["MappedTeacher", "fit_age_map", "fit_rotation", "space_agreement"]


def space_agreement(first: Tensor, second: Tensor) -> float:
    """Measure whether two teachers embed images in one space: the mean cosine of both embeddings of an image.

    Each teacher's mean unit embedding is subtracted first, so that two unrelated spaces give 0 up to `1 / sqrt(n d)`.

    Args:
        first: Embeddings `(n, d)` of one teacher.
        second: Embeddings `(n, d)` of the other for the same images.

    Returns:
        A cosine, -1 to 1.

    Raises:
        ValueError, TypeError: The shapes do not match.

    Examples:
        >>> x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
        >>> space_agreement(x, 2 * x) > 0.99, abs(space_agreement(x, x.flip(1))) < 0.1
        (True, True)
    """
    check_pair("space_agreement", first, second, "b d")
    one, other = (F.normalize(each.detach().float(), dim=1) for each in (first, second))
    return float(F.cosine_similarity(one - one.mean(0), other - other.mean(0), dim=1).mean())


def fit_rotation(source: Tensor, target: Tensor) -> Tensor:
    """Return the orthogonal matrix `R` that minimizes `||source R - target||^2` (orthogonal Procrustes).

    A rotation keeps every cosine within `source`. Where the source has fewer dimensions than the target, the rows of the
    matrix are orthonormal.

    Args:
        source: Unit embeddings `(n, d)` of one teacher.
        target: Embeddings `(n, D)` of another teacher for the same images, `D >= d`.

    Returns:
        `(d, D)`.

    Raises:
        ValueError: The shapes do not match.

    Examples:
        >>> x = torch.eye(3)[[0, 1, 2, 0]]
        >>> rotated = x[:, [1, 2, 0]]
        >>> bool(torch.allclose(x @ fit_rotation(x, rotated), rotated, atol=1e-6))
        True

    References:
        Schönemann: A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
    """
    check_batches("fit_rotation", "n d", source=source, target=target)
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
    """Fit a linear map of frozen embeddings that increases the similarity of cross-age pairs.

    `min_W CE(scale * cos(a_i W, b_j W), i = j) + l2_sp_weight * mean (W - 1)^2 * d`, where `a_i` and `b_i` are a cross-age
    pair of identity i and the other identities of the batch are the negatives.

    Args:
        embeddings: `(n, d)`; rows are normalized here.
        identities: `(n,)` int64, -1 where unknown.
        ages: `(n,)` years, NaN where unknown. Either ages or age groups must be given.
        age_groups: `(n,)` int64, -1 where unknown. Two different groups make a cross-age pair.
        min_age_gap: Minimum age difference of a pair, years.
        l2_sp_weight: Weight of the distance from the identity matrix. On a few hundred identities 100 was best or second
            best for two teachers; at 10 one of them was worse on unseen identities than without a map
            (`benchmarks/study_age_map.py`).
        scale: Inverse temperature.
        steps: Steps of Adam.
        batch: Identities per step.
        lr: Learning rate.
        seed: Seed of the order and choice of pairs.

    Returns:
        `(d, d)`, to be multiplied from the right.

    Raises:
        InputError: Neither ages nor groups are given, or fewer than two identities have a cross-age pair.

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
        raise InputError(f"fit_age_map: at least two identities must have images of different ages, got {len(pairs)}")
    unit = F.normalize(embeddings.detach().float(), dim=1)
    eye = torch.eye(unit.shape[1])
    matrix = eye.clone().requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        order = torch.randperm(len(pairs), generator=generator)[:batch].tolist()
        rows = torch.tensor([pairs[i][int(torch.randint(len(pairs[i]), (1,), generator=generator))] for i in order])
        first, second = (F.normalize(unit[rows[:, side]] @ matrix, dim=1) for side in (0, 1))
        logits = scale * first @ second.T
        target = torch.arange(len(rows))
        contrast = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        loss = contrast + l2_sp_weight * (matrix - eye).square().sum() / len(eye)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
    return matrix.detach()


def _cross_age_pairs(
    identities: Tensor, ages: Tensor | None, age_groups: Tensor | None, min_age_gap: float
) -> list[list[tuple[int, int]]]:
    """The cross-age pairs of rows of each identity that has any."""
    rows: dict[int, list[int]] = {}
    for row, identity in enumerate(identities.tolist()):
        rows.setdefault(identity, []).append(row)
    groups = None if age_groups is None else age_groups.tolist()
    years = None if ages is None else ages.tolist()

    def cross_age(i: int, j: int) -> bool:
        if years is not None and abs(years[i] - years[j]) >= min_age_gap:  # False for NaN
            return True
        return groups is not None and min(groups[i], groups[j]) >= 0 and groups[i] != groups[j]

    rows.pop(-1, None)
    pairs = [[(i, j) for i in own for j in own if i != j and cross_age(i, j)] for own in rows.values()]
    return [each for each in pairs if each]


class MappedTeacher(nn.Module):
    """A teacher with a matrix behind some of its features; the other features pass through.

    Args:
        teacher: Inputs to named features.
        matrices: Feature name to `(d, D)`. The rows of the feature are normalized, then multiplied.

    Attributes:
        inputs: The targets that the teacher reads in place of the inputs; None where it reads the inputs.

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
        self.inputs: TeacherInputs = teacher.inputs if isinstance(teacher, Teacher) else None

    @torch.no_grad()
    def forward(self, *inputs: Tensor, **named: Tensor) -> dict[str, Tensor]:
        """Return the teacher's features, mapped where there is a matrix."""
        features = dict(self.teacher(*inputs, **named))
        for name, matrix in self.matrices.items():
            features[name] = F.normalize(features[name].float(), dim=1) @ matrix.to(features[name].device)
        return features
