"""Heads room, private: the steps that the margin heads share. Touches tensors only."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib._checks import check_choice, check_floating, check_number, check_rank, show_shape
from kdlib._maths import REDUCTIONS, reduce, unit_rows
from kdlib_faces._checks import check_identities

__all__ = ["Reduction", "check_call", "check_head", "softmax_loss", "unit_pair"]

Reduction = Literal["mean", "none"]


def check_head(owner: str, embedding_dim: int, num_identities: int, scale: float, reduction: str) -> None:
    """Constructor arguments that every head has."""
    check_number(owner, "embedding_dim", embedding_dim, min=1, integer=True)
    check_number(owner, "num_identities", num_identities, min=1, integer=True)
    check_number(owner, "scale", scale, above=0)
    check_choice(owner, "reduction", reduction, REDUCTIONS)


def check_call(owner: str, embeddings: Tensor, centers: Tensor, identities: Tensor) -> None:
    """Embeddings `(b, d)`, one center `(d,)` an identity, identities `(b,)` in range."""
    check_floating(owner, embeddings=embeddings, centers=centers)
    check_rank(owner, "embeddings", embeddings, "b d")
    check_rank(owner, "centers", centers, "n d")
    if embeddings.shape[1] != centers.shape[1]:
        wanted = f"(b, {centers.shape[1]}) like centers {show_shape(centers)}"
        raise ValueError(f"{owner}: embeddings must be {wanted}, got {show_shape(embeddings)}")
    check_identities(owner, identities, embeddings.shape[0], centers.shape[0])


def unit_pair(embeddings: Tensor, centers: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Both with rows of length one, in float32, or in float64 if either is.

    A row too short for its gradient, at most 2 * scale / length, to be a number in the dtype it came in gets none; a
    zero row stays zero.
    """
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, centers.dtype), torch.float32)

    def unit(x: Tensor) -> Tensor:
        rows, largest = unit_rows(x.to(dtype))
        shortest = max(1e-12, 4 * scale / torch.finfo(x.dtype).max)
        return torch.where((largest < shortest).unsqueeze(1), rows.detach(), rows)

    return unit(embeddings), unit(centers)


def softmax_loss(
    owner: str,
    cosines: Tensor,
    moved: Tensor,
    identities: Tensor,
    scale: float,
    reduction: str,
    weight: Tensor | None,
) -> Tensor:
    """Cross-entropy of `scale * cosines` `(b, n)` after the own identity's cosine is replaced by `moved` `(b,)`."""
    logits = scale * cosines.scatter(1, identities.unsqueeze(1), moved.unsqueeze(1))
    return reduce(owner, F.cross_entropy(logits, identities, reduction="none"), reduction, weight)
