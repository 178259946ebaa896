"""Numerical edge cases that produce NaN, infinity or wrong values in other implementations.

All dtypes with and without autocast: values and gradients are finite, and values equal those of float64 arithmetic.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kdlib.functional
from kdlib import VariationalInformationLoss
from kdlib._maths import full_precision
from kdlib.functional import (
    activation_boundary,
    angular_distill,
    attention_transfer,
    attentive_similarity,
    dark_rank,
    hierarchical_context,
    hint,
    nst,
    overhaul,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    variational_information,
)  # fmt: skip
from tests.core.loss_inputs import (
    LOSSES,
    RELATIONS,
    each_dtype,
    each_loss,
    each_mode,
    edge_cases,
    function_of,
    gradient,
    noise,
    reference_of,
    seeded,
)  # fmt: skip

# The reference orders equal distances by their rounding errors.
TIED = {"three hundred", "at the end", "at both ends", "dead units", "teacher all equal", "zero teacher rows"}
# In the reference, the standard deviation of equal numbers is their rounding error, and logarithms may be infinite.
LOGITS_IN_RANGE = {"noise", "equal pairs", "equal to the teacher", "equal up to length", "opposite", "dead units"}


def expected_of(name: str, which: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the value of the naive reference where it is exact, otherwise that of the loss in float64."""
    limited = name.startswith("dark_rank") and (which in TIED or which == "large")
    limited |= name.startswith(("dist", "soft_target", "decoupled")) and which not in LOGITS_IN_RANGE
    if name in RELATIONS and not limited and len(student) > 1 and which not in ("at the end", "at both ends"):
        return torch.tensor(reference_of(name, student, teacher), dtype=torch.float64)
    targets = LOSSES[name].targets(len(student))
    value: Tensor = LOSSES[name].build().eval()(student.detach().double(), teacher.detach().double(), **targets)
    return value.detach().double()


@each_mode
@each_dtype
@each_loss
def test_values_and_gradients_are_finite_and_values_exact(name: str, dtype: torch.dtype, autocast: bool) -> None:
    case, num_cases = LOSSES[name], 0
    for which, sides in edge_cases(dtype).items():
        student, teacher = (x.to(dtype).reshape(-1, *case.shape).clone().requires_grad_() for x in sides)
        loss, targets = case.build(), case.targets(len(student))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(student, teacher, **targets)
            total = value + loss(student, teacher, **targets) if "queue" in name else value
        total.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), which
        assert math.isfinite(total.item()), which
        assert value.item() >= -1e-20 or name.startswith("variational"), which
        assert student.grad is not None, which
        assert student.grad.dtype == dtype, which
        assert torch.isfinite(student.grad).all(), which
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters() if p.requires_grad), which
        assert teacher.grad is None, which
        num_cases += 1
        expected = expected_of(name, which, student, teacher)
        assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=2e-5), which
    assert num_cases == 31


@each_dtype
@pytest.mark.parametrize("name", [name for name in LOSSES if "contrastive" not in name])
def test_pooling_and_sums_of_the_largest_numbers(name: str, dtype: torch.dtype) -> None:
    case, end = LOSSES[name], torch.finfo(dtype).max
    shape = (4, *case.shape)
    for teacher in (torch.full(shape, -end, dtype=dtype), torch.ones(shape, dtype=dtype)):
        student = torch.full(shape, end, dtype=dtype, requires_grad=True)
        loss = case.build()
        value = loss(student, teacher, **case.targets(4))
        value.backward()
        assert math.isfinite(value.item())
        assert torch.isfinite(student.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "similarity_preserving", "pkt", "dark_rank, unit rows"])
def test_relations_of_the_largest_numbers(name: str, dtype: torch.dtype) -> None:
    """The losses do not depend on scale, up to the largest number of the dtype."""
    loss, rng = function_of(name), torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 5, generator=rng).clamp(-1, 1).to(dtype) for _ in range(2))
    student[0, 0], teacher[1, 2] = 1.0, -1.0
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    far = (student * largest).requires_grad_()
    value = loss(far, teacher * largest)
    torch.testing.assert_close(value, loss(student, teacher), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    value.backward()
    assert bool(far.grad.isfinite().all())


# Angles and zero rows.


def test_angle_is_exact_and_has_a_gradient_near_both_ends() -> None:
    for angle in (0.0, 1e-12, 1e-7, 1e-4, 1e-2, 1.0, math.pi / 2, 3.0, math.pi - 1e-4, math.pi - 1e-7, math.pi):
        student = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64, requires_grad=True)
        value = angular_distill(student, torch.tensor([[1.0, 0.0]], dtype=torch.float64), form="angle")
        assert value.item() == pytest.approx(angle, rel=1e-9, abs=1e-15)
        value.backward()
        assert student.grad.norm().item() == pytest.approx(0.0 if angle == 0.0 else 1.0, abs=1e-6)
    opposite = torch.tensor([[-1.0, 0.0]])
    assert not gradient(angular_distill, opposite, torch.tensor([[1.0, 0.0]]), form="angle").any()


