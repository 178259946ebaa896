"""Activation boundaries, overhaul, hierarchical context and DarkRank: naive references, public code, properties.

The contract that all losses share is in `test_contracts`.
"""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib
import kdlib.losses
from kdlib import ActivationBoundaryLoss, DarkRankLoss, HierarchicalContextLoss, HintLoss, OverhaulLoss
from kdlib.functional import activation_boundary, dark_rank, hierarchical_context, overhaul, overhaul_margin
from tests.core import reference_further as reference
from tests.core.loss_inputs import each_dtype, each_mode, gradient, many_edge_cases, noise

MARGIN = torch.tensor([-0.1, -0.5, -2.0], dtype=torch.float64)
PER_SAMPLE: dict[str, tuple[Callable[..., Tensor], type[nn.Module], dict[str, Any]]] = {
    "activation_boundary": (activation_boundary, ActivationBoundaryLoss, {}),
    "activation_boundary, margin 0": (activation_boundary, ActivationBoundaryLoss, {"margin": 0}),
    "overhaul": (overhaul, OverhaulLoss, {"margin": -0.3}),
    "overhaul, by channel": (overhaul, OverhaulLoss, {"margin": MARGIN}),
    "hierarchical_context": (hierarchical_context, HierarchicalContextLoss, {}),
    "hierarchical_context, uneven": (hierarchical_context, HierarchicalContextLoss, {"levels": (3, 2)}),
}
RANKS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5, "beta": 1.0},
    {"beta": 0.5, "length": 3},
    {"normalize": True, "length": 2},
    {"normalize": True, "length": 50},
]
each = pytest.mark.parametrize("name", PER_SAMPLE)
each_rank = pytest.mark.parametrize("kwargs", RANKS, ids=str)


def maps(seed: int = 0, batch: int = 5, side: int = 6) -> tuple[Tensor, Tensor]:
    return noise(batch, 3, side, side, seed=seed), noise(batch, 3, side, side, seed=seed + 1)


def loops(name: str, student: Tensor, teacher: Tensor, kwargs: dict[str, Any]) -> np.ndarray:
    of = getattr(reference, name.split(",")[0])
    kwargs = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    return np.asarray(of(student.detach().double().numpy(), teacher.detach().double().numpy(), **kwargs))


def ranks(student: Tensor, teacher: Tensor, weight: Tensor | None = None, **kwargs: Any) -> float:
    w = np.ones(len(student)) if weight is None else weight.double().numpy()
    s, t = (x.detach().double().flatten(1).numpy() for x in (student, teacher))
    return reference.dark_rank(s, t, w, **kwargs)


# Naive references, public code and values by hand.


@each
def test_equals_the_loops(name: str) -> None:
    loss, _, kwargs = PER_SAMPLE[name]
    student, teacher = maps()
    got = loss(student, teacher, reduction="none", **kwargs)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), loops(name, student, teacher, kwargs), rtol=1e-11)
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7], dtype=torch.float64)
    torch.testing.assert_close(loss(student, teacher, weight=weight, **kwargs), (weight * got).sum() / weight.sum())
    torch.testing.assert_close(loss(student, teacher, weight=weight, reduction="none", **kwargs), weight * got)
    torch.testing.assert_close(loss(student, teacher, **kwargs), got.mean())
    assert torch.autograd.gradcheck(
        lambda s: loss(s, teacher, weight=weight, **kwargs), student.requires_grad_(), fast_mode=True
    )


@each_rank
def test_dark_rank_equals_the_loops(kwargs: dict[str, Any]) -> None:
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7, 0.0, 1.0], dtype=torch.float64)
    student, teacher = noise(7, 2, 2), noise(7, 4, seed=1)
    for w in (None, weight, torch.full((7,), 0.25)):
        got = dark_rank(student, teacher, weight=w, **kwargs)
        assert got.dtype == torch.float64
        assert got.item() == pytest.approx(ranks(student, teacher, w, **kwargs), rel=1e-10)
        single = dark_rank(student.float(), teacher.float(), weight=w, **kwargs)
        assert single.dtype == torch.float32
        assert single.item() == pytest.approx(got.item(), rel=1e-4)
        assert torch.autograd.gradcheck(
            lambda s, w=w: dark_rank(s, teacher, weight=w, **kwargs), student.clone().requires_grad_()
        )


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


