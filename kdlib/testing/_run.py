"""Running of contract checks, and the checks that all components share."""

import ast
import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_name
from kdlib._held import map_tensors, tensors_in

__all__ = ["Case", "clone", "expect", "finite", "run", "same"]

T = TypeVar("T")


class Case(ABC):
    """A component and the checks that all kinds of components share; one method per check."""

    component: Callable[..., Any]

    def fresh(self) -> Any:
        """Return a copy of the component: a component with a state starts anew in each check."""
        return copy.deepcopy(self.component)

    @abstractmethod
    def output(self, component: Any) -> Mapping[str, Tensor]:
        """Return named tensors of one deterministic call."""

    def use(self, component: Any) -> None:
        """Call the component so that it changes its state."""
        self.output(component)

    def parameters(self, component: Any) -> Iterable[nn.Parameter]:
        """Return the parameters that a deepcopy must not share."""
        return component.parameters() if isinstance(component, nn.Module) else ()

    def expect_equal(self, what: str, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
        """Compare the outputs of two calls bit by bit."""
        expect(list(one) == list(two), f"{what} must return {list(one)}, got {list(two)}")
        for name, x in one.items():
            expect(same(x, two[name]), f"{what} must return the same {name}, got {two[name]} for {x}")

    def deepcopy(self) -> None:
        one, two = self.fresh(), self.fresh()
        shared = {id(x) for x in self.parameters(self.component)} & {id(x) for x in self.parameters(one)}
        expect(not shared, "a deepcopy must not share its parameters")
        for _ in range(3):
            self.expect_equal("a deepcopy", self.output(one), self.output(two))

    def deterministic(self) -> None:
        self.expect_equal("a second call", self.output(self.fresh()), self.output(self.fresh()))

    def pickle(self) -> None:
        used = self.fresh()
        self.use(used)
        self.expect_equal("a pickled copy", self.output(pickle.loads(pickle.dumps(used))), self.output(used))

    def state_dict(self) -> None:
        used, other = self.fresh(), self.fresh()
        self.use(used)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)  # so that loading has something to restore
        other.load_state_dict(copy.deepcopy(used.state_dict()))
        self.expect_equal("a component with a loaded state dict", self.output(used), self.output(other))

    def repr(self) -> None:
        """`repr` must be a call of the class; if all arguments are literals, the call must rebuild the same `repr`."""
        text = repr(self.component)
        kind: type[Any] = type(self.component)
        try:
            call = ast.parse(text, mode="eval").body
        except SyntaxError:
            call = None
        if not isinstance(call, ast.Call):
            raise AssertionError(f"repr must be the call that rebuilds the object, got {text!r}")
        named = isinstance(call.func, ast.Name) and call.func.id == kind.__name__
        expect(named, f"repr must call {kind.__name__}, got {text!r}")
        try:
            positional = [ast.literal_eval(each) for each in call.args]
            options = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        except ValueError:
            return
        again = kind(*positional, **options)
        expect(repr(again) == text, f"repr must rebuild the object, {text!r} makes {again!r}")


def run(
    owner: str, case: Case, names: Iterable[str], exclude: Collection[str], left_out: Collection[str] = ()
) -> tuple[str, ...]:
    """Run the checks `names` without those in `exclude` or `left_out`; return what ran, or list all that failed."""
    for name in exclude:  # a misspelled name would exclude nothing
        check_name(owner, "check", name, names)
    kind = getattr(case.component, "__name__", type(case.component).__name__)
    names = tuple(name for name in names if name not in {*exclude, *left_out})
    failed: dict[str, list[str]] = {}  # message to checks
    errors: list[Exception] = []
    # Dropout, new layers and the fast form of gradcheck use the global generators, whose states are restored.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        for name in names:
            try:
                getattr(case, name)()
            except Exception as error:
                errors.append(error)
                text = str(error) if isinstance(error, AssertionError) else f"raised {type(error).__name__}: {error}"
                failed.setdefault(text, []).append(name)
    if failed:
        lines = [f"{', '.join(checks)}: {text}" for text, checks in failed.items()]
        title = "" if len(lines) == 1 else f"{len(errors)} of {len(names)} checks failed\n  "
        cause = errors[0] if len(errors) == 1 else ExceptionGroup("failed checks", errors)
        raise AssertionError(f"{owner}({kind}): {title}" + "\n  ".join(lines)) from cause
    return names


def expect(condition: bool | Tensor, message: str) -> None:
    """Raise `AssertionError` unless `condition` holds; unlike `assert`, also under `python -O`."""
    if not bool(condition):
        raise AssertionError(message)


def finite(x: Tensor) -> bool:
    """Return whether all values are finite."""
    return bool(torch.isfinite(x).all())


def same(a: Tensor, b: Tensor, *, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Return whether shapes are equal and values are equal within the tolerance, by default exactly."""
    return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=relative, atol=absolute))


def clone(value: T) -> T:
    """Return a deep copy of a value whose tensors are detached."""
    if isinstance(value, Tensor):
        return value.detach().clone()  # type: ignore[return-value]  # a Tensor in, a Tensor out
    if tensors_in(value):
        copied: T = map_tensors(value, clone)
        return copied
    return copy.deepcopy(value)
