"""Contract checks: each is seen to fail on a component that is broken in just that way, and to pass on a sound one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import testing
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


def fails(name: str, check: Callable[[], Any]) -> None:
    """`check` must fail at the check of that name, and say so."""
    with pytest.raises(AssertionError, match=rf"\): {name}: ") as caught:
        check()
    assert str(caught.value).split(f"): {name}: ")[1].strip()


STUDENT, TEACHER = randn(5, 4), randn(5, 4, seed=1)


class Sound(nn.Module):
    """A squared error that keeps the whole contract, from which the broken ones differ in one respect."""

    per_sample = True
    full = True

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__()
        self.power = power

    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean(1)

    def prepare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.shape != teacher.shape:
            raise ValueError("Sound: shapes differ")
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


class PlainCopy(Sound):
    def __deepcopy__(self, memo: dict[int, Any]) -> "PlainCopy":
        return PlainCopy(power=3.0)

    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.power * super().maths(student, teacher)


class Vector(Sound):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        return super().join(losses, reduction, weight).reshape(1)


class Blind(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (0 * student).sum(1) + teacher.square().mean(1)


class Attached(Sound):
    def prepare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student, detached = super().prepare(student, teacher)
        return student, teacher.to(student.dtype) if teacher.requires_grad else detached


class NoNone(Sound):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        return super().join(losses, "mean", weight)


class SumForMean(Sound):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        return super().join(losses, reduction, weight) * (losses.shape[0] if reduction == "mean" else 1)


class DividesByBatch(Sound):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        if weight is None or reduction == "none":
            return super().join(losses, reduction, weight)
        return (weight * losses).mean()


class Relation(Sound):
    """No per-sample form: what the others of its kind derive from."""

    per_sample = False

    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        if reduction != "mean":
            raise ValueError("Relation: reduction must be 'mean'")
        return super().join(losses, reduction, weight)


class OnesCount(Relation):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        return super().join(losses, reduction, weight) * (1 if weight is None else 2)


class ScaleCounts(Relation):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        weighted = super().join(losses, reduction, weight)
        return weighted if weight is None else weighted * weight.max()


class CountsMasked(Relation):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().maths(student, teacher) + student.mean().square()


class NaNWithoutWeight(Relation):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        return super().join(losses, reduction, None) if weight is None else (weight * losses).sum() / weight.sum()


class InHalf(Sound):
    dtype = torch.float16

    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        exact = bool((student.to(self.dtype).float() == student).all())
        return (difference.to(self.dtype) if exact else difference).square().mean(1).float()

    def forward(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        value = super().forward(student, teacher, **options)
        return value.to(self.dtype) if student.dtype == self.dtype else value


class InBrainHalf(InHalf):
    dtype = torch.bfloat16


class NeverDouble(Sound):
    def prepare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = super().prepare(student, teacher)
        return student.float(), teacher.float()

    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mul(8).round().div(8).mul(0).sum(1) + super().maths(student, teacher)


class Autocasts(Sound):
    def forward(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            student = student.bfloat16().float()
        return super().forward(student, teacher, **options)


class NaNAtZero(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (F.normalize(student, dim=1) - teacher).square().mean(1) / student.norm(dim=1) * student.norm(dim=1)


class NaNAtEqual(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).norm(dim=1) + 0 / (student - teacher).norm(dim=1)


class NaNAlone(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().maths(student, teacher) + (0 * student.std(0).sum() if student.shape[0] else 0)


class NaNEmpty(Sound):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        return losses.mean() if weight is None and reduction == "mean" else super().join(losses, reduction, weight)


class OverflowsHalf(Sound):
    def forward(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        extra = 0 * student.square().sum() if student.dtype == torch.float16 else 0
        return super().forward(student, teacher, **options) + extra


class OverflowsFloat(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().maths(student, teacher) + 0 * student.exp().sum()


class Broadcasts(Sound):
    def prepare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return super().prepare(student[: teacher.shape[0]], teacher)


class Random(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().maths(student, teacher) * (1 + 1e-3 * torch.rand(()))


class InPlace(Sound):
    def prepare(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        found = super().prepare(student, teacher)
        teacher.add_(0.5)
        return found[0], found[1].clone()


class InPlaceWeight(Sound):
    def join(self, losses: Tensor, reduction: str, weight: Tensor | None) -> Tensor:
        value = super().join(losses, reduction, weight)
        return value if weight is None else value + 0 * weight.mul_(2).sum()


class Unpicklable(Sound):
    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__(power=power)
        self.function = lambda x: x


class Forgets(Sound):
    """Remembers in a plain attribute, which no state dict holds."""

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__(power=power)
        self.calls = 0

    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * super().maths(student, teacher)


class Parts(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()


class WrongGradient(Sound):
    def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
        difference = student - teacher
        return (difference * difference.detach()).mean(1)


BROKEN_LOSSES = {
    "deepcopy": PlainCopy,
    "scalar": Vector,
    "student_gradient": Blind,
    "teacher_gradient": Attached,
    "reduction_none": NoNone,
    "mean_of_none": SumForMean,
    "weighted_mean": DividesByBatch,
    "weight_ones": OnesCount,
    "weight_scale": ScaleCounts,
    "weight_zero_masks": CountsMasked,
    "weight_all_zero": NaNWithoutWeight,
    "float16": InHalf,
    "bfloat16": InBrainHalf,
    "float64": NeverDouble,
    "autocast": Autocasts,
    "zero_rows": NaNAtZero,
    "equal_rows": NaNAtEqual,
    "batch_of_one": NaNAlone,
    "empty_batch": NaNEmpty,
    "large_float16": OverflowsHalf,
    "large_float32": OverflowsFloat,
    "batch_mismatch": Broadcasts,
    "deterministic": Random,
    "inputs_unchanged": InPlace,
    "pickle": Unpicklable,
    "state_dict": Forgets,
    "repr": Parts,
    "gradcheck": WrongGradient,
}


@pytest.mark.parametrize("name", LOSS_CHECKS)
def test_a_loss_broken_in_one_way_fails_that_check(name: str) -> None:
    # The others are left out: many a fault shows in several.
    others = [each for each in LOSS_CHECKS if each != name]
    fails(name, lambda: check_loss(BROKEN_LOSSES[name](), STUDENT, TEACHER, exclude=others))


@pytest.mark.parametrize("name", LOSS_CHECKS)
def test_a_broken_loss_fails_the_whole_contract(name: str) -> None:
    with pytest.raises(AssertionError, match=rf"^check_loss\({BROKEN_LOSSES[name].__name__}\): "):
        check_loss(BROKEN_LOSSES[name](), STUDENT, TEACHER)


def test_a_sound_loss_runs_every_check() -> None:
    assert check_loss(Sound(), STUDENT, TEACHER) == LOSS_CHECKS
    per_sample = {"mean_of_none", "weighted_mean"}
    assert check_loss(Relation(), STUDENT, TEACHER) == tuple(name for name in LOSS_CHECKS if name not in per_sample)


def test_no_per_sample_form_must_be_refused() -> None:
    only = [name for name in LOSS_CHECKS if name != "reduction_none"]
    assert check_loss(Relation(), STUDENT, TEACHER, per_sample=False, exclude=only) == ("reduction_none",)
    fails("reduction_none", lambda: check_loss(Sound(), STUDENT, TEACHER, per_sample=False, exclude=only))
    fails("reduction_none", lambda: check_loss(Relation(), STUDENT, TEACHER, per_sample=True, exclude=only))


def test_weights_changed_in_place_are_found() -> None:
    only = [name for name in LOSS_CHECKS if name not in ("inputs_unchanged", "weight_ones")]
    with pytest.raises(AssertionError, match="inputs_unchanged: must not change its arguments, changed weight"):
        check_loss(InPlaceWeight(), STUDENT, TEACHER, exclude=only)


def squared(student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    return Sound()(student, teacher, weight=weight, reduction=reduction)


def test_a_function_is_a_loss_too() -> None:
    ran = check_loss(squared, STUDENT, TEACHER)
    assert ran == tuple(name for name in LOSS_CHECKS if name not in ("state_dict", "repr"))


def test_a_loss_that_takes_a_target() -> None:
    class Targeted(Sound):
        def forward(self, student: Tensor, teacher: Tensor, *, target: Tensor, **options: Any) -> Tensor:
            if not target.shape[0] == student.shape[0] == teacher.shape[0]:
                raise ValueError("Targeted: another batch")
            mask = F.one_hot(target.long(), student.shape[1]).to(student.dtype)
            return super().forward(student * mask, teacher * mask, **options)

    # A class inside a function cannot be pickled.
    ran = check_loss(Targeted(), STUDENT, TEACHER, target=torch.arange(5) % 4, exclude=["pickle"])
    assert ran == tuple(name for name in LOSS_CHECKS if name != "pickle")


def test_a_loss_with_a_memory_is_asked_anew_each_time() -> None:
    class Running(Sound):
        def __init__(self, *, power: float = 2.0) -> None:
            super().__init__(power=power)
            self.register_buffer("seen", torch.ones(()))

        def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
            self.seen += 1
            return super().maths(student, teacher) * self.seen.to(student.dtype)

    ran = check_loss(Running(), STUDENT, TEACHER, exclude=["pickle"])
    assert len(ran) == len(LOSS_CHECKS) - 1


class Weigh(nn.Module):
    """A softmax of minus the losses, sound, from which the broken ones differ in one respect."""

    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return -losses / losses.amax(0, keepdim=True).clamp(min=1e-30)

    def forward(self, losses: Tensor, *, student: Tensor, teachers: list[Tensor], targets: Any) -> Tensor:
        return self.scores(losses.detach(), student, teachers).softmax(0)


class Transposed(Weigh):
    def forward(self, losses: Tensor, **options: Any) -> Tensor:
        return super().forward(losses, **options).T


class NotOne(Weigh):
    def forward(self, losses: Tensor, **options: Any) -> Tensor:
        return 1.01 * super().forward(losses, **options)


class Negative(Weigh):
    def forward(self, losses: Tensor, **options: Any) -> Tensor:
        good = super().forward(losses, **options)
        return torch.cat([good[:1] + 1, good[1:-1], good[-1:] - 1])


class Overflows(Weigh):
    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return (-losses).exp().log()


class Normalizes(Weigh):
    def forward(self, losses: Tensor, *, student: Tensor, teachers: list[Tensor], targets: Any) -> Tensor:
        lengths = torch.stack([x.norm(dim=1) for x in teachers])
        return lengths / lengths.sum(0)


class HalfSums(Weigh):
    def forward(self, losses: Tensor, *, student: Tensor, teachers: list[Tensor], targets: Any) -> Tensor:
        lengths = torch.stack([(100 * x).square().sum(1) * 10 for x in teachers])
        return (lengths / lengths.sum(0)).float()


class OverBatch(Weigh):
    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return (losses - losses.mean(1, keepdim=True)) / (losses.std(1, keepdim=True) if losses.shape[1] else 1)


class NeedsSamples(Weigh):
    def forward(self, losses: Tensor, **options: Any) -> Tensor:
        return super().forward(losses, **options) + 0 * losses.detach().amax()


class NotAlone(Weigh):
    def forward(self, losses: Tensor, **options: Any) -> Tensor:
        good = super().forward(losses, **options)
        return good if losses.shape[0] > 1 else 0.5 * good


class ByPosition(Weigh):
    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return torch.arange(float(losses.shape[0]))[:, None].expand_as(losses)


class Leaks(Weigh):
    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return torch.stack([x.mean(1) for x in teachers])


class RandomWeights(Weigh):
    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return torch.rand_like(losses)


class ChangesTeacher(Weigh):
    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        teachers[0].mul_(2)
        return super().scores(losses, student, teachers)


class HoldsLambda(Weigh):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: x


class ForgetsCalls(Weigh):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        self.calls += 1
        return self.calls * super().scores(losses, student, teachers)


class CopiesBadly(Weigh):
    made = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiesBadly":
        other = CopiesBadly()
        CopiesBadly.made += 1
        other.made = CopiesBadly.made
        return other

    def scores(self, losses: Tensor, student: Tensor, teachers: list[Tensor]) -> Tensor:
        return self.made * losses


class WithParts(Weigh):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()


BROKEN_WEIGHTINGS = {
    "deepcopy": CopiesBadly,
    "shape": Transposed,
    "columns_sum_to_one": NotOne,
    "not_negative": Negative,
    "extreme_losses": Overflows,
    "extreme_features": Normalizes,
    "half": HalfSums,
    "batch_of_one": OverBatch,
    "empty_batch": NeedsSamples,
    "one_teacher": NotAlone,
    "permutation": ByPosition,
    "teacher_gradient": Leaks,
    "deterministic": RandomWeights,
    "inputs_unchanged": ChangesTeacher,
    "pickle": HoldsLambda,
    "state_dict": ForgetsCalls,
    "repr": WithParts,
}


@pytest.mark.parametrize("name", WEIGHTING_CHECKS)
@pytest.mark.filterwarnings("ignore:std.. degrees of freedom")
def test_a_weighting_broken_in_one_way_fails_that_check(name: str) -> None:
    others = [each for each in WEIGHTING_CHECKS if each != name]
    fails(name, lambda: check_weighting(BROKEN_WEIGHTINGS[name](), exclude=others))


def test_a_sound_weighting_runs_every_check() -> None:
    assert check_weighting(Weigh()) == WEIGHTING_CHECKS
    assert check_weighting(Weigh(), num_teachers=3) == WEIGHTING_CHECKS
    assert check_weighting(Weigh(), student=randn(4, 3, 2, 2), teachers=[randn(4, 7), randn(4, 2)]) == WEIGHTING_CHECKS
    asymmetric = check_weighting(ByPosition(), symmetric=False)
    assert asymmetric == tuple(name for name in WEIGHTING_CHECKS if name not in ("one_teacher", "permutation"))


def test_a_plain_function_may_weigh() -> None:
    def even(losses: Tensor, *, student: Tensor, teachers: list[Tensor], targets: Any) -> Tensor:
        return torch.full_like(losses, 1 / losses.shape[0], requires_grad=False)

    ran = check_weighting(even, exclude=["pickle"])
    assert ran == tuple(name for name in WEIGHTING_CHECKS if name not in ("pickle", "state_dict", "repr"))


class Project(nn.Module):
    """A linear map, sound, from which the broken ones differ in one respect."""

    def __init__(self, out: int = 6) -> None:
        super().__init__()
        self.out = out
        self.linear = nn.Linear(4, out)

    def forward(self, student: Tensor) -> Tensor:
        return self.linear(student)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.out})"


class SharesWeights(Project):
    def __deepcopy__(self, memo: dict[int, Any]) -> "SharesWeights":
        other = SharesWeights(self.out)
        other.linear = self.linear
        return other


class Wider(Project):
    def forward(self, student: Tensor) -> Tensor:
        return torch.cat([super().forward(student)] * 2, 1)


class Detaches(Project):
    def forward(self, student: Tensor) -> Tensor:
        return super().forward(student.detach()) + 0 * student.sum()


class UnusedParameter(Project):
    def __init__(self, out: int = 6) -> None:
        super().__init__(out)
        self.idle = nn.Parameter(torch.zeros(1))


class FloatOnly(Project):
    def forward(self, student: Tensor) -> Tensor:
        return super().forward(student.float())


class NoAutocast(Project):
    def forward(self, student: Tensor) -> Tensor:
        return self.linear.weight.new_zeros(student.shape[0], self.out).add_(super().forward(student).detach())


class DoubleToFloat(Project):
    def forward(self, student: Tensor) -> Tensor:
        return super().forward(student).float()


class TwoAtLeast(Project):
    def forward(self, student: Tensor) -> Tensor:
        return super().forward(student) / student.std(0).sum()


class Noisy(Project):
    def forward(self, student: Tensor) -> Tensor:
        return super().forward(student) + torch.rand(())


class ClearsInput(Project):
    def forward(self, student: Tensor) -> Tensor:
        projected = super().forward(student.clone())
        student.detach().zero_()
        return projected


class KeepsLambda(Project):
    def __init__(self, out: int = 6) -> None:
        super().__init__(out)
        self.function = lambda x: x


class HidesState(Project):
    def __init__(self, out: int = 6) -> None:
        super().__init__(out)
        self.mean = torch.zeros(4)

    def forward(self, student: Tensor) -> Tensor:
        if self.training:
            self.mean = student.detach().mean(0)
        return super().forward(student - self.mean)


class OtherName(Project):
    def __repr__(self) -> str:
        return f"Project({self.out})"


BROKEN_PROJECTIONS = {
    "deepcopy": SharesWeights,
    "shape": Wider,
    "student_gradient": Detaches,
    "parameter_gradient": UnusedParameter,
    "half": FloatOnly,
    "autocast": NoAutocast,
    "float64": DoubleToFloat,
    "batch_of_one": TwoAtLeast,
    "deterministic": Noisy,
    "inputs_unchanged": ClearsInput,
    "pickle": KeepsLambda,
    "state_dict": HidesState,
    "repr": OtherName,
}


@pytest.mark.parametrize("name", PROJECTION_CHECKS)
@pytest.mark.filterwarnings("ignore:std.. degrees of freedom")
def test_a_projection_broken_in_one_way_fails_that_check(name: str) -> None:
    others = [each for each in PROJECTION_CHECKS if each != name]
    fails(name, lambda: check_projection(BROKEN_PROJECTIONS[name](), STUDENT, randn(5, 6), exclude=others))


def test_a_projection_that_mixes_samples_in_eval_mode_is_found() -> None:
    class Centerd(Project):
        def forward(self, student: Tensor) -> Tensor:
            projected = super().forward(student)
            return projected - projected.mean(0)

    fails("batch_of_one", lambda: check_projection(Centerd(), STUDENT, randn(5, 6)))


def test_a_sound_projection_runs_every_check() -> None:
    assert check_projection(Project(), STUDENT, randn(5, 6)) == PROJECTION_CHECKS
    assert not STUDENT.requires_grad


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


class SharesModel(Student):
    def __deepcopy__(self, memo: dict[int, Any]) -> "SharesModel":
        other = SharesModel()
        other.model = self.model
        return other


class RenamesTap(Student):
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return {name.upper(): x for name, x in super().forward(*inputs).items()}


class LeavesHook(Student):
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        self.model.inner[1].register_forward_hook(lambda module, given, output: None)
        return super().forward(*inputs)


class LeavesHookOnError(Student):
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        handle = self.model.inner[1].register_forward_hook(lambda module, given, output: None)
        found = super().forward(*inputs)
        handle.remove()
        return found


class Jitters(Student):
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return {name: x + torch.rand(()) for name, x in super().forward(*inputs).items()}


class ScalesInput(Student):
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return super().forward(inputs[0].mul_(2))


class HoldsHandle(Student):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: x


class DetachesFeatures(Student):
    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_() for name, x in super().forward(*inputs).items()}


class LosesState(Student):
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [*state_dict]:
            state_dict[key] = torch.zeros_like(state_dict[key])


class NaiveTeacher(nn.Module):
    """What a teacher is without an adapter: trained, saved and moved with the rest."""

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
    "deepcopy": SharesModel,
    "names": RenamesTap,
    "no_hooks": LeavesHook,
    "no_hooks_after_error": LeavesHookOnError,
    "deterministic": Jitters,
    "inputs_unchanged": ScalesInput,
    "pickle": HoldsHandle,
    "gradient": DetachesFeatures,
    "state_dict": LosesState,
    "frozen_mode": NaiveTeacher,
    "no_gradient": GradTeacher,
    "statistics": NaiveTeacher,
    "left_out": NaiveTeacher,
}


@pytest.mark.parametrize("name", ADAPTER_CHECKS)
def test_an_adapter_broken_in_one_way_fails_that_check(name: str) -> None:
    others = [each for each in ADAPTER_CHECKS if each != name]
    teacher = True if BROKEN_ADAPTERS[name] is NaiveTeacher else None
    fails(name, lambda: check_adapter(BROKEN_ADAPTERS[name](), STUDENT, teacher=teacher, exclude=others))


def test_sound_adapters_run_every_check_of_their_kind() -> None:
    of_teachers = {"frozen_mode", "no_gradient", "statistics", "left_out"}
    student = check_adapter(Student(), STUDENT)
    assert student == tuple(name for name in ADAPTER_CHECKS if name not in of_teachers)
    teacher = check_adapter(TeacherAdapter(Net(), TAPS), STUDENT)
    assert teacher == tuple(name for name in ADAPTER_CHECKS if name not in ("gradient", "state_dict"))


def test_every_check_has_a_component_that_fails_it() -> None:
    assert set(BROKEN_LOSSES) == set(LOSS_CHECKS)
    assert set(BROKEN_WEIGHTINGS) == set(WEIGHTING_CHECKS)
    assert set(BROKEN_PROJECTIONS) == set(PROJECTION_CHECKS)
    assert set(BROKEN_ADAPTERS) == set(ADAPTER_CHECKS)


def test_nothing_given_is_changed_and_no_random_number_is_drawn() -> None:
    loss, weighting, projection = HintLoss(), UniformWeighting(), LinearProjection(4, 6)
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone()
    adapter = TeacherAdapter(Net().train(), TAPS)
    held = copy.deepcopy([projection.state_dict(), adapter.model.state_dict()])
    generator = torch.get_rng_state()
    check_loss(loss, student, teacher)
    check_weighting(weighting, student=student, teachers=[teacher, student])
    check_projection(projection, student, randn(5, 6))
    check_adapter(adapter, student)
    assert torch.equal(torch.get_rng_state(), generator)
    assert student.grad is None
    assert torch.equal(student, STUDENT)
    assert torch.equal(teacher, TEACHER)
    for before, now in zip(held, [projection.state_dict(), adapter.model.state_dict()], strict=True):
        assert all(torch.equal(before[name], now[name]) for name in before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_loss(Sound(), STUDENT, TEACHER, exclude=["gradchek"]), ValueError, "nearest are 'gradcheck'"),
        (lambda: check_loss(Sound(), STUDENT, TEACHER, exclude="repr"), TypeError, "exclude must be a collection"),
        (lambda: check_loss(Sound(), STUDENT[:3], TEACHER[:3]), ValueError, r"the batch size must be .* >= 4, got 3"),
        (lambda: check_loss(Sound(), STUDENT, TEACHER[:4]), ValueError, "teacher must have the batch size"),
        (lambda: check_loss(Sound(), STUDENT.long(), TEACHER), TypeError, "student must be a floating-point tensor"),
        (lambda: check_loss(Sound(), STUDENT, TEACHER, target=STUDENT[:2]), ValueError, "target must have the batch"),
        (lambda: check_weighting(Weigh(), num_teachers=0), ValueError, "num_teachers must be"),
        (lambda: check_weighting(Weigh(), teachers=[]), ValueError, "the number of teachers must be"),
        (lambda: check_weighting(Weigh(), student=STUDENT, teachers=[randn(2, 4)]), ValueError, r"teachers\[0\] must"),
        (lambda: check_weighting(Weigh(), targets={"label": torch.ones(2)}), ValueError, r"targets\['label'\] must"),
        (lambda: check_projection(torch.tanh, STUDENT, TEACHER), TypeError, "projection must be a Module"),
        (lambda: check_loss("hint", STUDENT, TEACHER), TypeError, "check_loss: loss must be callable, got str"),
        (lambda: check_weighting(None), TypeError, "check_weighting: weighting must be callable, got NoneType"),
        (lambda: check_projection(Project(), STUDENT[:1], TEACHER[:1]), ValueError, "the batch size must be"),
        (lambda: check_adapter(torch.tanh, STUDENT), TypeError, "adapter must be a Module"),
    ],
)
def test_arguments_that_nothing_could_be_checked_with(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_error_inside_a_component_names_the_check_and_the_cause() -> None:
    class Raises(Sound):
        def maths(self, student: Tensor, teacher: Tensor) -> Tensor:
            raise RuntimeError("out of cheese")

    with pytest.raises(AssertionError, match=r"^check_loss\(Raises\): scalar: raised RuntimeError: out of cheese"):
        check_loss(Raises(), STUDENT, TEACHER, exclude=["deepcopy"])


def test_public_names() -> None:
    assert set(testing.__all__) >= {"check_adapter", "check_loss", "check_projection", "check_weighting"}
    assert all(hasattr(testing, name) for name in testing.__all__)
