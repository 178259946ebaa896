"""A frozen teacher model that returns named features."""

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable
from kdlib._held import map_tensors, move, move_tensors, split_inputs, tensors_in
from kdlib._maths import full_precision
from kdlib.adapters._checks import (
    check_device,
    check_dtype,
    check_eval_taps,
    check_exported_for_inference,
    check_input_names,
)
from kdlib.adapters.capture import capture, find_taps
from kdlib.adapters.tap import TapSpec, taps_in
from kdlib.types import TeacherInputs

__all__ = ["TeacherAdapter"]


class TeacherAdapter(nn.Module):
    """A frozen model and its taps: a forward returns one detached tensor per tap.

    Every forward runs in eval mode and without gradient, whichever module `.train()` was called on, so BatchNorm
    statistics never change. The model is not registered as a submodule: a parent's `parameters()` and `state_dict()` do
    not contain it. `.to()`, `.cuda()` and similar calls on a parent move it to another device, unless `device` is given;
    a cast by a parent applies only if it keeps every value, as `.double()` does and `.half()` does not, and
    `to_empty()` has no effect.

    The adapter changes only the training flags of the model (and its device and type, with `device` and `dtype`);
    `requires_grad` is not touched. One model can therefore be used by several adapters, or as teacher and student at once: each forward
    restores the training flags afterwards.

    Args:
        model: any module; set to eval mode here.
        taps: as in `StudentAdapter`; of taps by mode, those of eval mode.
        inputs: targets that a `Distiller` passes in place of the inputs of the batch, such as a view of the teacher's own:
            the name of an entry that is a tensor, a tuple or a mapping as inputs are; a sequence of names, for
            positional arguments; or a mapping of keyword argument to name. `None` reads the inputs of the batch.
        preprocess: called first, on what is read, to convert it to the teacher's size, channel order and normalization.
            Returns one tensor, a tuple, or a mapping of keyword arguments. A module or a named function can be pickled,
            a lambda cannot.
        device: where the model and a `preprocess` that is a module stay, whatever their parents are moved to. Inputs
            are brought there, and features are returned on the device of the inputs. `None` lets the teacher move with
            its parents.
        dtype: floating-point type to which the model and its inputs are converted; autocast is then disabled inside.
            `None` keeps the type of the model, to which floating-point inputs are converted outside of autocast.

    Raises:
        ValueError: a path does not exist; the nearest ones are named.
        TypeError: `inputs` are not names, `device` is not a device, `dtype` is not a floating-point type, or `preprocess`
            is not callable.
        ValueError: a feature has no tap in eval mode, or `inputs` names nothing.
        ValueError: the model was exported by `torch.export` in training mode.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> teacher = TeacherAdapter(model, {"embedding": "1"}, preprocess=torch.nn.functional.normalize)
        >>> teacher.train()(torch.ones(2, 4))["embedding"].requires_grad, list(teacher.state_dict())
        (False, [])
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, TapSpec],
        *,
        inputs: TeacherInputs = None,
        preprocess: Callable[..., Any] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        found = find_taps("TeacherAdapter", model, taps)
        self.taps = taps_in(found, training=False)
        check_eval_taps("TeacherAdapter", found, self.taps)
        check_dtype("TeacherAdapter", dtype)
        self.inputs = check_input_names("TeacherAdapter", inputs)
        self.device = check_device("TeacherAdapter", device)
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
        if self.device is not None and isinstance(preprocess, nn.Module):
            preprocess.to(self.device)
        if self.device is not None or dtype is not None:  # a quantized model refuses any call of to()
            model.to(device=self.device, dtype=dtype)
        self._held = (model, preprocess)
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
            One tensor `(b, ...)` per tap, without gradient. With `device`, on the device of the first input.

        Raises:
            ValueError: a tap did not fire, or fired more than once without choosing a call.
        """
        model, preprocess = self._held
        devices = [] if self.device is None else [x.device for x in tensors_in((inputs, named))]
        home = devices[0] if devices else None
        training = _enter(model)
        try:
            with torch.no_grad():
                inputs, named = self._brought(inputs), self._brought(named)
                if preprocess is not None:
                    inputs, named = split_inputs(preprocess(*inputs, **named))
                    inputs, named = self._brought(inputs), self._brought(named)  # it may create tensors of its own
                features = self._features(model, inputs, named)
        finally:
            _leave(model, training)
        return {name: x.detach() if home is None else move_tensors(x.detach(), home) for name, x in features.items()}

    def _brought(self, value: Any) -> Any:
        return value if self.device is None else move_tensors(value, self.device)

    def _features(self, model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = [*tensors_in((inputs, named))]
        example = tensors[0] if tensors else torch.empty(0)
        kind = example.device.type
        with full_precision(example) if self.dtype is not None else nullcontext():
            has_autocast = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)  # as in `full_precision`
            if not (has_autocast and torch.is_autocast_enabled(kind)):
                inputs, named = map_tensors(inputs, self._converted), map_tensors(named, self._converted)
            return capture("TeacherAdapter", model, self.taps, inputs, named)

    def _converted(self, x: Tensor) -> Tensor:
        """Convert a floating-point tensor to `dtype`; without one, to the first type of the weights if none is equal."""
        if not x.is_floating_point():
            return x
        if self.dtype is not None:
            return x.to(self.dtype)
        first: torch.dtype | None = None
        for each in self.model.parameters():
            if each.dtype == x.dtype:
                return x
            if first is None and each.is_floating_point():
                first = each.dtype
        return x if first is None else x.to(first)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        for module in self._held if recurse else ():
            if isinstance(module, nn.Module):
                move(module, fn, cast=self.dtype is None, stay=self.device is not None)
        return self

    def extra_repr(self) -> str:
        device = None if self.device is None else str(self.device)
        given = {"inputs": self.inputs, "preprocess": self.preprocess, "device": device, "dtype": self.dtype}
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
        return f"{type(self.model).__name__}, taps={self.taps}{options}"


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
