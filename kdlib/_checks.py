"""Shape and value checks: the only place in the core that words an error.

Each check is one call at the head of a function; it returns nothing, or the value it has checked. A message names the
function that the user called, the argument, what was expected and what came.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from math import isqrt
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_choice",
    "check_finite",
    "check_floating",
    "check_gathered",
    "check_gathered_reduction",
    "check_grid",
    "check_identities",
    "check_labels",
    "check_logits",
    "check_map",
    "check_most",
    "check_name",
    "check_number",
    "check_pair",
    "check_projectable",
    "check_rank",
    "check_relation",
    "check_relation_reduction",
    "check_same_batch",
    "check_shape",
    "check_shares",
    "check_square_tokens",
    "check_target",
    "check_teachers",
    "check_token_grid",
    "check_weight",
    "check_whole_numbers",
    "nearest",
    "show_shape",
]


def show_shape(x: Tensor) -> str:
    """Shape as users write it: `(4, 128)`."""
    return str(tuple(x.shape))


def check_floating(owner: str, **tensors: Tensor) -> None:
    """Each named argument must be a floating-point tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{owner}: {name} must be a floating-point tensor, got {x.dtype}")


def check_rank(owner: str, name: str, x: Tensor, shape: str) -> None:
    """`x` must have as many dimensions as `shape` has words, `"b c h w"` for one; a trailing `...` admits more."""
    words = shape.split()
    if words[-1] == "...":
        good, words = x.dim() >= len(words) - 1, words
    else:
        good = x.dim() == len(words)
    if not good:
        raise ValueError(f"{owner}: {name} must be ({', '.join(words)}), got {show_shape(x)}")


def check_shape(owner: str, name: str, x: Tensor, shape: str, **sizes: int) -> None:
    """`x` must be laid out as `shape`, with the given sizes: `check_shape(..., "b c h w", c=16)`."""
    words = shape.split()
    if x.dim() != len(words) or any(x.shape[words.index(word)] != size for word, size in sizes.items()):
        wanted = " and ".join(f"{word} = {size}" for word, size in sizes.items())
        layout = f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"
        raise ValueError(f"{owner}: {name} must be {layout} with {wanted}, got {show_shape(x)}")


def check_map(owner: str, **tensors: Tensor) -> None:
    """Each named argument must be a feature map `(b, c, h, w)` or an attention map `(b, h, w)`."""
    for name, x in tensors.items():
        if x.dim() not in (3, 4):
            raise ValueError(f"{owner}: {name} must be (b, c, h, w) or (b, h, w), got {show_shape(x)}")


def check_pair(owner: str, student: Tensor, teacher: Tensor, shape: str = "b ...") -> None:
    """Student and teacher must be floating point, of the rank `shape` says, and of one shape."""
    check_floating(owner, student=student, teacher=teacher)
    check_rank(owner, "student", student, shape)
    if student.shape != teacher.shape:
        layout = "b, d" if "..." in shape and student.dim() == 2 else ", ".join(shape.split())
        hint = "; project the student first" if student.shape[:1] == teacher.shape[:1] else ""
        raise ValueError(
            f"{owner}: teacher must be ({layout}) like student {show_shape(student)}, got {show_shape(teacher)}{hint}"
        )


def check_same_batch(owner: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Two arguments must agree on their batch size."""
    if a.dim() == 0 or b.dim() == 0 or a.shape[0] != b.shape[0]:
        raise ValueError(f"{owner}: {second} must have the batch size of {first} {show_shape(a)}, got {show_shape(b)}")


def check_weight(owner: str, weight: Tensor | None, batch: int) -> None:
    """Per-sample weights must be a tensor `(b,)`."""
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"{owner}: weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight is not None and tuple(weight.shape) != (batch,):
        raise ValueError(f"{owner}: weight must be (b,) = ({batch},), got {show_shape(weight)}")


def check_whole_numbers(owner: str, name: str, x: Tensor, size: int) -> None:
    """`x` must be `(size,)` whole numbers: identities, classes, sample ids."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{owner}: {name} must be whole numbers, got {x.dtype}")
    if tuple(x.shape) != (size,):
        raise ValueError(f"{owner}: {name} must be ({size},), got {show_shape(x)}")


def check_gathered(owner: str, rows: Sequence[tuple[tuple[int, ...], str]]) -> None:
    """The processes must bring rows of one shape and dtype; `rows` holds both for each process."""
    for rank, (shape, dtype) in enumerate(rows):
        if (shape, dtype) != rows[0]:
            raise ValueError(
                f"{owner}: all processes must hold rows of one shape and dtype, got {rows[0][0]} {rows[0][1]} in "
                f"process 0 and {shape} {dtype} in process {rank}"
            )


