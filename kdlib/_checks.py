"""Argument checks shared by kdlib and kdlib_faces: a private module that both packages import on purpose.

Each check is one call at the head of a function. It returns nothing, or the checked value. A message names the function
that the user called, the argument, what was expected and what was received. The other `_checks.py` modules hold the
checks of one package; there, a function named after a fault returns the error to raise.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from operator import ge, gt, le, lt
from types import NoneType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._layouts import prefix_candidates, shown_prefix

T = TypeVar("T")


def show_shape(x: Tensor) -> str:
    """Return the shape as users write it: `(4, 128)`."""
    return str(tuple(x.shape))


def check_floating(owner: str, **tensors: Tensor) -> None:
    """Each named argument must be a floating-point tensor."""
    for name, x in tensors.items():
        check_type(owner, name, x, Tensor, "a torch.Tensor")
        if not x.is_floating_point():
            raise TypeError(f"{owner}: {name} must be a floating-point tensor, got {x.dtype}")


def check_rank(owner: str, name: str, x: Tensor, shape: str) -> None:
    """`x` must have as many dimensions as `shape` has words, as in `"b c h w"`; a trailing `...` allows more."""
    words = shape.split()
    if x.dim() < len(words) - 1 if words[-1] == "..." else x.dim() != len(words):
        raise ValueError(f"{owner}: {name} must be ({', '.join(words)}), got {show_shape(x)}")


def check_shape(owner: str, name: str, x: Tensor, shape: str, **sizes: int) -> None:
    """`x` must have the layout `shape` and the given sizes, as in `check_shape(..., "b c h w", c=16)`."""
    words = shape.split()
    if x.dim() != len(words) or any(x.shape[words.index(word)] != size for word, size in sizes.items()):
        wanted = " and ".join(f"{word} = {size}" for word, size in sizes.items())
        layout = f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"
        raise ValueError(f"{owner}: {name} must be {layout} with {wanted}, got {show_shape(x)}")


def check_pair(owner: str, student: Tensor, teacher: Tensor, shape: str = "b ...") -> None:
    """Student and teacher must be floating-point tensors of the same shape, with the rank of `shape`."""
    check_floating(owner, student=student, teacher=teacher)
    check_rank(owner, "student", student, shape)
    if student.shape != teacher.shape:
        layout = "b, d" if "..." in shape and student.dim() == 2 else ", ".join(shape.split())
        hint = "the logits must be of the same classes" if shape == "b c" else "project the student first"
        hint = f"; {hint}" if student.shape[:1] == teacher.shape[:1] else ""
        raise ValueError(
            f"{owner}: teacher must be ({layout}) like student {show_shape(student)}, got {show_shape(teacher)}{hint}"
        )


def check_same_batch(owner: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Two arguments must have the same batch size."""
    if a.dim() == 0 or b.dim() == 0 or a.shape[0] != b.shape[0]:
        raise ValueError(f"{owner}: {second} must have the batch size of {first} {show_shape(a)}, got {show_shape(b)}")


def check_batches(owner: str, shape: str, **batches: Tensor) -> None:
    """The named tensors must be floating-point batches of one size, with the rank of `shape`; their widths may differ."""
    check_floating(owner, **batches)
    for name, x in batches.items():
        check_rank(owner, name, x, shape)
    (first, a), *others = batches.items()
    for name, x in others:
        check_same_batch(owner, first, a, name, x)


def check_weight(owner: str, weight: Tensor | None, batch: int) -> None:
    """Per-sample weights must be a tensor `(b,)` of finite numbers of at least 0; on an accelerator these are not read."""
    check_type(owner, "weight", weight, (Tensor, NoneType), "a torch.Tensor")
    if weight is not None and tuple(weight.shape) != (batch,):
        raise ValueError(f"{owner}: weight must be (b,) = ({batch},), got {show_shape(weight)}")
    if weight is not None and readable(weight):
        wrong = weight[~((weight >= 0) & (weight < inf))]
        if len(wrong):
            raise ValueError(f"{owner}: weight must hold finite numbers >= 0, got {wrong[0].item():g}")


