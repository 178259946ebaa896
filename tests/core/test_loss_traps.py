"""Numerical edge cases that produce NaN, infinity or wrong values in other implementations.

All dtypes with and without autocast: values and gradients are finite, and values equal those of float64 arithmetic.
"""

import math

import pytest
import torch
from torch import Tensor

from kdlib import AngularDistillLoss, AttentionTransferLoss, HintLoss, SoftTargetLoss
from kdlib._maths import full_precision
from kdlib.functional import angular_distill, attention_transfer, hint, soft_target
from tests.core.loss_inputs import DTYPES, each_dtype, each_mode, few_edge_cases, noise

LOSSES = {
    "squared": AngularDistillLoss(),
    "cosine": AngularDistillLoss(form="cosine"),
    "chord": AngularDistillLoss(form="chord"),
    "angle": AngularDistillLoss(form="angle"),
    "attention": AttentionTransferLoss(),
    "attention_p1": AttentionTransferLoss(p=1),
    "attention_p4": AttentionTransferLoss(p=4),
    "hint": HintLoss(),
    "soft_target": SoftTargetLoss(),
    "soft_target_1": SoftTargetLoss(temperature=1.0),
}


def prepared(name: str, trap: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (x.to(dtype) for x in few_edge_cases(dtype)[trap])
    if name.startswith("attention"):
        student, teacher = student.reshape(-1, 3, 2, 2), teacher.reshape(-1, 3, 2, 2)
    return student.requires_grad_(), teacher.requires_grad_()


@each_mode
@each_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_finite(name: str, dtype: torch.dtype, autocast: bool) -> None:
    tried = 0
    for trap in few_edge_cases(dtype):
        student, teacher = prepared(name, trap, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = LOSSES[name](student, teacher)
        value.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), trap
        assert math.isfinite(value.item()), trap
        assert value.item() >= -1e-6, trap
        assert student.grad is not None, trap
        assert student.grad.dtype == dtype, trap
        assert torch.isfinite(student.grad).all(), trap
        assert teacher.grad is None, trap
        tried += 1
    assert tried == 19


@each_mode
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_float64(name: str, dtype: torch.dtype, autocast: bool) -> None:
    for trap in few_edge_cases(dtype):
        student, teacher = prepared(name, trap, dtype)
        expected = LOSSES[name](student.double(), teacher.double(), reduction="none").detach()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = LOSSES[name](student, teacher, reduction="none").detach()
        torch.testing.assert_close(
            got.double(), expected, rtol=2e-5, atol=1e-5, msg=lambda m, trap=trap: f"{trap}: {m}"
        )


def test_angle_is_exact_and_has_a_gradient_near_both_ends() -> None:
    for angle in (0.0, 1e-12, 1e-7, 1e-4, 1e-2, 1.0, math.pi / 2, 3.0, math.pi - 1e-4, math.pi - 1e-7, math.pi):
        student = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64, requires_grad=True)
        value = angular_distill(student, torch.tensor([[1.0, 0.0]], dtype=torch.float64), form="angle")
        assert value.item() == pytest.approx(angle, rel=1e-9, abs=1e-15)
        value.backward()
        length = student.grad.norm().item()
        assert length == pytest.approx(0.0 if angle == 0.0 else 1.0, abs=1e-6)
    opposite = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    angular_distill(opposite, torch.tensor([[1.0, 0.0]]), form="angle").backward()
    assert torch.equal(opposite.grad, torch.zeros(1, 2))


def test_angle_of_many_equal_rows_is_zero_in_float32() -> None:
    """Rounding makes a quarter of the cosines of equal rows exceed 1, where acos is NaN."""
    rows = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = angular_distill(rows, rows.detach().clone(), form="angle", reduction="none")
    value.sum().backward()
    assert torch.equal(value, torch.zeros(4096))
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_zero_rows_are_orthogonal_to_everything() -> None:
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    expected = {"squared": [1, 1], "cosine": [1, 1], "chord": [1, 0], "angle": [math.pi / 2, math.pi / 2]}
    for form, values in expected.items():
        value = angular_distill(student, teacher, form=form, reduction="none")
        assert value.tolist() == pytest.approx(values, rel=1e-6)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert torch.equal(gradient, torch.zeros(2, 3))


