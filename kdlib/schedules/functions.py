"""Schedules: functions of the step for weights of terms, temperatures and the learning rate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdlib._checks import check_number, check_step
from kdlib.schedules._checks import check_pieces, check_stages
from kdlib.types import Schedule

__all__ = ["chain", "constant", "cosine", "linear", "linear_warmup", "piecewise"]


@dataclass(frozen=True, repr=False)
class _Schedule:
    """A formula of the step with its arguments; `repr` is the call that rebuilds it."""

    name: str
    formula: Callable[..., float]
    arguments: tuple[Any, ...]

    def __call__(self, step: int) -> float:
        return self.formula(check_step(self.name, step), *self.arguments)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"


@dataclass(frozen=True, repr=False)
class _Piecewise(_Schedule):
    def __repr__(self) -> str:
        return f"{self.name}({dict(self.arguments)!r})"


def constant(value: float) -> Schedule:
    r"""Return the schedule of one value.

    .. math:: f(n) = v

    Args:
        value: v, finite.

    Returns:
        A function of the step n, a whole number from 0. Like all schedules of this module it can be compared, copied
        and pickled, its `repr` is the call that rebuilds it, and `torch.compile` traces it: code that is compiled with
        the step as an argument is not compiled again for each step.

    Raises:
        TypeError, ValueError: `value` is not a finite number.

    Examples:
        >>> constant(0.5)(1000)
        0.5
    """
    return _Schedule("constant", _constant, (check_number("constant", "value", value),))


def linear(start: float, end: float, steps: int) -> Schedule:
    r"""Return the schedule that changes from one value to another in a straight line, and then stays.

    .. math:: f(n) = (1 - p) \, a + p \, e, \qquad p = \min(1, n / N)

    Args:
        start: a, the value at step 0.
        end: e, the value from step N on; exact.
        steps: N, at least 1.

    Returns:
        A function of the step n.

    Raises:
        TypeError, ValueError: An argument is not a finite number, or `steps` is below 1.

    Examples:
        >>> schedule = linear(4.0, 1.0, 100)
        >>> [schedule(step) for step in (0, 50, 100, 200)]
        [4.0, 2.5, 1.0, 1.0]
    """
    return _Schedule("linear", _linear, _span("linear", start, end, steps))


def linear_warmup(value: float, steps: int) -> Schedule:
    r"""Return the schedule that rises from 0 to a value in a straight line, and then stays: `linear(0, value, steps)`.

    .. math:: f(n) = v \min(1, n / N)

    Args:
        value: v, the value from step N on.
        steps: N, at least 1.

    Returns:
        A function of the step n.

    Raises:
        TypeError, ValueError: `value` is not a finite number, or `steps` is not a whole number of at least 1.

    Examples:
        >>> schedule = linear_warmup(2.0, 4)
        >>> [schedule(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """
    value = check_number("linear_warmup", "value", value)
    return _Schedule("linear_warmup", _linear_warmup, (value, _count("linear_warmup", steps)))


def cosine(start: float, end: float, steps: int) -> Schedule:
    r"""Return the schedule that changes from one value to another along half a cosine wave, and then stays.

    .. math:: f(n) = c \, a + (1 - c) \, e, \qquad c = \tfrac{1}{2} \bigl( 1 + \cos(\pi \min(1, n / N)) \bigr)

    Args:
        start: a, the value at step 0.
        end: e, the value from step N on; exact.
        steps: N, at least 1.

    Returns:
        A function of the step n.

    Raises:
        TypeError, ValueError: An argument is not a finite number, or `steps` is below 1.

    Examples:
        >>> schedule = cosine(8.0, 2.0, 100)
        >>> [round(schedule(step), 3) for step in (0, 25, 50, 100, 200)]
        [8.0, 7.121, 5.0, 2.0, 2.0]

    References:
        Loshchilov, Hutter, *SGDR: Stochastic Gradient Descent with Warm Restarts*, arXiv 1608.03983, without restarts.
    """
    return _Schedule("cosine", _cosine, _span("cosine", start, end, steps))


def piecewise(values: Mapping[int, float]) -> Schedule:
    r"""Return the schedule of values that each hold from a step on.

    .. math:: f(n) = v_j \quad \text{for } n_j \le n < n_{j+1}

    Args:
        values: first step :math:`n_j` to value :math:`v_j`, in any order; step 0 must be there. `torch.compile` compiles
            once more for each value.

    Returns:
        A function of the step n.

    Raises:
        TypeError, ValueError: `values` is not a mapping of whole numbers to finite numbers, or lacks step 0.

    Examples:
        >>> schedule = piecewise({0: 1.0, 100: 0.1, 200: 0.0})
        >>> [schedule(step) for step in (0, 99, 100, 200)]
        [1.0, 1.0, 0.1, 0.0]
    """
    return _Piecewise("piecewise", _piecewise, check_pieces(values))


def chain(*stages: tuple[Schedule, int | None]) -> Schedule:
    """Return the schedule that follows several schedules, one after another.

    Each schedule starts at its own step 0 where the one before ends.

    Args:
        stages: pairs of a schedule, of this module or any function of the step, and its number of steps, at least 1.
            The last schedule also holds after its steps, so its number may be `None`.

    Returns:
        A function of the step n.

    Raises:
        TypeError, ValueError: There is no stage, a stage is not a pair, its schedule is not callable, or its steps are
            not a whole number of at least 1.

    Examples:
        >>> schedule = chain((linear_warmup(1.0, 10), 10), (constant(1.0), 50), (cosine(1.0, 0.0, 40), None))
        >>> [round(schedule(step), 3) for step in (0, 5, 10, 60, 80, 100, 200)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
        >>> schedule
        chain((linear_warmup(1.0, 10), 10), (constant(1.0), 50), (cosine(1.0, 0.0, 40), None))
    """
    return _Schedule("chain", _chain, check_stages(stages))


def _count(owner: str, steps: int) -> int:
    return check_number(owner, "steps", steps, min=1, integer=True)


def _span(owner: str, start: float, end: float, steps: int) -> tuple[float, float, int]:
    return check_number(owner, "start", start), check_number(owner, "end", end), _count(owner, steps)


def _constant(step: int, value: float) -> float:
    return float(value)


def _linear(step: int, start: float, end: float, steps: int) -> float:
    progress = min(1.0, step / steps)
    return (1.0 - progress) * start + progress * end


def _linear_warmup(step: int, value: float, steps: int) -> float:
    return value * min(1.0, step / steps)


def _cosine(step: int, start: float, end: float, steps: int) -> float:
    share = (1.0 + math.cos(math.pi * min(1.0, step / steps))) / 2.0
    return share * start + (1.0 - share) * end


def _piecewise(step: int, *pieces: tuple[int, float]) -> float:
    value = pieces[0][1]
    for first, each in pieces[1:]:
        if step >= first:
            value = each
    return float(value)


def _chain(step: int, *stages: tuple[Schedule, int | None]) -> float:
    for schedule, steps in stages[:-1]:
        if steps is None or step < steps:  # only the last may be None
            return float(schedule(step))
        step = step - steps
    return float(stages[-1][0](step))