def readable(x: Tensor) -> bool:
    """Return whether reading values costs nothing: not on an accelerator, in a compiled graph or of a fake tensor."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(x)
    return not traced and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter)


def check_dtype_whole(owner: str, name: str, x: Tensor) -> None:
    """`x` must be a tensor of an integer dtype."""
    check_type(owner, name, x, Tensor, "a torch.Tensor")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{owner}: {name} must be whole numbers, got {x.dtype}")


def check_whole_numbers(owner: str, name: str, x: Tensor, size: int) -> None:
    """`x` must be an integer tensor `(size,)`, such as identities, classes or sample ids."""
    check_dtype_whole(owner, name, x)
    if tuple(x.shape) != (size,):
        raise ValueError(f"{owner}: {name} must be ({size},), got {show_shape(x)}")


def check_gathered(owner: str, rows: Sequence[tuple[tuple[int, ...], str]]) -> None:
    """All processes must have rows of the same shape and dtype; `rows` contains both for each process."""
    for rank, (shape, dtype) in enumerate(rows):
        if (shape, dtype) != rows[0]:
            raise ValueError(
                f"{owner}: all processes must hold rows of one shape and dtype, got {rows[0][0]} {rows[0][1]} in "
                f"process 0 and {shape} {dtype} in process {rank}"
            )


def check_target(owner: str, target: Tensor, batch: int, classes: int) -> None:
    """`target` must be `(b,)` classes: whole numbers from 0 to below `classes`."""
    check_dtype_whole(owner, "target", target)
    check_shape(owner, "target", target, "b", b=batch)
    if target.numel() == 0 or not readable(target):
        return
    lowest, highest = (int(end) for end in torch.aminmax(target))
    if lowest < 0 or highest >= classes:
        value = lowest if lowest < 0 else highest
        raise ValueError(f"{owner}: target must be from 0 to below c = {classes}, got {value}")


def check_relation_reduction(owner: str, reduction: str) -> None:
    """A relation loss has no per-sample form."""
    if reduction != "mean":
        raise ValueError(f"{owner}: reduction must be 'mean': a relation has no per-sample form, got {reduction!r}")


def check_shares(owner: str, name: str, shares: object) -> tuple[float, ...]:
    """Return `shares` as Python numbers: a sequence, array or tensor of finite numbers >= 0, at least one above 0."""
    if isinstance(shares, (np.ndarray, Tensor)):
        shares = shares.tolist()
    if isinstance(shares, (str, bytes)) or not isinstance(shares, Sequence):
        raise TypeError(f"{owner}: {name} must be a sequence of numbers, got {type(shares).__name__}")
    numbers = tuple(check_number(owner, f"{name}[{index}]", share, min=0) for index, share in enumerate(shares))
    if not any(numbers):
        raise ValueError(f"{owner}: {name} must hold a number > 0, got {shares!r}")
    return numbers


def check_below(owner: str, name: str, x: Tensor, batch: int, **limit: int) -> None:
    """`x` must be `(b,)` whole numbers below a named limit, as in `c=10`; negative numbers stand for unknown."""
    ((what, size),) = limit.items()
    check_dtype_whole(owner, name, x)
    check_shape(owner, name, x, "b", b=batch)
    if x.numel() and readable(x) and int(x.max()) >= size:
        raise ValueError(f"{owner}: {name} must be below {what} = {size}, got {int(x.max())}")


def check_identities(owner: str, identities: Tensor, batch: int, number: int) -> None:
    """`identities` must be `(b,)` whole numbers below `number`."""
    check_below(owner, "identities", identities, batch, num_identities=number)


def check_prefix(
    owner: str, name: str, x: Tensor, given: int | None, argument: str, positions: Sequence[int] = ()
) -> int:
    """Return how many leading tokens of `x` (b, n, d) are not on the grid: `given`, or the number that shapes show."""
    if given is not None:
        check_number(owner, argument, given, min=0, below=max(x.shape[1], 1), integer=True)
        return given
    shown = shown_prefix(x.shape[1], positions)
    if shown is None:
        few = " or ".join(map(str, prefix_candidates(x.shape[1], positions))) or "an unknown number of"
        raise ValueError(
            f"{owner}: {name} {show_shape(x)} may have {few} tokens (class token, registers) before those of the grid; "
            f"give {argument}= (0 if all are on the grid)"
        )
    return shown


def check_type(owner: str, name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """`value` must be an instance of `kind`, which the message calls `wanted`, as in `"a Module"`."""
    if not isinstance(value, kind):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {type(value).__name__}")


def check_callable(owner: str, name: str, value: object) -> None:
    """`value` must be callable."""
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be callable, got {type(value).__name__}")


def check_choice(owner: str, name: str, value: object, choices: Sequence[str]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name} must be one of {allowed}, got {value!r}")


def check_number(
    owner: str,
    name: str,
    value: T,
    *,
    above: float | None = None,
    min: float | None = None,
    max: float | None = None,
    below: float | None = None,
    integer: bool = False,
) -> T:
    """Return `value` as a Python number; it must be finite (whole if `integer`) and within the limits.

    Numbers of NumPy and other libraries, and arrays and tensors without dimensions, are numbers; bools are not.
    """
    scalar = isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0
    plain: Any = value.item() if scalar else value  # type: ignore[attr-defined]
    kind: type[Any] = Integral if integer else Real
    number = not isinstance(plain, bool) and isinstance(plain, kind) and -inf < plain < inf
    limits: list[tuple[str, Callable[[Any, Any], bool], float | None]]
    limits = [(">", gt, above), (">=", ge, min), ("<=", le, max), ("<", lt, below)]
    if not number or not all(limit is None or holds(plain, limit) for _, holds, limit in limits):
        bounds = [f"{sign} {limit}" for sign, _, limit in limits if limit is not None]
        wanted = " and ".join(["a whole number" if integer else "a finite number", *bounds])
        raise (ValueError if number else TypeError)(f"{owner}: {name} must be {wanted}, got {value!r}")
    return int(plain) if isinstance(plain, Integral) else float(plain)  # type: ignore[return-value]


def check_step(owner: str, step: int) -> int:
    """Return `step`, a whole number of at least 0."""
    if type(step) is int and step >= 0:  # compiled code formats no message, which would depend on the step
        return step
    return check_number(owner, "step", step, min=0, integer=True)


def check_scheduled(owner: str, name: str, value: T, *, above: float | None = None, min: float | None = None) -> T:
    """Return `value`: a schedule, or a number within the limits."""
    return value if callable(value) else check_number(owner, name, value, above=above, min=min)


def value_at(
    owner: str,
    name: str,
    value: float | Callable[[int], float],
    step: int | None,
    *,
    above: float | None = None,
    min: float | None = None,
) -> float:
    """Return a number, or the value of a schedule at a step, which must be a number within the limits."""
    if not callable(value):
        return value
    if step is None:
        raise ValueError(f"{owner}: {name} is a schedule and needs the step; give step= in the call")
    given = value(step)
    # As in `check_step`, a valid value must reach no message.
    if type(given) is float and given < inf and (above is None or given > above) and (min is None or given >= min):
        return given
    return float(check_number(owner, f"{name}({step})", given, above=above, min=min))


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return `"; the nearest are 'a', 'b'"` for an unknown name, or the list of known names if none is close."""
    known = list(dict.fromkeys(entry for entry in known if entry))
    close = get_close_matches(name, known, n=count, cutoff=0.5)
    close = close or [entry for entry in known if name and entry.lower().startswith(name.lower())][:count]
    if close:
        return "; the nearest are " + ", ".join(repr(entry) for entry in close)
    listed = ", ".join(repr(entry) for entry in known[:12])
    return f"; there are {listed}{', ...' if len(known) > 12 else ''}" if known else "; there are none"