def public_dark_rank(student: Tensor, teacher: Tensor, alpha: float, beta: float, length: int) -> Tensor:
    """The code of RKD's authors, which drops the first of the sorted samples."""
    apart, apart_t = torch.cdist(student, student), torch.cdist(teacher, teacher)
    order = (-alpha * apart_t**beta).sort(dim=1, descending=True)[1][:, 1 : length + 1]
    drawn = (-alpha * apart**beta).gather(1, order)
    rest = torch.stack([torch.logsumexp(drawn[:, k:], 1) for k in range(order.shape[1])], 1)
    return -(drawn - rest).sum(1).mean()


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
        overhaul(student, larger, margin=MARGIN) * values, public_overhaul(student, larger, MARGIN)
    )
    torch.testing.assert_close(hierarchical_context(student, teacher), public_hierarchical_context(student, teacher))


@pytest.mark.parametrize("batch", [3, 4, 5, 8, 30])
def test_dark_rank_of_public_code(batch: int) -> None:
    student, teacher = (F.normalize(noise(batch, 5, seed=seed), dim=1) for seed in (batch, batch + 1))
    for options in ((3.0, 3.0, 4), (2.0, 2.0, 8), (3.0, 3.0, 3)):
        named = dict(zip(("alpha", "beta", "length"), options, strict=True))
        value = dark_rank(student, teacher, **named)
        torch.testing.assert_close(value, public_dark_rank(student, teacher, *options))
        scaled = dark_rank(7 * student, 3 * teacher, **named, normalize=True)
        torch.testing.assert_close(scaled, value)


def test_dark_rank_of_three_by_hand() -> None:
    # The student is at 0, 1 and 3 on a line, the teacher at 2, 3 and 0.
    student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [3.0], [0.0]])
    # Distances of the student 0-1: 1, 0-2: 3, 1-2: 2. Orders of the teacher: 0: 1, 2; 1: 0, 2; 2: 0, 1.
    expected = [math.log1p(math.exp(near - far)) for near, far in ((1, 3), (1, 2), (3, 2))]
    value = dark_rank(student.double(), teacher.double(), alpha=1, beta=1)
    assert value.item() == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_dark_rank_is_the_likelihood_of_drawing_that_order() -> None:
    student, teacher = noise(5, 2), torch.arange(5.0, dtype=torch.float64).unsqueeze(1)
    one = torch.tensor(
        [1.0, 1e-30, 1e-30, 1e-30, 1e-30], dtype=torch.float64
    )  # only the list of the first sample has a weight
    scores = (-3 * torch.cdist(student, student)[0, 1:] ** 3).numpy()
    expected = -math.log(reference.likelihood_of_an_order(scores))
    assert dark_rank(student, teacher, weight=one).item() == pytest.approx(expected, rel=1e-9)


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


# Grids and shapes.


@pytest.mark.parametrize("teacher_grid", [(12, 12), (7, 9), (2, 9), (9, 2), (3, 3), (1, 1)])
def test_overhaul_pools_the_larger_grid(teacher_grid: tuple[int, int]) -> None:
    student, teacher = noise(4, 3, 5, 6), noise(4, 3, *teacher_grid, seed=1)
    got = overhaul(student, teacher, margin=MARGIN, reduction="none")
    np.testing.assert_allclose(got.numpy(), loops("overhaul", student, teacher, {"margin": MARGIN}), rtol=1e-11)
    grid = (min(5, teacher_grid[0]), min(6, teacher_grid[1]))
    pooled = (F.adaptive_avg_pool2d(x, grid) for x in (student, teacher))
    torch.testing.assert_close(overhaul(*pooled, margin=MARGIN, reduction="none"), got)


