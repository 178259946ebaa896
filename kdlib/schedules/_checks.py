"""Checks of the arguments of schedules."""

from collections.abc import Mapping, Sequence

from kdlib._checks import check_callable, check_number
from kdlib.types import Schedule

__all__ = ["check_pieces", "check_stages"]


def check_pieces(values: object) -> tuple[tuple[int, float], ...]:
    """Return the pieces in the order of their steps: a mapping of whole numbers, 0 among them, to finite numbers."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"piecewise: values must be a mapping of steps to values, as {{0: 1.0, 1000: 0.1}}, got {type(values).__name__}"
        )
    pieces = [
        (
            check_number("piecewise", "a step in values", step, min=0, integer=True),
            check_number("piecewise", f"values[{step!r}]", value),
        )
        for step, value in values.items()
    ]
    if not any(step == 0 for step, _ in pieces):
        raise ValueError(f"piecewise: values must hold the value from step 0 on, got {dict(values)!r}; add 0: value")
    return tuple(sorted(pieces))


def check_stages(stages: Sequence[object]) -> tuple[tuple[Schedule, int | None], ...]:
    """Return the stages: pairs of a schedule and its number of steps, which may be `None` for the last."""
    if not stages:
        raise ValueError("chain: at least one pair (schedule, steps) must be given, got none")
    checked: list[tuple[Schedule, int | None]] = []
    for index, stage in enumerate(stages):
        if not isinstance(stage, Sequence) or len(stage) != 2:
            raise TypeError(f"chain: stages[{index}] must be a pair (schedule, steps), got {stage!r}")
        schedule, steps = stage
        check_callable("chain", f"the schedule of stages[{index}]", schedule)
        if steps is not None or index < len(stages) - 1:
            steps = check_number("chain", f"the steps of stages[{index}]", steps, min=1, integer=True)
        checked.append((schedule, steps))
    return tuple(checked)