def test_angle_of_many_equal_rows_is_zero_in_float32() -> None:
    """Rounding makes a quarter of the cosines of equal rows exceed 1, where acos is NaN."""
    rows = noise(4096, 128, dtype=torch.float32).requires_grad_()
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
        assert not torch.autograd.grad(value.sum(), student)[0].any()
        assert angular_distill(teacher, student, form=form, reduction="none").tolist() == pytest.approx(
            values, rel=1e-6
        )


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
        student = torch.tensor([[length, 0.0]], dtype=dtype)
        slope = gradient(angular_distill, student, teacher.to(dtype), form="cosine")
        assert -slope[0, 1].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", [attention_transfer, nst])
def test_gradient_of_pooled_maps_grows_until_the_map_is_too_short(loss: Callable[..., Tensor]) -> None:
    student, teacher = noise(2, 3, 4, 4), noise(2, 5, 2, 2, seed=1)
    expected = gradient(loss, student, teacher)
    for size in (1e-6, 1e10):
        torch.testing.assert_close(size * gradient(loss, size * student, teacher), expected)
    assert not gradient(loss, 1e-13 * student, teacher).any()


def test_dead_maps_count_as_zero_vectors() -> None:
    dead, alive = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    for loss, one_dead, both_dead in (
        (attention_transfer, 1.0, 0.0),
        (attentive_similarity, 2.0, 2.0),
        (nst, 1.0, 0.0),
    ):
        assert loss(dead, alive).item() == pytest.approx(one_dead)
        assert loss(alive, dead).item() == pytest.approx(one_dead)
        assert loss(dead, dead).item() == both_dead
        assert not gradient(loss, dead, alive).any()
        assert not gradient(loss, dead, dead).any()
    half = torch.cat([torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)], dim=1)
    assert nst(half, alive[..., :2, :2]).item() == pytest.approx(1 + 1 / 4 - 2 / 2)


def test_attention_keeps_features_whose_squares_vanish() -> None:
    features = torch.tensor([[[[1e-25, 0.0]]]])
    assert attention_transfer(features, torch.tensor([[[[0.0, 1e25]]]])).item() == pytest.approx(2.0)


# Limits of float32 and float16.


def test_squares_saturate_where_they_would_leave_float32() -> None:
    student = torch.tensor([[1e30, 1.0]])
    assert hint(student, torch.zeros(1, 2)).item() == pytest.approx(5e29)
    assert gradient(hint, student, torch.zeros(1, 2)).tolist() == [[0.0, 1.0]]
    mean = torch.tensor([[3e38, 1.0]], requires_grad=True)
    variance = torch.tensor([1e-38, 1.0], requires_grad=True)
    value = variational_information(mean, torch.tensor([[-3e38, 0.0]]), variance=variance)
    value.backward()
    assert math.isfinite(value.item())
    assert mean.grad.tolist() == [[0.0, 0.5]]
    assert torch.isfinite(variance.grad).all()
    tiny = seeded(lambda: VariationalInformationLoss(3, 3, initial_variance=1e-9, min_variance=1e-12))
    assert torch.isfinite(gradient(tiny, noise(4, 3, 2, 2).float(), 300 * noise(4, 3, 2, 2, seed=1).float())).all()