@pytest.mark.parametrize("grid", [(8, 8), (8, 3), (3, 8), (4, 4), (1, 5), (2, 1), (1, 1)])
def test_hierarchical_context_of_any_grid(grid: tuple[int, int]) -> None:
    student, teacher = noise(3, 2, *grid), noise(3, 2, *grid, seed=1)
    for levels in ((4, 2, 1), [2], (1, 4), ()):
        got = hierarchical_context(student, teacher, levels=levels, reduction="none")
        expected = loops("hierarchical_context", student, teacher, {"levels": tuple(levels)})
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-11)
        turned = hierarchical_context(*(x.transpose(2, 3) for x in (student, teacher)), levels=levels, reduction="none")
        torch.testing.assert_close(turned, got)
    torch.testing.assert_close(hierarchical_context(student, teacher, levels=()), HintLoss()(student, teacher))


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


# Properties.

seeds = st.integers(0, 2**31 - 2)


@settings(deadline=None, max_examples=30)
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


@settings(deadline=None, max_examples=30)
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


@settings(deadline=None, max_examples=30)
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


@settings(deadline=None, max_examples=25)
@given(seed=seeds, batch=st.integers(3, 9), length=st.integers(2, 10), scale=st.floats(1e-3, 1e3))
def test_dark_rank_properties(seed: int, batch: int, length: int, scale: float) -> None:
    student, teacher = 0.5 * noise(batch, 3, seed=seed), noise(batch, 4, seed=seed + 1)
    value = dark_rank(student, teacher, length=length)
    assert value.item() >= 0
    close = {"rtol": 1e-8, "atol": 1e-12}
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(dark_rank(student[order], teacher[order], length=length), value, **close)
    torch.testing.assert_close(dark_rank(student + 10, scale * teacher - 5, length=length), value, **close)
    torch.testing.assert_close(  # the scale of the student is equivalent to a factor of alpha
        dark_rank(scale * student, teacher, length=length, alpha=3 / scale**3), value, **close
    )
    turn = torch.linalg.qr(noise(3, 3, seed=seed + 2))[0]
    torch.testing.assert_close(dark_rank(student @ turn, teacher, length=length), value, **close)
    free = dark_rank(torch.zeros(batch, 3), teacher, length=length)
    assert free.item() == pytest.approx(math.lgamma(min(length, batch - 1) + 1), rel=1e-6)
    assert (
        not gradient(dark_rank, student, teacher, length=length).sum(0).abs().max() > 1e-8
    )  # invariant to translation
    assert dark_rank(teacher, teacher, length=length, alpha=1e6).item() < free.item() + 1e6


