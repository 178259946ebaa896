"""Correlation of probabilities over the classes of a row and over the rows of a class, also a few rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._checks import readable
from kdlib._maths import promote, promoted_dtype, safe_divisor
from kdlib.losses.logits import _chunked
from kdlib.losses.logits._divergence import centered

__all__ = ["Options", "correlation_distances"]

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
    """Compute the weighted sum of one minus the correlation of both kinds.

    Args:
        student: logits `(n, c)`, or `(b, c, p)` with p positions, each of which is a row.
        teacher: of the same shape; receives no gradient.
        share: weight of each row, `(n,)` or `(b, p)`, with sum 1 or 0.
        options: see there.
    """
    share = share.unsqueeze(1)
    if torch.compiler.is_compiling() or student.numel() <= _chunked.CHUNK:
        return _whole(*promote(student, teacher), share, options)
    value: Tensor = _InChunks.apply(student, teacher.detach(), share, options)[0]  # type: ignore[no-untyped-call]  # torch has no types here
    return value


def _whole(student: Tensor, teacher: Tensor, share: Tensor, options: Options) -> Tensor:
    """Compute the formula on all rows, with autograd."""
    kept, rows = _kept(share), _rows_of(student)
    sides = [_Side(x, kept, options.temperature) for x in (student, teacher)]
    columns = [_standardize(x.log_p, x.error, x.size.amax(), share, kept, rows, options.min_spread) for x in sides]
    between_classes = (share * _distance([_over_classes(x, options) for x in sides], 1)).sum()
    return options.beta * between_classes + options.gamma * _distance(columns, rows, share).mean()


def _rows_of(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of `(n, c)` or `(b, c, p)` except that of the classes."""
    return (0,) if x.dim() == 2 else (0, 2)


def _kept(share: Tensor) -> Tensor | None:
    """Return which rows have a weight, `None` if all have one, as far as that can be read without a wait."""
    kept = share > 0
    return None if readable(share) and bool(kept.all()) else kept


def _hide(x: Tensor, kept: Tensor | None, fill: Tensor | float) -> Tensor:
    """Replace the values of the rows that are not kept."""
    return x if kept is None else torch.where(kept, x, fill)


class _Side:
    """Log-probabilities of one side `(n, c, ...)`, up to a constant, without the rounding error of their size."""

    def __init__(self, logits: Tensor, kept: Tensor | None, temperature: float) -> None:
        logits = _hide(logits, kept, 0.0)  # an overflow in a masked row must not reach the others
        self.softened = centered(logits, temperature)
        self.log_sum = self.softened.expm1().mean(1, keepdim=True).log1p()
        self.log_p = self.softened - self.log_sum
        self._logits, self._temperature = logits.detach(), temperature

    @property
    def size(self) -> Tensor:
        """The largest magnitude of each row."""
        largest = torch.maximum(self._logits.amax(1, keepdim=True), -self._logits.amin(1, keepdim=True))
        return largest / self._temperature

    @property
    def error(self) -> Tensor:
        """Bound of the rounding error of `log_p` in units of the precision; both summands are at most 0."""
        return -(self.softened.detach() + self.log_sum.detach())


class _Standard(NamedTuple):
    """Standardized values, where they have no spread, and 1 / spread, which is 0 where there is no gradient."""

    values: Tensor
    flat: Tensor
    inverse: Tensor


def _over_classes(side: _Side, options: Options) -> _Standard:
    """Standardize the probabilities of each row over its classes."""
    return _standardize(side.softened, -side.softened.detach(), side.size, None, None, (1,), options.min_spread)


