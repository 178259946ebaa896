"""Correlation of probabilities over the classes of a row and over the rows of a class, also a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._maths import promote, promoted_dtype
from kdlib.losses.logits import _chunked
from kdlib.losses.logits._divergence import centered

__all__ = ["Options", "as_rows", "correlation_distances"]

PRECISION = 8
"""Differences below this many units in the last place do not count as spread."""

STEPS = 4
"""Size of the chunks, as `by_rows` takes it."""


@dataclass(frozen=True)
class Options:
    """Weights of both parts, temperature, and the smallest relative spread that gets a gradient."""

    beta: float
    gamma: float
    temperature: float
    min_spread: float


def correlation_distances(student: Tensor, teacher: Tensor, share: Tensor, options: Options) -> Tensor:
    """Compute the weighted sum of one minus the correlation of both kinds, for logits and `share` with sum 1 or 0.

    Args:
        student: `(n, c)`, or `(b, c, p)` with p positions.
        teacher: of the same shape; receives no gradient.
        share: weight of each row, `(n,)` or `(b, p)`.
        options: see there.
    """
    if torch.compiler.is_compiling() or student.numel() <= _chunked.CHUNK:
        return _whole(*promote(student, teacher), share, options)
    value: Tensor = _InChunks.apply(student, teacher.detach(), share, options)[0]  # type: ignore[no-untyped-call]  # torch has no types here
    return value


def _whole(student: Tensor, teacher: Tensor, share: Tensor, options: Options) -> Tensor:
    """Compute the formula on all rows, with autograd."""
    student, teacher = as_rows(student), as_rows(teacher)
    share = share.flatten()
    # An overflow in the softmax of a masked sample must not reach the others.
    masked = (share == 0).unsqueeze(1)
    sides = [_Side(x.masked_fill(masked, 0.0), options.temperature) for x in (student, teacher)]
    size = [torch.where(masked, 0.0, x.size).amax() for x in sides]
    columns = [
        _standardize(x.log_p.T, x.error.T, most, share.unsqueeze(0), options.min_spread)
        for x, most in zip(sides, size, strict=True)
    ]
    between_classes = share @ _between_classes(sides, options)
    between_rows = _one_minus_correlation(columns, share.unsqueeze(0)).mean()
    return options.beta * between_classes + options.gamma * between_rows


def as_rows(x: Tensor) -> Tensor:
    """Arrange logits `(n, c)` or `(b, c, p)` as `(n, c)`."""
    return x if x.dim() == 2 else x.movedim(1, 2).flatten(0, 1)


class _Side:
    """Log-probabilities of one side `(n, c)`, up to a constant, without the rounding error of their size."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.softened = centered(logits, temperature)
        self.log_sum = self.softened.expm1().mean(1, keepdim=True).log1p()
        self.log_p = self.softened - self.log_sum
        self.size = logits.detach().abs().amax(1, keepdim=True) / temperature

    @property
    def error(self) -> Tensor:
        """Bound of the rounding error of `log_p`, in units of the precision."""
        return self.softened.detach().abs() + self.log_sum.detach().abs()


def _over_classes(side: _Side, options: Options) -> "_Standard":
    """Standardize the probabilities of each row over its classes."""
    even = torch.full_like(side.softened[:1], 1 / side.softened.shape[1])
    return _standardize(side.softened, side.softened, side.size, even, options.min_spread)


def _between_classes(sides: list[_Side], options: Options) -> Tensor:
    """Return one minus the correlation over the classes of each row `(n,)`."""
    even = torch.full_like(sides[0].softened[:1], 1 / sides[0].softened.shape[1])
    return _one_minus_correlation([_over_classes(side, options) for side in sides], even)


class _Standard(NamedTuple):
    """Standardized rows `(n, d)`, which have no spread `(n,)`, and 1 / spread `(n, 1)`, 0 for rows without gradient."""

    values: Tensor
    flat: Tensor
    inverse: Tensor


