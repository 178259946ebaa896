"""Relation losses: naive references, properties, values by hand and numerical edge cases.

The contract that all losses share is in `test_contracts`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib.functional
from kdlib.losses.relations.correlation_congruence import CorrelationCongruenceLoss, correlation_congruence
from kdlib.losses.relations.pkt import PKTLoss, pkt
from kdlib.losses.relations.rkd import RKDAngleLoss, RKDDistanceLoss, rkd_angle, rkd_distance
from kdlib.losses.relations.similarity_preserving import SimilarityPreservingLoss, similarity_preserving
from tests.core import reference_relations as reference
from tests.core.loss_inputs import each_dtype, each_mode, gradient, many_edge_cases, noise

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], type[nn.Module], tuple[dict[str, Any], ...]]] = {
    "rkd_distance": (rkd_distance, RKDDistanceLoss, ({}, {"chunk_size": 2})),
    "rkd_angle": (rkd_angle, RKDAngleLoss, ({}, {"chunk_size": 2})),
    "similarity_preserving": (similarity_preserving, SimilarityPreservingLoss, ({},)),
    "pkt": (pkt, PKTLoss, ({},)),
    "correlation_congruence": (
        correlation_congruence,
        CorrelationCongruenceLoss,
        ({}, {"order": 4, "gamma": 1.5}, {"order": 1}, {"order": None}),
    ),
}
HAND_WRITTEN = ["rkd_distance", "rkd_angle", "pkt", "correlation_congruence"]
CASES = [(name, kwargs) for name, (_, _, all_kwargs) in FUNCTIONS.items() for kwargs in all_kwargs]
IDS = [f"{name}{kwargs or ''}" for name, kwargs in CASES]
each = pytest.mark.parametrize(("name", "kwargs"), CASES, ids=IDS)


def loop(name: str, student: Tensor, teacher: Tensor, weight: Tensor | None = None, **kwargs: Any) -> float:
    kwargs.pop("chunk_size", None)
    w = np.ones(len(student)) if weight is None else weight.double().numpy()
    s, t = (x.detach().double().flatten(1).numpy() for x in (student, teacher))
    # The losses do not depend on scale, but squares in the loops could overflow. Division by a power of two is exact.
    s, t = (np.ldexp(x, -np.frexp(np.abs(x).max(initial=0))[1]) for x in (s, t))
    return float(getattr(reference, name)(s, t, w, **kwargs))


def angle_by_vectors(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the loss by difference vectors, with the gradient of autograd."""
    weight = student.new_ones(len(student)) if weight is None else weight
    cosines = []
    for x in (student, teacher):
        e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        cosines.append(e @ e.transpose(1, 2))
    losses = F.smooth_l1_loss(*cosines, reduction="none")
    return torch.einsum("ijk,i,j,k->", losses, weight, weight, weight) / weight.sum() ** 3


@each
def test_equals_the_loops(name: str, kwargs: dict[str, Any]) -> None:
    loss = FUNCTIONS[name][0]
    student, teacher = noise(6, 2, 3), noise(6, 4, seed=1)
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7, 0.0], dtype=torch.float64)
    for w in (None, weight, torch.full((6,), 0.25)):
        got = loss(student, teacher, weight=w, **kwargs)
        assert got.dtype == torch.float64
        assert got.item() == pytest.approx(loop(name, student, teacher, w, **kwargs), rel=1e-10)
        single = loss(student.float(), teacher.float(), weight=w, **kwargs)
        assert single.dtype == torch.float32
        assert single.item() == pytest.approx(got.item(), rel=1e-5)


