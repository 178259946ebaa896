"""Contracts, the mechanism: run named checks one after another and word what failed. Touches no tensor of the user."""

import ast
import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["check_repr", "clone", "expect", "finite", "repickle", "run", "same", "shift_parameters"]

T = TypeVar("T")


def run(owner: str, component: object, checks: Mapping[str, Callable[[], None]]) -> tuple[str, ...]:
    """Run every check; the first that fails ends it.

    Returns:
        The names of the checks that ran: all of them.

    Raises:
        AssertionError: a check failed, or the component raised an error inside one.
    """
    kind = getattr(component, "__name__", type(component).__name__)
    # Dropout, fresh layers and the fast form of gradcheck draw from the global generators: these are put back.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        for name, check in checks.items():
            try:
                check()
            except AssertionError as error:
                raise AssertionError(f"{owner}({kind}): {name}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{owner}({kind}): {name}: raised {type(error).__name__}: {error}") from error
    return tuple(checks)


def expect(good: bool | Tensor, message: str) -> None:
    """Unlike `assert`, not switched off by `python -O`."""
    if not bool(good):
        raise AssertionError(message)


def finite(x: Tensor) -> bool:
    """No NaN and no infinity."""
    return bool(torch.isfinite(x).all())


def same(a: Tensor, b: Tensor, *, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Equal shapes, and values equal to within the tolerance; bit by bit without one."""
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=relative, atol=absolute))


def clone(value: T) -> T:
    """A copy that shares nothing, cut from the graph; takes tensors, and mappings and sequences of them."""
    if isinstance(value, Tensor):
        return value.detach().clone()  # type: ignore[return-value]  # a Tensor in, a Tensor out
    return copy.deepcopy(value)


def repickle(component: T) -> T:
    """Through bytes and back; the bytes never leave this function."""
    again: T = pickle.loads(pickle.dumps(component))
    return again


def shift_parameters(module: nn.Module) -> None:
    """Move every parameter, so that loading a state dict has something to put right."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)


def check_repr(component: nn.Module) -> None:
    """`repr` must be a call of the class, and rebuild an object of the same `repr` where its arguments are literals."""
    kind, shown = type(component), repr(component)
    try:
        call = ast.parse(shown, mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call):
        raise AssertionError(f"repr must be the call that rebuilds the object, got {shown!r}")
    expect(
        isinstance(call.func, ast.Name) and call.func.id == kind.__name__,
        f"repr must call {kind.__name__}, got {shown!r}",
    )
    literals = list(_literals(call))
    if len(literals) == len(call.args) + len(call.keywords):
        again: Any = kind(
            *[value for name, value in literals if name is None],
            **{name: value for name, value in literals if name is not None},
        )
        expect(repr(again) == shown, f"repr must rebuild the object, {shown!r} makes {again!r}")


def _literals(call: ast.Call) -> Iterator[tuple[str | None, Any]]:
    """Arguments that are plain numbers, strings, tuples and the like."""
    for name, node in [*[(None, each) for each in call.args], *[(each.arg, each.value) for each in call.keywords]]:
        try:
            yield name, ast.literal_eval(node)
        except ValueError:
            continue