def _standardize(logs: Tensor, error: Tensor, size: Tensor, share: Tensor, min_spread: float) -> _Standard:
    """Scale rows of exp(logs) `(n, d)`, relative to their largest value, to weighted mean 0 and variance 1.

    Rows without spread become zero; rounding differences, of `error` times the precision, do not count as spread. Rows with a
    relative spread below `min_spread`, or within the precision of logits of `size`, get no gradient, because it grows
    as 1 / spread.
    """
    eps = PRECISION * torch.finfo(logs.dtype).eps
    top = torch.where(share > 0, logs.detach(), torch.finfo(logs.dtype).min).amax(1, keepdim=True)
    below = torch.where(share > 0, logs, top) - top
    x = below.expm1()
    centered = torch.where(share > 0, x - (share * x).sum(1, keepdim=True), 0.0)
    largest = centered.detach().abs().amax(1, keepdim=True)
    size_of_error = torch.where(share > 0, error, 0.0).detach().abs().amax(1, keepdim=True)
    flat = -below.detach().amin(1, keepdim=True) <= eps * size_of_error
    scaled = centered / torch.where(flat, 1.0, largest)
    spread = (share * torch.where(flat, 1.0, scaled).square()).sum(1, keepdim=True).sqrt()
    standard = torch.where(flat, 0.0, scaled / torch.where(spread == 0, 1.0, spread))
    steep = largest < torch.clamp(eps * size.clamp(max=100), min=min_spread)
    inverse = torch.where(flat | steep, 0.0, 1 / torch.where(flat | steep, 1.0, largest)) / spread.detach()
    return _Standard(torch.where(steep, standard.detach(), standard), flat.squeeze(1), inverse)


def _one_minus_correlation(sides: list[_Standard], share: Tensor) -> Tensor:
    """Return one minus the weighted correlation of the rows `(n,)`, as half the squared distance: it cannot cancel."""
    (x, x_flat, _), (y, y_flat, _) = sides
    apart = (share * (x - y).square()).sum(1) / 2
    return torch.where(x_flat | y_flat, (x_flat != y_flat).to(apart.dtype), apart)


