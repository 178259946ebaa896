"""Activation boundaries, overhaul, hierarchical context and DarkRank: against loops, public formulas, properties, traps."""

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

MARGIN = torch.tensor([-0.1, -0.5, -2.0], dtype=torch.float64)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
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
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_mode = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def maps(seed: int = 0, batch: int = 5, side: int = 6) -> tuple[Tensor, Tensor]:
    return noise(batch, 3, side, side, seed=seed), noise(batch, 3, side, side, seed=seed + 1)


def plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in kwargs.items()}


def loops(name: str, student: Tensor, teacher: Tensor, kwargs: dict[str, Any]) -> np.ndarray:
    of = getattr(reference, name.split(",")[0])
    return np.asarray(of(student.detach().double().numpy(), teacher.detach().double().numpy(), **plain(kwargs)))


def ranks(student: Tensor, teacher: Tensor, weight: Tensor | None = None, **kwargs: Any) -> float:
    w = np.ones(len(student)) if weight is None else weight.double().numpy()
    s, t = (x.detach().double().flatten(1).numpy() for x in (student, teacher))
    return reference.dark_rank(s, t, w, **kwargs)


def gradient(loss: Callable[..., Tensor], student: Tensor, *rest: Tensor, **kwargs: Any) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest, **kwargs), leaf)[0]


# Truth: the loops, what public code computes, and numbers worked out on paper.


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
    """The code of RKD's authors: the sample itself is dropped as the first of the sort."""
    apart, apart_t = torch.cdist(student, student), torch.cdist(teacher, teacher)
    order = (-alpha * apart_t**beta).sort(dim=1, descending=True)[1][:, 1 : length + 1]
    drawn = (-alpha * apart**beta).gather(1, order)
    rest = torch.stack([torch.logsumexp(drawn[:, k:], 1) for k in range(order.shape[1])], 1)
    return -(drawn - rest).sum(1).mean()


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 9])
def test_public_code_gives_the_same(side: int) -> None:
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
def test_public_dark_rank_gives_the_same(batch: int) -> None:
    student, teacher = (F.normalize(noise(batch, 5, seed=seed), dim=1) for seed in (batch, batch + 1))
    for options in ((3.0, 3.0, 4), (2.0, 2.0, 8), (3.0, 3.0, 3)):
        named = dict(zip(("alpha", "beta", "length"), options, strict=True))
        value = dark_rank(student, teacher, **named)
        torch.testing.assert_close(value, public_dark_rank(student, teacher, *options))
        scaled = dark_rank(7 * student, 3 * teacher, **named, normalize=True)
        torch.testing.assert_close(scaled, value)


def test_dark_rank_of_three_by_hand() -> None:
    # On a line at 0, 1, 3; the teacher has them in the order 3, 0, 1 from left to right: 0, 2 and 3.
    student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [3.0], [0.0]])
    # Distances of the student 0-1: 1, 0-2: 3, 1-2: 2. Orders of the teacher: 0: 1, 2; 1: 0, 2; 2: 0, 1.
    expected = [math.log1p(math.exp(near - far)) for near, far in ((1, 3), (1, 2), (3, 2))]
    value = dark_rank(student.double(), teacher.double(), alpha=1, beta=1)
    assert value.item() == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_dark_rank_is_the_likelihood_of_drawing_that_order() -> None:
    student, teacher = noise(5, 2), torch.arange(5.0, dtype=torch.float64).unsqueeze(1)
    one = torch.tensor([1.0, 1e-30, 1e-30, 1e-30, 1e-30], dtype=torch.float64)  # the first one's list alone counts
    scores = (-3 * torch.cdist(student, student)[0, 1:] ** 3).numpy()
    expected = -math.log(reference.likelihood_of_an_order(scores))
    assert dark_rank(student, teacher, weight=one).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [
        (1.0, 0.0, -math.sqrt(2 / math.pi)),  # a half normal
        (-2.0, 0.0, -2 * math.sqrt(2 / math.pi)),
        (1.0, -40.0, -40.0),  # always negative
        (1.0, 3.2, -3.0),  # hardly ever
        (0.5, 1e4, -1.5),
        (0.0, -0.7, -0.7),  # a constant
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
    norm.bias.data[:2] = torch.tensor([3.0, 3.2]) * norm.weight.data[:2].abs()  # both sides of one in a thousand
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
def test_activation_boundary_sees_the_signs_of_the_teacher_alone(seed: int, margin: float, scale: float) -> None:
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
def test_overhaul_leaves_the_silent_alone(seed: int, margin: float, scale: float) -> None:
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
    # What the teacher has below its margin does not matter.
    torch.testing.assert_close(overhaul(student, teacher.clamp(min=margin), margin=margin), value)
    torch.testing.assert_close(overhaul(scale * student, scale * teacher, margin=scale * margin), scale**2 * value)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, side=st.integers(1, 9), scale=st.floats(1e-3, 1e3))
