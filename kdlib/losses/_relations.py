"""Steps shared by relation losses: one batch with weights, pairwise cosines and distances, given gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._checks import readable
from kdlib._gather import gather_rows
from kdlib._maths import finite_weight, promote, relative_weight, rescale, safe_divisor
from kdlib.losses._checks import check_relation, no_second_derivative

__all__ = [
    "add_distance_gradient", "cosine_distances", "cosine_gradient", "one_batch", "power_of_two", "squared_distances",
    "with_gradient",
]  # fmt: skip

VALUES_PER_CHUNK = 2**22
"""Size of the chunks in which differences of near pairs are computed."""


def one_batch(
    owner: str, student: Tensor, teacher: Tensor, reduction: str, weight: Tensor | None, gather: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of a relation loss and convert them.

    Returns:
        Student `(b, d)` and teacher `(b, D)`, flattened, in full precision, with the teacher detached; and the shares
        `(b,)`, which are `weight / sum(weight)`, or all zero. With `gather`, those of the rows of all processes.
    """
    check_relation(owner, student, teacher, reduction, weight)
    student, teacher = promote(student.flatten(1), teacher.flatten(1))
    weight = student.new_ones(len(student)) if weight is None else finite_weight(weight.detach())
    if gather:
        student, teacher = gather_rows(student, grad=True), gather_rows(teacher, grad=False)
        weight = gather_rows(weight.clamp(max=torch.finfo(student.dtype).max).to(student), grad=False)
    weight = relative_weight(weight, student)
    return student, teacher, weight / safe_divisor(weight.sum())


def power_of_two(x: Tensor) -> Tensor:
    """Return the power of two above the largest magnitude of `x`, or the one below it where that is infinite.

    Division by it is exact, and squares of the quotients neither overflow nor vanish.
    """
    largest = x.abs().amax()
    mantissa = safe_divisor(torch.frexp(largest)[0])
    scale = largest / mantissa
    scale = torch.where(scale.isfinite(), scale, largest / 2 / mantissa)
    return torch.where(largest < torch.finfo(x.dtype).tiny, 1.0, scale)


