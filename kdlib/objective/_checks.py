"""Checks of terms and objectives."""

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType

from torch import Tensor, nn

from kdlib._checks import check_choice, check_key, check_type, show_shape

__all__ = [
    "check_step_given", "check_term", "check_term_loss", "check_term_names", "check_weights_of", "late_projections",
]  # fmt: skip


def check_term(
    student: object, teacher: object, teachers: Sequence[str] | None, target: object, project: object, sample: object
) -> None:
    """A term needs a teacher feature, a target or both; `teachers` and `project` need a teacher feature."""
    check_type("Term", "student", student, str, "a str")
    for name, value in (("teacher", teacher), ("target", target), ("sample_weight", sample)):
        check_type("Term", name, value, (str, NoneType), "a str or None")
    if teacher is None and target is None:
        raise ValueError("Term: at least one of teacher and target must be given, got neither")
    if teacher is None and (teachers is not None or project is not None):
        raise ValueError("Term: teachers and project need a teacher feature, got them with target alone")
    if isinstance(teachers, str) or (teachers is not None and not teachers):
        raise ValueError(f"Term: teachers must be a sequence of names or None, got {teachers!r}")
    for index, name in enumerate(teachers or ()):
        check_type("Term", f"teachers[{index}]", name, str, "a str")
    if teachers is not None and len(set(teachers)) < len(teachers):
        raise ValueError(f"Term: teachers must be distinct, got {tuple(teachers)!r}")
    if isinstance(project, str):
        check_choice("Term", "project", project, ("auto",))
    check_type("Term", "project", project, (str, nn.Module, NoneType), "None, 'auto' or a Module")


def check_term_names(terms: object) -> None:
    """`terms` must be a mapping with at least one entry, and each name must be a valid state-dict key."""
    if not isinstance(terms, Mapping):
        raise TypeError(f"Objective: terms must be a mapping of names to terms, got {type(terms).__name__}")
    if not terms:
        raise ValueError("Objective: terms must hold at least one term, got none")
    for name in terms:
        check_key("Objective", "a term's name", name)


def check_term_loss(term: str, loss: Tensor, batch: int, *, weighted: bool, teacher: bool) -> None:
    """A term's loss must be `(b,)`; it may be a scalar unless the objective has to apply sample weights to it."""
    if tuple(loss.shape) != (batch,) and (weighted or (teacher and loss.dim())):
        wanted = f"(b,) = ({batch},)"
        wanted = f"{wanted} losses for its sample_weight" if weighted else f"a scalar or {wanted}"
        raise ValueError(f"Objective: term {term!r} must return {wanted}, got {show_shape(loss)}")


def check_weights_of(losses: Tensor, weights: Tensor) -> None:
    """A weighting must return one weight per teacher and sample."""
    if weights.shape != losses.shape:
        wanted = f"(k, b) = {show_shape(losses)}"
        raise ValueError(f"Objective: the weighting must return {wanted}, got {show_shape(weights)}")


def late_projections(terms: Iterable[str]) -> str:
    """Return the message of a strict load with projections that the module creates at its first forward pass."""
    return (
        f"Objective: the state dict holds projections of the terms {', '.join(map(repr, terms))}, which are not "
        "created yet; call infer on one batch before loading"
    )


def check_step_given(scheduled: Sequence[str], step: int | None, *, stale: bool) -> None:
    """A schedule needs a step; `stale` means that an earlier call in training mode has given its own."""
    if step is None or stale:
        last = f" (the last one was {step})" if stale else ""
        raise ValueError(
            f"Objective: step must be given in each call, got none{last}: {', '.join(scheduled)} depends on it; call "
            "distiller(inputs, targets, step=step) with the number of training steps done so far"
        )
