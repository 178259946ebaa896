"""Checks and errors of the cache package."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable, check_name, check_type


class CacheError(ValueError):
    """A cache is missing, incomplete, damaged, or belongs to something else."""


def cache_error(message: str) -> CacheError:
    """Return the error with a message about a cache on disk."""
    return CacheError(f"TeacherCache: {message}")


def check_cache(good: bool, message: str) -> None:
    """A condition on a cache on disk must hold."""
    if not good:
        raise cache_error(message)


def check_argument(good: bool, message: str) -> None:
    """A condition on an argument, or on a header that is being parsed, must hold."""
    if not good:
        raise ValueError(message)


def check_build(teacher: object, fetch: object, progress: object, notes: object, **texts: object) -> None:
    """Check the callables of a build and the texts that it writes into the header."""
    check_type("TeacherCache", "teacher", teacher, nn.Module, "a Module")
    check_callable("TeacherCache", "fetch", fetch)
    if progress is not None:
        check_callable("TeacherCache", "progress", progress)
    for name, text in texts.items():
        check_type("TeacherCache", name, text, str, "a str")
    check_type("TeacherCache", "notes", notes, Mapping, "a mapping of names to texts")
    for key, text in dict(notes).items():  # type: ignore[call-overload]  # checked in the line before
        check_type("TeacherCache", "a name in notes", key, str, "a str")
        check_type("TeacherCache", f"notes[{key!r}]", text, str, "a str")


def check_inputs(inputs: object) -> tuple[str, ...] | dict[str, str]:
    """Return `inputs`, which must name one or two targets, or map `samples` and `views` to them."""
    inputs = (inputs,) if isinstance(inputs, str) else inputs
    names = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(names, Sequence) or len(names) not in (1, 2):
        raise ValueError(
            f"CachedTeacher: inputs must name the targets of sample and view, or only of the sample, got {inputs!r}"
        )
    for index, name in enumerate(names):
        check_type("CachedTeacher", f"inputs[{index}]", name, str, "a str")
    if isinstance(inputs, Mapping) and set(inputs) not in ({"samples"}, {"samples", "views"}):
        raise ValueError(f"CachedTeacher: inputs must have the keys 'samples' and 'views', got {inputs!r}")
    return dict(inputs) if isinstance(inputs, Mapping) else tuple(names)


def check_names(owner: str, features: Collection[str], known: Collection[str]) -> None:
    """`features` must be a collection of known names, not a string."""
    if isinstance(features, str):
        raise TypeError(f"{owner}: features must be a sequence of names, got {features!r}")
    for name in features:
        check_name(owner, "feature", name, known)


def check_features(features: object, batch: int) -> None:
    """A teacher must return named floating-point features of the batch."""
    if not isinstance(features, Mapping) or not features:
        raise TypeError(f"TeacherCache: teacher must return named features, got {type(features).__name__}")
    for name, x in features.items():
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != batch or not x.is_floating_point():
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"TeacherCache: feature {name!r} must be floating point ({batch}, d, ...), got {got}")


def check_fits(dtype: str, feature: str, largest: Tensor, name_row: Callable[[int], str]) -> None:
    """The largest magnitude of each row must be finite and fit the type on disk; `int8` has a float32 scale."""
    limit = torch.finfo(torch.float16 if dtype == "float16" else torch.float32).max
    bad = (~(largest <= limit)).nonzero().flatten()
    if len(bad):
        value = float(largest[bad[0]])
        remedy = '; use dtype="float32"' if math.isfinite(value) else ""
        raise ValueError(
            f"TeacherCache: feature {feature!r} of {name_row(int(bad[0]))} must fit {dtype}, got {value:.4g}{remedy}"
        )