def test_float16_gradients_do_not_overflow() -> None:
    end = torch.finfo(torch.float16).max
    far, teacher = torch.tensor([[end, 1.0]], dtype=torch.float16), torch.tensor([[-end, 1.0]], dtype=torch.float16)
    for loss in (hint, lambda s, t: variational_information(s, t, variance=1e-9)):
        assert loss(far, teacher).item() == pytest.approx(loss(far.float(), teacher.float()).item())
        assert gradient(loss, far, teacher).tolist() == [[0.0, 0.0]]
    student = torch.tensor([[6e4, 1.0, -6e4, 2.0]], dtype=torch.float16)
    for loss, options in ((activation_boundary, {}), (overhaul, {"margin": -1.0})):
        slope = gradient(loss, student, torch.tensor([[-1e9, 1.0, 1e9, -1e9]]), **options)
        assert torch.isfinite(slope).all()
        assert slope[0, 3] > 0
    teacher = torch.zeros(1, 1, 4, 4)
    teacher[0, 0, 0, 0] = 1e9  # its contribution to the neighbors would overflow float16
    assert torch.isfinite(gradient(hierarchical_context, torch.zeros(1, 1, 4, 4).half(), teacher)).all()
    # The mean of a level has a gradient up to a quarter of the largest number times a quarter of the 8 values.
    for size, steep in ((3e4, False), (3.5e4, True)):
        slope = gradient(
            hierarchical_context, torch.full((1, 2, 2, 2), size).half(), torch.zeros(1, 2, 2, 2), levels=(1,)
        )
        assert slope.float().unique().tolist() == pytest.approx([size / 6 if steep else size / 4], rel=1e-3)
    assert torch.isfinite(gradient(dark_rank, 300 * noise(6, 32).sign().half(), noise(6, 4, seed=1))).all()
    near = noise(6, 32, dtype=torch.float16)
    slopes = [gradient(dark_rank, x, noise(6, 4, seed=1)).double() for x in (near, near.double())]
    torch.testing.assert_close(*slopes, rtol=2e-3, atol=1e-4)


# Common offsets and near rows.


@pytest.mark.parametrize(
    "loss", [rkd_distance, rkd_angle, similarity_preserving, pkt, kdlib.functional.correlation_congruence]
)
def test_a_common_offset_costs_no_precision(loss: Callable[..., Tensor]) -> None:
    """This includes losses that depend on the offset and are then dominated by small differences."""
    for weight in (None, torch.linspace(0, 2, 40)):
        student, teacher = (noise(40, 16, seed=seed, dtype=torch.float32) + 1000 for seed in (0, 1))
        exact = loss(student.double(), teacher.double(), weight=weight)
        assert loss(student, teacher, weight=weight).item() == pytest.approx(exact.item(), rel=1e-4)
        slope = gradient(loss, student.double(), teacher.double(), weight=weight)
        single = gradient(loss, student, teacher, weight=weight)
        assert (single - slope).norm() / slope.norm() < 2e-4


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, lambda *sides: dark_rank(*sides, alpha=0.01)])
def test_near_rows_are_exact(loss: Callable[..., Tensor], apart: float) -> None:
    student, teacher = noise(24, 16, dtype=torch.float32), noise(24, 16, seed=1, dtype=torch.float32)
    student[12:] = student[:12] + apart * noise(12, 16, seed=2, dtype=torch.float32)
    for offset in (0, 1000) if apart > 1e-4 else (0,):
        moved = student + offset
        exact = loss(moved.double(), teacher.double())
        assert loss(moved, teacher).item() == pytest.approx(exact.item(), rel=1e-5)
        slope = gradient(loss, moved.double(), teacher.double())
        assert (gradient(loss, moved, teacher) - slope).norm() / slope.norm() < 1e-3


def test_distances_of_near_rows() -> None:
    """Pairs of near rows that are far from each other, where the loss depends on the near distances only."""
    far = 100 * noise(4, 8, dtype=torch.float32)
    student = torch.cat([far, far + 1e-2 * noise(4, 8, seed=3, dtype=torch.float32)])
    weight = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
    assert rkd_distance(student, 5 * student, weight=weight).item() == 0.0
    triple, teacher = torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0]), noise(8, 3, seed=4, dtype=torch.float32)
    exact = reference_of("rkd_distance", student, teacher, triple)
    assert rkd_distance(student, teacher, weight=triple).item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["angular_distill", "attention_transfer", "hint", "soft_target", "dist", "rkd_angle"])
def test_tensors_in_odd_memory_order(name: str) -> None:
    student, teacher = LOSSES[name].sides()
    expected = function_of(name)(student, teacher)
    if student.dim() == 4:
        odd = student.to(memory_format=torch.channels_last), teacher.transpose(2, 3).transpose(2, 3)
    else:
        odd = student.t().contiguous().t(), teacher.repeat_interleave(2, 1)[:, ::2]
    torch.testing.assert_close(function_of(name)(*odd), expected)


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