def check_name(owner: str, what: str, name: str, known: Iterable[str]) -> None:
    """`name` must be among `known`; the error lists the nearest names."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{owner}: no {what} named {name!r}{nearest(name, known)}")


def check_keyword(owner: str, name: str, known: Iterable[str]) -> None:
    """`name` must be a keyword argument of `owner`; the error lists the nearest ones."""
    if name not in known:
        raise TypeError(f"{owner}: no argument named {name!r}{nearest(name, known)}")


def check_finite(owner: str, **tensors: Tensor) -> None:
    """Each named tensor must hold finite values only."""
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise ValueError(f"{owner}: {name} must be finite, got {bad} NaN or infinite values of {x.numel()}")


def check_key(owner: str, what: str, name: object) -> None:
    """`name` must be a valid key of an `nn.ModuleDict`, and so of a state dict."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"{owner}: {what} must be text without a dot, got {name!r}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{owner}: {what} must not be an attribute of nn.ModuleDict, got {name!r}")


def check_term_teachers(owner: str, term: str, names: Iterable[str], teachers: Iterable[str]) -> None:
    """A term with a teacher feature needs at least one teacher, and each of `names` must be among `teachers`."""
    teachers = list(teachers)
    if not teachers:
        raise ValueError(f"{owner}: term {term!r} needs a teacher, got none")
    for name in names:
        check_name(f"{owner}: term {term!r}", "teacher", name, teachers)


def check_inferred(owner: str, inferred: bool, remedy: str) -> None:
    """All projections must exist."""
    if not inferred:
        raise RuntimeError(f"{owner}: projections are not created yet; call {remedy} once")


def check_features(owner: str, features: object) -> None:
    """A model in a distiller must return named features."""
    if not isinstance(features, Mapping):
        kind = type(features).__name__
        raise TypeError(f"Distiller: the {owner} must return named features, got {kind}; wrap it in an adapter")


def check_inputs(owner: str, unchanged: bool) -> None:
    """A model in a distiller must not change its inputs in place."""
    if not unchanged:
        raise ValueError(
            f"Distiller: the {owner} changed its inputs in place, which the other models read too; copy them first, as "
            "an out-of-place preprocess or nn.ReLU(inplace=False) does"
        )


def check_targets(owner: str, targets: object) -> None:
    """Targets must be named."""
    check_type(owner, "targets", targets, (Mapping, NoneType), "a mapping of names to tensors or None")


def check_teacher_inputs(teacher: str, names: Sequence[str], targets: Container[str]) -> None:
    """The targets that a teacher reads must be in the batch."""
    missing = [name for name in names if name not in targets]
    if missing:
        raise ValueError(
            f"Distiller: teacher {teacher!r} reads the targets {', '.join(names)}; the batch lacks {', '.join(missing)}"
        )