@each
def test_gradcheck(name: str, kwargs: dict[str, Any]) -> None:
    loss = FUNCTIONS[name][0]
    student, teacher = noise(5, 3).requires_grad_(), noise(5, 4, seed=1)
    for w in (None, torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7])):
        assert torch.autograd.gradcheck(lambda s, w=w: loss(s, teacher, weight=w, **kwargs), student)


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


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # Right isosceles triangle against three points on a line at 0, 1, 2.
        # Distances over their mean: 3/(2+r), 3/(2+r), 3r/(2+r) with r = sqrt 2; and 3/4, 3/2, 3/4.
        (
            "rkd_distance",
            {},
            ((3 / (2 + 2**0.5) - 0.75) ** 2 + (3 / (2 + 2**0.5) - 1.5) ** 2 + (3 * 2**0.5 / (2 + 2**0.5) - 0.75) ** 2)
            / 9,
        ),
        # Cosines 0, r/2, r/2 against 1, -1, 1: h = 1/2, 1/2 + r/2, (1 - r/2)^2 / 2, each twice, over 27.
        ("rkd_angle", {}, 2 * (0.5 + 0.5 + 2**-0.5 + (1 - 2**-0.5) ** 2 / 2) / 27),
    ],
)
def test_triangles_by_hand(name: str, kwargs: dict[str, Any], expected: float) -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    assert FUNCTIONS[name][0](student, teacher, **kwargs).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        # Rows (1, 0), (0, 1) against (1, 1) / sqrt 2 twice: (4 - 4 / sqrt 2) / 4.
        ("similarity_preserving", {}, 1 - 2**-0.5),
        # Each row (2/3, 1/3) against (1/2, 1/2): two divergences ln(3 / (2 sqrt 2)), over 4. EPS moves the 8th digit.
        ("pkt", {}, math.log(3 / 8**0.5) / 2),
        # Off the diagonal exp(-0.8) against exp(-0.8) (1 + 0.8 + 0.32): two squares over 4.
        ("correlation_congruence", {}, (1.12 * math.exp(-0.8)) ** 2 / 2),
        ("correlation_congruence", {"order": None}, (1 - math.exp(-0.8)) ** 2 / 2),
    ],
)
def test_two_samples_by_hand(name: str, kwargs: dict[str, Any], expected: float) -> None:
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    assert FUNCTIONS[name][0](student, teacher, **kwargs).item() == pytest.approx(expected, rel=1e-6)


@each
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(2, 7), d_s=st.integers(1, 5), d_t=st.integers(1, 5))
def test_properties(name: str, kwargs: dict[str, Any], seed: int, batch: int, d_s: int, d_t: int) -> None:
    loss = FUNCTIONS[name][0]
    student, teacher = noise(batch, d_s, seed=seed), noise(batch, d_t, seed=seed + 1)
    value = loss(student, teacher, **kwargs)
    assert value.item() >= -1e-9
    assert loss(student, student.clone(), **kwargs).item() == pytest.approx(0, abs=1e-25)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(loss(student[order], teacher[order], **kwargs), value, **close)
    torch.testing.assert_close(loss(3 * student, 0.2 * teacher, **kwargs), value, **close)
    turn = torch.linalg.qr(noise(d_s, d_s, seed=seed + 2))[0]
    torch.testing.assert_close(loss(student @ turn, teacher, **kwargs), value, **close)
    if name.startswith("rkd"):
        torch.testing.assert_close(loss(student + 10, teacher - 5, **kwargs), value, **close)
    slope = gradient(loss, student, teacher, **kwargs)
    # The gradient is orthogonal to a change of scale.
    assert (slope * student).sum().abs() < 1e-9
    weight = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    weighted = loss(student, teacher, weight=weight, **kwargs)
    torch.testing.assert_close(loss(student, teacher, weight=1e-30 * weight, **kwargs), weighted, **close)


@each
def test_masked_samples_of_any_size_have_no_influence(name: str, kwargs: dict[str, Any]) -> None:
    loss = FUNCTIONS[name][0]
    kept = torch.tensor([True, False, True, True, False, True])
    student, teacher = noise(6, 3, dtype=torch.float32), noise(6, 4, seed=1, dtype=torch.float32)
    student[~kept] *= 1e30
    teacher[~kept] *= 1e-30
    for weight in (kept, kept.float(), 7e20 * kept.double(), 1e300 * kept.double()):
        masked = loss(student, teacher, weight=weight, **kwargs)
        torch.testing.assert_close(masked, loss(student[kept], teacher[kept], **kwargs))
        slope = gradient(loss, student, teacher, weight=weight, **kwargs)
        torch.testing.assert_close(slope[kept], gradient(loss, student[kept], teacher[kept], **kwargs))
        assert not slope[~kept].any()


@each
def test_without_pairs_the_loss_is_zero_with_a_graph(name: str, kwargs: dict[str, Any]) -> None:
    loss = FUNCTIONS[name][0]
    for batch, weight in ((0, None), (1, None), (4, torch.zeros(4)), (4, torch.tensor([0.0, 3.0, 0.0, 0.0]))):
        student, teacher = noise(batch, 3, dtype=torch.float32).requires_grad_(), noise(batch, 2, seed=1).float()
        value = loss(student, teacher, weight=weight, **kwargs)
        assert value.shape == ()
        assert value.item() == pytest.approx(0, abs=1e-12)
        value.backward()
        assert student.grad is not None
        assert student.grad.abs().sum() < 1e-6


