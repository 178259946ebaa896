"""Activation boundaries, overhaul and hierarchical context: public code, grids, properties."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib.losses
from kdlib import HintLoss, OverhaulLoss
from kdlib.functional import activation_boundary, hierarchical_context, overhaul, overhaul_margin
from tests.core import reference_features as reference
from tests.core.loss_inputs import MARGIN, gradient, noise

seeds = st.integers(0, 2**31 - 2)


def maps(seed: int = 0, batch: int = 5, side: int = 6) -> tuple[Tensor, Tensor]:
    return noise(batch, 3, side, side, seed=seed), noise(batch, 3, side, side, seed=seed + 1)


def public_activation_boundary(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """RepDistiller at its last stage."""
    on, off = (teacher > 0).to(student), (teacher <= 0).to(student)
    silent = (student + margin) ** 2 * (student > -margin) * off
    fires = (student - margin) ** 2 * (student <= margin) * on
    return (silent + fires).abs().sum() / len(student) / 1000 * 3


def public_overhaul(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """mdistiller at its last stage."""
    teacher = F.adaptive_avg_pool2d(teacher, student.shape[-2:])
    margin = margin.reshape(1, -1, 1, 1)
    loss = (student - margin) ** 2 * ((student > margin) & (teacher <= margin))
    loss = loss + (student - teacher) ** 2 * ((student > teacher) & (teacher > margin) & (teacher <= 0))
    return (loss + (student - teacher) ** 2 * (teacher > 0)).abs().mean(0).sum()


def public_hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """mdistiller for one stage."""
    loss, part, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            part /= 2
            pooled = F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side)
            loss = loss + part * F.mse_loss(*pooled)
            total += part
    return loss / total


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 9])
def test_values_of_public_code(side: int) -> None:
    student, teacher = maps(side, side=side)
    values = student[0].numel()
    torch.testing.assert_close(
        activation_boundary(student, teacher, margin=0.8) * 3 * values / 1000,
        public_activation_boundary(student, teacher, 0.8),
    )
    torch.testing.assert_close(
        overhaul(student, teacher, margin=MARGIN) * values, public_overhaul(student, teacher, MARGIN)
    )
    larger = noise(5, 3, 2 * side + 1, side + 3, seed=3)
    torch.testing.assert_close(
        overhaul(student, larger, margin=MARGIN, layout="bchw") * values, public_overhaul(student, larger, MARGIN)
    )
    torch.testing.assert_close(hierarchical_context(student, teacher), public_hierarchical_context(student, teacher))


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        (1.0, 0.0, -math.sqrt(2 / math.pi)),  # a half normal
        (-2.0, 0.0, -2 * math.sqrt(2 / math.pi)),
        (1.0, -40.0, -40.0),  # always negative
        (1.0, 3.2, -3.0),  # rarely negative
        (0.5, 1e4, -1.5),
        (0.0, -0.7, -0.7),  # constant output
        (0.0, 0.7, 0.0),
        (0.0, 0.0, 0.0),
        (1e-30, 1.0, -3e-30),
        (1.0, -1e30, -1e30),
    ],
)
def test_margins_by_hand(weight: float, bias: float, expected: float) -> None:
    norm = nn.BatchNorm1d(1)
    norm.weight.data.fill_(weight)
    norm.bias.data.fill_(bias)
    margin = overhaul_margin(norm)
    assert margin.item() == pytest.approx(expected, rel=1e-6)
    assert margin.dtype == torch.float32
    assert not margin.requires_grad
    assert overhaul_margin(norm.half()).dtype == torch.float32 if abs(bias) < 6e4 else True


def test_margins_are_the_mean_below_zero() -> None:
    norm = nn.BatchNorm2d(40).double()
    norm.weight.data = noise(40)
    norm.bias.data = noise(40, seed=1)
    norm.bias.data[:2] = (
        torch.tensor([3.0, 3.2]) * norm.weight.data[:2].abs()
    )  # on both sides of a probability of 0.001
    margin = overhaul_margin(norm)
    assert margin.dtype == torch.float64
    expected = reference.overhaul_margin(norm.weight.detach().numpy(), norm.bias.detach().numpy())
    np.testing.assert_allclose(margin.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("teacher_grid", [(12, 12), (7, 9), (2, 9), (9, 2), (3, 3), (1, 1)])
def test_overhaul_pools_the_larger_grid(teacher_grid: tuple[int, int]) -> None:
    student, teacher = noise(4, 3, 5, 6), noise(4, 3, *teacher_grid, seed=1)
    got = overhaul(student, teacher, margin=MARGIN, reduction="none")
    np.testing.assert_allclose(
        got.numpy(), reference.overhaul(student.numpy(), teacher.numpy(), margin=MARGIN.numpy()), rtol=1e-11
    )
    grid = (min(5, teacher_grid[0]), min(6, teacher_grid[1]))
    pooled = (F.adaptive_avg_pool2d(x, grid) for x in (student, teacher))
    torch.testing.assert_close(overhaul(*pooled, margin=MARGIN, reduction="none"), got)


@pytest.mark.parametrize("grid", [(8, 8), (8, 3), (3, 8), (4, 4), (1, 5), (2, 1), (1, 1)])
def test_hierarchical_context_of_any_grid(grid: tuple[int, int]) -> None:
    student, teacher = noise(3, 2, *grid), noise(3, 2, *grid, seed=1)
    for levels in ((4, 2, 1), [2], (1, 4), ()):
        got = hierarchical_context(student, teacher, levels=levels, layout="bchw", reduction="none")
        expected = reference.hierarchical_context(student.numpy(), teacher.numpy(), levels=tuple(levels))
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11)
        swapped = (x.transpose(2, 3) for x in (student, teacher))
        turned = hierarchical_context(*swapped, levels=levels, layout="bchw", reduction="none")
        torch.testing.assert_close(turned, got)
    without = hierarchical_context(student, teacher, levels=(), layout="bchw")
    torch.testing.assert_close(without, HintLoss()(student, teacher))


def test_vectors_and_values() -> None:
    student, teacher = noise(4, 3), noise(4, 3, seed=1)
    as_maps = (x[:, :, None, None] for x in (student, teacher))
    torch.testing.assert_close(overhaul(student, teacher, margin=MARGIN), overhaul(*as_maps, margin=MARGIN))
    torch.testing.assert_close(
        activation_boundary(student[:, 0], teacher[:, 0]), activation_boundary(student[:, :1], teacher[:, :1])
    )
    torch.testing.assert_close(
        activation_boundary(student, teacher), activation_boundary(student[:, None], teacher[:, None])
    )


@settings(max_examples=30)
@given(seed=seeds, margin=st.floats(0, 5), scale=st.floats(1e-3, 1e3))
def test_activation_boundary_depends_on_the_signs_of_the_teacher(seed: int, margin: float, scale: float) -> None:
    student, teacher = maps(seed, batch=2, side=2)
    value = activation_boundary(student, teacher, margin=margin)
    assert value.item() >= 0
    torch.testing.assert_close(activation_boundary(student, scale * teacher, margin=margin), value)
    torch.testing.assert_close(activation_boundary(student, teacher.sign(), margin=margin), value)
    torch.testing.assert_close(activation_boundary(-student, -teacher, margin=margin), value)
    beyond = teacher.sign() * (margin + student.abs())
    assert activation_boundary(beyond, teacher, margin=margin).item() == pytest.approx(0, abs=1e-25)
    torch.testing.assert_close(activation_boundary(scale * student, teacher, margin=scale * margin), scale**2 * value)


@settings(max_examples=30)
@given(seed=seeds, margin=st.floats(-5, 0), scale=st.floats(1e-3, 1e3))
def test_overhaul_ignores_inactive_values(seed: int, margin: float, scale: float) -> None:
    student, teacher = maps(seed, batch=2, side=2)
    value = overhaul(student, teacher, margin=margin)
    assert value.item() >= 0
    assert overhaul(teacher, teacher, margin=margin).item() == 0
    fires = teacher.abs()
    torch.testing.assert_close(overhaul(student, fires, margin=margin), HintLoss()(student, fires))
    quiet = -teacher.abs()
    below = quiet.clamp(min=margin) - student.abs()
    assert overhaul(below, quiet, margin=margin).item() == 0
    assert not gradient(overhaul, below, quiet, margin=margin).any()
    # Teacher values below the margin have no influence.
    torch.testing.assert_close(overhaul(student, teacher.clamp(min=margin), margin=margin), value)
    torch.testing.assert_close(overhaul(scale * student, scale * teacher, margin=scale * margin), scale**2 * value)


@settings(max_examples=30)
@given(seed=seeds, side=st.integers(1, 9), scale=st.floats(1e-3, 1e3))
def test_hierarchical_context_between_its_parts(seed: int, side: int, scale: float) -> None:
    student, teacher = maps(seed, batch=2, side=side)
    value = hierarchical_context(student, teacher)
    assert hierarchical_context(student, student).item() == 0
    assert 0 < value.item() <= HintLoss()(student, teacher).item() * (1 + 1e-12)  # pooling cannot increase it
    torch.testing.assert_close(hierarchical_context(teacher, student), value)
    torch.testing.assert_close(hierarchical_context(student + 3, teacher + 3), value)
    torch.testing.assert_close(hierarchical_context(scale * student, scale * teacher), scale**2 * value)
    shifted = hierarchical_context(student, student - 2)
    torch.testing.assert_close(shifted, torch.tensor(4.0, dtype=torch.float64))


@pytest.mark.parametrize("margin", [-0.5, MARGIN])
def test_a_margin_is_no_state(margin: float | Tensor) -> None:
    loss = OverhaulLoss(margin)
    assert loss.state_dict() == {}
    rebuilt = eval(repr(loss), {**vars(kdlib.losses), "torch": torch})
    student, teacher = maps()
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), rebuilt.double()):
        torch.testing.assert_close(other(student, teacher), overhaul(student, teacher, margin=margin))


def test_margins_in_the_repr() -> None:
    assert repr(OverhaulLoss(-torch.arange(1.0, 65))) == (
        "OverhaulLoss(margin=torch.tensor([-1.0, -2.0, ..., -64.0]), reduction='mean')"
    )
    loss = OverhaulLoss(-torch.ones(3))
    assert loss.to(torch.float16).margin.dtype == torch.float16
    given_ = -torch.ones(3)
    loss = OverhaulLoss(given_)
    given_.zero_()
    assert loss.margin.tolist() == [-1, -1, -1]


def test_many_margins_are_shortened_in_the_text() -> None:
    few, many = OverhaulLoss(-torch.arange(6.0)), OverhaulLoss(-torch.arange(7.0))
    assert repr(few) == "OverhaulLoss(margin=torch.tensor([-0.0, -1.0, -2.0, -3.0, -4.0, -5.0]), reduction='mean')"
    assert repr(many) == "OverhaulLoss(margin=torch.tensor([-0.0, -1.0, ..., -6.0]), reduction='mean')"
    assert repr(OverhaulLoss(-0.5, layout="bhwc")) == "OverhaulLoss(margin=-0.5, layout='bhwc', reduction='mean')"


def test_the_margin_of_a_weight_of_zero_is_its_constant_output() -> None:
    norm = nn.BatchNorm2d(3)
    norm.weight.data.zero_()
    norm.bias.data = torch.tensor([-0.5, 0.0, 2.0])
    assert overhaul_margin(norm).tolist() == [-0.5, 0.0, 0.0]


def test_a_teacher_of_zero_is_not_active() -> None:
    student = torch.tensor([[2.0, -3.0, 0.5]])
    # Below -margin the student agrees: shortfalls 1 + 2, 0 and 1 + 0.5.
    assert activation_boundary(student, torch.zeros(1, 3)).item() == pytest.approx((9 + 2.25) / 3)
