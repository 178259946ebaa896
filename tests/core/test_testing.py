"""Contract checks: each fails on a component that violates only that check, and passes on a valid component."""

import copy
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.adapters import OUTPUT, StudentAdapter, TeacherAdapter
from kdlib.losses import HintLoss
from kdlib.projections import LinearProjection
from kdlib.testing import (
    ADAPTER_CHECKS,
    LOSS_CHECKS,
    PROJECTION_CHECKS,
    WEIGHTING_CHECKS,
    check_adapter,
    check_loss,
    check_projection,
    check_weighting,
)
from kdlib.weighting import UniformWeighting


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = randn(5, 4), randn(5, 4, seed=1)


def broken(base: type, **methods: Any) -> Callable[[], Any]:
    """A subclass of a valid component with other methods."""
    return type("Broken", (base,), methods)


def fails(name: str, check: Callable[[], Any]) -> None:
    """`check` must fail at the check of that name, with a message."""
    with pytest.raises(AssertionError, match=rf"\): {name}: ") as caught:
        check()
    assert str(caught.value).split(f"): {name}: ")[1].strip()


def without(names: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)


class Loss(nn.Module):
    """A squared error that satisfies the whole contract."""

    per_sample = True

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__()
        self.power = power
        self.calls = 0

    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean(1)

    def prepare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.shape != teacher.shape:
            raise ValueError("Loss: shapes differ")
        dtype = torch.promote_types(student.dtype, torch.float32)
        return student.to(dtype), teacher.detach().to(dtype)

    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        weight = torch.ones_like(losses) if weight is None else weight.to(losses)
        if reduction == "none":
            return weight * losses
        total = weight.sum()
        return (weight * losses).sum() / torch.where(total == 0, 1.0, total)

    def forward(
        self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: str | None = None
    ) -> Tensor:
        student, teacher = self.prepare(student, teacher)
        with torch.autocast("cpu", enabled=False):
            return self.join(self.maths(student, teacher), reduction or "mean", weight)

    def extra_repr(self) -> str:
        return f"power={self.power}"


class Relation(Loss):
    """A valid loss without a per-sample form."""

    per_sample = False

    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        if reduction != "mean":
            raise ValueError("Relation: reduction must be 'mean'")
        return super().join(losses, reduction, weight)


def in_half(dtype: torch.dtype) -> Callable[[], Any]:
    def maths(self: Loss, s: Tensor, t: Tensor) -> Tensor:
        exact = bool((s.to(dtype).float() == s).all())
        return ((s - t).to(dtype) if exact else s - t).square().mean(1).float()

    def forward(self: Loss, s: Tensor, t: Tensor, **options: Any) -> Tensor:
        value = Loss.forward(self, s, t, **options)
        return value.to(dtype) if s.dtype == dtype else value

    return broken(Loss, maths=maths, forward=forward)


