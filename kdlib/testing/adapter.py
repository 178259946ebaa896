"""Contract checks of an adapter."""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib._held import split_inputs, tensors_in
from kdlib.adapters import StudentAdapter, TeacherAdapter
from kdlib.testing._meta import expect_meta, on_meta, to_meta
from kdlib.testing._run import Case, clone, expect, run
from kdlib.types import HasTaps

__all__ = ["ADAPTER_CHECKS", "check_adapter"]

ADAPTER_CHECKS = (
    "deepcopy", "names", "no_hooks", "deterministic", "inputs_unchanged", "on_meta", "pickle", "gradient", "state_dict",
    "frozen_mode", "no_gradient", "statistics", "left_out",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""

_STUDENT = ("gradient", "state_dict")
_TEACHER = ("frozen_mode", "no_gradient", "statistics", "left_out")


def check_adapter(
    adapter: nn.Module, *inputs: Any, teacher: bool | None = None, exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """Check an adapter against the contract of this library.

    - `names`: returns a mapping of names to tensors, with the names of its `taps` if it declares them.
    - `no_hooks`: no hook is left on any module, also after a forward that failed.
    - `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`: in eval mode the same features twice, and after a copy.
    - `on_meta`: on the meta device features of the same shapes, so nothing is read from the device or stays on the CPU.
    - For a student: `gradient`, the gradient of the features reaches its parameters; `state_dict`, loading it restores
      the features.
    - For a teacher: `frozen_mode`, `train()` on a parent, on itself or on its model changes no feature; `no_gradient`,
      no feature requires a gradient; `statistics`, no buffer changes, such as those of batch norm; `left_out`, a
      parent's parameters and state dict contain none of it.

    Args:
        adapter: called as `adapter(*inputs)`.
        inputs: one batch: positional arguments, or a single mapping of keyword arguments; tensors are copied.
        teacher: whether it is frozen; `None` for whether it is a `TeacherAdapter`.
        exclude: names of checks to skip.

    Returns:
        The names of the checks that ran.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> ran = check_adapter(StudentAdapter(nn.Linear(4, 2), {"out": OUTPUT}), torch.rand(3, 4))
        >>> "gradient" in ran, "statistics" in ran
        (True, False)
    """
    check_type("check_adapter", "adapter", adapter, nn.Module, "a Module")
    if teacher is None:
        teacher = isinstance(adapter, TeacherAdapter)
    case = _AdapterCase(adapter, *split_inputs(inputs[0] if len(inputs) == 1 else inputs))
    return run("check_adapter", case, ADAPTER_CHECKS, exclude, _STUDENT if teacher else _TEACHER)


@dataclass
class _AdapterCase(Case):
    component: nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]

    def call(self, component: Any) -> Mapping[str, Tensor]:
        features: Mapping[str, Tensor] = component(*clone(self.inputs), **clone(self.named))
        return features

    def output(self, component: Any) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {name: clone(x) for name, x in self.call(component.eval()).items()}

    def parameters(self, component: Any) -> Iterable[nn.Parameter]:
        return _model(component).parameters()

    def names(self) -> None:
        features = self.call(self.fresh())
        expect(isinstance(features, Mapping), f"must return named features, got {type(features).__name__}")
        for name, x in features.items():
            expect(isinstance(name, str), f"names of features must be strings, got {name!r}")
            expect(isinstance(x, Tensor), f"feature {name!r} must be a tensor, got {type(x).__name__}")
        if isinstance(self.component, HasTaps):
            taps = list(self.component.taps)
            expect(set(features) == set(taps), f"must return the features {taps}, got {list(features)}")

    def no_hooks(self) -> None:
        adapter = self.fresh()
        before = _hooks(adapter)
        self.call(adapter)
        expect(_hooks(adapter) == before, f"a forward must leave no hook, got {_hooks(adapter) - before} more")
        with contextlib.suppress(Exception):
            adapter(object())  # an invalid input for any model
        expect(_hooks(adapter) == before, f"a failing forward left {_hooks(adapter) - before} hooks")

    def inputs_unchanged(self) -> None:
        inputs, named = clone(self.inputs), clone(self.named)
        with torch.no_grad():
            self.fresh()(*inputs, **named)
        pairs = zip(tensors_in((inputs, named)), tensors_in((self.inputs, self.named)), strict=True)
        for index, (x, original) in enumerate(pairs):
            expect(torch.equal(x, original), f"must not change its inputs, changed {index}")

    def on_meta(self) -> None:
        shapes = {name: x.shape for name, x in self.output(self.fresh()).items()}
        adapter, (inputs, named) = to_meta(self.fresh()).eval(), to_meta((self.inputs, self.named))
        with on_meta(), torch.no_grad():
            for name, x in adapter(*inputs, **named).items():
                expect_meta(f"feature {name!r}", x, shapes[name])

    def gradient(self) -> None:
        adapter = self.fresh()
        features = self.call(adapter)
        torch.autograd.backward([x.float().square().sum() for x in features.values() if x.is_floating_point()])
        reached = any(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
        expect(reached, "the gradient of the features must reach the student's parameters")

    def frozen_mode(self) -> None:
        adapter = self.fresh()
        with torch.no_grad():
            wanted = {name: clone(x) for name, x in self.call(adapter).items()}
            for what, module in [
                ("its parent", nn.ModuleDict({"teacher": adapter})),
                ("itself", adapter),
                ("its model", _model(adapter)),
            ]:
                module.train()
                self.expect_equal(f"after train() on {what}, a teacher", wanted, self.call(adapter))
        expect(not adapter.training, "a teacher must stay in eval mode")

    def no_gradient(self) -> None:
        inputs, named = clone(self.inputs), clone(self.named)
        for x in tensors_in((inputs, named)):
            if x.is_floating_point():
                x.requires_grad_()
        for name, x in self.fresh()(*inputs, **named).items():
            expect(not x.requires_grad, f"feature {name!r} of a teacher must carry no gradient; detach it")

    def statistics(self) -> None:
        adapter = self.fresh()
        model = _model(adapter)
        before = {name: clone(x) for name, x in model.named_buffers()}
        nn.ModuleDict({"teacher": adapter}).train()
        with torch.no_grad():
            self.call(adapter)
        for name, x in model.named_buffers():
            expect(torch.equal(x, before[name]), f"a teacher's statistics must never change, buffer {name!r} did")

    def left_out(self) -> None:
        parent = nn.ModuleDict({"teacher": self.fresh()})
        expect(not list(parent.parameters()), "a parent's parameters must contain none of a teacher")
        names = list(parent.state_dict())
        expect(not names, f"a parent's state dict must contain no weights of a teacher, got {names[:3]}")


def _model(adapter: nn.Module) -> nn.Module:
    """Return the model inside an adapter of this library, which a teacher does not register; else the adapter."""
    return adapter.model if isinstance(adapter, (StudentAdapter, TeacherAdapter)) else adapter


def _hooks(adapter: nn.Module) -> int:
    """Count the hooks on the adapter and on its model."""
    modules = {*adapter.modules(), *_model(adapter).modules()}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in modules for kind in kinds)