def _standardize(
    logs: Tensor,
    error: Tensor,
    size: Tensor,
    share: Tensor | None,
    kept: Tensor | None,
    dims: tuple[int, ...],
    min_spread: float,
) -> _Standard:
    """Scale exp(logs), relative to its largest value, to mean 0 and variance 1 over `dims`, weighted by `share`.

    Values without spread become zero; rounding differences, of `error` times the precision, do not count as spread.
    Those with a relative spread below `min_spread`, or within the precision of logits of `size`, get no gradient,
    because it grows as 1 / spread.
    """
    eps = PRECISION * torch.finfo(logs.dtype).eps
    top = _hide(logs.detach(), kept, torch.finfo(logs.dtype).min).amax(dims, keepdim=True)
    below = _hide(logs, kept, top) - top
    depth = -below.detach().amin(dims, keepdim=True)
    flat = depth <= eps * _hide(error, kept, 0.0).amax(dims, keepdim=True)
    x = below.expm1()
    mean = _mean(x, share, dims)
    largest = torch.maximum(-mean.detach(), mean.detach() - (-depth).expm1())
    steep = largest < torch.clamp(eps * size.clamp(max=100), min=min_spread)
    largest = torch.where(flat, 1.0, largest)
    scaled = _hide(x - mean, kept, 0.0) / largest
    spread = torch.where(flat, 1.0, _mean(scaled.square(), share, dims)).sqrt()
    spread = safe_divisor(spread)
    values = scaled * torch.where(flat, 0.0, 1 / spread)
    inverse = torch.where(flat | steep, 0.0, 1 / torch.where(steep, 1.0, largest) / spread.detach())
    if logs.requires_grad and torch.is_grad_enabled():
        values = torch.where(steep, values.detach(), values)
    return _Standard(values, flat, inverse)