def test_dark_rank_of_the_order_of_the_teacher_is_small() -> None:
    """The loss approaches zero as the distances in a list differ more, and is high for the reverse order."""
    places = 2.0 ** torch.arange(6, dtype=torch.float64).unsqueeze(1)
    losses = [dark_rank(places, places, alpha=alpha, beta=1).item() for alpha in (0.01, 0.1, 1.0, 10.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3
    assert dark_rank(places.flip(0), places, alpha=1, beta=1).item() > 10 * losses[2]


def test_gradient_descent_learns_the_order() -> None:
    teacher, student = noise(8, 4), 0.1 * noise(8, 2, seed=1)
    first = dark_rank(student, teacher).item()
    for _ in range(300):
        student = student - 0.05 * gradient(dark_rank, student, teacher)
    assert dark_rank(student, teacher).item() < 0.6 * first


# Equal rows, masks, small batches.


def test_the_sample_itself_is_excluded_among_equal_rows() -> None:
    """Rows 0 and 1 of the teacher are equal: public code may drop the wrong one."""
    teacher = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    student = noise(4, 2)
    apart = torch.cdist(student, student)
    lists = ((1, 2, 3), (0, 2, 3), (0, 1, 3), (2, 0, 1))  # equal distances keep the order of the batch
    expected = 0.0
    for i, others in enumerate(lists):
        scores = [-3 * apart[i, j].item() ** 3 for j in others]
        expected += sum(reference.log_sum_exp(scores[k:]) - scores[k] for k in range(3)) / 4
    assert dark_rank(student, teacher, length=3).item() == pytest.approx(expected, rel=1e-10)


@each_rank
def test_masked_samples_of_any_size_have_no_influence(kwargs: dict[str, Any]) -> None:
    kept = torch.tensor([True, False, True, True, False, True, True])
    student, teacher = noise(7, 3, dtype=torch.float32), noise(7, 4, seed=1, dtype=torch.float32)
    student[~kept] *= 1e30
    teacher[~kept] *= 1e-30
    for weight in (kept, kept.float(), 7e20 * kept.double(), 1e300 * kept.double()):
        masked = dark_rank(student, teacher, weight=weight, **kwargs)
        torch.testing.assert_close(masked, dark_rank(student[kept], teacher[kept], **kwargs))
        slope = gradient(dark_rank, student, teacher, weight=weight, **kwargs)
        torch.testing.assert_close(slope[kept], gradient(dark_rank, student[kept], teacher[kept], **kwargs))
        assert not slope[~kept].any()


@each_rank
def test_without_three_samples_the_loss_is_zero_with_a_graph(kwargs: dict[str, Any]) -> None:
    tried = 0
    two = torch.tensor([0.0, 3.0, 0.0, 1.0])
    for batch, weight in ((0, None), (1, None), (2, None), (4, torch.zeros(4)), (4, two), (4, two > 2)):
        student = noise(batch, 3, dtype=torch.float32).requires_grad_()
        value = dark_rank(student, noise(batch, 2, seed=1).float(), weight=weight, **kwargs)
        assert value.item() == 0
        value.backward()
        assert student.grad is not None
        assert not student.grad.any()
        tried += 1
    assert tried == 6
    empty = torch.ones(4, 0, requires_grad=True)
    assert dark_rank(empty, torch.ones(4, 2), **kwargs).item() == 0


# Numerical edge cases.


def checked(call: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, which: str) -> Tensor:
    """Return the value after checking that it and the gradient are finite."""
    student.requires_grad_(), teacher.requires_grad_()
    value = call(student, teacher)
    value.backward()
    assert value.dtype == torch.promote_types(student.dtype, torch.float32), which
    assert math.isfinite(value.item()), which
    assert value.item() >= 0, which
    assert student.grad is not None, which
    assert student.grad.dtype == student.dtype, which
    assert torch.isfinite(student.grad).all(), which
    assert teacher.grad is None, which
    return value.detach().double()


@each_mode
@each_dtype
@each
def test_values_and_gradients_are_finite(name: str, dtype: torch.dtype, autocast: bool) -> None:
    loss, _, kwargs = PER_SAMPLE[name]
    tried = 0
    for which, sides in many_edge_cases(12, dtype).items():
        for shape in ((-1, 3, 2, 2), (-1, 3, 4, 1), (-1, 3, 1, 4)):
            student, teacher = (x.to(dtype).reshape(shape).clone() for x in sides)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = checked(lambda s, t: loss(s, t, **kwargs), student, teacher, which)
            # Half-precision inputs give the value of float64 arithmetic on the same numbers.
            wide = loss(student.detach().double(), teacher.detach().double(), **kwargs)
            torch.testing.assert_close(value, wide, rtol=1e-5, atol=1e-10, msg=lambda m, at=which: f"{at}: {m}")
            tried += 1
    assert tried == 63


@each_mode
@each_dtype
@each_rank
def test_dark_rank_is_finite_and_that_of_the_loops(kwargs: dict[str, Any], dtype: torch.dtype, autocast: bool) -> None:
    tried = 0
    for which, sides in many_edge_cases(12, dtype).items():
        student, teacher = (x.to(dtype).clone() for x in sides)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = checked(lambda s, t: dark_rank(s, t, **kwargs), student, teacher, which)
        tried += 1
        # Rounding may order equal distances differently in the reference, and distances beyond float64 are clamped.
        tied = which in ("three hundred", "at the end", "at both ends", "dead units") or "teacher" in which
        if not tied and not (which == "large" and dtype == torch.float64):
            expected = ranks(student, teacher, **kwargs)
            assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-9), which
    assert tried == 21


def test_float16_gradients_do_not_overflow() -> None:
    student = torch.tensor([[6e4, 1.0, -6e4, 2.0]], dtype=torch.float16)
    for loss, options in ((activation_boundary, {}), (overhaul, {"margin": -1.0})):
        slope = gradient(loss, student, torch.tensor([[-1e9, 1.0, 1e9, -1e9]]), **options)
        assert torch.isfinite(slope).all()
        assert slope[0, 3] > 0
    grid = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    teacher = torch.zeros(1, 1, 4, 4)
    teacher[0, 0, 0, 0] = 1e9  # its contribution to the neighbors would overflow float16
    slope = gradient(hierarchical_context, grid, teacher)
    assert torch.isfinite(slope).all()
    apart = 300 * noise(6, 32).sign().half()
    assert torch.isfinite(gradient(dark_rank, apart, noise(6, 4, seed=1))).all()
    near = noise(6, 32, dtype=torch.float16)
    torch.testing.assert_close(
        gradient(dark_rank, near, noise(6, 4, seed=1)).double(),
        gradient(dark_rank, near.double(), noise(6, 4, seed=1)),
        rtol=2e-3,
        atol=1e-4,
    )


def test_scores_saturate_instead_of_overflow() -> None:
    teacher = torch.tensor([[0.0], [1.0], [3.0]])
    student = torch.tensor([[0.0], [1e30], [3e30]], requires_grad=True)
    for beta in (1.0, 3.0, 40.0, 1e-3, 1e3):
        for alpha in (1e-300, 3.0, 1e300):
            value = dark_rank(student, teacher, alpha=alpha, beta=beta)
            (slope,) = torch.autograd.grad(value, student)
            assert math.isfinite(value.item())
            assert torch.isfinite(slope).all()
    apart = dark_rank(torch.tensor([[0.0], [1.0], [1e20]]), torch.tensor([[0.0], [3.0], [1.0]]))
    assert apart.item() == pytest.approx(2e30 / 3, rel=1e-5)  # two lists are in the wrong order


def test_normalized_short_rows_get_no_gradient() -> None:
    for dtype, length in ((torch.float16, 1e-5), (torch.float32, 1e-20)):
        student = noise(6, 4, dtype=dtype)
        student[0] *= length
        slope = gradient(dark_rank, student, noise(6, 3, seed=1), normalize=True)
        assert torch.isfinite(slope).all()
        assert not slope[0].any()
        assert slope[1:].any()


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_near_rows_and_offsets_cost_no_precision(apart: float) -> None:
    student = noise(24, 16, dtype=torch.float32)
    student[12:] = student[:12] + apart * noise(12, 16, seed=2, dtype=torch.float32)
    teacher = noise(24, 16, seed=1, dtype=torch.float32)
    for offset in (0, 1000):
        moved = student + offset
        exact = dark_rank(moved.double(), teacher.double(), alpha=0.01)
        assert dark_rank(moved, teacher, alpha=0.01).item() == pytest.approx(exact.item(), rel=1e-5)
        slope = gradient(dark_rank, moved.double(), teacher.double(), alpha=0.01)
        single = gradient(dark_rank, moved, teacher, alpha=0.01)
        assert (single - slope).norm() / slope.norm() < 1e-4
        assert exact.item() == pytest.approx(ranks(moved, teacher, alpha=0.01), rel=1e-8)


# Compilers and function transforms.


@each
def test_compiles_as_one_graph(name: str) -> None:
    loss, module, kwargs = PER_SAMPLE[name]
    torch._dynamo.reset()
    student, teacher = (x.float() for x in maps())
    built = module(**kwargs)
    compiled = torch.compile(lambda s, t, w: built(s, t, weight=w), fullgraph=True, backend="aot_eager")
    for weight in (None, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])):
        torch.testing.assert_close(compiled(student, teacher, weight), loss(student, teacher, weight=weight, **kwargs))
        torch.testing.assert_close(
            gradient(compiled, student, teacher, weight), gradient(loss, student, teacher, weight=weight, **kwargs)
        )


