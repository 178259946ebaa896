"""Relation losses: values by hand and of public code, properties, memory."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdlib.functional import correlation_congruence, dark_rank, pkt, rkd_angle, rkd_distance, similarity_preserving
from tests.core import reference_relations as reference
from tests.core.loss_inputs import RELATIONS, function_of, gradient, noise


def angle_by_vectors(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the loss by difference vectors, with the gradient of autograd."""
    weight = student.new_ones(len(student)) if weight is None else weight
    cosines = []
    for x in (student, teacher):
        e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        cosines.append(e @ e.transpose(1, 2))
    losses = F.smooth_l1_loss(*cosines, reduction="none")
    return torch.einsum("ijk,i,j,k->", losses, weight, weight, weight) / weight.sum() ** 3


def test_tiles_and_chunks_of_any_size_do_the_same() -> None:
    student, teacher = noise(150, 7), noise(150, 3, seed=1)  # more than two tiles of 64
    expected = angle_by_vectors(student, teacher)
    slope = gradient(angle_by_vectors, student, teacher)
    for chunk_size in (None, 1, 64, 149, 1000):
        torch.testing.assert_close(rkd_angle(student, teacher, chunk_size=chunk_size), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(rkd_angle, student, teacher, chunk_size=chunk_size), slope)
        torch.testing.assert_close(
            rkd_distance(student, teacher, chunk_size=chunk_size), rkd_distance(student, teacher), rtol=1e-12, atol=0
        )
    single = gradient(rkd_angle, student.float(), teacher.float())
    assert (single - slope).norm() / slope.norm() < 1e-6
    uneven = torch.rand(150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    twice = torch.tensor([2] * 75 + [1] * 75)
    torch.testing.assert_close(  # a weight of 2 counts as two equal samples
        rkd_angle(student, teacher, weight=twice.double()),
        rkd_angle(student.repeat_interleave(twice, 0), teacher.repeat_interleave(twice, 0)),
    )
    expected = angle_by_vectors(student, teacher, uneven)
    torch.testing.assert_close(rkd_angle(student, teacher, weight=uneven, chunk_size=7), expected)


def test_triangles_by_hand() -> None:
    """A right isosceles triangle against three points on a line at 0, 1, 2."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    # Distances over their mean: 3/(2+r), 3/(2+r), 3r/(2+r) with r = sqrt 2; and 3/4, 3/2, 3/4.
    r = 2**0.5
    gaps = (3 / (2 + r) - 0.75, 3 / (2 + r) - 1.5, 3 * r / (2 + r) - 0.75)
    assert rkd_distance(student, teacher).item() == pytest.approx(sum(gap**2 for gap in gaps) / 9, rel=1e-12)
    # Cosines 0, r/2, r/2 against 1, -1, 1: h = 1/2, 1/2 + r/2, (1 - r/2)^2 / 2, each twice, over 27.
    expected = 2 * (0.5 + 0.5 + r / 2 + (1 - r / 2) ** 2 / 2) / 27
    assert rkd_angle(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_two_samples_by_hand() -> None:
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    # Rows (1, 0), (0, 1) against (1, 1) / sqrt 2 twice: (4 - 4 / sqrt 2) / 4.
    assert similarity_preserving(student, teacher).item() == pytest.approx(1 - 2**-0.5, rel=1e-6)
    # Each row (2/3, 1/3) against (1/2, 1/2): two divergences ln(3 / (2 sqrt 2)), over 4. EPS moves the 8th digit.
    assert pkt(student, teacher).item() == pytest.approx(math.log(3 / 8**0.5) / 2, rel=1e-6)
    # Off the diagonal exp(-0.8) against exp(-0.8) (1 + 0.8 + 0.32): two squares over 4.
    expected = (1.12 * math.exp(-0.8)) ** 2 / 2
    assert correlation_congruence(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    expected = (1 - math.exp(-0.8)) ** 2 / 2
    assert correlation_congruence(student, teacher, order=None).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in RELATIONS if not name.startswith("d")])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), batch=st.integers(2, 7), d_s=st.integers(1, 5), d_t=st.integers(1, 5))
def test_properties(name: str, seed: int, batch: int, d_s: int, d_t: int) -> None:
    loss = function_of(name)
    student, teacher = noise(batch, d_s, seed=seed), noise(batch, d_t, seed=seed + 1)
    value = loss(student, teacher)
    assert value.item() >= -1e-9
    assert loss(student, student.clone()).item() == pytest.approx(0, abs=1e-25)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(loss(student[order], teacher[order]), value, **close)
    torch.testing.assert_close(loss(3 * student, 0.2 * teacher), value, **close)
    turn = torch.linalg.qr(noise(d_s, d_s, seed=seed + 2))[0]
    torch.testing.assert_close(loss(student @ turn, teacher), value, **close)
    if name.startswith("rkd"):
        torch.testing.assert_close(loss(student + 10, teacher - 5), value, **close)
    slope = gradient(loss, student, teacher)
    # The gradient is orthogonal to a change of scale.
    assert (slope * student).sum().abs() < 1e-9
    weight = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    weighted = loss(student, teacher, weight=weight)
    torch.testing.assert_close(loss(student, teacher, weight=1e-30 * weight), weighted, **close)


def test_angles_take_the_memory_of_a_few_matrices() -> None:
    """No tensor that is created or saved is larger than a few matrices."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    student, teacher = noise(256, 8, dtype=torch.float32).requires_grad_(), noise(256, 8, seed=1, dtype=torch.float32)
    with Watch():
        rkd_angle(student, teacher, chunk_size=4).backward()
    assert 0 < largest <= 256 * 256 * 8


# DarkRank.


def public_dark_rank(student: Tensor, teacher: Tensor, alpha: float, beta: float, length: int) -> Tensor:
    """The code of RKD's authors, which drops the first of the sorted samples."""
    apart, apart_t = torch.cdist(student, student), torch.cdist(teacher, teacher)
    order = (-alpha * apart_t**beta).sort(dim=1, descending=True)[1][:, 1 : length + 1]
    drawn = (-alpha * apart**beta).gather(1, order)
    rest = torch.stack([torch.logsumexp(drawn[:, k:], 1) for k in range(order.shape[1])], 1)
    return -(drawn - rest).sum(1).mean()


@pytest.mark.parametrize("batch", [3, 4, 5, 8, 30])
def test_dark_rank_of_public_code(batch: int) -> None:
    student, teacher = (F.normalize(noise(batch, 5, seed=seed), dim=1) for seed in (batch, batch + 1))
    for options in ((3.0, 3.0, 4), (2.0, 2.0, 8), (3.0, 3.0, 3)):
        named = dict(zip(("alpha", "beta", "length"), options, strict=True))
        value = dark_rank(student, teacher, **named)
        torch.testing.assert_close(value, public_dark_rank(student, teacher, *options))
        scaled = dark_rank(7 * student, 3 * teacher, **named, normalize=True)
        torch.testing.assert_close(scaled, value)


def test_dark_rank_of_more_neighbors_than_dimensions() -> None:
    student, teacher = noise(7, 2), noise(7, 2, seed=1)
    value = dark_rank(student, teacher, alpha=2.0, beta=3.0, length=5)
    torch.testing.assert_close(value, public_dark_rank(student, teacher, 2.0, 3.0, 5))


def test_features_without_a_dimension_have_no_relations() -> None:
    assert pkt(noise(4, 3), torch.zeros(4, 0)).item() == 0.0


def test_pkt_of_nearly_equal_features_is_as_precise_as_in_float64() -> None:
    teacher = noise(12, 6)
    student = teacher + 2e-3 * noise(12, 6, seed=1)
    exact = pkt(student, teacher)
    torch.testing.assert_close(pkt(student.float(), teacher.float()).double(), exact, rtol=5e-4, atol=0)


def test_pkt_gradient_of_nearly_opposite_rows_equals_that_of_the_definition() -> None:
    """The probabilities of the two rows are near the epsilon of the logarithm."""

    def definition(student: Tensor, teacher: Tensor) -> Tensor:
        kernels = [1 + unit @ unit.T for unit in (F.normalize(x, dim=1) for x in (student, teacher))]
        p_s, p_t = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
        return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()

    student, teacher = torch.eye(4, 5, dtype=torch.float64), noise(4, 5)
    student[2, 0] = 0.3
    for apart in (1e-2, 1e-3, 3e-4):
        student[1, :2] = torch.tensor([-1, apart])
        expected = gradient(definition, student, teacher)
        torch.testing.assert_close(
            gradient(pkt, student, teacher), expected, rtol=0, atol=1e-8 * expected.norm().item()
        )


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0])])
@pytest.mark.parametrize("name", RELATIONS)
def test_gradients_of_nearly_equal_and_nearly_opposite_rows(name: str, weight: Tensor | None) -> None:
    student, teacher = noise(5, 6), noise(5, 6, seed=1)
    student[1], student[3] = -student[0], student[2]
    student[[1, 3], 0] += 0.02
    loss = function_of(name)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, teacher, weight=weight), (student.requires_grad_(),), atol=1e-5, rtol=1e-5
    )


def test_similarities_of_large_negative_features_are_finite() -> None:
    student, teacher = 1e30 * noise(4, 3).abs().float(), noise(4, 3, seed=1).float()
    expected = similarity_preserving(student, teacher)
    torch.testing.assert_close(similarity_preserving(-student, teacher), expected)


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


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31 - 2), batch=st.integers(3, 9), length=st.integers(2, 10), scale=st.floats(1e-3, 1e3))
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