def check_relation(owner: str, student: Tensor, teacher: Tensor, reduction: str, weight: Tensor | None) -> None:
    """A relation loss takes two batches of as many samples, of any size each, and has one value for a batch."""
    check_relation_reduction(owner, reduction)
    check_floating(owner, student=student, teacher=teacher)
    check_rank(owner, "student", student, "b d ...")
    check_rank(owner, "teacher", teacher, "b d ...")
    check_same_batch(owner, "student", student, "teacher", teacher)
    check_weight(owner, weight, student.shape[0])


def check_relation_reduction(owner: str, reduction: str) -> None:
    """A relation has no per-sample form."""
    if reduction != "mean":
        raise ValueError(f"{owner}: reduction must be 'mean': a relation has no per-sample form, got {reduction!r}")


def check_gathered_reduction(owner: str, gather: bool, reduction: str) -> None:
    """A loss over the rows of all processes has one value, which every process gets."""
    if gather and reduction != "mean":
        raise ValueError(
            f"{owner}: reduction must be 'mean' with gather: the processes share one value, got {reduction!r}"
        )


def check_projectable(owner: str, student: Tensor, teacher: Tensor) -> None:
    """A projection can be inferred between features of one kind, between maps and tokens, and from a map to a vector."""
    known = {(2, 2), (3, 3), (4, 4), (3, 4), (4, 3), (4, 2)}
    if (student.dim(), teacher.dim()) not in known:
        raise ValueError(
            f"{owner}: student and teacher must be vectors (b, d), tokens (b, n, d) or maps (b, c, h, w), both of one kind, "
            f"or maps and tokens, or a map and a vector, got {show_shape(student)} and {show_shape(teacher)}; "
            "give a projection of your own"
        )


def check_square_tokens(owner: str, name: str, x: Tensor) -> tuple[int, bool]:
    """`x` (b, n, d) must hold the tokens of a square grid, with or without one class token in front.

    Returns:
        The side of the grid, and whether there is a class token.
    """
    for leading in (0, 1):
        side = isqrt(max(x.shape[1] - leading, 0))
        if side and side * side == x.shape[1] - leading:
            return side, leading == 1
    raise ValueError(
        f"{owner}: {name} must hold the tokens (b, n, d) of a square grid, or these and one class token, where the other "
        f"side has another number, got {show_shape(x)}; give a TokenProjection with size= and grid="
    )


def check_token_grid(owner: str, x: Tensor, leading: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """`x` (b, n, d) must hold `leading` tokens and those of `grid`, or of a square one; returns it."""
    tokens = x.shape[1] - leading
    side = isqrt(max(tokens, 0))
    height, width = (side, side) if grid is None else grid
    if tokens < 1 or height * width != tokens:
        wanted = "a square number" if grid is None else f"{height} x {width}"
        more = " and a class token" if leading else ""
        remedy = "; give grid=(h, w)" if grid is None else ""
        raise ValueError(f"{owner}: student must be (b, n, d) with n = {wanted}{more}, got {show_shape(x)}{remedy}")
    return height, width


def check_grid(owner: str, name: str, size: Any) -> None:
    """`size` must be the height and the width of a feature map."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(type(side) is int for side in size):
        raise TypeError(f"{owner}: {name} must be two whole numbers (h, w), got {size!r}")
    if min(size) < 1:
        raise ValueError(f"{owner}: {name} must be (h, w) with sides >= 1, got {size!r}")


def check_shares(owner: str, name: str, shares: Any) -> None:
    """`shares` must be a sequence of finite numbers of at least 0, not all of them 0."""
    if isinstance(shares, (str, bytes)) or not isinstance(shares, Sequence):
        raise TypeError(f"{owner}: {name} must be a sequence of numbers, got {type(shares).__name__}")
    for index, share in enumerate(shares):
        check_number(owner, f"{name}[{index}]", share, least=0)
    if not any(shares):
        raise ValueError(f"{owner}: {name} must hold a number > 0, got {shares!r}")


def check_identities(owner: str, identities: Tensor, batch: int, number: int) -> None:
    """`identities` must be `(b,)` whole numbers below `number`."""
    if identities.is_floating_point() or identities.is_complex() or identities.dtype == torch.bool:
        raise TypeError(f"{owner}: identities must be whole numbers, got {identities.dtype}")
    check_shape(owner, "identities", identities, "b", b=batch)
    if identities.numel() and int(identities.max()) >= number:
        raise ValueError(f"{owner}: identities must be below num_identities = {number}, got {int(identities.max())}")


def check_teachers(owner: str, losses: Tensor, teachers: Sequence[Tensor] | None = None) -> None:
    """A weighting takes losses `(k, b)`, and a tensor `(b, ...)` of each of the k teachers if it looks at them."""
    check_floating(owner, losses=losses)
    check_rank(owner, "losses", losses, "k b")
    if teachers is None:
        return
    if len(teachers) != losses.shape[0]:
        raise ValueError(f"{owner}: teachers must be k = {losses.shape[0]} tensors, got {len(teachers)}")
    for index, teacher in enumerate(teachers):
        if teacher.dim() < 2 or teacher.shape[0] != losses.shape[1]:
            raise ValueError(
                f"{owner}: teachers[{index}] must be (b, d, ...) with b = {losses.shape[1]}, got {show_shape(teacher)}"
            )


def check_labels(owner: str, labels: Tensor, batch: int, classes: int) -> None:
    """`labels` must be `(b,)` whole numbers below the number of classes; negative ones are unknown."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{owner}: labels must be whole numbers, got {labels.dtype}")
    check_shape(owner, "labels", labels, "b", b=batch)
    if labels.numel() and int(labels.max()) >= classes:
        raise ValueError(
            f"{owner}: labels must be below c = {classes} of the teachers' logits, got {int(labels.max())}"
        )


