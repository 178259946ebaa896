"""Stage 1: a teacher as named features. Holds the user's model out of reach of training, saving and optimizers."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable, check_type
from kdlib.adapters._checks import check_dtype
from kdlib.adapters.capture import capture, find_module
from kdlib.adapters.tap import Tap, parse_taps

__all__ = ["TeacherAdapter"]


class TeacherAdapter(nn.Module):
    """A frozen model and its taps: a forward returns one detached tensor a tap.

    Frozen for good: every forward runs in eval mode and without gradient whatever `.train()` was called on, so
    that no BatchNorm statistic moves. The model is held, not registered: a parent's `parameters()` and `state_dict()`
    do not contain it, while `.to()`, `.cuda()` and their kin on a parent still move it.

    Nothing of the model but its training flags (and its type, with `dtype`) is changed; `requires_grad` is left alone.
    So one model may serve several adapters, or be teacher and student at once: a forward puts back the flags it found.

    Args:
        model: any module; put in eval mode here.
        taps: as in `StudentAdapter`.
        preprocess: called first, on what the student sees, to give the teacher its own size, channel order and
            normalization. Returns one tensor or a tuple. A module or a named function can be pickled, a lambda cannot.
        dtype: floating-point type to convert the model and its inputs to; autocast is then off inside. `None`
            leaves both as they are.

    Raises:
        ValueError: a path does not exist; the nearest ones are named.
        TypeError: `dtype` is no floating-point type, or `preprocess` is not callable.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> teacher = TeacherAdapter(model, {"embedding": "1"}, preprocess=torch.nn.functional.normalize)
        >>> teacher.train()(torch.ones(2, 4))["embedding"].requires_grad, list(teacher.state_dict())
        (False, [])
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, str | Tap],
        *,
        preprocess: Callable[..., Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_type("TeacherAdapter", "model", model, nn.Module, "a Module")
        check_dtype("TeacherAdapter", dtype)
        if preprocess is not None:
            check_callable("TeacherAdapter", "preprocess", preprocess)
        self.taps = parse_taps("TeacherAdapter", taps)
        for tap in self.taps.values():
            if tap.path is not None:
                find_module("TeacherAdapter", model, tap.path)
        self.dtype = dtype
        # In a tuple nn.Module does not see them, so parents neither train, save nor optimize them.
        if isinstance(preprocess, nn.Module):
            preprocess.eval()
        self._held = (model.eval() if dtype is None else model.eval().to(dtype), preprocess)
        self.training = False

    @property
    def model(self) -> nn.Module:
        """The user's model, the very object given."""
        return self._held[0]

    @property
    def preprocess(self) -> Callable[..., Any] | None:
        """What is called on the inputs first."""
        return self._held[1]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode` is."""
        return self

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Features of one batch, detached.

        Args:
            inputs: what `preprocess` takes, or the model if there is none.

        Returns:
            One tensor `(b, ...)` a tap, without gradient.

        Raises:
            ValueError: a tap did not fire, or fired more than once without saying which call.
        """
        model, preprocess = self._held
        compiling = torch.compiler.is_compiling()  # a trace is of one thread, and knows no lock
        awake = _sleep(model) if compiling else []
        if not compiling:
            _enter(model)
        try:
            with torch.no_grad():
                if preprocess is not None:
                    prepared = preprocess(*inputs)
                    inputs = prepared if isinstance(prepared, tuple) else (prepared,)
                features = self._features(model, inputs)
        finally:
            if compiling:
                _wake(awake)
            else:
                _leave(model)
        return {name: tensor.detach() for name, tensor in features.items()}

    def _features(self, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        dtype = self.dtype
        if dtype is None:
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


# Models that some thread is running, how many threads are, and what they will wake.
_LOCK = threading.Lock()
_RUNNING: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


def _sleep(model: nn.Module) -> list[nn.Module]:
    """Put in eval mode what somebody has set to training since, by way of the model itself; returns that."""
    awake = [module for module in model.modules() if module.training]
    for module in awake:
        module.training = False
    return awake


def _enter(model: nn.Module) -> None:
    with _LOCK:
        threads, awake = _RUNNING.get(model, (0, []))
        _RUNNING[model] = (threads + 1, awake + _sleep(model))


def _leave(model: nn.Module) -> None:
    """The last thread out wakes the model: the first would wake it while another is still running it."""
    with _LOCK:
        threads, awake = _RUNNING.pop(model)
        if threads > 1:
            _RUNNING[model] = (threads - 1, awake)
        else:
            _wake(awake)


def _wake(awake: list[nn.Module]) -> None:
    for module in awake:
        module.training = True
