"""Contract checks of weightings, projections and adapters: each fails on a component that violates only that check."""

import copy
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib.adapters import OUTPUT, StudentAdapter, TeacherAdapter
from kdlib.losses import HintLoss
from kdlib.projections import LinearProjection
from kdlib.testing import (
    ADAPTER_CHECKS,
    PROJECTION_CHECKS,
    WEIGHTING_CHECKS,
    check_adapter,
    check_loss,
    check_projection,
    check_weighting,
)
from kdlib.weighting import UniformWeighting
from tests.core.contract_cases import STUDENT, TEACHER, broken, fails, randn, without


class Weighting(nn.Module):
    """A softmax of the negative losses that satisfies the whole contract."""

    calls = 0

    def scores(self, losses: Tensor, teachers: list[Tensor]) -> Tensor:
        return -losses / losses.amax(0, keepdim=True).clamp(min=1e-30)

    def forward(self, losses: Tensor, *, student: Tensor, teachers: list[Tensor], targets: Any) -> Tensor:
        return self.change(self.scores(losses.detach(), teachers).softmax(0), losses)

    def change(self, weights: Tensor, losses: Tensor) -> Tensor:
        return weights


def over_batch(self: Weighting, losses: Tensor, teachers: list[Tensor]) -> Tensor:
    return (losses - losses.mean(1, keepdim=True)) / (losses.std(1, keepdim=True) if losses.shape[1] else 1)


def by_length(power: float, scale: float) -> Callable[..., Tensor]:
    def forward(self: Weighting, losses: Tensor, *, teachers: list[Tensor], **options: Any) -> Tensor:
        lengths = torch.stack([(scale * x).square().sum(1) ** power for x in teachers])
        return (lengths / lengths.sum(0)).float()

    return forward


def doubles_teacher(self: Weighting, losses: Tensor, teachers: list[Tensor]) -> Tensor:
    teachers[0].mul_(2)
    return Weighting.scores(self, losses, teachers)


def counts_weights(self: Weighting, losses: Tensor, teachers: list[Tensor]) -> Tensor:
    self.calls += 1
    return self.calls * Weighting.scores(self, losses, teachers)


COPIES = cycle([Weighting(), UniformWeighting()])
ByPosition = broken(
    Weighting, scores=lambda self, x, teachers: torch.arange(float(len(x)), device=x.device)[:, None].expand_as(x)
)
BROKEN_WEIGHTINGS = {
    "deepcopy": broken(Weighting, __deepcopy__=lambda self, memo: next(COPIES)),
    "valid": broken(Weighting, change=lambda self, weights, losses: 1.01 * weights),
    "extreme_losses": broken(Weighting, scores=lambda self, losses, teachers: (-losses).exp().log()),
    "extreme_features": broken(Weighting, forward=by_length(0.5, 1.0)),
    "half": broken(Weighting, forward=by_length(1.0, 1000.0)),
    "batch_of_one": broken(Weighting, scores=over_batch),
    "empty_batch": broken(Weighting, change=lambda self, weights, losses: weights + 0 * losses.detach().amax()),
    "one_teacher": broken(Weighting, change=lambda self, weights, x: weights if len(x) > 1 else 0.5 * weights),
    "permutation": ByPosition,
    "teacher_gradient": broken(Weighting, scores=lambda self, x, teachers: torch.stack([t.mean(1) for t in teachers])),
    "deterministic": broken(Weighting, scores=lambda self, losses, teachers: torch.rand_like(losses)),
    "inputs_unchanged": broken(Weighting, scores=doubles_teacher),
    "on_meta": broken(Weighting, scores=lambda self, losses, teachers: -losses @ torch.eye(losses.shape[1])),
    "pickle": broken(Weighting),
    "state_dict": broken(Weighting, scores=counts_weights),
    "repr": broken(Weighting, __repr__=lambda self: "Weighting()"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTING_CHECKS)
@pytest.mark.filterwarnings("ignore:std.. degrees of freedom")
def test_a_weighting_that_violates_one_check_fails_it(name: str) -> None:
    fails(name, lambda: check_weighting(BROKEN_WEIGHTINGS[name](), exclude=without(WEIGHTING_CHECKS, name)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self, weights, losses: weights.T, r"call 1: must be \(k, b\) = \(2, 6\), got \(6, 2\)"),
        (lambda self, weights, losses: torch.cat([weights[:1] + 1, weights[1:] - 1]), "call 1: weights must be >= 0"),
        (lambda self, weights, losses: (weights > 0).long(), "call 1: weights must be floating point"),
    ],
)
def test_invalid_weights_are_described(change: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_weighting(broken(Weighting, change=change)(), exclude=["deepcopy"])


def test_valid_weightings_run_every_check() -> None:
    def uniform(losses: Tensor, *, student: Tensor, teachers: list[Tensor], targets: Any) -> Tensor:
        return torch.full_like(losses, 1 / losses.shape[0], requires_grad=False)

    maps = {"student": randn(4, 3, 2, 2), "teachers": [randn(4, 7), randn(4, 2)]}
    for options in ({}, {"num_teachers": 3}, maps):
        assert check_weighting(Weighting(), **options) == WEIGHTING_CHECKS
    asymmetric = check_weighting(ByPosition(), symmetric=False, exclude=["pickle"])
    assert asymmetric == without(WEIGHTING_CHECKS, "one_teacher", "permutation", "pickle")
    assert check_weighting(uniform, exclude=["pickle"]) == without(WEIGHTING_CHECKS, "pickle", "state_dict", "repr")


class Project(nn.Module):
    """A linear map that satisfies the whole contract."""

    def __init__(self, out: int = 6) -> None:
        super().__init__()
        self.out = out
        self.linear = nn.Linear(4, out)
        self.mean = torch.zeros(4)

    def forward(self, student: Tensor) -> Tensor:
        return self.linear(student)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.out})"


