"""The single contract checks of a loss."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partialmethod
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from kdlib.testing._meta import expect_meta, on_meta, to_meta
from kdlib.testing._run import Case, clone, expect, finite, same

__all__ = ["LossCase", "pack", "unpack"]


@dataclass
class LossCase(Case):
    """A loss and example tensors; one method per check.

    Args:
        copies: whether the loss can be copied.
        weights: whether the loss accepts `weight=`.
        layers: shapes of one sample of each layer, of the student and of the teacher, for a loss of lists; `student`
            and `teacher` then hold the values of all layers, `(b, n)`.
    """

    component: Callable[..., Tensor]
    student: Tensor
    teacher: Tensor
    target: Tensor | None
    per_sample: bool | None
    copies: bool
    weights: bool
    layers: tuple[Sequence[torch.Size] | None, Sequence[torch.Size] | None] = (None, None)

    def fresh(self, dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
        loss = copy.deepcopy(self.component) if self.copies else self.component
        return loss.to(dtype) if dtype is not None and isinstance(loss, nn.Module) else loss

    def output(self, component: Any) -> Mapping[str, Tensor]:
        return {"value": self.value(loss=component).detach()}

    def value(
        self,
        student: Tensor | None = None,
        teacher: Tensor | None = None,
        *,
        rows: Any = slice(None),
        loss: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        student = self.student if student is None else student
        teacher = self.teacher if teacher is None else teacher
        if self.target is not None:
            options["target"] = self.target[rows]
        result = self.call(self.fresh() if loss is None else loss, student[rows], teacher[rows], **options)
        expect(isinstance(result, Tensor), f"must return a tensor, got {type(result).__name__}")
        return result

    def call(self, loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        """Call the loss with tensors, or with lists of tensors if it compares several layers."""
        return loss(*(unpack(x, shapes) for x, shapes in zip((student, teacher), self.layers, strict=True)), **options)

    def gradient(self, what: str, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Return value and gradient, checked to be finite."""
        student = clone(student).requires_grad_()
        loss = options.pop("loss", None) or self.fresh()
        value = self.value(student, teacher, loss=loss, **options)
        expect(finite(value), f"{what}: the value must be finite, got {value.tolist()}")
        expect(value.requires_grad, f"{what}: the value must be on the graph of the student")
        value.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = {"the student": student.grad}
        if isinstance(loss, nn.Module):
            gradients.update({name: parameter.grad for name, parameter in loss.named_parameters()})
        for name, gradient in gradients.items():
            bad = 0 if gradient is None else int((~torch.isfinite(gradient)).sum())
            expect(bad == 0, f"{what}: the gradient of {name} must be finite, got {bad} NaN or infinite values")
        return value.detach(), torch.zeros_like(student) if student.grad is None else student.grad

    def accepts_none(self) -> bool:
        """Return whether a loss that does not declare it has a per-sample form."""
        try:
            return self.value(reduction="none").dim() == 1
        except Exception:  # the checks describe it
            return False

    def deepcopy(self) -> None:
        super().deepcopy()
        other = copy.deepcopy(self.component)
        self.expect_equal("a deepcopy", self.output(self.component), self.output(other))

    def scalar(self) -> None:
        value = self.value()
        scalar = value.dim() == 0 and value.is_floating_point()
        expect(scalar, f"must return a floating-point scalar, got {value.dtype} {tuple(value.shape)}")
        expect(finite(value), f"must be finite, got {value.item()}")
        expect(value.dtype == torch.float32, f"must be float32 for float32, got {value.dtype}")

    def student_gradient(self) -> None:
        _, gradient = self.gradient("float32", self.student, self.teacher)
        expect(gradient.any(), "a gradient must reach the student, got none or zeros")

    def teacher_gradient(self) -> None:
        student, teacher = clone(self.student).requires_grad_(), clone(self.teacher).requires_grad_()
        self.value(student, teacher).backward()  # type: ignore[no-untyped-call]  # likewise
        expect(teacher.grad is None, "no gradient may reach the teacher; detach it")

    def reduction_none(self) -> None:
        if self.per_sample:
            got, wanted = tuple(self.value(reduction="none").shape), (self.student.shape[0],)
            expect(got == wanted, f"'none' must give (b,) = {wanted}, got {got}")
            return
        try:
            value = self.value(reduction="none")
        except ValueError:
            return
        raise AssertionError(
            f"without a per-sample form reduction='none' must raise a ValueError, got a tensor of shape {tuple(value.shape)}"
        )

    def mean_of_none(self) -> None:
        self._expect_close("the mean of 'none'", self.value(reduction="mean"), self.value(reduction="none").mean())

    def weighted_mean(self) -> None:
        weight = self._increasing_weight()
        values = self.value(reduction="none")
        self._expect_close("sum(w * l) / sum(w)", self.value(weight=weight), (weight * values).sum() / weight.sum())
        self._expect_close("w * l for 'none'", self.value(weight=weight, reduction="none"), weight * values)

    def weight_ones(self) -> None:
        ones = torch.ones_like(self._increasing_weight())
        self._expect_close("the value without weights", self.value(weight=ones), self.value())

    def weight_scale(self) -> None:
        weight = self._increasing_weight()
        self._expect_close("the value for weights / 8", self.value(weight=8 * weight), self.value(weight=weight))

    def _increasing_weight(self) -> Tensor:
        return torch.linspace(0.5, 2.0, self.student.shape[0]).to(self.student)

    def _expect_close(self, what: str, value: Tensor, wanted: Tensor) -> None:
        close = same(value, wanted, relative=1e-4, absolute=1e-6)
        expect(close, f"must equal {what}, {wanted.tolist()}, got {value.tolist()}")

    def weight_zero_masks(self) -> None:
        student, teacher = self.student.double(), self.teacher.double()
        kept = torch.arange(student.shape[0], device=student.device) % 3 != 1
        weight = kept.to(student.dtype)
        loss = self.fresh(torch.float64)
        wanted = self.value(student, teacher, rows=kept, loss=copy.deepcopy(loss) if self.copies else loss)
        value, gradient = self.gradient("with zeros among the weights", student, teacher, weight=weight, loss=loss)
        close = same(value, wanted, relative=1e-6, absolute=1e-9)
        expect(close, f"must equal the value without the samples of weight 0, {wanted.item()}, got {value.item()}")
        expect(not gradient[~kept].any(), "a sample of weight 0 must get no gradient")

    def weight_all_zero(self) -> None:
        weight = torch.zeros_like(self._increasing_weight())
        value, gradient = self.gradient("all weights 0", self.student, self.teacher, weight=weight)
        expect(value == 0, f"all weights 0 must give 0, got {value.item()}")
        expect(not gradient.any(), "all weights 0 must give no gradient")

    def _half(self, dtype: torch.dtype) -> None:
        student, teacher = self.student.to(dtype), self.teacher.to(dtype)
        value, gradient = self.gradient(str(dtype), student, teacher)
        expect(value.dtype == torch.float32, f"the value must be float32 for {dtype}, got {value.dtype}")
        expect(gradient.any(), f"a gradient must reach the student in {dtype}")
        self._expect_close("the value in float32", value, self.value(student.float(), teacher.float()))

    float16 = partialmethod(_half, torch.float16)
    bfloat16 = partialmethod(_half, torch.bfloat16)

    def float64(self) -> None:
        student, teacher = self.student.double(), self.teacher.double()
        value, _ = self.gradient("float64", student, teacher, loss=self.fresh(torch.float64))
        expect(value.dtype == torch.float64, f"the value must be float64 for float64, got {value.dtype}")

    def autocast(self) -> None:
        wanted = self.value()
        with torch.autocast(self.student.device.type, dtype=torch.bfloat16):
            value, _ = self.gradient("under autocast", self.student, self.teacher)
        expect(value.dtype == torch.float32, f"the value must be float32 under autocast, got {value.dtype}")
        self._expect_close("the value without autocast", value, wanted)

    def zero_rows(self) -> None:
        def variants(x: Tensor) -> dict[str, Tensor]:
            return {"the original": x, "a zero row": torch.cat([0 * x[:1], x[1:]]), "zeros": 0 * x}

        for (a, s), (b, t) in product(variants(self.student).items(), variants(self.teacher).items()):
            self._in_both_dtypes(f"student: {a}, teacher: {b}", s, t)

    def equal_rows(self) -> None:
        student, teacher = self.student, self.teacher
        equal_student, equal_teacher = (x[:1].expand_as(x) for x in (student, teacher))
        cases = {
            "equal rows of the student": (equal_student, teacher),
            "equal rows of the teacher": (student, equal_teacher),
            "equal rows of both": (equal_student, equal_teacher),
            "constant rows": (torch.ones_like(student), torch.ones_like(teacher)),
        }
        if student.shape == teacher.shape:
            cases["a student equal to the teacher"] = teacher, teacher
            cases["a student opposite to the teacher"] = -teacher, teacher
        for what, (s, t) in cases.items():
            self._in_both_dtypes(what, s, t)

    def batch_of_one(self) -> None:
        self._in_both_dtypes("a batch of one", self.student, self.teacher, rows=slice(0, 1))

    def empty_batch(self) -> None:
        value, _ = self.gradient("an empty batch", self.student, self.teacher, rows=slice(0, 0))
        expect(value == 0, f"an empty batch must give 0, got {value.item()}")

    def _in_both_dtypes(self, what: str, student: Tensor, teacher: Tensor, **options: Any) -> None:
        for dtype in (torch.float32, torch.float16):
            self.gradient(f"{what}, {dtype}", student.to(dtype), teacher.to(dtype), **options)

    def _large(self, size: float, dtype: torch.dtype) -> None:
        student, teacher = (size * x / x.abs().max().clamp(min=1e-12) for x in (self.student, self.teacher))
        for what, s, t in [
            ("both", student, teacher),
            ("the student", student, self.teacher),
            ("the teacher", self.student, teacher),
            ("constant", torch.full_like(student, size), torch.full_like(teacher, -size)),
        ]:
            self.gradient(f"values to {size:g} in {dtype}, {what}", s.to(dtype), t.to(dtype))

    large_float16 = partialmethod(_large, 300.0, torch.float16)
    large_float32 = partialmethod(_large, 1e4, torch.float32)

    def batch_mismatch(self) -> None:
        options = {} if self.target is None else {"target": self.target}
        try:
            self.call(self.fresh(), self.student, self.teacher[:-1], **options)
        except (ValueError, TypeError):
            return
        raise AssertionError("another batch size of the teacher must be a ValueError, got a value")

    def inputs_unchanged(self) -> None:
        given = {"student": clone(self.student), "teacher": clone(self.teacher)}
        if self.weights:
            given["weight"] = torch.ones_like(self._increasing_weight())
        if self.target is not None:
            given["target"] = clone(self.target)
        before = {name: clone(x) for name, x in given.items()}
        options = {name: x for name, x in given.items() if name in ("weight", "target")}
        self.call(self.fresh(), given["student"], given["teacher"], **options)
        for name, x in given.items():
            expect(torch.equal(x, before[name]), f"must not change its arguments, changed {name}")

    def on_meta(self) -> None:
        student, teacher, target = to_meta((self.student, self.teacher, self.target))
        options = {} if target is None else {"target": target}
        # A copy even where other checks use the loss itself, which would lose its values.
        loss = to_meta(copy.deepcopy(self.component)) if isinstance(self.component, nn.Module) else self.component
        with on_meta():
            for given in [{}, {"weight": to_meta(self._increasing_weight())}] if self.weights else [{}]:
                layers = unpack(student.requires_grad_(), self.layers[0]), unpack(teacher, self.layers[1])
                value = loss(*layers, **options, **given)
                expect_meta("the value", value, ())
                value.backward()
                expect_meta("the gradient of the student", student.grad)

    def gradcheck(self) -> None:
        teacher = self.teacher.double()
        loss = self.fresh(torch.float64)

        def call(student: Tensor) -> Tensor:
            return self.value(student, teacher, loss=copy.deepcopy(loss) if self.copies else loss)

        student = self.student.double().requires_grad_()
        try:
            torch.autograd.gradcheck(call, (student,), fast_mode=student.numel() > 128)
        except GradcheckError as error:  # its message holds the whole Jacobians
            reason = str(error).splitlines()[0].rstrip(",")
            raise AssertionError(f"the gradient must equal that by differences in float64, got: {reason}") from error


def pack(layers: Tensor | Sequence[Tensor]) -> tuple[Tensor, Sequence[torch.Size] | None]:
    """Join the layers of a list to `(b, n)`, so that all checks treat them as one tensor; return the shapes, too."""
    if isinstance(layers, Tensor):
        return layers, None
    return torch.cat([x.flatten(1) for x in layers], 1), [x.shape[1:] for x in layers]


def unpack(x: Tensor, shapes: Sequence[torch.Size] | None) -> Tensor | list[Tensor]:
    """Return views of `x` in the shapes of the layers."""
    if shapes is None:
        return x
    parts = torch.split(x, [shape.numel() for shape in shapes], 1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