def _mean(x: Tensor, share: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    return x.mean(dims, keepdim=True) if share is None else (share * x).sum(dims, keepdim=True)


def _distance(sides: list[_Standard], dims: int | tuple[int, ...], share: Tensor | None = None) -> Tensor:
    """Return one minus the weighted correlation over `dims`, as half the squared distance: it cannot cancel."""
    (x, x_flat, _), (y, y_flat, _) = sides
    square = (x - y).square()
    apart = (square.mean(dims, keepdim=True) if share is None else (share * square).sum(dims, keepdim=True)) / 2
    return torch.where(x_flat | y_flat, (x_flat != y_flat).to(apart.dtype), apart)


class _InChunks(Function):
    """The formula in passes over chunks of the rows: nothing of the size of the logits is held but the gradient."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, share: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        def passes() -> Iterator[tuple[list[_Side], Tensor, Tensor | None]]:
            for s, t, w in _chunked.chunks(student, STEPS, student, teacher, share):
                yield _both(s, t, w, options)

        dtype = promoted_dtype(student, teacher)
        between_classes = torch.zeros((), dtype=dtype, device=student.device)
        columns = [_Columns(student, between_classes) for _ in range(2)]
        for sides, w, kept in passes():
            between_classes += (w * _distance([_over_classes(side, options) for side in sides], 1)).sum()
            for column, side in zip(columns, sides, strict=True):
                column.add_range(side, w, kept)
        for column in columns:
            column.set_largest(options.min_spread)
        square = torch.zeros_like(columns[0].mean)
        for sides, w, kept in passes():
            x, y = (column.scaled(side, kept) for column, side in zip(columns, sides, strict=True))
            square += _mean((x - y).square_(), w, columns[0].rows)
            for column, scaled in zip(columns, (x, y), strict=True):
                column.square += _mean(scaled.square_(), w, column.rows)
        # As half the squared distance of x / spread and y / spread, which cannot cancel where x is near y.
        x_spread, y_spread = (column.spread for column in columns)
        apart = (square - (x_spread - y_spread).square()).clamp(min=0) / (2 * x_spread * y_spread)
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
        columns = [_Columns(student, apart).load(state) for state in (states[:half], states[half:])]
        result = torch.empty_like(student)
        for out, s, t, w in _chunked.chunks(student, STEPS, result, student, teacher, share):
            slope = _slope(*_both(s, t, w, ctx.options), columns, apart, ctx.options)
            torch.mul(slope, gradient, out=out)
        return result, None, None, None


def _both(s: Tensor, t: Tensor, share: Tensor, options: Options) -> tuple[list[_Side], Tensor, Tensor | None]:
    """Return both sides of a chunk in full precision, its weights, and which rows are kept."""
    kept = _kept(share)
    return [_Side(x, kept, options.temperature) for x in promote(s, t)], share, kept


class _Columns:
    """Statistics over all rows of exp(log_p), relative to its largest value as in `_standardize`, for each class."""

    def __init__(self, logits: Tensor, like: Tensor) -> None:
        limit = torch.finfo(like.dtype)
        self.rows = _rows_of(logits)
        shape = (1, logits.shape[1], *[1] * (logits.dim() - 2))
        self.top, self.bottom = like.new_full(shape, limit.min), like.new_full(shape, limit.max)
        self.error, self.mean, self.square = (like.new_zeros(shape) for _ in range(3))
        self.largest, self.size, self.share = torch.ones_like(self.top), like.new_zeros(()), like.new_zeros(())
        self.flat, self.steep = (torch.zeros_like(self.top, dtype=torch.bool) for _ in range(2))

    def add_range(self, side: _Side, w: Tensor, kept: Tensor | None) -> None:
        """Add the rows of a chunk to the range, and to the mean relative to the largest value up to now."""
        limit = torch.finfo(self.top.dtype)
        before = self.top
        self.top = torch.maximum(self.top, _hide(side.log_p, kept, limit.min).amax(self.rows, keepdim=True))
        self.bottom = torch.minimum(self.bottom, _hide(side.log_p, kept, limit.max).amin(self.rows, keepdim=True))
        self.error = torch.maximum(self.error, _hide(side.error, kept, 0.0).amax(self.rows, keepdim=True))
        self.size = torch.maximum(self.size, side.size.amax())
        step = before - self.top
        moved = self.mean * step.exp() + self.share * step.expm1()
        self.mean = moved + _mean(self.relative(side, kept), w, self.rows)
        self.share = self.share + w.sum()

    def set_largest(self, min_spread: float) -> None:
        """Set the largest magnitude of a value minus the mean, and which classes have no spread or no gradient."""
        eps = PRECISION * torch.finfo(self.top.dtype).eps
        depth = (self.top - self.bottom).clamp(min=0)
        self.flat = depth <= eps * self.error
        largest = torch.maximum(-self.mean, self.mean - (-depth).expm1())
        self.steep = largest < torch.clamp(eps * self.size.clamp(max=100), min=min_spread)
        self.largest = torch.where(self.flat, 1.0, largest)

    def state(self) -> tuple[Tensor, ...]:
        """Return what `load` needs."""
        return self.top, self.mean, self.largest, self.square, self.flat.to(self.top), self.steep.to(self.top)

    def load(self, state: list[Tensor]) -> "_Columns":
        self.top, self.mean, self.largest, self.square = state[:4]
        self.flat, self.steep = (x > 0 for x in state[4:])
        return self

    @property
    def spread(self) -> Tensor:
        return torch.where(self.flat | (self.square == 0), 1.0, self.square).sqrt()

    def relative(self, side: _Side, kept: Tensor | None) -> Tensor:
        return _hide(side.log_p - self.top, kept, 0.0).expm1()

    def scaled(self, side: _Side, kept: Tensor | None) -> Tensor:
        return _hide(self.relative(side, kept) - self.mean, kept, 0.0) / self.largest

    def standard(self, side: _Side, kept: Tensor | None) -> Tensor:
        return self.scaled(side, kept) * torch.where(self.flat, 0.0, 1 / self.spread)


def _slope(
    sides: list[_Side], w: Tensor, kept: Tensor | None, columns: list[_Columns], apart: Tensor, options: Options
) -> Tensor:
    r"""Return the derivative by the student's logits `(n, c, ...)`.

    For values x of mean 0 and variance 1 under the weights w, those of the other side y, and D one minus their
    correlation, the derivative of D by the k-th value before its division by the spread is
    :math:`w_k (x_k - y_k - D x_k)` / spread.
    """
    student, classes = sides[0], apart.shape[1]
    x, y = (_over_classes(side, options) for side in sides)
    distance = (x.values - y.values).square().mean(1, keepdim=True) / 2
    factor = w * (options.beta / classes) * torch.where(y.flat, 0.0, x.inverse)
    slope = ((1 - distance) * x.values - y.values) * student.softened.exp() * factor
    ours, theirs = columns
    u, v = (column.standard(side, kept) for column, side in zip(columns, sides, strict=True))
    held = ours.flat | ours.steep | theirs.flat
    factor = torch.where(held, 0.0, options.gamma / classes / torch.where(held, 1.0, ours.largest) / ours.spread)
    by_log = w * ((1 - apart) * u - v) * _hide(student.log_p - ours.top, kept, 0.0).exp() * factor
    # The logarithm of the sum of powers, which log_p contains, has the probabilities as its derivative.
    slope = slope + by_log - student.log_p.exp() * (by_log.sum(1, keepdim=True) / classes)
    return slope / options.temperature
