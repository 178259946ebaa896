"""Teachers room: several teachers as one, whose embeddings are joined and projected by a matrix learned on identities.

Two teachers whose spaces do not align cannot be averaged. A student can follow each through a projection of its own, one can
be turned onto the other (`fit_rotation`), or, here, both are concatenated and one projection is learned that tells the
training identities apart (MST-KD, arXiv:2408.16563); what it gives is then the frozen target.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch
from kdlib_faces._checks import InputError
from kdlib_faces.heads import CosFaceHead

__all__ = ["FusedTeacher", "fit_fusion", "join_embeddings"]


def join_embeddings(embeddings: Sequence[Tensor]) -> Tensor:
    """Unit rows of each teacher side by side, `(n, d_1 + ... + d_k)`, of length 1: a cosine is the mean of theirs.

    Examples:
        >>> join_embeddings([torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])]).round(decimals=3)
        tensor([[0.4240, 0.5660, 0.7070]])
    """
    rows = torch.cat([F.normalize(each.float(), dim=1, eps=1e-6) for each in embeddings], dim=1)
    scaled: Tensor = rows / len(embeddings) ** 0.5
    return scaled


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
    """Learn the projection of joined embeddings: `min_W CosFace(joined W, identity) + l2_sp_weight * ||W - W_0||^2 * d / ||W_0||^2`.

    `W_0` holds the `dim` principal directions of the joined embeddings (uncenterd): it keeps their cosines as well as `dim`
    numbers can, so that the projection is of use from the first step, and few identities cannot lead it far away.

    Args:
        embeddings: of each teacher, `(n, d_k)`, row i of the same image; recorded ones, for example.
        identities: `(n,)` int64 from 0.
        dim: d, dimensions of the fused embedding; at most the sum of the d_k.
        l2_sp_weight: how strongly the projection is held to its start; 0 lets it go where the identities lead.
        scale: s of the margin softmax.
        margin: its margin m.
        steps: of Adam.
        batch: images a step.
        lr: learning rate.
        seed: of the head and the batches.

    Returns:
        `(d_1 + ... + d_k, d)`, to be multiplied from the right.

    Raises:
        InputError: no embeddings, fewer than two identities, or more dimensions than there are.
        ValueError, TypeError: embeddings that do not go together.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> one, two = (torch.randn(12, 4, generator=generator) for _ in range(2))
        >>> fit_fusion([one, two], torch.arange(12) // 3, dim=6, steps=2).shape
        torch.Size([8, 6])

    References:
        Caldeira et al.: MST-KD: Multiple Specialized Teachers Knowledge Distillation for Fair Face Recognition, 2024, which
        trains one layer with ElasticArcFace on the concatenation; start, l2_sp_weight and head are ours.
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
    for name, whole in {"steps": steps, "batch": batch, "dim": dim}.items():
        check_number(owner, name, whole, min=1, integer=True)
    rows = join_embeddings([each.detach() for each in embeddings])
    if dim > rows.shape[1]:
        raise InputError(f"{owner}: dim must be at most the {rows.shape[1]} dimensions of all teachers, got {dim}")
    people, who = torch.unique(identities, return_inverse=True)
    if len(people) < 2:
        raise InputError(f"{owner}: identities must hold at least two, got {len(people)}")
    start = torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors.flip(1)[:, :dim].float().contiguous()
    matrix = start.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = CosFaceHead(dim, len(people), scale, margin)
    with torch.no_grad():  # centers begin where the images are, not at random
        for weight in head.parameters():
            sums = torch.zeros(len(people), dim).index_add_(0, who, rows @ start)
            weight.copy_(F.normalize(sums, dim=1, eps=1e-6))
    optimizer = torch.optim.Adam([matrix, *head.parameters()], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(len(rows), generator=generator)[:batch]
        held = (matrix - start).square().sum() / start.square().sum()
        loss = head(rows[chosen] @ matrix, who[chosen]) + l2_sp_weight * held
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    learned: Tensor = matrix.detach()
    return learned


class FusedTeacher(nn.Module):
    """Several frozen teachers behind one embedding: `normalize(join_embeddings(embeddings) W)`.

    Stands where a `kdlib.TeacherAdapter` stands. Its parts may be adapters, ONNX teachers or recorded ones, all reading the
    same inputs.

    Args:
        teachers: name to teacher, inputs to named features with an embedding; the order is that of `fit_fusion`.
        matrix: from `fit_fusion`, `(d_1 + ... + d_k, d)`.
        feature: name of the embedding in each.
        pass_through: name of the teacher whose other features pass through; `None` passes none.

    Raises:
        InputError: no teacher, an unknown name, teachers that read different inputs.

    Examples:
        >>> class Plain(nn.Module):
        ...     def forward(self, x):
        ...         return {"embedding": x}
        >>> fused = FusedTeacher({"a": Plain(), "b": Plain()}, torch.eye(4)[:, :3])
        >>> fused(torch.tensor([[3.0, 4.0]]))["embedding"].shape
        torch.Size([1, 3])
    """

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
        reads = {getattr(teacher, "reads", None) for teacher in teachers.values()}
        if len(reads) != 1:
            raise InputError("FusedTeacher: teachers must read the same inputs: all images, or all recorded samples")
        self.reads: tuple[str, ...] | None = reads.pop()
        self.teachers = nn.ModuleDict(dict(teachers)).requires_grad_(False)
        self.register_buffer("matrix", matrix.detach().clone(), persistent=True)
        self.feature, self.pass_through = feature, pass_through
        self.embedding_dim = matrix.shape[1]
        super().train(False)

    def train(self, mode: bool = True) -> "FusedTeacher":
        """Stays in eval mode, whatever is asked."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The fused embedding `(b, d)` of unit length, and what passes through."""
        said = {name: teacher(*inputs) for name, teacher in self.teachers.items()}
        rows = join_embeddings([features[self.feature] for features in said.values()])
        matrix = self.get_buffer("matrix")
        if rows.shape[1] != len(matrix):
            raise InputError(
                f"FusedTeacher: matrix must have the {rows.shape[1]} rows of the joined embeddings, got {len(matrix)}"
            )
        features = dict(said[self.pass_through]) if self.pass_through is not None else {}
        features[self.feature] = F.normalize(rows @ matrix.to(rows.device), dim=1, eps=1e-6)
        return features