def attached(self: Loss, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    student, detached = Loss.prepare(self, s, t)
    return student, t.to(student.dtype) if t.requires_grad else detached


def divides_by_batch(self: Loss, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    if weight is None or reduction == "none":
        return Loss.join(self, losses, reduction, weight)
    return (weight * losses).mean()


def scale_counts(self: Loss, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    return Relation.join(self, losses, reduction, weight) * (1 if weight is None else weight.max())


def nan_without_weight(self: Loss, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    return Relation.join(self, losses, reduction, None) if weight is None else (weight * losses).sum() / weight.sum()


def nan_empty(self: Loss, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
    return losses.mean() if weight is None and reduction == "mean" else Loss.join(self, losses, reduction, weight)


def coarse_under_autocast(self: Loss, s: Tensor, t: Tensor, **options: Any) -> Tensor:
    return Loss.forward(self, s.bfloat16().float() if torch.is_autocast_enabled("cpu") else s, t, **options)


def overflows_half(self: Loss, s: Tensor, t: Tensor, **options: Any) -> Tensor:
    return Loss.forward(self, s, t, **options) + (0 * s.square().sum() if s.dtype == torch.float16 else 0)


def changes_teacher(self: Loss, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = Loss.prepare(self, s, t)
    t.add_(0.5)
    return student, teacher.clone()


def counts_calls(self: Loss, s: Tensor, t: Tensor) -> Tensor:
    self.calls += 1
    return self.calls * Loss.maths(self, s, t)


BROKEN_LOSSES = {
    "deepcopy": broken(Loss, __deepcopy__=lambda *_: Loss(), maths=lambda self, s, t: 3 * Loss.maths(self, s, t)),
    "scalar": broken(Loss, join=lambda self, *args: Loss.join(self, *args).reshape(1)),
    "student_gradient": broken(Loss, maths=lambda self, s, t: (0 * s).sum(1) + t.square().mean(1)),
    "teacher_gradient": broken(Loss, prepare=attached),
    "reduction_none": broken(Loss, join=lambda self, x, how, w: Loss.join(self, x, "mean", w)),
    "mean_of_none": broken(Loss, join=lambda self, x, how, w: Loss.join(self, x, how, w) * (1 + 4 * (how == "mean"))),
    "weighted_mean": broken(Loss, join=divides_by_batch),
    "weight_ones": broken(Relation, join=lambda self, x, how, w: Relation.join(self, x, how, w) * (1 + (w is None))),
    "weight_scale": broken(Relation, join=scale_counts),
    "weight_zero_masks": broken(Relation, maths=lambda self, s, t: Loss.maths(self, s, t) + s.mean().square()),
    "weight_all_zero": broken(Relation, join=nan_without_weight),
    "float16": in_half(torch.float16),
    "bfloat16": in_half(torch.bfloat16),
    "float64": broken(Loss, prepare=lambda self, s, t: tuple(x.float() for x in Loss.prepare(self, s, t))),
    "autocast": broken(Loss, forward=coarse_under_autocast),
    "zero_rows": broken(Loss, maths=lambda self, s, t: Loss.maths(self, s, t) / s.norm(dim=1) * s.norm(dim=1)),
    "equal_rows": broken(Loss, maths=lambda self, s, t: (s - t).norm(dim=1) + 0 / (s - t).norm(dim=1)),
    "batch_of_one": broken(Loss, maths=lambda self, s, t: Loss.maths(self, s, t) + 0 * s.std(0).sum()),
    "empty_batch": broken(Loss, join=nan_empty),
    "large_float16": broken(Loss, forward=overflows_half),
    "large_float32": broken(Loss, maths=lambda self, s, t: Loss.maths(self, s, t) + 0 * s.exp().sum()),
    "batch_mismatch": broken(Loss, prepare=lambda self, s, t: Loss.prepare(self, s[: t.shape[0]], t)),
    "deterministic": broken(Loss, maths=lambda self, s, t: Loss.maths(self, s, t) * (1 + 1e-3 * torch.rand(()))),
    "inputs_unchanged": broken(Loss, prepare=changes_teacher),
    "pickle": broken(Loss),  # a class that its module does not contain
    "state_dict": broken(Loss, maths=counts_calls),
    "repr": broken(Loss, __repr__=lambda self: "Broken(\n  (inner): Identity()\n)"),
    "gradcheck": broken(Loss, maths=lambda self, s, t: ((s - t) * (s - t).detach()).mean(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSS_CHECKS)
def test_a_loss_that_violates_one_check_fails_it(name: str) -> None:
    # The other checks are skipped, because many faults violate several.
    fails(name, lambda: check_loss(BROKEN_LOSSES[name](), STUDENT, TEACHER, exclude=without(LOSS_CHECKS, name)))


def test_valid_losses_run_every_check() -> None:
    assert check_loss(Loss(), STUDENT, TEACHER) == LOSS_CHECKS
    assert check_loss(Relation(), STUDENT, TEACHER) == without(LOSS_CHECKS, "mean_of_none", "weighted_mean")
    assert check_loss(squared, STUDENT, TEACHER) == without(LOSS_CHECKS, "state_dict", "repr")


def squared(student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    return Loss()(student, teacher, weight=weight, reduction=reduction)


def test_the_argument_per_sample_overrides_the_declaration() -> None:
    only = without(LOSS_CHECKS, "reduction_none")
    assert check_loss(Relation(), STUDENT, TEACHER, per_sample=False, exclude=only) == ("reduction_none",)
    fails("reduction_none", lambda: check_loss(Loss(), STUDENT, TEACHER, per_sample=False, exclude=only))
    fails("reduction_none", lambda: check_loss(Relation(), STUDENT, TEACHER, per_sample=True, exclude=only))


def test_weights_changed_in_place_are_found() -> None:
    def join(self: Loss, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        value = Loss.join(self, losses, reduction, weight)
        return value if weight is None else value + 0 * weight.mul_(2).sum()

    only = without(LOSS_CHECKS, "inputs_unchanged", "weight_ones")
    with pytest.raises(AssertionError, match="inputs_unchanged: must not change its arguments, changed weight"):
        check_loss(broken(Loss, join=join)(), STUDENT, TEACHER, exclude=only)


def test_losses_with_a_target_and_with_a_state() -> None:
    class Targeted(Loss):
        def forward(self, student: Tensor, teacher: Tensor, *, target: Tensor, **options: Any) -> Tensor:
            if not target.shape[0] == student.shape[0] == teacher.shape[0]:
                raise ValueError("Targeted: another batch")
            mask = F.one_hot(target.long(), student.shape[1]).to(student.dtype)
            return super().forward(student * mask, teacher * mask, **options)

    class Running(Loss):
        def __init__(self, *, power: float = 2.0) -> None:
            super().__init__(power=power)
            self.register_buffer("seen", torch.ones(()))

        def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
            self.seen += 1
            return super().maths(student, teacher) * self.seen.to(student.dtype)

    # Classes inside a function cannot be pickled.
    ran = check_loss(Targeted(), STUDENT, TEACHER, target=torch.arange(5) % 4, exclude=["pickle"])
    assert ran == without(LOSS_CHECKS, "pickle")
    assert check_loss(Running(), STUDENT, TEACHER, exclude=["pickle"]) == without(LOSS_CHECKS, "pickle")


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
ByPosition = broken(Weighting, scores=lambda self, x, teachers: torch.arange(float(len(x)))[:, None].expand_as(x))
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
    fails("batch_of_one", lambda: check_projection(centered(), STUDENT, randn(5, 6)))


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


def leaves_hook(self: Student, x: Tensor) -> dict[str, Tensor]:
    self.model.inner[1].register_forward_hook(lambda module, given, output: None)
    return StudentAdapter.forward(self, x)


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
    "no_hooks": broken(Student, forward=leaves_hook),
    "no_hooks_after_error": broken(Student, forward=leaves_hook_on_error),
    "deterministic": student(lambda name, x: (name, x + torch.rand(()))),
    "inputs_unchanged": broken(Student, forward=lambda self, x: StudentAdapter.forward(self, x.mul_(2))),
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_loss(Loss(), STUDENT, TEACHER, exclude=["gradchek"]), ValueError, "nearest are 'gradcheck'"),
        (lambda: check_loss(Loss(), STUDENT[:3], TEACHER[:3]), ValueError, r"the batch size must be .* >= 4, got 3"),
        (lambda: check_loss(Loss(), STUDENT, TEACHER[:4]), ValueError, "teacher must have the batch size"),
        (lambda: check_loss(Loss(), STUDENT.long(), TEACHER), TypeError, "student must be a floating-point tensor"),
        (lambda: check_loss(Loss(), STUDENT, TEACHER, target=STUDENT[:2]), ValueError, "target must have the batch"),
        (lambda: check_weighting(Weighting(), num_teachers=0), ValueError, "num_teachers must be"),
        (lambda: check_weighting(Weighting(), teachers=[]), ValueError, "the number of teachers must be"),
        (lambda: check_weighting(Weighting(), teachers=[randn(2, 4), randn(3, 4)]), ValueError, r"teachers\[1\] must"),
        (lambda: check_weighting(Weighting(), targets={"a": torch.ones(2)}), ValueError, r"targets\['a'\] must"),
        (lambda: check_projection(torch.tanh, STUDENT, TEACHER), TypeError, "projection must be a Module"),
        (lambda: check_loss("hint", STUDENT, TEACHER), TypeError, "check_loss: loss must be callable, got str"),
        (lambda: check_weighting(None), TypeError, "check_weighting: weighting must be callable, got NoneType"),
        (lambda: check_projection(Project(), STUDENT[:1], TEACHER[:1]), ValueError, "the batch size must be"),
        (lambda: check_adapter(torch.tanh, STUDENT), TypeError, "adapter must be a Module"),
    ],
)
def test_invalid_arguments_are_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_error_inside_a_component_names_the_check_and_the_cause() -> None:
    def maths(self: Loss, student: Tensor, teacher: Tensor) -> Tensor:
        raise RuntimeError("out of cheese")

    with pytest.raises(AssertionError, match=r"^check_loss\(Broken\): scalar: raised RuntimeError: out of cheese"):
        check_loss(broken(Loss, maths=maths)(), STUDENT, TEACHER, exclude=["deepcopy"])
