"""A frozen teacher model that returns named features."""

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable
from kdlib._held import move, split_inputs
from kdlib._maths import full_precision
from kdlib.adapters._checks import check_dtype, check_exported_for_inference
from kdlib.adapters.capture import capture, find_taps
from kdlib.adapters.tap import Tap

__all__ = ["TeacherAdapter"]


class TeacherAdapter(nn.Module):
    """A frozen model and its taps: a forward returns one detached tensor per tap.

    Every forward runs in eval mode and without gradient, whichever module `.train()` was called on, so BatchNorm
    statistics never change. The model is not registered as a submodule: a parent's `parameters()` and `state_dict()` do
    not contain it. `.to()`, `.cuda()` and similar calls on a parent move it to another device; a cast by a parent
    applies only if it keeps every value, as `.double()` does and `.half()` does not, and `to_empty()` has no effect.

    The adapter changes only the training flags of the model (and its type, with `dtype`); `requires_grad` is not
    touched. One model can therefore be used by several adapters, or as teacher and student at once: each forward
    restores the training flags afterwards.

    Args:
        model: any module; set to eval mode here.
        taps: as in `StudentAdapter`.
        preprocess: called first, on the student's inputs, to convert them to the teacher's size, channel order and
            normalization. Returns one tensor, a tuple, or a mapping of keyword arguments. A module or a named function
            can be pickled, a lambda cannot.
        dtype: floating-point type to which the model and its inputs are converted; autocast is then disabled inside.
            `None` keeps the type of the model, to which floating-point inputs are converted outside of autocast.

    Raises:
        ValueError: a path does not exist; the nearest ones are named.
        TypeError: `dtype` is not a floating-point type, or `preprocess` is not callable.
        ValueError: the model was exported by `torch.export` in training mode.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> teacher = TeacherAdapter(model, {"embedding": "1"}, preprocess=torch.nn.functional.normalize)
        >>> teacher.train()(torch.ones(2, 4))["embedding"].requires_grad, list(teacher.state_dict())
        (False, [])
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the targets passed in place of the inputs: none."""

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, str | Tap],
        *,
        preprocess: Callable[..., Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.taps = find_taps("TeacherAdapter", model, taps)
        check_dtype("TeacherAdapter", dtype)
        if preprocess is not None:
            check_callable("TeacherAdapter", "preprocess", preprocess)
        self.dtype = dtype
        # nn.Module does not register the contents of a tuple, so parents neither train, save nor optimize them.
        if isinstance(preprocess, nn.Module):
            preprocess.eval()
        try:
            model.eval()
        except NotImplementedError:  # a module of torch.export, whose mode is part of its graph
            check_exported_for_inference("TeacherAdapter", model)
        self._held = (model if dtype is None else model.to(dtype), preprocess)
        self.training = False

    @property
    def model(self) -> nn.Module:
        """The model that was passed in."""
        return self._held[0]

    @property
    def preprocess(self) -> Callable[..., Any] | None:
        """The function that is called on the inputs first."""
        return self._held[1]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode and ignore `mode`."""
        return self

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Compute the features of one batch, detached.

        Args:
            inputs: the inputs of `preprocess`, or of the model if there is none.
            named: its keyword arguments.

        Returns:
            One tensor `(b, ...)` per tap, without gradient.

        Raises:
            ValueError: a tap did not fire, or fired more than once without choosing a call.
        """
        model, preprocess = self._held
        training = _enter(model)
        try:
            with torch.no_grad():
                if preprocess is not None:
                    inputs, named = split_inputs(preprocess(*inputs, **named))
                features = self._features(model, inputs, named)
        finally:
            _leave(model, training)
        return {name: tensor.detach() for name, tensor in features.items()}

    def _features(self, model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Tensor]:
        example = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), torch.empty(0))
        kind = example.device.type
        with full_precision(example) if self.dtype is not None else nullcontext():
            if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
                inputs = tuple(self._converted(x) for x in inputs)
                named = {name: self._converted(x) for name, x in named.items()}
            return capture("TeacherAdapter", model, self.taps, inputs, named)

    def _converted(self, x: Any) -> Any:
        """Convert a floating-point tensor to `dtype`; without one, to the first type of the weights if none is equal."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if self.dtype is not None:
            return x.to(self.dtype)
        types = (each.dtype for each in self.model.parameters() if each.is_floating_point())
        first = next(types, x.dtype)
        return x if x.dtype == first or x.dtype in types else x.to(first)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        for module in self._held if recurse else ():
            if isinstance(module, nn.Module):
                move(module, fn, cast=self.dtype is None)
        return self

    def extra_repr(self) -> str:
        preprocess = "" if self.preprocess is None else f", preprocess={self.preprocess!r}"
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"{type(self.model).__name__}, taps={self.taps}{preprocess}{dtype}"


# For each model that some thread is running: the number of threads, and the modules to set back to training mode.
_LOCK = threading.Lock()
_RUNNING: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


def _set_eval(model: nn.Module) -> list[nn.Module]:
    """Set training submodules to eval mode and return them."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    return training


def _enter(model: nn.Module) -> list[nn.Module]:
    if torch.compiler.is_compiling():  # torch.compile traces one thread and cannot trace a lock
        return _set_eval(model)
    with _LOCK:
        threads, training = _RUNNING.get(model, (0, []))
        _RUNNING[model] = (threads + 1, training + _set_eval(model))
    return []


def _leave(model: nn.Module, training: list[nn.Module]) -> None:
    """Restore the training flags when the last thread leaves: another thread may still be running the model."""
    if not torch.compiler.is_compiling():
        with _LOCK:
            threads, held = _RUNNING.pop(model)
            if threads > 1:
                _RUNNING[model] = (threads - 1, held)
            else:
                training = held
    for module in training:
        module.training = True
