"""Shared parts of the margin heads."""

import math
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib._checks import check_choice, check_floating, check_number, check_rank, show_shape
from kdlib._gather import is_sharded
from kdlib._maths import REDUCTIONS, Reduction, finite_weight, promoted_dtype, reduce, rescale
from kdlib_faces._checks import check_class_shards, check_identities
from kdlib_faces.heads._streamed import Modulate, own_and_log_sum, unit

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "LossModule", "MarginHead", "add_angular_margin", "angle_to", "check_call", "counted_rows", "lengths",
    "margin_softmax", "move", "shift_angle", "softmax_loss", "unit_pair",
]  # fmt: skip


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

    def arguments(self) -> dict[str, object]:
        """Return the arguments of the call that rebuilds the loss, without centers and generator."""
        names = [name for name in signature(type(self)).parameters if name not in ("centers", "generator")]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return the arguments of the call that rebuilds the loss."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, object],
        prefix: str,
        metadata: dict[str, object],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        for name, own in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            loaded = state_dict.get(f"{prefix}{name}")
            if own.dim() < 2 or not isinstance(loaded, Tensor) or loaded.dim() < 2 or loaded.shape == own.shape:
                continue
            middle = "sub_centers, " if own.dim() == 3 else ""
            count = f"sub_centers={loaded.shape[1]}, " if own.dim() == loaded.dim() == 3 else ""
            errors.append(
                f"{type(self).__name__}: {prefix}{name} must be (num_identities, {middle}embedding_dim) = "
                f"{show_shape(own)}, got {show_shape(loaded)}; build the loss with num_identities={len(loaded)}, "
                f"{count}embedding_dim={loaded.shape[-1]}, or load the student's weights alone"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class MarginHead(LossModule):
    """Base class of margin heads: learned class centers and the arguments that all heads share.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: the margin, at least 0; a plain float attribute that a schedule may set.
        reduction: `"mean"` or `"none"`.
        generator: generator of the initial centers; None uses torch's global generator.
        chunk_size: identities per chunk of the softmax; None computes all logits at once.
        sub_centers: number of centers per identity, which `weight` then has as its second dimension.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    _loss: ClassVar[Callable[..., Tensor]]
    _max_margin: ClassVar[float | None] = None

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float,
        margin: float,
        *,
        reduction: Reduction,
        generator: torch.Generator | None,
        chunk_size: int | None,
        sub_centers: int | None = None,
    ) -> None:
        super().__init__()
        self._set_sizes(embedding_dim, num_identities, scale, reduction)
        owner = type(self).__name__
        self.margin = float(check_number(owner, "margin", margin, min=0, max=self._max_margin))
        if chunk_size is not None:
            chunk_size = check_number(owner, "chunk_size", chunk_size, min=1, integer=True)
        self.chunk_size = chunk_size
        middle = () if sub_centers is None else (sub_centers,)
        self.weight = nn.Parameter(torch.empty(self.num_identities, *middle, self.embedding_dim))
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5, generator=generator)

    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of embeddings `(b, d)` and `identities` `(b,)`; `reduction=None` uses that of the constructor.

        `negatives` are the indices of the centers that are compared to, as `SampledHead` draws them; None compares to all.
        """
        return self._loss(
            embeddings, self.weight, identities, scale=self.scale, margin=self.margin,
            reduction=reduction or self.reduction, weight=weight, chunk_size=self.chunk_size, negatives=negatives,
        )  # fmt: skip


def check_call(
    owner: str,
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    shape: str = "n d",
) -> None:
    """Check embeddings `(b, d)`, centers of the dimensions in `shape`, and identities `(b,)`."""
    check_floating(owner, embeddings=embeddings, centers=centers)
    check_rank(owner, "embeddings", embeddings, "b d")
    check_rank(owner, "centers", centers, shape)
    if embeddings.shape[1] != centers.shape[-1]:
        wanted = f"(b, {centers.shape[-1]}) like centers {show_shape(centers)}"
        raise ValueError(f"{owner}: embeddings must be {wanted}, got {show_shape(embeddings)}")
    check_identities(owner, identities, embeddings.shape[0], centers.shape[0])
    if is_sharded(centers):
        check_class_shards(owner, cast("DTensor", centers))


def unit_pair(embeddings: Tensor, centers: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Normalize the rows of both, in float32, or in float64 if either is float64; see `unit` for short rows."""
    dtype = promoted_dtype(embeddings, centers)
    return unit(embeddings, dtype, scale), unit(centers, dtype, scale)


def _cosine_and_sine(e_bd: Tensor, center_bd: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine `(b,)` of the angles to the own centers; a zero row is at a right angle."""
    cosine = (e_bd * center_bd).sum(1)
    nonzero = (e_bd.detach() != 0).any(1)
    across = torch.where(nonzero.unsqueeze(1), e_bd - cosine.unsqueeze(1) * center_bd, 1.0)  # no second derivative at 0
    sine = torch.where(nonzero, torch.linalg.vector_norm(across, dim=1), 1.0)
    return cosine, sine


def add_angular_margin(e_bd: Tensor, center_bd: Tensor, cos_m: Tensor | float, sin_m: Tensor | float) -> Tensor:
    """Return the cosines `(b,)` of the angles to the own centers plus the margins m; psi in `arcface_loss`."""
    cosine, sine = _cosine_and_sine(e_bd, center_bd)
    return torch.where(cosine >= -cos_m, cosine * cos_m - sine * sin_m, cosine + cos_m - 1)


def angle_to(e_bd: Tensor, center_bd: Tensor) -> Tensor:
    """Return the angles `(b,)` to the own centers, whose gradient has at most unit length, also at 0 and pi."""
    cosine, sine = _cosine_and_sine(e_bd, center_bd)
    return torch.atan2(sine, cosine)


def shift_angle(angle: Tensor, shift: Tensor | float, factor: float = 1.0) -> Tensor:
    r"""Return the cosines `(b,)` of `factor * angle + shift`, which never increase with the angle.

    Beyond pi, the cosine of the angle continues the curve from -1 on, as psi in `arcface_loss` does. Below 0, which a
    negative shift reaches, the cosine stays 1.
    """
    shifted = factor * angle + shift
    edge = (math.pi - shift) / factor
    cos_edge = edge.cos() if isinstance(edge, Tensor) else math.cos(edge)
    return torch.where(shifted > math.pi, angle.cos() - cos_edge - 1, shifted.clamp(min=0).cos())


def lengths(x_bd: Tensor) -> Tensor:
    """Return the norms `(b,)` of the rows, in float32 or float64; safe for all finite rows."""
    scaled_bd, largest = rescale(x_bd.to(torch.promote_types(x_bd.dtype, torch.float32)))
    norms: Tensor = largest * torch.linalg.vector_norm(scaled_bd, dim=1)
    return norms


def counted_rows(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return which of `values` `(b,)` enter running statistics: finite ones that `weight` does not mask."""
    finite = values.isfinite()
    return finite if weight is None else finite & (finite_weight(weight) > 0).to(finite.device)


def move(running: Tensor, value: Tensor, momentum: float, where: Tensor) -> None:
    """Replace the part `momentum` of a running value by `value`, if `where` is true."""
    running.copy_(torch.where(where, running + momentum * (value - running), running))


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


def margin_softmax(
    owner: str,
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    target: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float,
    reduction: str,
    weight: Tensor | None,
    chunk_size: int | None,
    negatives: Tensor | None,
    steepness: float = 1.0,
    modulate: Modulate | None = None,
) -> Tensor:
    """Softmax cross-entropy over cosines, with a margin on the target cosine.

    Args:
        owner: name of the loss, for errors.
        embeddings: `(b, d)`, not necessarily normalized.
        centers: `(n, d)`, or `(n, k, d)` of which the nearest one of an identity counts; may be sharded along n.
        identities: `(b,)`.
        target: maps unit embeddings and own unit centers, both `(b, d)`, to target cosines with margin.
        scale: factor of the cosines.
        reduction: `"mean"` or `"none"`.
        weight: `(b,)`, weight per sample.
        chunk_size: identities per chunk; None computes all logits at once.
        negatives: indices of the (local) centers that count as negatives; None for all.
        steepness: the largest slope of `target` by the angle.
        modulate: changes the cosines of negatives; compares them to the target cosines with margin.
    """
    identities, slope = identities.long(), scale * steepness
    if chunk_size is None and negatives is None and not is_sharded(centers):
        e_bd, rows = unit_pair(embeddings, centers.flatten(0, -2), slope)
        cosines, own = e_bd @ rows.T, identities
        if centers.dim() == 3:
            cosines, nearest = cosines.reshape(len(e_bd), *centers.shape[:2]).max(2)
            own = identities * centers.shape[1] + nearest.gather(1, identities.unsqueeze(1)).squeeze(1)
        psi = target(e_bd, rows[own])
        if modulate is not None:
            cosines = modulate(cosines, psi)
        return softmax_loss(owner, cosines, psi, identities, scale, reduction, weight)
    if chunk_size is not None:
        check_number(owner, "chunk_size", chunk_size, min=1, integer=True)
    e_bd = unit(embeddings, promoted_dtype(embeddings, centers), slope)

    def nearest_target(rows: Tensor) -> Tensor:
        units = unit(rows, e_bd.dtype, slope)
        if units.dim() == 3:
            nearest = (units @ e_bd.unsqueeze(2)).squeeze(2).argmax(1)
            units = units[torch.arange(len(units), device=units.device), nearest]
        return target(e_bd, units)

    own_rows, log_sum = own_and_log_sum(
        e_bd, centers, identities, scale=scale, steepness=steepness, chunk_size=chunk_size, negatives=negatives,
        modulate=modulate, target_cosine=nearest_target,
    )  # fmt: skip
    losses = -F.logsigmoid(scale * nearest_target(own_rows) - log_sum)
    return reduce(owner, losses, reduction, weight)
