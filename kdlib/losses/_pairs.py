"""Losses: the steps that relation losses share: one batch, its shares, its pairwise distances. Touches tensors only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._checks import check_relation
from kdlib._gather import gather_rows
from kdlib._maths import promote
from kdlib.losses._checks import no_second_derivative

__all__ = [
    "add_distance_gradient",
    "chord_gradient",
    "gram_gradient",
    "one_batch",
    "one_minus_cosines",
    "power_of_two",
    "scaled_rows",
    "shortest_length",
    "squared_distances",
    "unit_gradient_",
    "unit_rows_",
    "with_gradient",
]

PAIRS_AT_A_TIME = 2**22
"""How many numbers the differences of near pairs take at a time."""


def one_batch(
    owner: str, student: Tensor, teacher: Tensor, reduction: str, weight: Tensor | None, gather: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of a relation loss and bring them into one form.

    Returns:
        Student `(b, d)` and teacher `(b, D)` in full precision, flattened, the teacher cut from the graph, and the
        shares `(b,)`, which are `weight / sum(weight)`, or all zero. With `gather`, of the rows of all processes.
    """
    check_relation(owner, student, teacher, reduction, weight)
    student, teacher = promote(student.flatten(1), teacher.flatten(1))
    if weight is None:
        weight = student.new_ones(student.shape[0])
    if weight.dtype == torch.float64:
        weight = weight.clamp(max=torch.finfo(student.dtype).max)
    weight = weight.detach().to(student)
    if gather:
        student, teacher = gather_rows(student, grad=True), gather_rows(teacher, grad=False)
        weight = gather_rows(weight, grad=False)
    if weight.shape[0] == 0:
        return student, teacher, weight
    # Twice, as a sum of large weights may overflow and squares of small ones vanish.
    weight = weight / torch.where(weight.amax() == 0, 1.0, weight.amax())
    return student, teacher, weight / torch.where(weight.sum() == 0, 1.0, weight.sum())


def scaled_rows(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows divided by one number, for squares that neither overflow nor vanish; those of no share set to zero.

    Without a graph.

    Returns:
        The rows `(b, d)`, the largest magnitude `(b,)` of each before, and that number, the scale.
    """
    rows = x.detach()
    largest = torch.where(share > 0, torch.maximum(rows.amax(1), -rows.amin(1)), 0.0)
    scale = power_of_two(largest)
    return rows * torch.where(share > 0, 1 / scale, 0.0).unsqueeze(1), largest, scale


def shortest_length(origin: torch.dtype) -> float:
    """Lengths below this one pass no gradient on, as in `hold_short`; `origin` is the dtype the student came in."""
    return max(1e-12, 8 * torch.finfo(origin).tiny)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two above the largest magnitude, or below it where that is infinite: dividing `x` by it is exact.

    For rows whose squares must neither overflow nor vanish, and whose small differences must stay.
    """
    largest = x.abs().amax()
    mantissa = torch.frexp(largest)[0]
    mantissa = torch.where(mantissa == 0, 1.0, mantissa)
    scale = largest / mantissa
    scale = torch.where(scale.isfinite(), scale, largest / 2 / mantissa)
    return torch.where(largest < torch.finfo(x.dtype).tiny, 1.0, scale)


def unit_rows_(x: Tensor) -> tuple[Tensor, Tensor]:
    """`unit_rows` in place of `x`, without a graph: the rows, and their lengths `(b, 1)` before, infinite for none."""
    largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))
    x.div_(torch.where(largest == 0, 1.0, largest))
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    length = torch.where(length == 0, torch.inf, length)
    x.div_(length)
    # A length beyond the end of the dtype is no row of zeros.
    whole = (length * torch.where(largest == 0, 1.0, largest)).clamp(max=torch.finfo(x.dtype).max)
    return x, torch.where(largest == 0, torch.inf, whole)


