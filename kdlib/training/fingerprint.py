"""Description of everything that determines the weights of a run, which checkpoints store and a resumed run compares."""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kdlib._gather import is_sharded
from kdlib.distiller import Distiller
from kdlib.objective import Term
from kdlib.training._checks import check_argument
from kdlib.training.config import TrainConfig
from kdlib.types import FrozenModel, HasFingerprint

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LENGTH = ("epochs", "max_steps", "total_steps")
"""A run may continue for more steps, with the same values up to its checkpoint."""

_OPENED = ("monitor", "mode")
"""A run without these may be resumed with them."""

__all__ = ["check_fingerprint", "check_same", "run_fingerprint"]


def run_fingerprint(
    config: TrainConfig, distiller: Distiller, optimizer: torch.optim.Optimizer, total_steps: int
) -> dict[str, object]:
    """Return names and plain values: settings, optimizer, terms, weighting and teachers of a run."""
    objective = distiller.objective
    return {
        **config.fingerprint(),
        **({"optimizer": _describe_optimizer(optimizer)} if callable(config.optimizer) else {}),
        "total_steps": total_steps,
        **{f"term {name!r}": _describe_term(term, total_steps) for name, term in objective.terms.items()},
        "weighting": _describe(objective.weighting),
        **{f"teacher {name!r}": _describe_teacher(teacher) for name, teacher in distiller.teachers.items()},
    }


def check_fingerprint(
    saved: Mapping[str, object],
    current: Mapping[str, object],
    weights: Mapping[str, object],
    live: Mapping[str, object],
    place: object,
) -> None:
    """A resumed run must have the same fingerprint and, in its state dict, the same names and shapes.

    Its length may differ, and it may monitor a metric where it did not before. The error names each difference with both
    values.
    """
    names = sorted({*saved, *current}.difference(_LENGTH))
    pairs = [(name, saved.get(name), current.get(name)) for name in names]
    pairs = [pair for pair in pairs if not (pair[0] in _OPENED and pair[1] is None)]
    before, now = (
        {
            name: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            for name, x in state.items()
        }
        for state in (weights, live)
    )
    # A module may create buffers in its first forward pass and when it loads them, so more names alone are no difference.
    names = sorted(now if {*now} <= {*before} else {*before, *now})
    pairs += [(name, before.get(name, "absent"), now.get(name, "absent")) for name in names]
    texts = [f"{name} (checkpoint {old!r}, now {new!r})" for name, old, new in pairs if old != new]
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    check_argument(
        not texts,
        f"checkpoint_dir {place} must contain a run of this configuration, got different {', '.join(texts[:8])}{more}; "
        "restore these settings or use another directory",
    )


def check_same(fingerprints: Sequence[Mapping[str, object]]) -> None:
    """All processes must have the same fingerprint."""
    texts = [
        f"{name} {[each.get(name) for each in fingerprints]}"
        for name in sorted(set().union(*fingerprints))
        if any(each.get(name) != fingerprints[0].get(name) for each in fingerprints)
    ]
    check_argument(not texts, f"all processes must train with the same settings, got {', '.join(texts)}")


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Describe the class and the settings of the groups; the current learning rate is part of the state."""
    groups = [
        {name: value for name, value in group.items() if value and name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__qualname__} {groups}"


def _describe_term(term: Term, total_steps: int) -> str:
    """Describe a term; a schedule is described by its values at some steps."""
    steps = sorted({0, 1, total_steps // 4, total_steps // 2, max(0, total_steps - 1)})
    values = "".join(f" {name} {[float(each(step)) for step in steps]}" for name, each in term.schedules.items())
    return f"{_without_addresses(term)}{_attributes(term.loss)}{values}"


def _describe(value: object) -> str:
    return f"{_without_addresses(value)}{_attributes(value)}"


def _without_addresses(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _attributes(value: object) -> str:
    """Describe the numbers and texts of a Module, which its `repr` may lack."""
    if not isinstance(value, nn.Module):
        return ""
    plain = {name: x for name, x in sorted(vars(value).items()) if isinstance(x, (int, float, str)) and name[0] != "_"}
    hidden = {name: x for name, x in plain.items() if name != "training" and f"{name}=" not in repr(value)}
    return f" {hidden}" if hidden else ""


def _describe_teacher(teacher: object) -> str:
    """Return the teacher's own fingerprint, or its class and a checksum of the first values of each frozen weight."""
    if isinstance(teacher, HasFingerprint):
        return teacher.fingerprint
    if not isinstance(teacher, FrozenModel):
        return type(teacher).__qualname__
    checksum = 0
    for name, value in teacher.model.state_dict().items():
        if isinstance(value, Tensor):
            checksum = zlib.crc32(f"{name} {tuple(value.shape)}".encode() + _first_values(value), checksum)
    return f"{type(teacher.model).__qualname__} {checksum:08x}"


def _first_values(weight: Tensor) -> bytes:
    """Return the first values of a weight; none of one that is offloaded, whose values are not in the module."""
    if weight.is_meta:
        return b""
    first = weight.detach().flatten()[:16].double()
    if is_sharded(first):
        first = cast("DTensor", first).full_tensor()
    return first.cpu().numpy().tobytes()
