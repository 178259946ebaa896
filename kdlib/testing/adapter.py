"""Contracts: what every adapter must keep. Runs the adapter's model on copies of the inputs that the user gives."""

import contextlib
import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib.adapters import TeacherAdapter
from kdlib.testing._checks import check_exclude
from kdlib.testing._run import clone, expect, repickle, run, same, shift_parameters

__all__ = ["ADAPTER_CHECKS", "check_adapter"]

ADAPTER_CHECKS = (
    "deepcopy", "names", "no_hooks", "no_hooks_after_error", "deterministic", "inputs_unchanged", "pickle", "gradient",
    "state_dict", "frozen_mode", "no_gradient", "statistics", "left_out",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""

_STUDENT = ("gradient", "state_dict")
_TEACHER = ("frozen_mode", "no_gradient", "statistics", "left_out")


def check_adapter(
    adapter: nn.Module, *inputs: Any, teacher: bool | None = None, exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """Hold an adapter to the contract of this library.

    - `names`: a mapping of names to tensors, of the names in its `taps` if it has that attribute.
    - `no_hooks`, `no_hooks_after_error`: none left on any module, also after a forward that failed.
    - `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`: in eval mode the same features twice, and after a copy.
    - Of a student: `gradient`, that of the features reaches its parameters; `state_dict`, loading it strictly restores
      the features.
    - Of a teacher: `frozen_mode`, `train()` on a parent, on itself or on its model changes no feature; `no_gradient`;
      `statistics`, no buffer moves, such as those of batch norm; `left_out`, a parent has neither its parameters nor its
      weights in the state dict.

    Every check works on a copy of the adapter.

    Args:
        adapter: called as `adapter(*inputs)`.
        inputs: one batch; tensors are copied.
        teacher: whether it is frozen; `None` for whether it is a `TeacherAdapter`.
        exclude: names of checks to leave out.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: a check failed.
        ValueError, TypeError: an adapter that is no Module, or an unknown name in `exclude`.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> ran = check_adapter(StudentAdapter(nn.Linear(4, 2), {"out": OUTPUT}), torch.rand(3, 4))
        >>> "gradient" in ran, "statistics" in ran
        (True, False)
    """
    check_exclude("check_adapter", exclude, ADAPTER_CHECKS)
    check_type("check_adapter", "adapter", adapter, nn.Module, "a Module")
    if teacher is None:
        teacher = isinstance(adapter, TeacherAdapter)
    case = _Case(adapter, tuple(clone(x) for x in inputs))
    left_out = {*exclude, *(_STUDENT if teacher else _TEACHER)}
    checks = {name: getattr(case, name) for name in ADAPTER_CHECKS if name not in left_out}
    return run("check_adapter", adapter, checks)


@dataclass
class _Case:
    """An adapter and the inputs it is tried on; one method a check."""

    adapter: nn.Module
    inputs: tuple[Any, ...]

    def fresh(self) -> Any:
        return copy.deepcopy(self.adapter)

    def features(self, adapter: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: clone(x) for name, x in adapter(*(clone(x) for x in self.inputs)).items()}

    def equal(self, what: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        expect(list(got) == list(wanted), f"{what}: must give the features {list(wanted)}, got {list(got)}")
        for name, x in wanted.items():
            expect(same(got[name], x), f"{what}: feature {name!r} must stay the same")

    def deepcopy(self) -> None:
        one, two = self.fresh().eval(), self.fresh().eval()
        self.equal("a deepcopy", self.features(two), self.features(one))
        models = [getattr(each, "model", each) for each in (self.adapter, one)]
        own, copied = ({id(x) for x in each.parameters()} for each in models)
        expect(not own & copied, "a deepcopy must not share its parameters")

    def names(self) -> None:
        features = self.fresh()(*self.inputs)
        expect(isinstance(features, Mapping), f"must return named features, got {type(features).__name__}")
        for name, x in features.items():
            expect(isinstance(name, str), f"names of features must be strings, got {name!r}")
            expect(isinstance(x, Tensor), f"feature {name!r} must be a tensor, got {type(x).__name__}")
        taps = getattr(self.adapter, "taps", None)
        if taps is not None:
            expect(set(features) == set(taps), f"must return the features {list(taps)}, got {list(features)}")

    def no_hooks(self) -> None:
        adapter = self.fresh()
        before = _hooks(adapter)
        adapter(*self.inputs)
        expect(_hooks(adapter) == before, f"a forward must leave no hook behind, got {_hooks(adapter) - before} more")

    def no_hooks_after_error(self) -> None:
        adapter = self.fresh()
        before = _hooks(adapter)
        with contextlib.suppress(Exception):
            adapter(object())  # which no model takes
        expect(_hooks(adapter) == before, f"a failing forward left {_hooks(adapter) - before} hooks behind")

    def deterministic(self) -> None:
        adapter = self.fresh().eval()
        self.equal("a second forward", self.features(adapter), self.features(adapter))

    def inputs_unchanged(self) -> None:
        given = tuple(clone(x) for x in self.inputs)
        with torch.no_grad():
            self.fresh()(*given)
        for index, (x, kept) in enumerate(zip(given, self.inputs, strict=True)):
            expect(not isinstance(x, Tensor) or torch.equal(x, kept), f"must leave its inputs alone, changed {index}")

    def pickle(self) -> None:
        adapter = self.fresh().eval()
        self.equal("through pickle", self.features(repickle(adapter).eval()), self.features(adapter))

    def gradient(self) -> None:
        adapter = self.fresh()
        features = adapter(*self.inputs)
        sum(x.float().square().sum() for x in features.values() if x.is_floating_point()).backward()
        expect(
            any(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters()),
            "the gradient of the features must reach the student's parameters",
        )

    def state_dict(self) -> None:
        adapter, other = self.fresh().eval(), self.fresh().eval()
        shift_parameters(other)
        other.load_state_dict(copy.deepcopy(adapter.state_dict()))
        self.equal("a loaded state dict", self.features(other), self.features(adapter))

    def frozen_mode(self) -> None:
        adapter = self.fresh()
        wanted = self.features(adapter)
        parent = nn.ModuleDict({"teacher": adapter})
        for what, module in [
            ("its parent", parent),
            ("itself", adapter),
            ("its model", getattr(adapter, "model", None)),
        ]:
            if module is not None:
                module.train()
                self.equal(f"after train() on {what}", self.features(adapter), wanted)
        expect(not adapter.training, "a teacher must stay in eval mode")

    def no_gradient(self) -> None:
        adapter = self.fresh()
        inputs = [clone(x) for x in self.inputs]
        for x in inputs:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        for name, x in adapter(*inputs).items():
            expect(not x.requires_grad, f"feature {name!r} of a teacher must carry no gradient; detach it")

    def statistics(self) -> None:
        adapter = self.fresh()
        model = getattr(adapter, "model", adapter)
        before = {name: clone(x) for name, x in model.named_buffers()}
        nn.ModuleDict({"teacher": adapter}).train()
        for _ in range(2):
            self.features(adapter)
        for name, x in model.named_buffers():
            expect(torch.equal(x, before[name]), f"a teacher's statistics must never move, buffer {name!r} did")

    def left_out(self) -> None:
        parent = nn.ModuleDict({"teacher": self.fresh()})
        expect(not list(parent.parameters()), "a parent's parameters must contain none of a teacher")
        expect(
            not parent.state_dict(),
            f"a teacher's weights must be in no state dict, got {list(parent.state_dict())[:3]}",
        )


def _hooks(adapter: nn.Module) -> int:
    """Hooks on the adapter and on the model in it, registered or held."""
    held = getattr(adapter, "model", None)
    modules = {*adapter.modules(), *(held.modules() if isinstance(held, nn.Module) else ())}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in modules for kind in kinds)