def one_minus_cosines(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One minus the cosine of each two rows, to the precision of the smallest ones.

    As half the squared distances between the unit rows, these taken from their mean: what rows share that all point
    nearly one way, as a common offset makes them, cancels before it is squared. A row of zeros has cosine 0 to all,
    itself too.

    Args:
        x: `(b, d)`.
        share: `(b,)`, of sum 1 or 0.

    Returns:
        The matrix `(b, b)`; the unit rows less their mean; the unit rows; their lengths before, as of `unit_rows_`.
    """
    unit, length = unit_rows_(x.detach().clone())
    centerd = unit - share @ unit
    half = torch.linalg.vecdot(centerd, centerd) / 2
    product = centerd @ centerd.T  # apart from the sum: addmm takes twice as long on a CPU
    gap = (half - product).add_(half.unsqueeze(1)).clamp_(0, 2).fill_diagonal_(0)
    zero = length.isinf()
    # On a CPU a pass over the matrix costs more than a look at the rows; elsewhere the look does.
    if gap.device.type != "cpu" or torch.compiler.is_compiling() or bool(zero.any()):
        gap.masked_fill_(zero | zero.T, 1)
    return gap, centerd, unit, length


def unit_gradient_(slope: Tensor, unit: Tensor, length: Tensor, shortest: float = 0.0) -> Tensor:
    """The gradient of rows from that of their unit rows, in place of it; rows below the shortest length get none."""
    slope.sub_(unit * torch.linalg.vecdot(slope, unit).unsqueeze(1))
    return slope.div_(torch.where(length < shortest, torch.inf, length))


def gram_gradient(slope: Tensor, x: Tensor) -> Tensor:
    """The gradient of the rows `x` from that of their dot products."""
    return (slope + slope.T) @ x


def chord_gradient(slope: Tensor, centerd: Tensor) -> Tensor:
    r"""The gradient :math:`\sum_j (c_{ij} + c_{ji}) (u_j - u_i)` of unit rows from the slopes c on their cosines.

    That of `gram_gradient` but for a part along each row, which a unit row does not feel; of rows less their mean.
    """
    both = slope + slope.T
    return (both @ centerd).addcmul_(both.sum(1, keepdim=True), centerd, value=-1)


def squared_distances(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Squared distances between the rows, each exact to about the square root of `dtype`'s precision, or better.

    By dot products of the centerd rows, where that is safe, and by differences, where two rows are too near each
    other for it; so a common offset does no harm, and equal rows are at distance 0.

    Args:
        x: `(b, d)` of magnitudes up to 1.
        dtype: of the dot products and the result.

    Returns:
        The squared distances `(b, b)` and the near pairs `(2, n)`, places i < j.
    """
    wide = x.to(dtype)
    wide = wide - wide.mean(0)
    product = wide @ wide.T
    size = product.diagonal()
    both = size.unsqueeze(1) + size
    squares = torch.add(both, product, alpha=-2).clamp_(min=0).fill_diagonal_(0)
    near = (squares <= both.mul_(4 * torch.finfo(dtype).eps ** 0.5)).triu_(1).nonzero().T
    for i, j in _parts(near, x.shape[1]):
        exact = (x[i].to(dtype) - x[j].to(dtype)).square_().sum(1)
        squares[i, j] = exact
        squares[j, i] = exact
    return squares, near


def add_distance_gradient(x: Tensor, slope: Tensor, near: Tensor) -> Tensor:
    r"""The gradient :math:`\sum_j c_{ij} (x_i - x_j)` of the rows, for slopes c that are symmetric.

    Args:
        x: `(b, d)`.
        slope: `(b, b)`; overwritten.
        near: the near pairs of `squared_distances`: these by differences, the others by one product.
    """
    wide = x.to(slope.dtype)
    wide = wide - wide.mean(0)
    near_slope = slope[near[0], near[1]]
    slope[near[0], near[1]] = 0
    slope[near[1], near[0]] = 0
    out = (slope.sum(1, keepdim=True) - slope.diagonal().unsqueeze(1)) * wide
    out = out.sub_(slope.fill_diagonal_(0) @ wide)
    done = 0
    for i, j in _parts(near, x.shape[1]):
        part = near_slope[done : done + len(i)].unsqueeze(1) * (x[i].to(slope.dtype) - x[j].to(slope.dtype))
        out.index_add_(0, i, part).index_add_(0, j, part, alpha=-1)
        done += len(i)
    return out


def _parts(near: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """The near pairs, a few at a time."""
    parts = torch.split(near, max(1, PAIRS_AT_A_TIME // max(width, 1)), dim=1) if near.shape[1] else ()
    return [(part[0], part[1]) for part in parts]


def with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value`, as a function of `x` that has this gradient."""
    # An operation of the library is what a compiler takes as it is, a Function what `torch.func.grad` takes.
    given = _with_gradient if torch.compiler.is_compiling() else _WithGradient.apply
    result: Tensor = given(x, value, gradient)  # type: ignore[no-untyped-call]  # torch has no types here
    return result


class _WithGradient(Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return _give(ctx, slope)


@torch.library.custom_op("kdlib::with_gradient", mutates_args=())
def _with_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`_WithGradient` as one operation."""
    return value.clone()


@_with_gradient.register_fake
def _(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, _, gradient = inputs
    ctx.save_for_backward(x, gradient)


def _give(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
    x, gradient = ctx.saved_tensors
    product = slope * gradient
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the graph of the gradient is asked for
        product = _NoSecondDerivative.apply(product, x)  # type: ignore[no-untyped-call]  # torch has no types here
    return product, None, None


_with_gradient.register_autograd(_give, setup_context=_keep)


class _NoSecondDerivative(Function):
    """A gradient without a graph: to differentiate it again is an error, not a zero."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise no_second_derivative()
