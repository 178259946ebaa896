"""Several teachers fused into one by a projection of their concatenated embeddings that is fitted on identities."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import Teacher
from kdlib._checks import check_floating, check_number, check_rank, check_same_batch
from kdlib.types import TeacherInputs
from kdlib_faces._checks import InputError
from kdlib_faces.heads import CosFaceHead

__all__ = ["FusedTeacher", "fit_fusion", "join_embeddings", "principal_directions"]


def join_embeddings(embeddings: Sequence[Tensor]) -> Tensor:
    """Concatenate the unit embeddings of several teachers, `(n, d_1 + ... + d_k)`, scaled to length 1.

    The cosine of two joined rows is the mean of the teachers' cosines.

    Examples:
        >>> join_embeddings([torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])]).round(decimals=3)
        tensor([[0.4240, 0.5660, 0.7070]])
    """
    rows = torch.cat([F.normalize(each.float(), dim=1, eps=1e-6) for each in embeddings], dim=1)
    scaled: Tensor = rows / len(embeddings) ** 0.5
    return scaled


def principal_directions(rows: Tensor, dim: int) -> Tensor:
    """Return the directions `(d, dim)` in which rows `(n, d)`, not centered, have the largest second moments, falling.

    Rows multiplied by them keep their dot products as well as `dim` numbers can. The computation is in float64.
    """
    moments = rows.double().T @ rows.double()
    directions: Tensor = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :dim].float()
    return directions


def fit_fusion(
    embeddings: Sequence[Tensor],
    identities: Tensor,
    *,
    dim: int = 512,
    l2_sp_weight: float = 1.0,
    scale: float = 32.0,
    margin: float = 0.2,
    steps: int = 500,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> Tensor:
    """Fit the projection of joined embeddings: `min_W CosFace(joined W, identity) + w ||W - W_0||^2 d / ||W_0||^2`.

    `W_0` holds the `dim` principal directions of the joined embeddings (not centered), which preserve their cosines as well
    as `dim` numbers can. The projection is useful from the first step, and few identities cannot move it far.

    Args:
        embeddings: `(n, d_k)` of each teacher; row i of each belongs to the same image.
        identities: `(n,)` int64 from 0.
        dim: Dimensions `d` of the fused embedding, at most the sum of the `d_k`.
        l2_sp_weight: Weight `w` of the distance from `W_0`.
        scale: Scale of the margin softmax.
        margin: Margin of the margin softmax.
        steps: Steps of Adam.
        batch: Images per step.
        lr: Learning rate.
        seed: Seed of the head and of the batches.

    Returns:
        `(d_1 + ... + d_k, d)`, to be multiplied from the right.

    Raises:
        InputError: No embeddings, fewer than two identities, or more dimensions than there are.
        ValueError, TypeError: An argument is out of range, or the embeddings do not match.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> one, two = (torch.randn(12, 4, generator=generator) for _ in range(2))
        >>> fit_fusion([one, two], torch.arange(12) // 3, dim=6, steps=2).shape
        torch.Size([8, 6])

    References:
        Caldeira et al.: MST-KD: Multiple Specialized Teachers Knowledge Distillation for Fair Face Recognition, 2024,
        arXiv:2408.16563, which trains one layer with ElasticArcFace on the concatenation. The initial projection, its
        regularization and the head are ours.
    """
    owner = "fit_fusion"
    if not embeddings:
        raise InputError(f"{owner}: embeddings must hold those of at least one teacher, got none")
    for number, each in enumerate(embeddings):
        check_floating(owner, **{f"embeddings[{number}]": each})
        check_rank(owner, f"embeddings[{number}]", each, "n d")
        check_same_batch(owner, f"embeddings[{number}]", each, "identities", identities)
    for name, value in {"l2_sp_weight": l2_sp_weight, "margin": margin}.items():
        check_number(owner, name, value, min=0)
    for name, value in {"scale": scale, "lr": lr}.items():
        check_number(owner, name, value, above=0)
    for name, value in {"steps": steps, "batch": batch, "dim": dim}.items():
        check_number(owner, name, value, min=1, integer=True)
    rows = join_embeddings([each.detach() for each in embeddings])
    if dim > rows.shape[1]:
        raise InputError(f"{owner}: dim must be at most the {rows.shape[1]} dimensions of all teachers, got {dim}")
    labels, codes = torch.unique(identities, return_inverse=True)
    if len(labels) < 2:
        raise InputError(f"{owner}: identities must hold at least two, got {len(labels)}")
    start = principal_directions(rows, dim).contiguous()
    matrix = start.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = CosFaceHead(dim, len(labels), scale, margin)
    with torch.no_grad():  # class centers start at the mean embeddings instead of random directions
        for weight in head.parameters():
            sums = torch.zeros(len(labels), dim).index_add_(0, codes, rows @ start)
            weight.copy_(F.normalize(sums, dim=1, eps=1e-6))
    optimizer = torch.optim.Adam([matrix, *head.parameters()], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(rows), generator=generator)[:batch]
        distance = (matrix - start).square().sum() / start.square().sum()
        loss = head(rows[chosen] @ matrix, codes[chosen]) + l2_sp_weight * distance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    learned: Tensor = matrix.detach()
    return learned


class FusedTeacher(nn.Module):
    """Several frozen teachers with one embedding: `normalize(join_embeddings(embeddings) W)`.

    It takes the place of a `kdlib.TeacherAdapter`. The teachers may be adapters, ONNX teachers or cached teachers, as long as
    all read the same inputs.

    Args:
        teachers: Names to teachers, in the order of `fit_fusion`. Each maps inputs to named features with an embedding.
        matrix: The projection `W` of `fit_fusion`, `(d_1 + ... + d_k, d)`.
        feature: Name of the embedding in each teacher.
        pass_through: Name of the teacher whose other features are returned too; None returns the embedding alone.

    Attributes:
        inputs: The targets that the teachers read in place of the inputs; None where they read the inputs.

    Raises:
        InputError: No teacher, an unknown name, or teachers that read different inputs.

    Examples:
        >>> class Plain(nn.Module):
        ...     def forward(self, x):
        ...         return {"embedding": x}
        >>> fused = FusedTeacher({"a": Plain(), "b": Plain()}, torch.eye(4)[:, :3])
        >>> fused(torch.tensor([[3.0, 4.0]]))["embedding"].shape
        torch.Size([1, 3])
    """

    matrix: Tensor

    def __init__(
        self,
        teachers: Mapping[str, nn.Module],
        matrix: Tensor,
        *,
        feature: str = "embedding",
        pass_through: str | None = None,
    ) -> None:
        super().__init__()
        if not teachers:
            raise InputError("FusedTeacher: teachers must hold at least one, got none")
        if pass_through is not None and pass_through not in teachers:
            raise InputError(f"FusedTeacher: pass_through must be one of {', '.join(teachers)}, got {pass_through!r}")
        check_rank("FusedTeacher", "matrix", matrix, "d e")
        first, *others = (teacher.inputs if isinstance(teacher, Teacher) else None for teacher in teachers.values())
        if any(other != first for other in others):
            raise InputError("FusedTeacher: teachers must all read images, or all read the same targets")
        self.inputs: TeacherInputs = first
        self.teachers = nn.ModuleDict(dict(teachers)).requires_grad_(False)
        self.register_buffer("matrix", matrix.detach().clone())
        self.feature, self.pass_through = feature, pass_through
        self.embedding_dim = matrix.shape[1]
        super().train(False)

    def train(self, mode: bool = True) -> "FusedTeacher":
        """Stay in eval mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Tensor, **named: Tensor) -> dict[str, Tensor]:
        """Return the fused embedding `(b, d)` of unit length, and the features that pass through."""
        outputs = {name: teacher(*inputs, **named) for name, teacher in self.teachers.items()}
        rows = join_embeddings([features[self.feature] for features in outputs.values()])
        if rows.shape[1] != len(self.matrix):
            raise InputError(
                f"FusedTeacher: matrix must have the {rows.shape[1]} rows of the joined embeddings, got {len(self.matrix)}"
            )
        features = {} if self.pass_through is None else dict(outputs[self.pass_through])
        features[self.feature] = F.normalize(rows @ self.matrix.to(rows.device), dim=1, eps=1e-6)
        return features