@each_rank
def test_dark_rank_compiles_as_one_graph(kwargs: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dark_rank, fullgraph=True, backend="aot_eager")
    student, teacher = noise(6, 3, dtype=torch.float32), noise(6, 4, seed=1, dtype=torch.float32)
    for weight in (None, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])):
        torch.testing.assert_close(
            compiled(student, teacher, weight=weight, **kwargs), dark_rank(student, teacher, weight=weight, **kwargs)
        )
        torch.testing.assert_close(
            gradient(compiled, student, teacher, weight=weight, **kwargs),
            gradient(dark_rank, student, teacher, weight=weight, **kwargs),
        )


@each
def test_function_transforms(name: str) -> None:
    loss, _, kwargs = PER_SAMPLE[name]
    student, teacher = maps()
    slope = torch.func.grad(lambda s: loss(s, teacher, **kwargs))(student)
    torch.testing.assert_close(slope, gradient(loss, student, teacher, **kwargs))
    one_by_one = torch.func.vmap(lambda s, t: loss(s[None], t[None], **kwargs))(student, teacher)
    torch.testing.assert_close(one_by_one, loss(student, teacher, reduction="none", **kwargs))
    assert torch.autograd.gradgradcheck(
        lambda s: loss(s, teacher[:1, :, :2, :2], **kwargs), student[:1, :, :2, :2].requires_grad_()
    )