class UnusedParameter(Project):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1))


def clears_input(self: Project, student: Tensor) -> Tensor:
    projected = self.linear(student.clone())
    student.detach().zero_()
    return projected


def hidden_state(self: Project, student: Tensor) -> Tensor:
    if self.training:
        self.mean = student.detach().mean(0)
    return self.linear(student - self.mean)


BROKEN_PROJECTIONS = {
    "deepcopy": broken(Project, __deepcopy__=lambda self, memo: self),
    "shape": broken(Project, forward=lambda self, x: torch.cat([self.linear(x)] * 2, 1)),
    "student_gradient": broken(Project, forward=lambda self, x: self.linear(x.detach()) + 0 * x.sum()),
    "parameter_gradient": UnusedParameter,
    "half": broken(Project, forward=lambda self, x: self.linear(x.float())),
    "autocast": broken(Project, forward=lambda self, x: x.new_zeros(len(x), self.out).add_(self.linear(x).detach())),
    "float64": broken(Project, forward=lambda self, x: self.linear(x).float()),
    "batch_of_one": broken(Project, forward=lambda self, x: self.linear(x) / x.std(0).sum()),
    "deterministic": broken(Project, forward=lambda self, x: self.linear(x) + torch.rand(())),
    "inputs_unchanged": broken(Project, forward=clears_input),
    "on_meta": broken(Project, forward=lambda self, x: self.linear(x) @ torch.eye(self.out)),
    "pickle": broken(Project),
    "state_dict": broken(Project, forward=hidden_state),
    "repr": broken(Project, __repr__=lambda self: f"Project({self.out})"),
}


@pytest.mark.parametrize("name", PROJECTION_CHECKS)
@pytest.mark.filterwarnings("ignore:std.. degrees of freedom")
def test_a_projection_that_violates_one_check_fails_it(name: str) -> None:
    others = without(PROJECTION_CHECKS, name)
    fails(name, lambda: check_projection(BROKEN_PROJECTIONS[name](), STUDENT, randn(5, 6), exclude=others))


def test_a_projection_that_mixes_samples_in_eval_mode_fails() -> None:
    centered = broken(Project, forward=lambda self, x: self.linear(x) - self.linear(x).mean(0))
    others = without(PROJECTION_CHECKS, "batch_of_one")
    fails("batch_of_one", lambda: check_projection(centered(), STUDENT, randn(5, 6), exclude=others))


