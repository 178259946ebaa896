"""A teacher whose weights are the running mean of the student's."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdlib._averaging import average_into
from kdlib._checks import check_callable, check_number, check_type
from kdlib._held import move, split_inputs
from kdlib.adapters import StudentAdapter, Tap
from kdlib.adapters._checks import check_input_names
from kdlib.online._checks import check_initialized, check_same_tensors
from kdlib.types import HasTaps, Schedule, TeacherInputs

__all__ = ["EMATeacher"]

_HALF = (torch.float16, torch.bfloat16)
# Wrappers of torch.compile, DDP and activation checkpointing add these steps to the names of weights.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


class EMATeacher(nn.Module):
    r"""A copy of the student whose weights are the exponential running mean of the student's weights.

    .. math:: \theta^t \leftarrow d_n \, \theta^t + (1 - d_n) \, \theta^s, \qquad
        d_n = \min\bigl(d, \; 1 - \tfrac{1}{n + 1}\bigr)

    after step n, counted from 0, with the student's weights :math:`\theta^s`, the teacher's :math:`\theta^t` and
    `decay` d. `kdlib.train` updates the teacher after every step; a loop of your own calls
    `distiller.update_teachers()` after `optimizer.step()`.

    The teacher's weights need no gradient and are not among `Distiller.trainable_parameters()`. They are part of the
    distiller's state dict, without which a resumed run would differ. They are kept in float32 if the student is in
    float16 or bfloat16, where a mean with a decay near 1 would never change.

    Args:
        student: the student of the distiller, copied here. Load its weights first, or keep `warmup=True`, with which
            nothing is left of the copied weights after the first update.
        decay: d, from 0 (the student itself) to 1 (no change), or a schedule of the step
            as in `kdlib.schedules`.
        warmup: limit d as above, so that the teacher starts as the plain mean of the weights so far. `False` uses d
            from the first step.
        taps: as in `StudentAdapter`; `None` for the student's. Only for a student that is a `StudentAdapter`.
        always_eval: run in eval mode, with buffers such as BatchNorm's statistics averaged like weights. `False`
            follows `train()` and `eval()` of the distiller: with dropout in training, and with BatchNorm's statistics of
            the teacher's own batches.
        inputs: names of the targets that are passed in place of the inputs, such as another augmentation of the images,
            as in `TeacherAdapter`.
        preprocess: called first, on the inputs. Returns one tensor, a tuple, or a mapping of keyword arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, or a student whose weights are not
            initialized.

    Examples:
        >>> from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, Term
        >>> student = StudentAdapter(nn.Linear(4, 3), {"logits": OUTPUT})
        >>> teacher = EMATeacher(student, decay=0.99, inputs="weak")
        >>> terms = {"consistency": Term(SoftTargetLoss(), student="logits", teacher="logits")}
        >>> distiller = Distiller(student, {"ema": teacher}, Objective(terms))
        >>> optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.1)
        >>> image = torch.randn(8, 4)
        >>> distiller(image + 0.1 * torch.randn(8, 4), {"weak": image}).total.backward()
        >>> optimizer.step()
        >>> distiller.update_teachers()
        >>> torch.equal(teacher.model.weight, student.model.weight), teacher.model.weight.requires_grad
        (True, False)

    References:
        Tarvainen, Valpola, *Mean teachers are better role models*, arXiv 1703.01780. Its code runs the teacher in
        training mode, as `always_eval=False`, and limits the decay as `warmup`.
    """

    taps: Mapping[str, object]

    def __init__(
        self,
        student: nn.Module,
        decay: float | Schedule = 0.999,
        *,
        warmup: bool = True,
        taps: Mapping[str, str | Tap] | None = None,
        always_eval: bool = True,
        inputs: TeacherInputs = None,
        preprocess: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_type("EMATeacher", "student", student, nn.Module, "a Module")
        if not callable(decay):
            decay = check_number("EMATeacher", "decay", decay, min=0, max=1)
        for name, value in (("warmup", warmup), ("always_eval", always_eval)):
            check_type("EMATeacher", name, value, bool, "True or False")
        if preprocess is not None:
            check_callable("EMATeacher", "preprocess", preprocess)
        check_initialized("EMATeacher", student)
        average = copy.deepcopy(student).requires_grad_(False)
        if taps is not None:
            check_type("EMATeacher", "student", average, StudentAdapter, "a StudentAdapter if taps are given")
            average = StudentAdapter(average.model, taps)  # type: ignore[arg-type]  # checked in the line before
        self.average = average
        self._raise_precision()
        if isinstance(average, HasTaps):
            self.taps = dict(average.taps)
        self.decay, self.warmup, self.always_eval = decay, warmup, always_eval
        self.inputs = check_input_names("EMATeacher", inputs)
        self._preprocess = (preprocess,)  # not registered, in case it is a Module
        self.step = 0
        self.train(student.training)

    @property
    def model(self) -> nn.Module:
        """The averaged network, for example to evaluate or export it."""
        return self.average.model if isinstance(self.average, StudentAdapter) else self.average

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after a step, counted from 0."""
        decay = self.decay
        if callable(decay):
            decay = check_number("EMATeacher", f"decay({step})", decay(step), min=0, max=1)
        return min(decay, step / (step + 1)) if self.warmup else decay

    def update(self, student: nn.Module, *, step: int | None = None) -> None:
        """Move the weights towards those of the student, once after each step of the optimizer.

        Args:
            student: the student, with the same weights by name and shape as the one that was copied.
            step: the step, counted from 0; `None` counts the updates.

        Raises:
            ValueError: the student has other weights.
        """
        step = self.step if step is None else check_number("EMATeacher", "step", step, min=0, integer=True)
        average_into(self._pairs(student), self.decay_at(step))
        self.step = step + 1

    def _pairs(self, student: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair each weight, and in eval mode each buffer, with the student's."""
        means, values = self._tensors(self.average), self._tensors(student)
        check_same_tensors("EMATeacher", means, values)
        return ((mean, values[name]) for name, mean in means.items())

    def _tensors(self, module: nn.Module) -> dict[str, Tensor]:
        named = [*module.named_parameters(), *(module.named_buffers() if self.always_eval else ())]
        return {".".join(step for step in name.split(".") if step not in _WRAPPERS): x for name, x in named}

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Compute the features of one batch, detached.

        Args:
            inputs: the inputs of `preprocess`, or of the student if there is none.
            named: its keyword arguments.

        Returns:
            One tensor `(b, ...)` per tap, without gradient.
        """
        (preprocess,) = self._preprocess
        if preprocess is not None:
            inputs, named = split_inputs(preprocess(*inputs, **named))
        if self.always_eval and any(module.training for module in self.average.modules()):
            self.average.eval()  # train() was called on a part of the teacher
        inputs = tuple(map(self._converted, inputs))
        features = self.average(*inputs, **{name: self._converted(x) for name, x in named.items()})
        return {name: x.detach() for name, x in features.items()}

    def train(self, mode: bool = True) -> Self:
        """Follow `mode`, or stay in eval mode with `always_eval`."""
        return super().train(mode and not self.always_eval)

    @property
    def fingerprint(self) -> str:
        """The settings, which a resumed run compares; the weights change with every step."""
        decays = [self.decay_at(step) for step in (0, 1, 10, 100, 1000, 10_000)]
        return f"EMATeacher decay={decays} always_eval={self.always_eval} inputs={self.inputs}"

    def _converted(self, x: Any) -> Any:
        """Convert an input in half precision to the precision of the weights, outside of autocast."""
        if not (isinstance(x, Tensor) and x.dtype in _HALF) or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(next((each.dtype for each in self.average.parameters() if each.is_floating_point()), x.dtype))

    def _raise_precision(self) -> None:
        if any(each.dtype in _HALF for each in self.average.parameters()):
            self.average.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast of a parent to half precision does not reach the means.
        if recurse:
            move(self.average, fn)
        return self

    def get_extra_state(self) -> Tensor:
        """Return the number of updates."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the number of updates."""
        self.step = int(state)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *lists: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        missing[:] = [key for key in missing if key != f"{prefix}_extra_state"]  # weights alone are complete

    def extra_repr(self) -> str:
        options = [f"decay={self.decay!r}", f"warmup={self.warmup}", f"always_eval={self.always_eval}"]
        options += [f"inputs={self.inputs!r}"] if self.inputs else []
        return ", ".join(options)