def test_hierarchical_context_between_its_parts(seed: int, side: int, scale: float) -> None:
    student, teacher = maps(seed, batch=2, side=side)
    value = hierarchical_context(student, teacher)
    assert hierarchical_context(student, student).item() == 0
    assert 0 < value.item() <= HintLoss()(student, teacher).item() * (1 + 1e-12)  # a mean has no more spread
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
    torch.testing.assert_close(  # the scale of the student goes into alpha
        dark_rank(scale * student, teacher, length=length, alpha=3 / scale**3), value, **close
    )
    turn = torch.linalg.qr(noise(3, 3, seed=seed + 2))[0]
    torch.testing.assert_close(dark_rank(student @ turn, teacher, length=length), value, **close)
    free = dark_rank(torch.zeros(batch, 3), teacher, length=length)
    assert free.item() == pytest.approx(math.lgamma(min(length, batch - 1) + 1), rel=1e-6)
    assert not gradient(dark_rank, student, teacher, length=length).sum(0).abs().max() > 1e-8  # moved as one
    assert dark_rank(teacher, teacher, length=length, alpha=1e6).item() < free.item() + 1e6


def test_a_student_that_ranks_as_the_teacher_is_likely() -> None:
    """Not zero at equality, but towards it as the distances in a list grow apart; the reverse order is unlikely."""
    places = 2.0 ** torch.arange(6, dtype=torch.float64).unsqueeze(1)
    losses = [dark_rank(places, places, alpha=alpha, beta=1).item() for alpha in (0.01, 0.1, 1.0, 10.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3
    assert dark_rank(places.flip(0), places, alpha=1, beta=1).item() > 10 * losses[2]


def test_descent_learns_the_order() -> None:
    teacher, student = noise(8, 4), 0.1 * noise(8, 2, seed=1)
    first = dark_rank(student, teacher).item()
    for _ in range(300):
        student = student - 0.05 * gradient(dark_rank, student, teacher)
    assert dark_rank(student, teacher).item() < 0.6 * first


# Ties: equal rows.


def test_the_sample_itself_is_left_out_by_its_place_not_by_its_distance() -> None:
    """Rows 0 and 1 are equal for the teacher: public code may drop either one from the other's list."""
    teacher = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    student = noise(4, 2)
    apart = torch.cdist(student, student)
    lists = ((1, 2, 3), (0, 2, 3), (0, 1, 3), (2, 0, 1))  # equal distances in the order of the batch
    expected = 0.0
    for i, others in enumerate(lists):
        scores = [-3 * apart[i, j].item() ** 3 for j in others]
        expected += sum(reference.log_sum_exp(scores[k:]) - scores[k] for k in range(3)) / 4
    assert dark_rank(student, teacher, length=3).item() == pytest.approx(expected, rel=1e-10)


@each_rank
def test_equal_rows_have_finite_gradients(kwargs: dict[str, Any]) -> None:
    student = noise(4, 3)[[0, 0, 1, 1, 2, 3]]
    teacher = noise(6, 3, seed=1)
    slope = gradient(dark_rank, student, teacher, **kwargs)
    assert torch.isfinite(slope).all()
    assert slope.any()
    same = gradient(dark_rank, torch.ones(6, 3), teacher, **kwargs)
    assert not same.any()  # rows at one place have no direction from each other
    assert torch.isfinite(gradient(dark_rank, noise(6, 3), torch.ones(6, 2), **kwargs)).all()


# Masks, small batches.


@each_rank
def test_a_mask_equals_leaving_out_whatever_is_there(kwargs: dict[str, Any]) -> None:
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


@each
def test_batches_of_none_and_of_no_weight(name: str) -> None:
    loss, _, kwargs = PER_SAMPLE[name]
    student, teacher = maps()
    for rows, weight in ((slice(0, 0), None), (slice(None), torch.zeros(5))):
        leaf = student[rows].clone().requires_grad_()
        value = loss(leaf, teacher[rows], weight=weight, **kwargs)
        assert value.item() == 0
        value.backward()
        assert not leaf.grad.any()
    assert loss(student[:0], teacher[:0], reduction="none", **kwargs).shape == (0,)
    torch.testing.assert_close(
        loss(student[:1], teacher[:1], **kwargs), loss(student, teacher, reduction="none", **kwargs)[0]
    )
    assert loss(torch.ones(2, 3, 0, 4), torch.ones(2, 3, 0, 4), **kwargs).item() == 0


# Traps.


def trap(which: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    s, t = noise(8, 12), noise(8, 12, seed=1)
    limits = torch.finfo(dtype)
    large = min(1e30, limits.max / 4)
    first = torch.arange(8).unsqueeze(1) == 0
    return {
        "noise": (s, t),
        "zero rows": (s * (torch.arange(8) > 3).unsqueeze(1), t * (torch.arange(8) > 1).unsqueeze(1)),
        "all zero": (0 * s, 0 * t),
        "student all equal": (torch.ones(8, 12), t),
        "teacher all equal": (s, torch.ones(8, 12)),
        "equal pairs": (s[[0, 0, 1, 1, 2, 2, 3, 3]], t),
        "equal pairs of both": (s[[0, 0, 1, 1, 2, 2, 3, 3]], t[[0, 0, 1, 1, 2, 2, 3, 3]]),
        "equal to the teacher": (s, s),
        "opposite": (s, -s),
        "three hundred": (300 * s.sign(), 300 * t.sign()),
        "large": (large * s / s.abs().max(), large * t / t.abs().max()),
        "at the end": (limits.max * s.sign(), limits.max * t.sign()),
        "at both ends": (limits.max * t.sign(), -limits.max * t.sign()),
        "smallest": (limits.smallest_normal * s, limits.smallest_normal * t),
        "one large row": (torch.where(first, large * s / s.abs().max(), s), t),
        "one tiny row": (torch.where(first, limits.smallest_normal * s, s), t),
        "offset of 1000": (s + 1000, t + 1000),
        "dead units": (s.clamp(min=0), t.clamp(min=0)),
        "one row": (s[:1], t[:1]),
        "negative zeros": (-0.0 * s, t),
    }[which]


TRAPS = [
    *("noise", "zero rows", "all zero", "student all equal", "teacher all equal", "equal pairs", "equal pairs of both"),
    *("equal to the teacher", "opposite", "three hundred", "large", "at the end", "at both ends", "smallest"),
    *("one large row", "one tiny row", "offset of 1000", "dead units", "one row", "negative zeros"),
]


def trapped(call: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, which: str) -> Tensor:
    """The value; it and the gradient found finite."""
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
    for which in TRAPS:
        for shape in ((-1, 3, 2, 2), (-1, 3, 4, 1), (-1, 3, 1, 4)):
            student, teacher = (x.to(dtype).reshape(shape).clone() for x in trap(which, dtype))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = trapped(lambda s, t: loss(s, t, **kwargs), student, teacher, which)
            # Half precision costs storage, not arithmetic: the value is that of the same numbers in float64.
            wide = loss(student.detach().double(), teacher.detach().double(), **kwargs)
            torch.testing.assert_close(value, wide, rtol=1e-5, atol=1e-10, msg=lambda m, at=which: f"{at}: {m}")
            tried += 1
    assert tried == 60


@each_mode
@each_dtype
@each_rank
def test_dark_rank_is_finite_and_that_of_the_loops(kwargs: dict[str, Any], dtype: torch.dtype, autocast: bool) -> None:
    tried = 0
    for which in TRAPS:
        student, teacher = (x.to(dtype).clone() for x in trap(which, dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = trapped(lambda s, t: dark_rank(s, t, **kwargs), student, teacher, which)
        tried += 1
        # Distances beyond float64 count as its end; among equal ones rounding may order the loops and us another way.
        tied = which in ("three hundred", "at the end", "at both ends", "dead units") or "teacher" in which
        if not tied and not (which == "large" and dtype == torch.float64):
            expected = ranks(student, teacher, **kwargs)
            assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-9), which
    assert tried == len(TRAPS) == 20


def test_float16_passes_on_no_gradient_that_it_cannot_hold() -> None:
    student = torch.tensor([[6e4, 1.0, -6e4, 2.0]], dtype=torch.float16)
    for loss, options in ((activation_boundary, {}), (overhaul, {"margin": -1.0})):
        slope = gradient(loss, student, torch.tensor([[-1e9, 1.0, 1e9, -1e9]]), **options)
        assert torch.isfinite(slope).all()
        assert slope[0, 3] > 0
    grid = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    teacher = torch.zeros(1, 1, 4, 4)
    teacher[0, 0, 0, 0] = 1e9  # its share in the pooled gaps would leave float16 at its neighbors
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


def test_scores_saturate_where_a_power_would_overflow() -> None:
    teacher = torch.tensor([[0.0], [1.0], [3.0]])
    student = torch.tensor([[0.0], [1e30], [3e30]], requires_grad=True)
    for beta in (1.0, 3.0, 40.0, 1e-3, 1e3):
        for alpha in (1e-300, 3.0, 1e300):
            value = dark_rank(student, teacher, alpha=alpha, beta=beta)
            (slope,) = torch.autograd.grad(value, student)
            assert math.isfinite(value.item())
            assert torch.isfinite(slope).all()
    apart = dark_rank(torch.tensor([[0.0], [1.0], [1e20]]), torch.tensor([[0.0], [3.0], [1.0]]))
    assert apart.item() == pytest.approx(2e30 / 3, rel=1e-5)  # the first two have theirs in the wrong order


def test_normalized_short_rows_get_no_gradient() -> None:
    for dtype, length in ((torch.float16, 1e-5), (torch.float32, 1e-20)):
        student = noise(6, 4, dtype=dtype)
        student[0] *= length
        slope = gradient(dark_rank, student, noise(6, 3, seed=1), normalize=True)
        assert torch.isfinite(slope).all()
        assert not slope[0].any()
        assert slope[1:].any()


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_near_rows_and_offsets_cost_only_what_storing_them_costs(apart: float) -> None:
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


# Compilers, function transforms, memory order.


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
def test_functional_gradient_of_dark_rank(kwargs: dict[str, Any]) -> None:
    student, teacher = noise(6, 3), noise(6, 4, seed=1)
    found, value = torch.func.grad_and_value(lambda s: dark_rank(s, teacher, **kwargs))(student)
    assert value.item() == dark_rank(student, teacher, **kwargs).item()
    torch.testing.assert_close(found, gradient(dark_rank, student, teacher, **kwargs), rtol=1e-12, atol=1e-15)


def test_the_gradient_of_dark_rank_has_no_graph_and_says_so() -> None:
    student = noise(4, 3).requires_grad_()
    (slope,) = torch.autograd.grad(dark_rank(student, noise(4, 2, seed=1)), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"this relation loss has a gradient, but no second derivative"):
        slope.square().sum().backward()


@each
def test_tensors_in_odd_memory_order(name: str) -> None:
    loss, _, kwargs = PER_SAMPLE[name]
    student, teacher = maps()
    odd = student.to(memory_format=torch.channels_last), teacher.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(loss(*odd, **kwargs), loss(student, teacher, **kwargs))


# Modules and errors.

MODULES: list[tuple[nn.Module, Callable[..., Tensor], dict[str, Any], bool]] = [
    (ActivationBoundaryLoss(margin=0.5), activation_boundary, {"margin": 0.5}, True),
    (OverhaulLoss(-0.5), overhaul, {"margin": -0.5}, True),
    (OverhaulLoss(MARGIN), overhaul, {"margin": MARGIN}, True),
    (HierarchicalContextLoss(levels=[2, 1]), hierarchical_context, {"levels": (2, 1)}, True),
    (DarkRankLoss(alpha=0.1, beta=2.0, length=3), dark_rank, {"alpha": 0.1, "beta": 2.0, "length": 3}, False),
    (DarkRankLoss(normalize=True, gather=True), dark_rank, {"normalize": True}, False),
]


@pytest.mark.parametrize(("built", "loss", "kwargs", "per_sample"), MODULES, ids=[repr(row[0]) for row in MODULES])
def test_the_module_is_the_function(
    built: nn.Module, loss: Callable[..., Tensor], kwargs: dict[str, Any], per_sample: bool
) -> None:
    student, teacher = maps()
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7])
    expected = loss(student, teacher, weight=weight, **kwargs)
    rebuilt = eval(repr(built), {**vars(kdlib.losses), "torch": torch})
    for other in (built, copy.deepcopy(built), pickle.loads(pickle.dumps(built)), rebuilt.double()):
        torch.testing.assert_close(other(student, teacher, weight=weight), expected)
        assert repr(other) == repr(built)
    assert type(built).per_sample is per_sample
    assert list(built.parameters()) == []
    assert built.state_dict() == {}
    if per_sample:
        each_value = loss(student, teacher, reduction="none", **kwargs)
        assert torch.equal(type(built)(**kwargs, reduction="none")(student, teacher), each_value)
        assert torch.equal(built(student, teacher, reduction="none"), each_value)


def test_many_margins_are_shown_by_their_ends() -> None:
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
        (lambda: activation_boundary(MAP.int(), MAP), TypeError, r"^activation_boundary: student must be a floating-point tensor"),
        (lambda: activation_boundary(MAP, MAP, reduction="sum"), ValueError, r"^activation_boundary: reduction must be one of 'mean', 'none', got 'sum'$"),
        (lambda: ActivationBoundaryLoss(reduction="sum"), ValueError, r"^ActivationBoundaryLoss: reduction must be one of"),
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
        (lambda: overhaul(VECTOR.numpy(), MAP, margin=0), TypeError, r"^overhaul: student must be a torch.Tensor, got ndarray$"),
        (lambda: overhaul_margin(nn.BatchNorm2d(3, affine=False)), TypeError, r"^overhaul_margin: norm must have a weight and a bias \(c,\), as BatchNorm2d\(c\), got BatchNorm2d\("),
        (lambda: overhaul_margin(nn.Linear(3, 3)), TypeError, r"^overhaul_margin: norm must have a weight and a bias \(c,\)"),
        (lambda: hierarchical_context(VECTOR, VECTOR), ValueError, r"^hierarchical_context: student must be \(b, c, h, w\), got \(4, 3\)$"),
        (lambda: hierarchical_context(MAP, MAP[:, :, :1]), ValueError, r"^hierarchical_context: teacher must be \(b, c, h, w\) like student"),
        (lambda: hierarchical_context(MAP, MAP, levels=(2, 0)), ValueError, r"^hierarchical_context: levels\[1\] must be a whole number and >= 1, got 0$"),
        (lambda: HierarchicalContextLoss(levels=4), TypeError, r"^HierarchicalContextLoss: levels must be a sequence of whole numbers, got int$"),
        (lambda: HierarchicalContextLoss(levels=(1.5,)), TypeError, r"^HierarchicalContextLoss: levels\[0\] must be a whole number and >= 1, got 1\.5$"),
        (lambda: dark_rank(VECTOR, VECTOR, reduction="none"), ValueError, r"^dark_rank: reduction must be 'mean': a relation has no per-sample form, got 'none'$"),
        (lambda: DarkRankLoss(reduction="none"), ValueError, r"^DarkRankLoss: reduction must be 'mean'"),
        (lambda: dark_rank(VECTOR, VECTOR[:3]), ValueError, r"^dark_rank: teacher must have the batch size of student"),
        (lambda: dark_rank(VECTOR[:, 0], VECTOR), ValueError, r"^dark_rank: student must be \(b, d, \.\.\.\), got \(4,\)$"),
        (lambda: dark_rank(VECTOR, VECTOR, weight=torch.ones(3)), ValueError, r"^dark_rank: weight must be \(b,\) = \(4,\)"),
        (lambda: dark_rank(VECTOR, VECTOR, alpha=0), ValueError, r"^dark_rank: alpha must be a finite number and > 0, got 0$"),
        (lambda: DarkRankLoss(beta=-1.0), ValueError, r"^DarkRankLoss: beta must be a finite number and > 0, got -1\.0$"),
        (lambda: DarkRankLoss(length=1), ValueError, r"^DarkRankLoss: length must be a whole number and >= 2, got 1$"),
        (lambda: dark_rank(VECTOR, VECTOR, length=2.5), TypeError, r"^dark_rank: length must be a whole number and >= 2, got 2\.5$"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_in_an_objective() -> None:
    """As a user has them: pre-activations of two networks of other widths, and their outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, teacher = (
            nn.Sequential(
                nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.Flatten(), nn.Linear(36 * c, c)
            )
            for c in (4, 6)
        )
        taps = {"map": "1", "out": kdlib.OUTPUT}
        terms = {
            "boundary": kdlib.Term(ActivationBoundaryLoss(), student="map", teacher="map", project="auto"),
            "overhaul": kdlib.Term(OverhaulLoss(overhaul_margin(teacher[1])), student="map", teacher="map", project="auto"),
            "review": kdlib.Term(HierarchicalContextLoss(), student="map", teacher="map", project="auto"),
            "order": kdlib.Term(DarkRankLoss(normalize=True), student="out", teacher="out"),
        }  # fmt: skip
        objective = kdlib.Objective(terms)
        distiller = kdlib.Distiller(kdlib.StudentAdapter(student, taps), {"big": kdlib.TeacherAdapter(teacher, taps)}, objective)  # fmt: skip
        images = torch.randn(8, 3, 6, 6)
        distiller.infer(images)
        optimizer = torch.optim.SGD(list(distiller.trainable_parameters()), lr=0.05)
        totals = []
        for _ in range(20):
            output = distiller(images)
            optimizer.zero_grad()
            output.total.backward()
            optimizer.step()
            totals.append(output.total.item())
    assert set(output.terms) == set(terms)
    assert totals[-1] < 0.8 * totals[0]
    assert not any("margin" in name for name in distiller.state_dict())
