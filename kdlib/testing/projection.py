"""Contracts: what every projection must keep. Calls the projection on copies of the tensors that the user gives."""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_same_batch, check_type
from kdlib.testing._checks import check_exclude
from kdlib.testing._run import check_repr, clone, expect, finite, repickle, run, same, shift_parameters

__all__ = ["PROJECTION_CHECKS", "check_projection"]

PROJECTION_CHECKS = (
    "deepcopy", "shape", "student_gradient", "parameter_gradient", "half", "autocast", "float64", "batch_of_one",
    "deterministic", "inputs_unchanged", "pickle", "state_dict", "repr",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""


def check_projection(
    projection: nn.Module, student: Tensor, teacher: Tensor, *, exclude: Collection[str] = ()
) -> tuple[str, ...]:
    """Hold a projection to the contract of this library.

    - `shape`: the teacher's, finite; `batch_of_one`: likewise for one sample in eval mode, whatever its neighbors.
    - `student_gradient`, `parameter_gradient`: finite gradients for the student and for every parameter.
    - `half` (float16 and bfloat16 throughout), `autocast`, `float64`: still so.
    - `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`, `state_dict`: the same result twice, and after a copy;
      `repr`: the call that rebuilds the object.

    Every check works on a copy of the projection.

    Args:
        projection: called as `projection(student)`.
        student: example `(b, ...)`, at least 2 samples.
        teacher: example `(b, ...)` of what it must look like; the values do not matter.
        exclude: names of checks to leave out; `["repr"]` for a container of torch, which shows its parts.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: a check failed.
        ValueError, TypeError: arguments that no projection could be checked with, or an unknown name in `exclude`.

    Examples:
        >>> from kdlib import LinearProjection
        >>> check_projection(LinearProjection(8, 16), torch.rand(2, 8), torch.rand(2, 16)) == PROJECTION_CHECKS
        True
    """
    check_exclude("check_projection", exclude, PROJECTION_CHECKS)
    check_type("check_projection", "projection", projection, nn.Module, "a Module")
    check_floating("check_projection", student=student, teacher=teacher)
    check_same_batch("check_projection", "student", student, "teacher", teacher)
    check_number("check_projection", "the batch size", student.shape[0], min=2, integer=True)
    case = _Case(projection, clone(student).float(), tuple(teacher.shape))
    checks = {name: getattr(case, name) for name in PROJECTION_CHECKS if name not in exclude}
    return run("check_projection", projection, checks)


@dataclass
class _Case:
    """A projection and the tensor it is tried on; one method a check."""

    projection: nn.Module
    student: Tensor
    wanted: tuple[int, ...]

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(self.projection).to(dtype)

    def tried(self, what: str, dtype: torch.dtype) -> tuple[Tensor, nn.Module]:
        """The gradient of the student and the projection, value and gradients found finite."""
        projection, student = self.fresh(dtype), clone(self.student).to(dtype).requires_grad_()
        projected = projection(student)
        expect(finite(projected), f"{what}: the projection must be finite")
        expect(projected.requires_grad, f"{what}: the projection must hang on the graph of the student")
        # Different shares: their plain sum would be blind behind a normalization.
        (projected.float() * torch.linspace(-1, 1, projected.numel(), device=student.device).view_as(projected)).sum(
        ).backward()  # fmt: skip
        if student.grad is None:
            raise AssertionError(f"{what}: a gradient must reach the student, got none")
        expect(finite(student.grad), f"{what}: the gradient of the student must be finite")
        return student.grad, projection

    def deepcopy(self) -> None:
        other = self.fresh()
        shared = {id(x) for x in self.projection.parameters()} & {id(x) for x in other.parameters()}
        expect(not shared, "a deepcopy must not share its parameters")
        one, two = other.eval()(self.student), copy.deepcopy(other).eval()(self.student)
        expect(same(one, two), "a deepcopy must give the same result")

    def shape(self) -> None:
        projected = self.fresh()(self.student)
        expect(isinstance(projected, Tensor), f"must return a tensor, got {type(projected).__name__}")
        got = tuple(projected.shape)
        expect(got == self.wanted, f"must be shaped as the teacher {self.wanted}, got {got}")
        expect(finite(projected), "must be finite")

    def student_gradient(self) -> None:
        gradient, _ = self.tried("float32", torch.float32)
        expect(gradient.any(), "a gradient must reach the student, got zeros")

    def parameter_gradient(self) -> None:
        _, projection = self.tried("float32", torch.float32)
        for name, parameter in projection.named_parameters():
            expect(not parameter.requires_grad or parameter.grad is not None, f"parameter {name!r} gets no gradient")
            expect(parameter.grad is None or finite(parameter.grad), f"the gradient of {name!r} must be finite")

    def half(self) -> None:
        for dtype in (torch.float16, torch.bfloat16):
            self.tried(str(dtype), dtype)
            got = tuple(self.fresh(dtype)(self.student.to(dtype)).shape)
            expect(got == self.wanted, f"{dtype}: must be shaped as the teacher {self.wanted}, got {got}")

    def autocast(self) -> None:
        with torch.autocast(self.student.device.type, dtype=torch.bfloat16):
            self.tried("under autocast", torch.float32)

    def float64(self) -> None:
        self.tried("float64", torch.float64)
        got = self.fresh(torch.float64)(self.student.double()).dtype
        expect(got == torch.float64, f"must be float64 for float64, got {got}")

    def batch_of_one(self) -> None:
        projected = self.fresh().eval()(self.student[:1])
        wanted = (1, *self.wanted[1:])
        expect(tuple(projected.shape) == wanted, f"one sample must give {wanted}, got {tuple(projected.shape)}")
        expect(finite(projected), "one sample must give finite values")
        among = self.fresh().eval()(self.student)[:1]
        expect(
            same(projected, among, relative=1e-3, absolute=1e-5),
            "in eval mode a sample must not depend on its neighbors in the batch",
        )

    def deterministic(self) -> None:
        expect(same(self.fresh()(self.student), self.fresh()(self.student)), "must give the same result twice")

    def inputs_unchanged(self) -> None:
        student = clone(self.student)
        self.fresh()(student)
        expect(torch.equal(student, self.student), "must leave its argument alone, changed student")

    def pickle(self) -> None:
        projection = self.fresh()
        one, two = projection.eval()(self.student), repickle(projection).eval()(self.student)
        expect(same(one, two), "through pickle it must stay the same")

    def state_dict(self) -> None:
        used, other = self.fresh(), self.fresh()
        used.train()(self.student)
        shift_parameters(other)
        other.load_state_dict(copy.deepcopy(used.state_dict()))
        one, two = used.eval()(self.student), other.eval()(self.student)
        expect(same(one, two), "its state dict must hold all it remembers")

    def repr(self) -> None:
        check_repr(self.projection)
