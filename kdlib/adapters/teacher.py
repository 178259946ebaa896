"""A frozen teacher model that returns named features."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable
from kdlib.adapters._checks import check_dtype
from kdlib.adapters.capture import capture, find_taps
from kdlib.adapters.tap import Tap

__all__ = ["TeacherAdapter"]


class TeacherAdapter(nn.Module):
    """A frozen model and its taps: a forward returns one detached tensor per tap.

    Every forward runs in eval mode and without gradient, whichever module `.train()` was called on, so BatchNorm
    statistics never change. The model is not registered as a submodule: a parent's `parameters()` and `state_dict()` do
    not contain it, but `.to()`, `.cuda()` and similar calls on a parent still move it.

    The adapter changes only the training flags of the model (and its type, with `dtype`); `requires_grad` is not
    touched. One model can therefore be used by several adapters, or as teacher and student at once: each forward
    restores the training flags afterwards.

    Args:
        model: any module; set to eval mode here.
        taps: as in `StudentAdapter`.
        preprocess: called first, on the student's inputs, to convert them to the teacher's size, channel order and
            normalization. Returns one tensor or a tuple. A module or a named function can be pickled, a lambda cannot.
        dtype: floating-point type to which the model and its inputs are converted; autocast is then disabled inside.
            `None` keeps both types.

    Raises:
        ValueError: a path does not exist; the nearest ones are named.
        TypeError: `dtype` is not a floating-point type, or `preprocess` is not callable.

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
        self._held = (model.eval() if dtype is None else model.eval().to(dtype), preprocess)
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

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Compute the features of one batch, detached.

        Args:
            inputs: the inputs of `preprocess`, or of the model if there is none.

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
                    prepared = preprocess(*inputs)
                    inputs = prepared if isinstance(prepared, tuple) else (prepared,)
                features = self._features(model, inputs)
        finally:
            _leave(model, training)
        return {name: tensor.detach() for name, tensor in features.items()}

    def _features(self, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        if (dtype := self.dtype) is None:
            return capture("TeacherAdapter", model, self.taps, inputs)
        inputs = tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return capture("TeacherAdapter", model, self.taps, inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        model, preprocess = self._held
        model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(preprocess, nn.Module):
            preprocess._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.dtype is not None:
            model.to(self.dtype)
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