@each_mode
@each_dtype
@each
def test_values_and_gradients_are_finite(name: str, kwargs: dict[str, Any], dtype: torch.dtype, autocast: bool) -> None:
    loss = FUNCTIONS[name][0]
    for which, sides in many_edge_cases(6, dtype).items():
        if which in ("at the end", "at both ends", "one row"):  # in tests of their own
            continue
        student, teacher = (x.to(dtype).detach().clone().requires_grad_() for x in sides)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(student, teacher, **kwargs)
        value.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), which
        assert math.isfinite(value.item()), which
        assert value.item() >= -1e-6, which
        assert student.grad is not None, which
        assert student.grad.dtype == dtype, which
        assert torch.isfinite(student.grad).all(), which
        assert teacher.grad is None, which
        # Half-precision inputs give the value of float64 arithmetic on the same numbers.
        exact = loop(name, student, teacher, **kwargs)
        rough = name in ("similarity_preserving", "pkt", "correlation_congruence")  # they depend on the offset
        allowed = 1e-5 if rough or dtype != torch.float64 else 1e-9
        assert value.item() == pytest.approx(exact, rel=1e-3 if rough else 1e-4, abs=allowed), which


@each
def test_a_common_offset_costs_no_precision(name: str, kwargs: dict[str, Any]) -> None:
    """This includes losses that depend on the offset and are then dominated by small differences."""
    loss = FUNCTIONS[name][0]
    for weight in (None, torch.linspace(0, 2, 40)):
        student, teacher = (noise(40, 16, seed=seed, dtype=torch.float32) + 1000 for seed in (0, 1))
        exact = loss(student.double(), teacher.double(), weight=weight, **kwargs)
        assert loss(student, teacher, weight=weight, **kwargs).item() == pytest.approx(exact.item(), rel=1e-4)
        slope = gradient(loss, student.double(), teacher.double(), weight=weight, **kwargs)
        single = gradient(loss, student, teacher, weight=weight, **kwargs)
        assert (single - slope).norm() / slope.norm() < 2e-4


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_near_rows_are_exact(name: str, apart: float) -> None:
    loss = FUNCTIONS[name][0]
    student = noise(24, 16, dtype=torch.float32)
    student[12:] = student[:12] + apart * noise(12, 16, seed=2, dtype=torch.float32)
    teacher = noise(24, 16, seed=1, dtype=torch.float32)
    vectors = angle_by_vectors if name == "rkd_angle" else None
    exact = loss(student.double(), teacher.double())
    if vectors is not None:
        torch.testing.assert_close(exact, vectors(student.double(), teacher.double()), rtol=1e-7, atol=0)
    assert loss(student, teacher).item() == pytest.approx(exact.item(), rel=1e-5)
    slope = gradient(loss, student.double(), teacher.double())
    assert (gradient(loss, student, teacher) - slope).norm() / slope.norm() < 1e-3


def test_distances_of_near_rows() -> None:
    """Pairs of near rows that are far from each other, where the loss depends on the near distances only."""
    far = 100 * noise(4, 8, dtype=torch.float32)
    student = torch.cat([far, far + 1e-2 * noise(4, 8, seed=3, dtype=torch.float32)])
    weight = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
    assert rkd_distance(student, 5 * student, weight=weight).item() == 0.0
    triple = torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    teacher = noise(8, 3, seed=4, dtype=torch.float32)
    exact = loop("rkd_distance", student, teacher, triple)
    assert rkd_distance(student, teacher, weight=triple).item() == pytest.approx(exact, rel=1e-5)


