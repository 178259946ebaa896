"""Margin softmax over part of the class centers at a time, on one process or on many."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kdlib._checks import readable
from kdlib._gather import all_rows, is_sharded
from kdlib._maths import full_precision, rescale

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Modulate", "Part", "local_part", "local_rows", "own_and_log_sum", "own_centers", "unit", "whole_batch"]

Modulate = Callable[[Tensor, Tensor], Tensor]
"""Maps the cosines `(b, m)` of negatives and the target cosines with margin `(b,)` to modulated cosines."""

CHUNK = 2**20
"""Cosines of a chunk, and values of its centers, if `chunk_size` is not given: 4 MB in float32."""


SAFE = (1e-15, 1e15)
"""Lengths of rows whose squares neither overflow nor lose digits in float32."""


def unit(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Normalize the last dimension in `dtype`; the gradient is at most 2 * scale / norm.

    A row whose norm is too small for this to be finite in its original dtype gets no gradient; a zero row stays zero.
    """
    rows = x.to(dtype).flatten(0, -2)
    smallest = max(1e-12, 4 * scale / torch.finfo(x.dtype).max)
    if readable(rows) and rows.numel():
        units: Tensor = _Unit.apply(rows, smallest)[0]  # type: ignore[no-untyped-call]  # torch has no types here
    else:
        units, length = _units(rows)
        units = torch.where(length < smallest, units.detach(), units)
    return units.reshape(x.shape)


def _units(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit rows `(n, d)` and the lengths `(n, 1)`; safe for all finite rows, of which zero rows stay zero."""
    scaled, largest = rescale(rows)
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(length == 0, 1.0, length), length.detach() * largest.unsqueeze(1)


class _Unit(Function):
    """Unit rows and lengths on a CPU, with a third of the passes over the values that autograd takes.

    The backward pass consists of differentiable operations of the outputs, so second derivatives and `torch.func.vmap` work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if SAFE[0] < length.min() and length.max() < SAFE[1]:
            return rows / length, length
        return _units(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)
        ctx.smallest = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None, length_slope: Tensor | None) -> tuple[Tensor | None, None]:
        units, length = ctx.saved_tensors
        gradient = None if slope is None else _across(slope, units, length, ctx.smallest)
        if length_slope is not None:
            outward = torch.where(length < ctx.smallest, 0.0, length_slope) * units
            gradient = outward if gradient is None else gradient + outward
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor]:
        units, length = ctx.saved_tensors
        along = torch.linalg.vecdot(tangent, units).unsqueeze(1)
        return _across(tangent, units, length, ctx.smallest), torch.where(length < ctx.smallest, 0.0, along)


def _across(x: Tensor, units: Tensor, length: Tensor, smallest: float) -> Tensor:
    """Return the part of x across the unit rows, divided by the lengths; 0 for rows shorter than `smallest`."""
    short = length < smallest
    inverse = torch.where(short, 0.0, 1 / torch.where(short, 1.0, length))
    across = torch.addcmul(x, units, torch.linalg.vecdot(x, units).unsqueeze(1), value=-1)
    # With create_graph=True, the values are needed again.
    return across * inverse if torch.is_grad_enabled() else across.mul_(inverse)


@dataclass(frozen=True)
class Part:
    """The class centers that this process holds.

    Args:
        rows: `(m, d)` or `(m, k, d)`, the centers of m consecutive identities.
        first: the identity of the first row.
        group: the processes that hold all centers together; None if this process holds all.
    """

    rows: Tensor
    first: int = 0
    group: dist.ProcessGroup | None = None