def check_target(owner: str, target: Tensor, batch: int, classes: int) -> None:
    """`target` must be `(b,)` classes: whole numbers from 0 to below `classes`."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{owner}: target must be a torch.Tensor, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{owner}: target must be whole numbers, got {target.dtype}")
    check_shape(owner, "target", target, "b", b=batch)
    if torch.compiler.is_compiling() or target.numel() == 0:  # a compiler has no values to look at
        return
    least, most = (int(end) for end in torch.aminmax(target))
    if least < 0 or most >= classes:
        raise ValueError(f"{owner}: target must be from 0 to below c = {classes}, got {least if least < 0 else most}")


def check_logits(owner: str, teachers: Sequence[Tensor]) -> None:
    """Each teacher must be logits `(b, c)`, all on one set of classes."""
    if any(teacher.dim() != 2 or teacher.shape[1] != teachers[0].shape[1] for teacher in teachers):
        shapes = ", ".join(show_shape(teacher) for teacher in teachers)
        raise ValueError(f"{owner}: teachers must be logits (b, c) on the same c classes, got {shapes}")


def check_most(owner: str, most: float, teachers: int) -> None:
    """Weights of at most `most` each must be able to sum to one."""
    if teachers and most * teachers < 1 - 1e-9:
        raise ValueError(f"{owner}: most must be >= 1 / k for k = {teachers} teachers, got {most!r}")


def check_choice(owner: str, name: str, value: object, choices: Sequence[str]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name} must be one of {allowed}, got {value!r}")


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    integer: bool = False,
) -> None:
    """`value` must be a finite number, strictly above `above`, from `least` to `most`, whole when `integer`."""
    kind = "a whole number" if integer else "a finite number"
    bounds = [
        f"> {above}" if above is not None else "",
        f">= {least}" if least is not None else "",
        f"<= {most}" if most is not None else "",
    ]
    wanted = " and ".join([kind, *[bound for bound in bounds if bound]])
    good = isinstance(value, int) if integer else isinstance(value, (int, float))
    good = good and not isinstance(value, bool) and value == value and abs(value) != float("inf")
    if not good:
        raise TypeError(f"{owner}: {name} must be {wanted}, got {value!r}")
    if (
        (above is not None and not value > above)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        raise ValueError(f"{owner}: {name} must be {wanted}, got {value!r}")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`"; the nearest are 'a', 'b'"` for a name that is not among `known`, or what there is if nothing is near."""
    known = [entry for entry in known if entry]
    close = get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "; the nearest are " + ", ".join(repr(entry) for entry in close)
    listed = ", ".join(repr(entry) for entry in known[:12])
    return f"; there are {listed}{', ...' if len(known) > 12 else ''}" if known else "; there are none"


def check_name(owner: str, what: str, name: str, known: Iterable[str]) -> None:
    """`name` must be among `known`; otherwise the error lists the nearest."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{owner}: no {what} named {name!r}{nearest(name, known)}")


def check_finite(owner: str, **tensors: Tensor) -> None:
    """Each named tensor must be free of NaN and infinity."""
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise ValueError(f"{owner}: {name} must be finite, got {bad} NaN or infinite values of {x.numel()}")
