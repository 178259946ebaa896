"""Contract checks of a projection."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_same_batch, check_type
from kdlib.testing._meta import expect_meta, on_meta, to_meta
from kdlib.testing._run import Case, clone, expect, finite, run, same

__all__ = ["PROJECTION_CHECKS", "check_projection"]

PROJECTION_CHECKS = (
    "deepcopy", "shape", "student_gradient", "parameter_gradient", "half", "autocast", "float64", "batch_of_one",
    "deterministic", "inputs_unchanged", "on_meta", "pickle", "state_dict", "repr",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""


def check_projection(
    projection: nn.Module, student: Tensor, teacher: Tensor, *, exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """Check a projection against the contract of this library.

    - `shape`: the output is finite and has the teacher's shape; `batch_of_one`: also for one sample in eval mode, with
      the same result as within a batch.
    - `student_gradient`, `parameter_gradient`: finite gradients for the student and for every parameter.
    - `half` (float16 and bfloat16 throughout), `autocast`, `float64`: the same for these dtypes.
    - `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`, `state_dict`: the same result twice, and after a copy;
      `repr`: the call that rebuilds the object.
    - `on_meta`: runs on the meta device, so nothing is read from the device or stays on the CPU.

    Args:
        projection: called as `projection(student)`.
        student: example `(b, ...)`, at least 2 samples.
        teacher: example `(b, ...)` of the expected shape; its values do not matter.
        exclude: names of checks to skip, such as `["repr"]` for a torch container, whose `repr` is not a call.

    Returns:
        The names of the checks that ran.

    Examples:
        >>> from kdlib import LinearProjection
        >>> check_projection(LinearProjection(8, 16), torch.rand(2, 8), torch.rand(2, 16)) == PROJECTION_CHECKS
        True
    """
    check_type("check_projection", "projection", projection, nn.Module, "a Module")
    check_floating("check_projection", student=student, teacher=teacher)
    check_same_batch("check_projection", "student", student, "teacher", teacher)
    check_number("check_projection", "the batch size", student.shape[0], min=2, integer=True)
    case = _ProjectionCase(projection, clone(student).float(), tuple(teacher.shape))
    return run("check_projection", case, PROJECTION_CHECKS, exclude)


@dataclass
class _ProjectionCase(Case):
    component: nn.Module
    student: Tensor
    wanted: tuple[int, ...]

    def cast(self, dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(self.component).to(dtype)

    def output(self, component: Any) -> Mapping[str, Tensor]:
        return {"result": component.eval()(self.student)}

    def use(self, component: Any) -> None:
        component.train()(self.student)

    def gradient(self, what: str, dtype: torch.dtype) -> tuple[Tensor, nn.Module]:
        """Run forward and backward; return the student's gradient, checked to be finite, and the projection."""
        projection, student = self.cast(dtype), clone(self.student).to(dtype).requires_grad_()
        projected = projection(student)
        expect(finite(projected), f"{what}: the projection must be finite")
        expect(projected.requires_grad, f"{what}: the projection must be on the graph of the student")
        # Unequal coefficients: the gradient of a plain sum would vanish behind a normalization.
        coefficients = torch.linspace(-1, 1, projected.numel(), device=student.device).view_as(projected)
        (projected.float() * coefficients).sum().backward()
        if student.grad is None:
            raise AssertionError(f"{what}: a gradient must reach the student, got none")
        expect(finite(student.grad), f"{what}: the gradient of the student must be finite")
        return student.grad, projection

    def shape(self) -> None:
        projected = self.fresh()(self.student)
        expect(isinstance(projected, Tensor), f"must return a tensor, got {type(projected).__name__}")
        got = tuple(projected.shape)
        expect(got == self.wanted, f"must have the teacher's shape {self.wanted}, got {got}")
        expect(finite(projected), "must be finite")

    def student_gradient(self) -> None:
        gradient, _ = self.gradient("float32", torch.float32)
        expect(gradient.any(), "a gradient must reach the student, got zeros")

    def parameter_gradient(self) -> None:
        _, projection = self.gradient("float32", torch.float32)
        for name, parameter in projection.named_parameters():
            expect(not parameter.requires_grad or parameter.grad is not None, f"parameter {name!r} gets no gradient")
            expect(parameter.grad is None or finite(parameter.grad), f"the gradient of {name!r} must be finite")

    def half(self) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            self.gradient(str(dtype), dtype)
            got = tuple(self.cast(dtype)(self.student.to(dtype)).shape)
            expect(got == self.wanted, f"{dtype}: must have the teacher's shape {self.wanted}, got {got}")

    def autocast(self) -> None:
        with torch.autocast(self.student.device.type, dtype=torch.bfloat16):
            self.gradient("under autocast", torch.float32)

    def float64(self) -> None:
        self.gradient("float64", torch.float64)
        got = self.cast(torch.float64)(self.student.double()).dtype
        expect(got == torch.float64, f"must be float64 for float64, got {got}")

    def batch_of_one(self) -> None:
        projected = self.fresh().eval()(self.student[:1])
        wanted = (1, *self.wanted[1:])
        expect(tuple(projected.shape) == wanted, f"one sample must give {wanted}, got {tuple(projected.shape)}")
        expect(finite(projected), "one sample must give finite values")
        among = self.fresh().eval()(self.student)[:1]
        close = same(projected, among, relative=1e-3, absolute=1e-5)
        expect(close, "in eval mode a sample must not depend on the other samples of the batch")

    def on_meta(self) -> None:
        projection, student = to_meta(self.fresh()), to_meta(self.student).requires_grad_()
        with on_meta():
            projected = projection(student)
            expect_meta("the projection", projected, self.wanted)
            projected.sum().backward()
            expect_meta("the gradient of the student", student.grad)

    def inputs_unchanged(self) -> None:
        student = clone(self.student)
        self.fresh()(student)
        expect(torch.equal(student, self.student), "must not change its arguments, changed student")