def cosine_distances(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute one minus the cosine of each pair of rows, without a graph and precise also for small values.

    The values are half the squared distances between the unit rows after subtraction of their mean. A component that
    all rows have in common, such as a large offset, therefore cancels before it is squared. A zero row has cosine 0 to
    all rows, including itself.

    Args:
        x: `(b, d)`.
        share: `(b,)`, with sum 1 or 0.

    Returns:
        The matrix `(b, b)`; the unit rows minus their mean; the unit rows; and the lengths `(b, 1)` of the rows of `x`,
        infinite for zero rows.
    """
    unit, largest = rescale(x.detach())
    largest = largest.unsqueeze(1)
    length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    unit.div_(safe_divisor(length))
    # A length beyond the largest number of the dtype must not look like that of a zero row.
    length = torch.where(largest == 0, torch.inf, (length * largest).clamp(max=torch.finfo(x.dtype).max))
    centered = unit - share @ unit
    half = torch.linalg.vecdot(centered, centered) / 2
    product = centered @ centered.T  # not fused with the sum: addmm takes twice as long on a CPU
    distances = (half - product).add_(half.unsqueeze(1)).clamp_(0, 2).fill_diagonal_(0)
    zero = largest == 0
    # On a CPU, reading `zero` costs less than a pass over the matrix. On an accelerator it would force a wait.
    if not readable(zero) or bool(zero.any()):
        distances.masked_fill_(zero | zero.T, 1)
    return distances, centered, unit, length


def cosine_gradient(slope: Tensor, centered: Tensor, unit: Tensor, length: Tensor, shortest: float) -> Tensor:
    r"""Convert slopes c on the cosines `(b, b)` to the gradient of the rows `(b, d)`.

    For the unit rows u it is :math:`\sum_j (c_{ij} + c_{ji}) (u_j - u_i)`. Rows shorter than `shortest` get none.
    """
    both = slope + slope.T
    gradient = (both @ centered).addcmul_(both.sum(1, keepdim=True), centered, value=-1)
    gradient.sub_(unit * torch.linalg.vecdot(gradient, unit).unsqueeze(1))
    return gradient.div_(torch.where(length < shortest, torch.inf, length))


def squared_distances(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Compute squared distances between rows, exact to about the square root of the precision of `dtype`, or better.

    On a CPU they come from dot products of the centered rows where that is safe; pairs that are too near each other use
    differences. On an accelerator, the number of near pairs would have to be read, so all pairs use differences. A
    common offset does no harm, and equal rows have distance 0.

    Args:
        x: `(b, d)`, with magnitudes up to 1.
        dtype: of the dot products and the result.

    Returns:
        The squared distances `(b, b)` and the near pairs `(2, n)`, indices i < j, or `None` for all pairs.
    """
    wide = x.to(dtype)
    if not readable(x):
        return torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").square(), None
    wide = wide - wide.mean(0)
    product = wide @ wide.T
    size = product.diagonal()
    both = size.unsqueeze(1) + size
    squares = torch.add(both, product, alpha=-2).clamp_(min=0).fill_diagonal_(0)
    near = (squares <= both.mul_(4 * torch.finfo(dtype).eps ** 0.5)).triu_(1).nonzero().T
    for i, j in _chunks(near, x.shape[1]):
        exact = (x[i].to(dtype) - x[j].to(dtype)).square_().sum(1)
        squares[i, j] = exact
        squares[j, i] = exact
    return squares, near


def add_distance_gradient(x: Tensor, slope: Tensor, near: Tensor | None) -> Tensor:
    r"""Compute the gradient :math:`\sum_j c_{ij} (x_i - x_j)` of the rows, for symmetric slopes c.

    Args:
        x: `(b, d)`.
        slope: `(b, b)`; overwritten.
        near: the near pairs of `squared_distances`, which use differences; all others use one product.
    """
    wide = x.to(slope.dtype)
    if near is None:
        rows = max(1, VALUES_PER_CHUNK // max(wide.numel(), 1))
        parts = zip(torch.split(wide, rows), torch.split(slope, rows), strict=True)
        return torch.cat([(c.unsqueeze(1) @ (part.unsqueeze(1) - wide)).squeeze(1) for part, c in parts])
    wide = wide - wide.mean(0)
    near_slope = slope[near[0], near[1]]
    slope[near[0], near[1]] = 0
    slope[near[1], near[0]] = 0
    out = (slope.sum(1, keepdim=True) - slope.diagonal().unsqueeze(1)) * wide
    out = out.sub_(slope.fill_diagonal_(0) @ wide)
    done = 0
    for i, j in _chunks(near, x.shape[1]):
        part = near_slope[done : done + len(i)].unsqueeze(1) * (x[i].to(slope.dtype) - x[j].to(slope.dtype))
        out.index_add_(0, i, part).index_add_(0, j, part, alpha=-1)
        done += len(i)
    return out


def _chunks(near: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """Split the near pairs into chunks."""
    parts = torch.split(near, max(1, VALUES_PER_CHUNK // max(width, 1)), dim=1) if near.shape[1] else ()
    return [(part[0], part[1]) for part in parts]


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Return `value` as a function of `x` that has this gradient."""
    # `torch.compile` needs an operation of the library, `torch.func.grad` an autograd Function.
    attach = _with_gradient if torch.compiler.is_compiling() else _WithGradient.apply
    result: Tensor = attach(x, value, gradient)  # type: ignore[no-untyped-call]  # torch has no types here
    return result


class _WithGradient(Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, _, gradient = inputs
        ctx.save_for_backward(x, gradient)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = ctx.saved_tensors
        product = slope * gradient
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # with create_graph=True
            product = _NoSecondDerivative.apply(product, x)  # type: ignore[no-untyped-call]  # torch has no types here
        return product, None, None


@torch.library.custom_op("kdlib::with_gradient", mutates_args=())
def _with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return value.clone()


@_with_gradient.register_fake
def _(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(value)


_with_gradient.register_autograd(_WithGradient.backward, setup_context=_WithGradient.setup_context)


class _NoSecondDerivative(Function):
    """A gradient without a graph: differentiating it again is an error, not zero."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise no_second_derivative()
