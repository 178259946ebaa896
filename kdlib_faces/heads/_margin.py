"""Shared parts of the margin heads."""

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib._checks import check_choice, check_floating, check_number, check_rank, show_shape
from kdlib._maths import REDUCTIONS, Reduction, reduce, unit_rows
from kdlib_faces._checks import check_identities

__all__ = ["LossModule", "MarginHead", "add_angular_margin", "check_call", "softmax_loss", "unit_pair"]


class LossModule(nn.Module):
    """A loss that prints the call that rebuilds it, without centers and generator."""

    per_sample: ClassVar[bool] = True

    def _set_sizes(self, embedding_dim: int, num_identities: int, scale: float, reduction: Reduction) -> None:
        """Check and store the arguments that all losses with class centers share."""
        owner = type(self).__name__
        self.embedding_dim = check_number(owner, "embedding_dim", embedding_dim, min=1, integer=True)
        self.num_identities = check_number(owner, "num_identities", num_identities, min=1, integer=True)
        self.scale = float(check_number(owner, "scale", scale, above=0))
        check_choice(owner, "reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def extra_repr(self) -> str:
        """Return the arguments of the call that rebuilds the loss."""
        names = [name for name in signature(type(self)).parameters if name not in ("centers", "generator")]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        for name, own in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            loaded = state_dict.get(f"{prefix}{name}")
            if own.dim() == 2 and isinstance(loaded, Tensor) and loaded.dim() == 2 and loaded.shape != own.shape:
                errors.append(
                    f"{type(self).__name__}: {prefix}{name} must be (num_identities, embedding_dim) = "
                    f"{show_shape(own)}, got {show_shape(loaded)}; build the loss with num_identities={len(loaded)}, "
                    f"embedding_dim={loaded.shape[1]}, or load the student's weights alone"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class MarginHead(LossModule):
    """Base class of margin heads: learned class centers, and the arguments that all heads share; see `ArcFaceHead`.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    _loss: ClassVar[Callable[..., Tensor]]
    _usual_margin: ClassVar[float]
    _max_margin: ClassVar[float | None] = None

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float | None = None,
        *,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(embedding_dim, num_identities, scale, reduction)
        margin = self._usual_margin if margin is None else margin
        self.margin = float(check_number(type(self).__name__, "margin", margin, min=0, max=self._max_margin))
        self.weight = nn.Parameter(torch.empty(self.num_identities, self.embedding_dim))
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5, generator=generator)

    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Return the loss of embeddings `(b, d)` and `identities` `(b,)`; `reduction=None` uses that of the constructor."""
        return self._loss(
            embeddings, self.weight, identities, scale=self.scale, margin=self.margin,
            reduction=reduction or self.reduction, weight=weight,
        )  # fmt: skip


def check_call(owner: str, embeddings: Tensor, centers: Tensor, identities: Tensor) -> None:
    """Check embeddings `(b, d)`, centers `(n, d)` and identities `(b,)`."""
    check_floating(owner, embeddings=embeddings, centers=centers)
    check_rank(owner, "embeddings", embeddings, "b d")
    check_rank(owner, "centers", centers, "n d")
    if embeddings.shape[1] != centers.shape[1]:
        wanted = f"(b, {centers.shape[1]}) like centers {show_shape(centers)}"
        raise ValueError(f"{owner}: embeddings must be {wanted}, got {show_shape(embeddings)}")
    check_identities(owner, identities, embeddings.shape[0], centers.shape[0])


def unit_pair(embeddings: Tensor, centers: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Normalize the rows of both, in float32, or in float64 if either is float64.

    The gradient of a row is at most 2 * scale / norm. A row whose norm is too small for this to be finite in its
    original dtype gets no gradient; a zero row stays zero.
    """
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, centers.dtype), torch.float32)

    def unit(x: Tensor) -> Tensor:
        rows, largest = unit_rows(x.to(dtype))
        smallest = max(1e-12, 4 * scale / torch.finfo(x.dtype).max)
        return torch.where((largest < smallest).unsqueeze(1), rows.detach(), rows)

    return unit(embeddings), unit(centers)


def add_angular_margin(e_bd: Tensor, center_bd: Tensor, cos_m: Tensor | float, sin_m: Tensor | float) -> Tensor:
    """Return the cosines `(b,)` of the angles to the own centers plus the margins m; psi in `arcface_loss`."""
    cosine = (e_bd * center_bd).sum(1)
    nonzero = (e_bd.detach() != 0).any(1)
    sine = torch.where(nonzero, torch.linalg.vector_norm(e_bd - cosine.unsqueeze(1) * center_bd, dim=1), 1.0)
    return torch.where(cosine >= -cos_m, cosine * cos_m - sine * sin_m, cosine + cos_m - 1)


def softmax_loss(
    owner: str,
    cosines: Tensor,
    target_cosine: Tensor,
    identities: Tensor,
    scale: float,
    reduction: str,
    weight: Tensor | None,
) -> Tensor:
    """Cross-entropy of `scale * cosines` `(b, n)`, with the target cosine replaced by `target_cosine` `(b,)`."""
    logits = scale * cosines.scatter(1, identities.unsqueeze(1), target_cosine.unsqueeze(1))
    return reduce(owner, F.cross_entropy(logits, identities, reduction="none"), reduction, weight)