def local_rows(count: int, mesh: "DeviceMesh") -> tuple[int, int]:
    """Return the first of `count` rows that this process holds, and the one after the last.

    As in `torch.chunk`, the last processes may hold fewer rows, or none.
    """
    each = -(-count // mesh.size())
    first = min(each * mesh.get_local_rank(), count)
    return first, min(first + each, count)


def local_part(centers: Tensor) -> Part:
    """Return the centers of this process: all of a plain tensor, or the local rows of a sharded one."""
    if not is_sharded(centers):
        return Part(centers)
    sharded = cast("DTensor", centers)
    mesh = sharded.device_mesh
    first, _ = local_rows(len(centers), mesh)
    return Part(sharded.to_local(), first, mesh.get_group() if mesh.size() > 1 else None)


def whole_batch(values: Tensor, centers: Tensor) -> tuple[Tensor, int]:
    """Return the values `(b, ...)` of all processes that share the centers, without gradient, and the index of our first.

    The batch of a sharded head is that of all processes together; that of any other head is that of its process.
    """
    group = local_part(centers).group
    return (values.detach(), 0) if group is None else all_rows(values.detach(), group)


@torch.no_grad()
def own_centers(centers: Tensor, identities: Tensor) -> Tensor:
    """Return the centers `(b, d)` or `(b, k, d)` of `identities` `(b,)`, without gradient."""
    part = local_part(centers)
    if part.group is None:
        return part.rows[identities]
    everyone, at = all_rows(identities, part.group)
    return _own(part, everyone)[at : at + len(identities)]


def own_and_log_sum(
    e_bd: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float,
    steepness: float,
    chunk_size: int | None,
    negatives: Tensor | None,
    modulate: Modulate | None,
    target_cosine: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the own centers and the logarithm of the summed exponentials of the logits of all negatives.

    No more than the logits of a chunk exist at once. They are computed again in the backward pass, which writes the
    gradient of the centers chunk by chunk. There is no second derivative.

    Args:
        e_bd: unit embeddings `(b, d)`.
        centers: `(n, d)` or `(n, k, d)`, not necessarily normalized; may be sharded along n.
        identities: `(b,)`.
        scale: factor of the cosines.
        steepness: the largest slope of the target cosine by the angle.
        chunk_size: identities per chunk; None for about 1 million cosines, and as many values of centers.
        negatives: indices of the local centers that count as negatives; None for all.
        modulate: changes the cosines of negatives.
        target_cosine: maps own centers to target cosines with margin, which `modulate` compares to.

    Returns:
        The own centers `(b, d)` or `(b, k, d)`, in the dtype of `centers`, and `(b,)`, which is -inf without negatives.
    """
    part = local_part(centers)
    limit = e_bd.new_zeros(len(e_bd))
    if modulate is not None:
        with torch.no_grad():
            limit = target_cosine(own_centers(centers, identities))
    rows: tuple[Tensor, Tensor] = _Streamed.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        _Plan(part, scale, scale * steepness, chunk_size, negatives, modulate),
        e_bd,
        part.rows,
        identities,
        limit.detach(),
    )
    return rows


def _own(part: Part, identities: Tensor) -> Tensor:
    """Return the centers of the identities of all processes; each process adds those that it holds."""
    local, mine = _position(part, identities)
    if not len(part.rows):
        own = part.rows.new_zeros(len(identities), *part.rows.shape[1:])
    else:
        own = part.rows[local] * mine.view(-1, *[1] * (part.rows.dim() - 1))
    dist.all_reduce(own, group=part.group)
    return own


def _position(part: Part, identities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the local rows of identities, any row for those of other processes, and which ones are local."""
    local = identities - part.first
    mine = (local >= 0) & (local < len(part.rows))
    return torch.where(mine, local, 0), mine


@dataclass(frozen=True)
class _Plan:
    part: Part
    scale: float
    slope: float
    chunk_size: int | None
    negatives: Tensor | None
    modulate: Modulate | None

    def columns(self, batch: int) -> tuple[Tensor | None, list[slice]]:
        """Return the indices of the negatives, None for all, and the chunks of them."""
        count = len(self.part.rows) if self.negatives is None else len(self.negatives)
        width = math.prod(self.part.rows.shape[1:-1]) * max(batch, self.part.rows.shape[-1], 1)
        size = self.chunk_size or max(1, CHUNK // width)
        return self.negatives, [slice(at, min(at + size, count)) for at in range(0, count, size)]

    def logits(self, e_bd: Tensor, rows: Tensor, own: Tensor, limit: Tensor) -> Tensor:
        """Return the logits `(b, m)` of a chunk of centers, -inf where `own` `(b, m)` is true."""
        cosines = e_bd @ unit(rows, e_bd.dtype, self.slope).flatten(0, -2).T
        if rows.dim() == 3:
            cosines = cosines.reshape(len(e_bd), *rows.shape[:2]).max(2).values
        if self.modulate is not None:
            cosines = self.modulate(cosines, limit)
        return (self.scale * cosines).masked_fill(own, -torch.inf)


class _Streamed(Function):
    """Returns the own centers and the log-sum of negatives of the samples of this process."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, e_bd: Tensor, rows: Tensor, identities: Tensor, limit: Tensor
    ) -> tuple[Tensor, Tensor]:
        part, at, count = Part(rows, plan.part.first, plan.part.group), 0, len(e_bd)
        if part.group is None:
            own_rows = rows[identities]
        else:
            identities, at = all_rows(identities, part.group)
            packed = all_rows(torch.cat([e_bd, limit.unsqueeze(1)], 1), part.group)[0]
            e_bd, limit = packed[:, :-1], packed[:, -1]
            own_rows = _own(part, identities)[at : at + count]
        local = identities - part.first
        log_sum = e_bd.new_full((len(e_bd),), -torch.inf)
        negatives, chunks = plan.columns(len(e_bd))
        for chunk in chunks:
            columns = _columns(negatives, chunk, rows.device)
            chunk_rows = rows[chunk] if negatives is None else rows[columns]
            logits = plan.logits(e_bd, chunk_rows, local.unsqueeze(1) == columns, limit)
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
        if part.group is not None:
            log_sum = all_rows(log_sum.unsqueeze(0), part.group)[0].logsumexp(0)
        ctx.plan, ctx.mine = plan, slice(at, at + count)
        ctx.save_for_backward(e_bd, rows, identities, limit, log_sum)
        return own_rows, log_sum[ctx.mine].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, own_slopes: Tensor, slopes: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        e_bd, rows, identities, limit, log_sum = ctx.saved_tensors
        group, needs_e, needs_rows = plan.part.group, ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        if group is not None:
            packed = torch.cat([own_slopes.to(slopes.dtype).flatten(1), slopes.unsqueeze(1)], 1)
            packed = all_rows(packed, group)[0]
            own_slopes, slopes = packed[:, :-1].reshape(-1, *own_slopes.shape[1:]), packed[:, -1]
        local, log_sum = identities - plan.part.first, log_sum.masked_fill(log_sum.isneginf(), 0).unsqueeze(1)
        e_grad = torch.zeros_like(e_bd) if needs_e else None
        negatives, chunks = plan.columns(len(e_bd))
        row_grad = None
        if needs_rows:
            row_grad = torch.empty_like(rows) if negatives is None else torch.zeros_like(rows)
        for chunk in chunks:
            columns = _columns(negatives, chunk, rows.device)
            with torch.enable_grad(), full_precision(e_bd):
                e_leaf = e_bd.detach().requires_grad_(needs_e)
                leaf = (rows[chunk] if negatives is None else rows[columns]).detach().requires_grad_(needs_rows)
                logits = plan.logits(e_leaf, leaf, local.unsqueeze(1) == columns, limit)
            with torch.no_grad():
                logit_slopes = (logits.detach() - log_sum).exp_().mul_(slopes.unsqueeze(1))
            leaves = [x for x, needed in ((e_leaf, needs_e), (leaf, needs_rows)) if needed]
            grads = list(torch.autograd.grad(logits, leaves, logit_slopes))
            if row_grad is not None:
                row_grad[chunk if negatives is None else columns] = grads.pop()
            if e_grad is not None:
                e_grad += grads.pop()
        if row_grad is not None and len(rows):
            at, mine = _position(plan.part, identities)
            own_slopes = own_slopes * mine.view(-1, *[1] * (rows.dim() - 1))
            row_grad.index_add_(0, at, own_slopes.to(row_grad.dtype))
            if group is not None:  # as DDP: the gradient of the mean of the losses of all processes
                row_grad /= dist.get_world_size(group)
        if e_grad is not None and group is not None:
            dist.all_reduce(e_grad, group=group)
        return None, None if e_grad is None else e_grad[ctx.mine], row_grad, None, None


def _columns(negatives: Tensor | None, chunk: slice, device: torch.device) -> Tensor:
    return torch.arange(chunk.start, chunk.stop, device=device) if negatives is None else negatives[chunk]