class _InChunks(Function):
    """The formula in passes over chunks of the rows: nothing of the size of the logits is held but the gradient."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, share: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        def passes() -> Iterator[tuple[list[_Side], Tensor]]:
            for s, t, w in _chunked.chunks(student, STEPS, student, teacher, share):
                yield _sides(s, t, w, options), as_rows(w.unsqueeze(1))

        dtype = promoted_dtype(student, teacher)
        between_classes = torch.zeros((), dtype=dtype, device=student.device)
        columns = [_Columns(student.shape[1], between_classes) for _ in range(2)]
        for sides, w in passes():
            between_classes += w.squeeze(1) @ _between_classes(sides, options)
            for column, side in zip(columns, sides, strict=True):
                column.add_range(side, w)
        for sides, w in passes():
            for column, side in zip(columns, sides, strict=True):
                column.mean += (w * column.relative(side, w)).sum(0)
        for column in columns:
            column.set_largest(options.min_spread)
        for sides, w in passes():
            for column, side in zip(columns, sides, strict=True):
                column.square += (w * column.scaled(side, w).square()).sum(0)
        apart = torch.zeros_like(columns[0].mean)
        for sides, w in passes():
            x, y = (column.standard(side, w) for column, side in zip(columns, sides, strict=True))
            apart += (w * (x - y).square()).sum(0) / 2
        x_flat, y_flat = (column.flat for column in columns)
        between_rows = torch.where(x_flat | y_flat, (x_flat != y_flat).to(dtype), apart).mean()
        value = options.beta * between_classes + options.gamma * between_rows
        return value, torch.stack([apart, *(x for column in columns for x in column.state())])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        student, teacher, share, statistics = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # with create_graph=True
            value = _whole(*promote(student, teacher), share, ctx.options)
            return *torch.autograd.grad(value, student, gradient, create_graph=True), None, None, None
        apart, *states = statistics
        half = len(states) // 2
        columns = [_Columns.of(states[:half]), _Columns.of(states[half:])]
        result = torch.empty_like(student)
        for out, s, t, w in _chunked.chunks(student, STEPS, result, student, teacher, share):
            slope = _slope(_sides(s, t, w, ctx.options), as_rows(w.unsqueeze(1)), columns, apart, ctx.options) * gradient
            out.copy_(slope if s.dim() == 2 else slope.unflatten(0, (s.shape[0], s.shape[2])).movedim(2, 1))
        return result, None, None, None


def _sides(student: Tensor, teacher: Tensor, share: Tensor, options: Options) -> list["_Side"]:
    """Return both sides of a chunk, in full precision; masked rows count as 0."""
    masked = (share == 0).unsqueeze(1)
    both = promote(student, teacher)
    return [_Side(as_rows(x.masked_fill(masked, 0.0)), options.temperature) for x in both]


class _Columns:
    """Statistics of exp(log_p) over the rows of each class `(c,)`, relative to its largest value as in `_standardize`."""

    def __init__(self, classes: int, like: Tensor) -> None:
        limit = torch.finfo(like.dtype)
        self.top, self.bottom = like.new_full((classes,), limit.min), like.new_full((classes,), limit.max)
        self.error, self.mean, self.square = (like.new_zeros(classes) for _ in range(3))
        self.largest, self.size = torch.ones_like(self.top), like.new_zeros(())
        self.flat, self.steep = (torch.zeros_like(self.top, dtype=torch.bool) for _ in range(2))

    def add_range(self, side: _Side, w: Tensor) -> None:
        self.top = torch.maximum(self.top, torch.where(w > 0, side.log_p, self.top).amax(0))
        self.bottom = torch.minimum(self.bottom, torch.where(w > 0, side.log_p, self.bottom).amin(0))
        self.error = torch.maximum(self.error, torch.where(w > 0, side.error, 0.0).amax(0))
        self.size = torch.maximum(self.size, torch.where(w > 0, side.size, 0.0).amax())

    def set_largest(self, min_spread: float) -> None:
        """Set the largest magnitude of a value minus the mean, and which classes have no spread or no gradient."""
        eps = PRECISION * torch.finfo(self.top.dtype).eps
        depth = (self.top - self.bottom).clamp(min=0)
        self.flat = depth <= eps * self.error
        largest = torch.maximum(-self.mean, self.mean - (-depth).expm1())
        self.steep = largest < torch.clamp(eps * self.size.clamp(max=100), min=min_spread)
        self.largest = torch.where(self.flat, 1.0, largest)

    def state(self) -> tuple[Tensor, ...]:
        """Return what `of` needs."""
        return self.top, self.mean, self.largest, self.square, self.flat.to(self.top), self.steep.to(self.top)

    @classmethod
    def of(cls, state: list[Tensor]) -> "_Columns":
        columns = cls(len(state[0]), state[0])
        columns.top, columns.mean, columns.largest, columns.square = state[:4]
        columns.flat, columns.steep = (x > 0 for x in state[4:])
        return columns

    @property
    def spread(self) -> Tensor:
        return torch.where(self.flat | (self.square == 0), 1.0, self.square).sqrt()

    def relative(self, side: _Side, w: Tensor) -> Tensor:
        return torch.where(w > 0, side.log_p - self.top, 0.0).expm1()

    def scaled(self, side: _Side, w: Tensor) -> Tensor:
        return torch.where((w > 0) & ~self.flat, self.relative(side, w) - self.mean, 0.0) / self.largest

    def standard(self, side: _Side, w: Tensor) -> Tensor:
        return self.scaled(side, w) / self.spread


def _slope(sides: list[_Side], w: Tensor, columns: list[_Columns], apart: Tensor, options: Options) -> Tensor:
    r"""Return the derivative by the student's logits `(n, c)`.

    For values x of mean 0 and variance 1 under the weights w, those of the other side y, and D one minus their
    correlation, the derivative of D by the k-th value before its division by the spread is
    :math:`w_k (x_k - y_k - D x_k)` / spread.
    """
    student, classes = sides[0], apart.shape[0]
    x, y = (_over_classes(side, options) for side in sides)
    distance = (x.values - y.values).square().mean(1, keepdim=True) / 2
    inverse = torch.where(y.flat.unsqueeze(1), 0.0, x.inverse)
    slope = w * (options.beta / classes) * inverse * (x.values - y.values - distance * x.values) * student.softened.exp()
    ours, theirs = columns
    u, v = (column.standard(side, w) for column, side in zip(columns, sides, strict=True))
    held = ours.flat | ours.steep | theirs.flat
    factor = torch.where(held, 0.0, options.gamma / classes / ours.largest / ours.spread)
    by_log = w * factor * (u - v - apart * u) * (ours.relative(student, w) + 1)
    # The logarithm of the sum of powers, which log_p contains, has the probabilities as its derivative.
    p = student.log_p.exp() / classes
    return (slope + by_log - p * by_log.sum(1, keepdim=True)) / options.temperature