def test_a_valid_projection_runs_every_check() -> None:
    assert check_projection(Project(), STUDENT, randn(5, 6)) == PROJECTION_CHECKS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


TAPS = {"map": "inner.1", "out": OUTPUT}


class Student(StudentAdapter):
    def __init__(self) -> None:
        super().__init__(Net(), TAPS)


def student(change: Callable[[str, Tensor], tuple[str, Tensor]]) -> Callable[[], Any]:
    """A student adapter whose features are changed."""

    def forward(self: Student, *inputs: Any) -> dict[str, Tensor]:
        return dict(change(name, x) for name, x in StudentAdapter.forward(self, *inputs).items())

    return broken(Student, forward=forward)


def leaves_hook_on_error(self: Student, x: Tensor) -> dict[str, Tensor]:
    handle = self.model.inner[1].register_forward_hook(lambda module, given, output: None)
    features = StudentAdapter.forward(self, x)
    handle.remove()
    return features


def loads_zeros(self: Student, state: dict[str, Any], *args: Any) -> None:
    for key in [*state]:
        state[key] = torch.zeros_like(state[key])


class NaiveTeacher(nn.Module):
    """A teacher without an adapter: trained, saved and moved with its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net().eval()
        self.taps = {"out": OUTPUT}

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return {"out": self.model(*inputs)}


class GradTeacher(TeacherAdapter):
    def __init__(self) -> None:
        super().__init__(Net(), TAPS)

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return {name: x + 0 * inputs[0].sum() for name, x in super().forward(*inputs).items()}


BROKEN_ADAPTERS = {
    "deepcopy": broken(Student, __deepcopy__=lambda self, memo: self),
    "names": student(lambda name, x: (name.upper(), x)),
    "no_hooks": broken(Student, forward=leaves_hook_on_error),
    "deterministic": student(lambda name, x: (name, x + torch.rand(()))),
    "inputs_unchanged": broken(Student, forward=lambda self, x: StudentAdapter.forward(self, x.mul_(2))),
    "on_meta": student(lambda name, x: (name, x[:, torch.arange(x.shape[1])])),
    "pickle": broken(Student),
    "gradient": student(lambda name, x: (name, x.detach().requires_grad_())),
    "state_dict": broken(Student, _load_from_state_dict=loads_zeros),
    "frozen_mode": NaiveTeacher,
    "no_gradient": GradTeacher,
    "statistics": NaiveTeacher,
    "left_out": NaiveTeacher,
}


@pytest.mark.parametrize("name", ADAPTER_CHECKS)
def test_an_adapter_that_violates_one_check_fails_it(name: str) -> None:
    teacher = True if BROKEN_ADAPTERS[name] is NaiveTeacher else None
    others = without(ADAPTER_CHECKS, name)
    fails(name, lambda: check_adapter(BROKEN_ADAPTERS[name](), STUDENT, teacher=teacher, exclude=others))


def test_valid_adapters_run_every_check_of_their_kind() -> None:
    of_teachers = ("frozen_mode", "no_gradient", "statistics", "left_out")
    assert check_adapter(Student(), STUDENT) == without(ADAPTER_CHECKS, *of_teachers)
    teacher = check_adapter(TeacherAdapter(Net(), TAPS), STUDENT)
    assert teacher == without(ADAPTER_CHECKS, "gradient", "state_dict")


def test_arguments_and_the_global_generator_are_unchanged() -> None:
    projection, adapter = LinearProjection(4, 6), TeacherAdapter(Net().train(), TAPS)
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
    before = copy.deepcopy([projection.state_dict(), adapter.model.state_dict()])
    generator = torch.get_rng_state()
    check_loss(HintLoss(), student, teacher)
    check_weighting(UniformWeighting(), student=student, teachers=[teacher, student])
    check_projection(projection, student, randn(5, 6))
    check_adapter(adapter, student)
    assert torch.equal(torch.get_rng_state(), generator)
    assert student.grad is None
    assert torch.equal(student, STUDENT)
    assert torch.equal(teacher, TEACHER)
    for one, two in zip(before, [projection.state_dict(), adapter.model.state_dict()], strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