@each_rank
def test_dark_rank_has_second_derivatives_and_vmap(kwargs: dict[str, Any]) -> None:
    student, teacher = noise(3, 5, 2), noise(3, 5, 3, seed=1)
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda s: dark_rank(s, teacher[0], weight=weight, **kwargs), student[0].clone().requires_grad_()
    )
    expected = torch.stack([dark_rank(s, t, **kwargs) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda s, t: dark_rank(s, t, **kwargs))(student, teacher), expected)
    slopes = torch.func.vmap(torch.func.grad(lambda s: dark_rank(s, teacher[0], **kwargs)))(student)
    torch.testing.assert_close(slopes[1], gradient(dark_rank, student[1], teacher[0], **kwargs))


# Modules and errors.


@pytest.mark.parametrize("margin", [-0.5, MARGIN])
def test_a_margin_is_no_state(margin: float | Tensor) -> None:
    loss = OverhaulLoss(margin)
    assert loss.state_dict() == {}
    rebuilt = eval(repr(loss), {**vars(kdlib.losses), "torch": torch})
    student, teacher = maps()
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), rebuilt.double()):
        torch.testing.assert_close(other(student, teacher), overhaul(student, teacher, margin=margin))


def test_maps_without_positions() -> None:
    for name, (loss, _, kwargs) in PER_SAMPLE.items():
        assert loss(torch.ones(2, 3, 0, 4), torch.ones(2, 3, 0, 4), **kwargs).item() == 0, name


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


