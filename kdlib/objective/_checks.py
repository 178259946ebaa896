"""Checks of terms and objectives."""

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType

from torch import Tensor, nn

from kdlib._checks import check_callable, check_choice, check_key, check_type, show_shape
from kdlib.types import CrossLayerWeighting, MaskedLoss, Weighting

__all__ = [
    "check_cross_layer", "check_loss_of_term", "check_masked", "check_step_given", "check_taps", "check_term", "check_term_loss",
    "check_term_names", "check_weights_of", "late_projections",
]  # fmt: skip


def check_taps(name: str, taps: object) -> str | tuple[str, ...]:
    """Return the taps of one side: a name, or a tuple of the names in a sequence."""
    if isinstance(taps, str):
        return taps
    if not isinstance(taps, Sequence) or not taps:
        got = type(taps).__name__ if not isinstance(taps, Sequence) else "an empty one"
        raise TypeError(f"Term: {name} must be the name of a tap or a list of names, got {got}")
    for index, each in enumerate(taps):
        check_type("Term", f"{name}[{index}]", each, str, "a str")
    return tuple(taps)


def check_loss_of_term(loss: object) -> None:
    """The loss of a term must be a function or a Module, not the class of one."""
    check_callable("Term", "loss", loss)
    if isinstance(loss, type):
        raise TypeError(
            f"Term: loss must be a function or a Module, got the class {loss.__name__}; write {loss.__name__}()"
        )


def check_term(
    student: str | tuple[str, ...],
    teacher: str | tuple[str, ...] | None,
    teachers: Sequence[str] | None,
    project: object,
    **targets: object,
) -> None:
    """A term needs a teacher feature, a target or both; `teachers` and `project` need a teacher feature."""
    for name, value in targets.items():
        check_type("Term", name, value, (str, NoneType), "a str or None")
    if teacher is None and targets["target"] is None:
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
    given, wanted = (
        ("1 tap" if isinstance(side, str) else f"a list of {len(side)}" if side else "none")
        for side in (student, teacher)
    )
    if project == "auto" and given != wanted:
        raise ValueError(
            f"Term: project='auto' needs one student tap for each teacher tap, got {given} and {wanted}; give an "
            "nn.ModuleList with a projection for each student tap, or a loss with projections of its own"
        )
    if isinstance(project, nn.Module) and isinstance(project, nn.ModuleList) == isinstance(student, str):
        shape = (
            "a Module that maps its feature" if isinstance(student, str) else "an nn.ModuleList with one Module each"
        )
        raise ValueError(f"Term: project must be {shape} for student {student!r}, got {type(project).__name__}")
    if isinstance(project, nn.ModuleList) and len(project) != len(student):
        raise ValueError(
            f"Term: project must have {len(student)} Modules, one for each student tap, got {len(project)}"
        )


def check_masked(loss: object) -> None:
    """The loss of a term with a mask must accept `mask=`, unless it does not declare whether it does."""
    if isinstance(loss, MaskedLoss) and not loss.masked:
        raise ValueError(
            f"Term: mask needs a loss that accepts mask=, such as SoftTargetLoss, got {type(loss).__name__}; mask whole "
            "samples by sample_weight"
        )


def check_cross_layer(term: str, weighting: Weighting) -> None:
    """The weighting of a term with lists of taps must accept lists of features."""
    if not (isinstance(weighting, CrossLayerWeighting) and weighting.cross_layer):
        raise ValueError(
            f"Objective: {type(weighting).__name__} reads one feature of each side, and term {term!r} has lists of taps; "
            "give weigh_by= a term with one tap on each side, or another weighting such as UniformWeighting"
        )


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
    check_type(f"Objective: term {term!r}", "the value of the loss", loss, Tensor, "a torch.Tensor")
    if tuple(loss.shape) != (batch,) and (weighted or (teacher and loss.dim())):
        wanted = f"(b,) = ({batch},)"
        wanted = f"{wanted} losses for its sample_weight" if weighted else f"a scalar or {wanted}"
        remedy = "; return one value per sample, or accept weight= as a kdlib.types.WeightedLoss" if weighted else ""
        raise ValueError(f"Objective: term {term!r} must return {wanted}, got {show_shape(loss)}{remedy}")


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
