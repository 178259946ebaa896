"""Contract checks: each fails on a loss that violates only that check, and passes on a valid loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import functional
from kdlib.losses import HintLoss
from kdlib.projections import LinearProjection
from kdlib.testing import (
    LOSS_CHECKS,
    check_adapter,
    check_loss,
    check_projection,
    check_weighting,
)
from kdlib.weighting import UniformWeighting
from tests.core.contract_cases import STUDENT, TEACHER, broken, fails, randn, without


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
    "on_meta": broken(Loss, maths=lambda self, s, t: Loss.maths(self, s, t) * (2 if s.sum().item() > 1e30 else 1)),
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


def test_all_failures_are_listed_with_the_checks_of_one_cause_together() -> None:
    def maths(self: Loss, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) <= 1:
            raise RuntimeError("out of cheese")
        return Loss.maths(self, student, teacher).reshape(-1, 1)

    run = ["scalar", "reduction_none", "deterministic", "batch_of_one", "empty_batch"]
    with pytest.raises(AssertionError) as caught:
        check_loss(broken(Loss, maths=maths)(), STUDENT, TEACHER, exclude=without(LOSS_CHECKS, *run))
    assert str(caught.value).splitlines() == [
        "check_loss(Broken): 3 of 5 checks failed",
        "  reduction_none: 'none' must give (b,) = (5,), got (5, 1)",
        "  batch_of_one, empty_batch: raised RuntimeError: out of cheese",
    ]


def test_arguments_that_a_loss_does_not_accept_are_one_cause_on_every_device() -> None:
    with pytest.raises(AssertionError) as caught:
        check_loss(nn.MSELoss(), STUDENT, TEACHER, exclude=without(LOSS_CHECKS, "weight_ones", "on_meta"))
    assert str(caught.value).splitlines() == [
        "check_loss(MSELoss): weight_ones, on_meta: raised TypeError: MSELoss.forward() got an unexpected keyword argument "
        "'weight'"
    ]


def test_a_wrong_gradient_is_one_line() -> None:
    def gradient_of_half(student: Tensor, teacher: Tensor) -> Tensor:
        value = functional.hint(student, teacher)
        return value.detach() + 0.5 * (value - value.detach())

    with pytest.raises(
        AssertionError, match=r"the gradient must equal that by differences in float64, got: .*"
    ) as caught:
        check_loss(gradient_of_half, STUDENT, TEACHER, exclude=without(LOSS_CHECKS, "gradcheck"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_loss(HintLoss(), STUDENT, TEACHER, exclude=["gradchek"]), ValueError, "nearest are 'gradcheck'"),
        (
            lambda: check_loss(HintLoss(), STUDENT[:3], TEACHER[:3]),
            ValueError,
            r"the batch size must be .* >= 4, got 3",
        ),
        (lambda: check_loss(HintLoss(), STUDENT, TEACHER[:4]), ValueError, "teacher must have the batch size"),
        (lambda: check_loss(HintLoss(), STUDENT.long(), TEACHER), TypeError, "student must be a floating-point tensor"),
        (
            lambda: check_loss(HintLoss(), STUDENT, TEACHER, target=STUDENT[:2]),
            ValueError,
            "target must have the batch",
        ),
        (lambda: check_weighting(UniformWeighting(), num_teachers=0), ValueError, "num_teachers must be"),
        (lambda: check_weighting(UniformWeighting(), teachers=[]), ValueError, "the number of teachers must be"),
        (
            lambda: check_weighting(UniformWeighting(), teachers=[randn(2, 4), randn(3, 4)]),
            ValueError,
            r"teachers\[1\] must",
        ),
        (lambda: check_weighting(UniformWeighting(), targets={"a": torch.ones(2)}), ValueError, r"targets\['a'\] must"),
        (lambda: check_projection(torch.tanh, STUDENT, TEACHER), TypeError, "projection must be a Module"),
        (lambda: check_loss("hint", STUDENT, TEACHER), TypeError, "check_loss: loss must be callable, got str"),
        (lambda: check_weighting(None), TypeError, "check_weighting: weighting must be callable, got NoneType"),
        (
            lambda: check_projection(LinearProjection(4, 6), STUDENT[:1], TEACHER[:1]),
            ValueError,
            "the batch size must be",
        ),
        (lambda: check_adapter(torch.tanh, STUDENT), TypeError, "adapter must be a Module"),
    ],
)
def test_invalid_arguments_are_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
