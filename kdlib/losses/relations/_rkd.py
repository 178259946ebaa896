"""The two losses of `rkd`, each computed together with its gradient.

On a CPU, the values decide which pairs need care, because care takes time. On an accelerator, where reading them would
force a wait, all pairs get it. Each loss is one operation to a compiler, which could not read values either.
"""

import torch
from torch import Tensor

from kdlib._checks import readable
from kdlib._maths import safe_divisor, unit_rows
from kdlib.losses._relations import add_distance_gradient, power_of_two, squared_distances

__all__ = ["angle_operation", "angle_with_gradient", "distance_operation", "distance_with_gradient"]


def distance_with_gradient(
    student: Tensor, teacher: Tensor, share: Tensor, chunk: int, shortest: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss and, if needed, its gradient `(b, d)`."""
    out = torch.zeros_like(student) if needs_grad else student.new_empty(0)
    kept = _present(student, share)
    student, teacher, share = _rows(kept, student, teacher, share)
    batch = share.shape[0]
    if batch < 2 or student.shape[1] * teacher.shape[1] == 0:
        return student.new_zeros(()), out
    scale = power_of_two(student)
    student, teacher = student / scale, teacher / power_of_two(teacher)
    dtype = _safe_dtype(student)
    (d_s, near), (d_t, _) = squared_distances(student, dtype), squared_distances(teacher, dtype)
    share = share.to(dtype)
    d_s, d_t = d_s.sqrt_(), d_t.sqrt_()
    pairs = safe_divisor(torch.outer(share, share).fill_diagonal_(0).sum())  # of two different samples
    mean_s, mean_t = share @ (d_s @ share) / pairs, share @ (d_t @ share) / pairs
    divide_s, divide_t = safe_divisor(mean_s), safe_divisor(mean_t)
    value, mean_slope = share.new_zeros(()), share.new_zeros(())
    for start in range(0, batch, chunk or batch):
        at = slice(start, start + (chunk or batch))
        difference = (d_s[at] / divide_s).sub_(d_t[at].div_(divide_t))
        slope = torch.clamp(difference, -1, 1, out=d_t[at])
        value += share[at] @ (difference.sub_(slope, alpha=0.5).mul_(slope) @ share)
        if needs_grad:
            mean_slope += share[at] @ (torch.mul(slope, d_s[at], out=difference) @ share)
    if not needs_grad:
        return value.to(student.dtype), out
    # The derivative by the distance, divided by the distance; both orders of a pair are the same distance.
    factor = torch.where(mean_s * scale >= shortest, 2 / divide_s, 0.0)
    slope = d_t.sub_(mean_slope / divide_s / pairs).mul_(factor)
    slope.mul_(share.unsqueeze(1)).mul_(share).div_(torch.where(d_s > 0, d_s, torch.inf))
    gradient = add_distance_gradient(student, slope, near) / scale
    return value.to(student.dtype), _placed(gradient, kept, out)


def angle_with_gradient(
    student: Tensor, teacher: Tensor, share: Tensor, chunk: int, shortest: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss and, if needed, its gradient `(b, d)`."""
    out = torch.zeros_like(student) if needs_grad else student.new_empty(0)
    known, kept = readable(student), _present(student, share)
    student, teacher, share = _rows(kept, student, teacher, share)
    if share.shape[0] < 2 or student.shape[1] * teacher.shape[1] == 0:
        return student.new_zeros(()), out
    scale = power_of_two(student)
    student, teacher = student / scale, teacher / power_of_two(teacher)
    wide = torch.float32 if student.device.type == "mps" else torch.float64  # Metal devices have no float64
    (squares, near), (squares_t, _) = squared_distances(student, wide), squared_distances(teacher, wide)
    largest = safe_divisor(squares.amax())
    squares_t /= safe_divisor(squares_t.amax())
    short = squares < (shortest / scale.to(wide)) ** 2
    squares /= largest
    # The rounding error of a cosine grows with the ratio of its two sides. Above a ratio of 1e3 float64 is used, and
    # difference vectors at vertices where it is above 1e9. Without reading values, float64 is used for all, and shorter
    # sides count as 0 where a cosine could be wrong by 0.01.
    by_vectors: Tensor | None = None
    weight: Tensor | None = share.to(wide)
    dtype = wide
    if known:
        dtype = wide if bool((_uneven(squares, 1e-6) | _uneven(squares_t, 1e-6)).any()) else student.dtype
        by_vectors = _uneven(squares, 1e-18) | _uneven(squares_t, 1e-18)
        weight = None if bool((share == share[0]).all()) else share.to(dtype)
    else:
        limit = (100 * torch.finfo(wide).eps) ** 2
        squares, squares_t = (x.masked_fill(x < limit, 0) for x in (squares, squares_t))
    sides = (_Side(squares.to(dtype), student), _Side(squares_t.to(dtype), teacher))
    value, slope = _angles(*sides, by_vectors, weight, chunk, needs_grad)
    if needs_grad:
        slope = slope.to(wide).div_(largest).masked_fill_(short, 0)
        out = _placed(add_distance_gradient(student, slope, near) / scale, kept, out)
    return value.to(student.dtype), out


def _present(student: Tensor, share: Tensor) -> Tensor | None:
    """Return the indices of the samples with a weight; `None` if reading their number would force a wait."""
    return share.nonzero().squeeze(1) if readable(student) else None


def _rows(kept: Tensor | None, student: Tensor, teacher: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples with a weight, or all samples with those set to zero that have none."""
    if kept is not None:
        return student[kept], teacher[kept], share[kept]
    absent = (share == 0).unsqueeze(1)
    return student.masked_fill(absent, 0), teacher.masked_fill(absent, 0), share


def _placed(gradient: Tensor, kept: Tensor | None, out: Tensor) -> Tensor:
    """Return the gradient of all samples, zero for those without a weight."""
    return gradient.to(out.dtype) if kept is None else out.index_copy_(0, kept, gradient.to(out.dtype))


def _uneven(squares: Tensor, limit: float) -> Tensor:
    """Return which vertices `(b,)` have a neighbor nearer than `limit` that does not coincide with them."""
    return ((squares > 0) & (squares < limit)).any(1)


def _angles(
    student: "_Side", teacher: "_Side", by_vectors: Tensor | None, share: Tensor | None, chunk: int, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the loss, and twice its symmetric slopes on the student's squared distances `(b, b)`.

    `share=None` means equal shares, `by_vectors=None` no vertex by difference vectors. The matrix of cosines at a vertex is symmetric, so only tiles on and above the
    diagonal are computed, those on it with factor 1/2.
    """
    squares_s = student.squares
    batch = squares_s.shape[0]
    # Tiles fit a processor's cache or fill an accelerator.
    side, capacity = (64, 2**18) if by_vectors is not None else (256, 2**24)
    chunk = min(batch, chunk or max(1, capacity // (side * batch)))
    if by_vectors is None:
        vertices = [(i, False) for i in torch.split(torch.arange(batch, device=squares_s.device), chunk)]
    else:
        vertices = [(i, False) for i in torch.split((~by_vectors).nonzero().squeeze(1), chunk) if len(i)]
        vertices += [(i, True) for i in torch.split(by_vectors.nonzero().squeeze(1), 1) if len(i)]
    values = []
    at_vertex, across = torch.zeros_like(squares_s), torch.zeros_like(squares_s)
    blocks = [slice(first, min(first + side, batch)) for first in range(0, batch, side)]
    tiles = [(rows, rows, 0.5) for rows in blocks]
    tiles += [(rows, slice(rows.stop, batch), 1.0) for rows in blocks if rows.stop < batch]
    for i, vectors in vertices:
        value = squares_s.new_zeros(())
        for j, k, factor in tiles:
            cosine, difference = (x.cosines(i, j, k, by_vectors=vectors) for x in (student, teacher))
            torch.sub(cosine, difference, out=difference)
            slope = difference.clamp(-1, 1)
            difference.sub_(slope, alpha=0.5)
            if share is not None:
                slope.mul_(share[i, None, None] * (share[j, None] * share[k]))
            value += 2 * factor * torch.dot(slope.view(-1), difference.view(-1))
            if not needs_grad:
                continue
            if factor != 1:
                slope.mul_(factor)
            inverse = student.inverse[i]
            cosine.mul_(slope)
            at_vertex[i, j] -= cosine.sum(2).mul_(inverse[:, j].square())
            at_vertex[i, k] -= cosine.sum(1).mul_(inverse[:, k].square())
            slope.mul_(inverse[:, j, None]).mul_(inverse[:, None, k])
            at_vertex[i, j] += slope.sum(2)
            at_vertex[i, k] += slope.sum(1)
            across[j, k] -= slope.sum(0)
        values.append(value)
    value = torch.stack(values).sum()
    if share is None:
        value, at_vertex, across = value / batch**3, at_vertex.div_(batch**3), across.div_(batch**3)
    # c = (d_ij^2 + d_ik^2 - d_jk^2) / (2 d_ij d_ik): `at_vertex` is the slope on d_ij^2, `across` half that on d_jk^2.
    slope = at_vertex.add_(across)
    return value, 2 * (slope + slope.T)


class _Side:
    """Rows and pairwise terms of one side, from which the cosines at all vertices are computed."""

    def __init__(self, squares: Tensor, rows: Tensor) -> None:
        self.squares, self.rows = squares, rows
        self.half_distance = squares.sqrt() / 2
        self.inverse = torch.where(squares > 0, 0.5 / self.half_distance, 0.0)
        self.minus_half = squares * -0.5

    def cosines(self, i: Tensor, j: slice, k: slice, *, by_vectors: bool) -> Tensor:
        """Return the cosines of the angles between j and k at the vertices i, `(i, j, k)`; 0 where j or k is at i."""
        if by_vectors:
            rows = self.rows.to(self.squares.dtype)
            first, second = (unit_rows(rows[at] - rows[i])[0] for at in (j, k))  # one vertex at a time
            return (first @ second.T).unsqueeze(0)
        inverse, half = self.inverse[i], self.half_distance[i]
        out = (self.minus_half[j, k] * inverse[:, j, None]).mul_(inverse[:, None, k])
        out.addcmul_(half[:, j, None], inverse[:, None, k])
        return out.addcmul_(inverse[:, j, None], half[:, None, k])


def _safe_dtype(x: Tensor) -> torch.dtype:
    """Return a dtype with exact products: on accelerators, float32 products may have a precision of ten bits."""
    exact = x.device.type == "mps" or (x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest")
    return x.dtype if exact else torch.float64


distance_operation = torch.library.custom_op("kdlib::rkd_distance", distance_with_gradient, mutates_args=())
angle_operation = torch.library.custom_op("kdlib::rkd_angle", angle_with_gradient, mutates_args=())


@distance_operation.register_fake
@angle_operation.register_fake
def _(
    student: Tensor, teacher: Tensor, share: Tensor, chunk: int, shortest: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    return student.new_empty(()), torch.empty_like(student) if needs_grad else student.new_empty(0)