@each
def test_functional_gradients_are_those_of_autograd(name: str, kwargs: dict[str, Any]) -> None:
    student, teacher = noise(7, 5, seed=1), noise(7, 4, seed=2)
    weight = noise(7, seed=3).abs()

    def loss(x: Tensor) -> Tensor:
        return FUNCTIONS[name][0](x, teacher, weight=weight, **kwargs)

    found, value = torch.func.grad_and_value(loss)(student)
    torch.testing.assert_close(value, loss(student), rtol=0, atol=0)
    torch.testing.assert_close(found, gradient(loss, student), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_second_derivative_of_a_hand_written_gradient_is_an_error(name: str) -> None:
    student = noise(4, 3).requires_grad_()
    value = FUNCTIONS[name][0](student, noise(4, 2, seed=1))
    (slope,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match="this relation loss has a gradient, but no second derivative"):
        slope.square().sum().backward()


def test_similarity_preserving_has_second_derivatives_and_vmap() -> None:
    student, teacher = noise(3, 4, 2), noise(3, 4, 3, seed=1)
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda s: similarity_preserving(s, teacher[0], weight=weight), student[0].clone().requires_grad_()
    )
    each_batch = torch.func.vmap(similarity_preserving)(student, teacher)
    expected = torch.stack([similarity_preserving(s, t) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(each_batch, expected)


@each
def test_the_module_is_the_function(name: str, kwargs: dict[str, Any]) -> None:
    loss, module, _ = FUNCTIONS[name]
    student, teacher, weight = noise(5, 3), noise(5, 4, seed=1), torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7])
    expected = loss(student, teacher, weight=weight, **kwargs)
    assert torch.equal(module(**kwargs)(student, teacher, weight=weight, reduction="mean"), expected)
    assert torch.equal(loss(student, teacher, weight=weight, gather=True, **kwargs), expected)  # in a single process


@each
def test_compiles_as_one_graph(name: str, kwargs: dict[str, Any]) -> None:
    loss = FUNCTIONS[name][0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    student, teacher = noise(6, 3, dtype=torch.float32), noise(6, 4, seed=1, dtype=torch.float32)
    for weight in (None, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])):
        torch.testing.assert_close(
            compiled(student, teacher, weight=weight, **kwargs), loss(student, teacher, weight=weight, **kwargs)
        )
        torch.testing.assert_close(
            gradient(compiled, student, teacher, weight=weight, **kwargs),
            gradient(loss, student, teacher, weight=weight, **kwargs),
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_input_is_named(name: str) -> None:
    loss, module, _ = FUNCTIONS[name]
    good = torch.ones(4, 3)
    for call, error, message in (
        (
            lambda: module(reduction="none"),
            ValueError,
            rf"^{module.__name__}: reduction must be 'mean': a relation has",
        ),
        (lambda: module()(good, good, reduction="none"), ValueError, rf"^{name}: reduction must be 'mean': a relation"),
        (lambda: loss(good, torch.ones(3, 3)), ValueError, rf"^{name}: teacher must have the batch size of student"),
        (lambda: loss(torch.ones(4), good), ValueError, rf"^{name}: student must be \(b, d, ...\), got \(4,\)"),
        (lambda: loss(good, torch.ones(4)), ValueError, rf"^{name}: teacher must be \(b, d, ...\), got \(4,\)"),
        (lambda: loss(good.int(), good), TypeError, rf"^{name}: student must be a floating-point tensor"),
        (lambda: loss(good, good, weight=torch.ones(3)), ValueError, rf"^{name}: weight must be \(b,\) = \(4,\)"),
        (lambda: loss(good, good, weight=[1.0]), TypeError, rf"^{name}: weight must be a torch.Tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RKDAngleLoss(chunk_size=0), ValueError, r"RKDAngleLoss: chunk_size must be a whole number and >= 1"),
        (lambda: RKDDistanceLoss(chunk_size=1.5), TypeError, r"chunk_size must be a whole number and >= 1, got 1\.5"),
        (lambda: CorrelationCongruenceLoss(gamma=0), ValueError, r"gamma must be a finite number and > 0, got 0"),
        (lambda: CorrelationCongruenceLoss(order=0), ValueError, r"order must be a whole number and >= 1, got 0"),
        (lambda: CorrelationCongruenceLoss(order=2.0), TypeError, r"order must be a whole number and >= 1, got 2\.0"),
    ],
)
def test_bad_hyper_parameters_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "similarity_preserving", "pkt", "dark_rank"])
def test_the_largest_numbers_of_a_dtype(name: str, dtype: torch.dtype) -> None:
    """The losses do not depend on scale, up to the largest number of the dtype."""
    loss = getattr(kdlib.functional, name)
    if name == "dark_rank":
        loss = partial(loss, normalize=True)
    rng = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 5, generator=rng).clamp(-1, 1).to(dtype) for _ in range(2))
    student[0, 0], teacher[1, 2] = 1.0, -1.0
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    far = (student * largest).requires_grad_()
    value = loss(far, teacher * largest)
    torch.testing.assert_close(value, loss(student, teacher), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    value.backward()
    assert bool(far.grad.isfinite().all())