VECTOR, MAP = torch.ones(4, 3), torch.ones(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: activation_boundary(MAP, MAP[:, :2]), ValueError, r"^activation_boundary: teacher must be \(b, \.\.\.\) like student \(4, 3, 2, 2\), got \(4, 2, 2, 2\); project the student first$"),
        (lambda: activation_boundary(MAP, MAP, margin=-1), ValueError, r"^activation_boundary: margin must be a finite number and >= 0, got -1$"),
        (lambda: ActivationBoundaryLoss(margin="1"), TypeError, r"^ActivationBoundaryLoss: margin must be a finite number and >= 0, got '1'$"),
        (lambda: overhaul(MAP, MAP), TypeError, r"margin"),
        (lambda: overhaul(MAP, MAP, margin=0.5), ValueError, r"^overhaul: margin must be a finite number and <= 0, got 0\.5$"),
        (lambda: overhaul(MAP, MAP, margin=torch.ones(3)), ValueError, r"^overhaul: margin must be <= 0, got 1$"),
        (lambda: overhaul(MAP, MAP, margin=-torch.ones(2)), ValueError, r"^overhaul: margin must be \(c,\) = \(3,\) or a number, got \(2,\)$"),
        (lambda: overhaul(MAP, MAP, margin=torch.tensor([0.0, math.nan, 0.0])), ValueError, r"^overhaul: margin must be finite, got 1 NaN"),
        (lambda: overhaul(MAP, MAP, margin=[-1.0] * 3), TypeError, r"^overhaul: margin must be a finite number and <= 0, got \["),
        (lambda: overhaul(MAP, MAP, margin=torch.zeros(3).int()), TypeError, r"^overhaul: margin must be a floating-point tensor"),
        (lambda: OverhaulLoss(torch.ones(3)), ValueError, r"^OverhaulLoss: margin must be <= 0, got 1$"),
        (lambda: OverhaulLoss(-torch.ones(3, 1)), ValueError, r"^OverhaulLoss: margin must be \(c,\) or a number, got \(3, 1\)$"),
        (lambda: overhaul(MAP, VECTOR, margin=0), ValueError, r"^overhaul: teacher must be \(b, c, h, w\), got \(4, 3\)$"),
        (lambda: overhaul(MAP, MAP[:, :2], margin=0), ValueError, r"^overhaul: teacher must be \(b, c, h, w\) with c = 3, got \(4, 2, 2, 2\)$"),
        (lambda: overhaul(VECTOR, VECTOR[:, :2], margin=0), ValueError, r"^overhaul: teacher must be \(b, d\) with d = 3, got \(4, 2\)$"),
        (lambda: overhaul(MAP, MAP[:3], margin=0), ValueError, r"^overhaul: teacher must have the batch size of student"),
        (lambda: overhaul(torch.ones(4, 3, 2), MAP, margin=0), ValueError, r"^overhaul: student must be \(b, c, h, w\), got \(4, 3, 2\)$"),
        (lambda: overhaul_margin(nn.BatchNorm2d(3, affine=False)), TypeError, r"^overhaul_margin: norm must have a weight and a bias \(c,\), as BatchNorm2d\(c\), got BatchNorm2d\("),
        (lambda: overhaul_margin(nn.Linear(3, 3)), TypeError, r"^overhaul_margin: norm must have a weight and a bias \(c,\)"),
        (lambda: hierarchical_context(VECTOR, VECTOR), ValueError, r"^hierarchical_context: student must be \(b, c, h, w\), got \(4, 3\)$"),
        (lambda: hierarchical_context(MAP, MAP, levels=(2, 0)), ValueError, r"^hierarchical_context: levels\[1\] must be a whole number and >= 1, got 0$"),
        (lambda: HierarchicalContextLoss(levels=4), TypeError, r"^HierarchicalContextLoss: levels must be a sequence of whole numbers, got int$"),
        (lambda: HierarchicalContextLoss(levels=(1.5,)), TypeError, r"^HierarchicalContextLoss: levels\[0\] must be a whole number and >= 1, got 1\.5$"),
        (lambda: dark_rank(VECTOR, VECTOR, alpha=0), ValueError, r"^dark_rank: alpha must be a finite number and > 0, got 0$"),
        (lambda: DarkRankLoss(beta=-1.0), ValueError, r"^DarkRankLoss: beta must be a finite number and > 0, got -1\.0$"),
        (lambda: DarkRankLoss(length=1), ValueError, r"^DarkRankLoss: length must be a whole number and >= 2, got 1$"),
        (lambda: dark_rank(VECTOR, VECTOR, length=2.5), TypeError, r"^dark_rank: length must be a whole number and >= 2, got 2\.5$")
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
