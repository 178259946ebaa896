"""Arguments of public classes and functions: NumPy numbers are converted, a wrong keyword names the nearest one."""

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import CO_VARKEYWORDS, isfunction, unwrap
from typing import Any

import numpy as np

from kdlib._checks import check_keyword

__all__ = ["prepare_arguments"]


def prepare_arguments(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Wrap the public functions of a module and the constructors of its public classes; signatures stay visible."""
    for name in names:
        value = namespace.get(name)  # None if it is loaded later
        if isinstance(value, type):
            value.__init__ = _prepared(name, value.__init__)  # type: ignore[misc]
        elif isfunction(value):
            home = vars(sys.modules[value.__module__])  # where pickle and doctest find the function
            home[name] = namespace[name] = _prepared(name, home[name])


def _prepared(owner: str, call: Callable[..., Any]) -> Callable[..., Any]:
    if not isfunction(call) or call.__globals__ is globals():  # built in, or wrapped already
        return call
    code = unwrap(call).__code__  # inspect.signature is much slower
    names = code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount]
    known = [name for name in names if name != "self"]
    any_keyword = code.co_flags & CO_VARKEYWORDS

    @wraps(call)
    def prepared(*arguments: Any, **options: Any) -> Any:
        for name in options:
            check_keyword(owner, name, options if any_keyword else known)
        return call(*[_plain(each) for each in arguments], **{name: _plain(each) for name, each in options.items()})

    return prepared


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value