@each_dtype
@pytest.mark.parametrize("form", ["squared", "cosine", "chord", "angle"])
def test_tiny_rows_keep_their_value(form: str, dtype: torch.dtype) -> None:
    tiny = torch.tensor([[3, 0, 4], [1, 1, 0]], dtype=dtype) * torch.finfo(dtype).smallest_normal
    one = torch.tensor([[1, 0, 0], [1, 0, 0]], dtype=dtype)
    got = angular_distill(tiny, one, form=form, reduction="none")
    expected = angular_distill(torch.tensor([[3.0, 0, 4], [1, 1, 0]]), one.float(), form=form, reduction="none")
    torch.testing.assert_close(got.float(), expected, rtol=1e-6, atol=0)


def test_gradient_grows_with_one_over_length_until_the_row_is_too_short() -> None:
    teacher = torch.tensor([[0.0, 1.0]])
    for dtype, length, expected in (
        (torch.float32, 1e-10, 1e10),
        (torch.float32, 1e-13, 0.0),
        (torch.float16, 2**-10, 2.0**10),
        (torch.float16, 2**-12, 0.0),
        (torch.bfloat16, 2**-12, 2.0**12),
    ):
        student = torch.tensor([[length, 0.0]], dtype=dtype, requires_grad=True)
        angular_distill(student, teacher.to(dtype), form="cosine").backward()
        assert -student.grad[0, 1].item() == pytest.approx(expected, rel=1e-3)


def test_dead_maps_count_as_zero_vectors() -> None:
    dead, alive = torch.zeros(1, 2, 3, 3, requires_grad=True), torch.ones(1, 2, 3, 3)
    assert attention_transfer(dead, alive).item() == pytest.approx(1.0)
    assert attention_transfer(alive, dead).item() == pytest.approx(1.0)
    assert attention_transfer(dead, torch.zeros(1, 2, 3, 3)).item() == 0.0


def test_attention_keeps_features_whose_squares_vanish() -> None:
    features = torch.zeros(1, 1, 1, 2)
    features[0, 0, 0, 0] = 1e-25
    assert attention_transfer(features, torch.tensor([[[[0.0, 1e25]]]])).item() == pytest.approx(2.0)


def test_soft_target_at_a_gap_is_the_gap() -> None:
    for gap in (20.0, 120.0, 1e4):
        student = torch.tensor([[gap, 0.0]], requires_grad=True)
        value = soft_target(student, torch.tensor([[0.0, gap]]), temperature=1.0)
        assert value.item() == pytest.approx(gap, rel=1e-5)
        value.backward()
        torch.testing.assert_close(student.grad, torch.tensor([[1.0, -1.0]]))


def test_soft_target_at_the_end_of_float32() -> None:
    end = torch.finfo(torch.float32).max
    student = torch.tensor([[end, -end, 0.0]], requires_grad=True)
    value = soft_target(student, torch.tensor([[-end, end, 0.0]]), temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(1e30)
    assert torch.isfinite(student.grad).all()


def test_hint_saturates_where_its_square_would_leave_float32() -> None:
    student = torch.tensor([[1e30, 1.0]], requires_grad=True)
    value = hint(student, torch.zeros(1, 2))
    value.backward()
    assert value.item() == pytest.approx(5e29)
    assert student.grad.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_in_odd_memory_order(name: str) -> None:
    student, teacher = prepared(name, "noise", torch.float64)
    expected = LOSSES[name](student, teacher)
    if student.dim() == 4:
        odd = student.detach().to(memory_format=torch.channels_last), teacher.detach().transpose(2, 3).transpose(2, 3)
    else:
        odd = student.detach().t().contiguous().t(), teacher.detach().repeat_interleave(2, 1)[:, ::2]
    torch.testing.assert_close(LOSSES[name](*odd), expected.detach())


def test_full_precision_disables_autocast() -> None:
    x = noise(4, 12).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        with full_precision(x):
            assert torch.equal(x @ x.T, x.matmul(x.T))
            assert (x @ x.T).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    with full_precision(torch.empty(1, device="meta")):  # a device without autocast
        assert (x @ x.T).dtype == torch.float32
