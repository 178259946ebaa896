"""Losses of logits: soft targets, decoupled distillation, DIST. Values by hand, properties, memory."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib import DISTLoss
from kdlib.functional import decoupled_kd, dist, soft_target
from kdlib.losses.logits import _chunked
from tests.core.loss_inputs import each_dtype, gradient, noise


def logits(b: int = 6, c: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(b, c, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randint(c, (b,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


def test_values_by_hand() -> None:
    # KL((3/4, 1/4) || (1/2, 1/2)) = log 2 - H(1/4) = 0.130812 nats, times T^2 = 4 at logits of T log 3.
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64)
    value = soft_target(torch.zeros_like(teacher), teacher, temperature=2.0).item()
    assert value == pytest.approx(4 * 0.13081203594113694, rel=1e-12)
    # Probabilities (1/4, 3/4) and (3/4, 1/4): opposite within each sample and within each class, 1 + 1 on both sides.
    student = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).log()
    assert dist(student, student.flip(0)).item() == pytest.approx(4.0)
    # Teacher (1/2, 1/4, 1/4), student even: the rest is alike, KL((1/2, 1/2), (1/3, 2/3)) = log(9/8) / 2.
    teacher, even = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.zeros(1, 3)
    got = decoupled_kd(even, teacher, target=torch.tensor([0]), temperature=1.0)
    assert got.item() == pytest.approx(0.0588915, abs=1e-6)
    # Teacher's rest (3/4, 1/4): KL((3/4, 1/4), (1/2, 1/2)) = log 2 - H(1/4) = 0.1308.
    teacher = torch.tensor([[5.0, 3.0, 1.0]]).log()
    got = decoupled_kd(even, teacher, target=torch.tensor([0]), temperature=1.0, alpha=0.0, beta=1.0)
    assert got.item() == pytest.approx(0.1308120, abs=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), offset=st.floats(-100, 100), temperature=st.floats(0.5, 10))
def test_soft_target_ignores_offsets_and_is_never_negative(seed: int, offset: float, temperature: float) -> None:
    student, teacher = logits(3, 5, seed)[:2]
    value = soft_target(student, teacher, temperature=temperature)
    moved = soft_target(student + offset, teacher - offset, temperature=temperature)
    torch.testing.assert_close(moved, value)
    assert value.item() >= 0


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8), b=st.integers(1, 5), c=st.integers(2, 7))
def test_the_parts_of_decoupled_add_up_to_the_soft_target(seed: int, temperature: float, b: int, c: int) -> None:
    student, teacher, target = logits(b, c, seed)
    for row in range(b):
        s, t, y = student[row : row + 1], teacher[row : row + 1], target[row : row + 1]
        rest = 1 - float((t / temperature).softmax(1)[0, y])
        got = decoupled_kd(s, t, target=y, alpha=1.0, beta=rest, temperature=temperature)
        torch.testing.assert_close(got, soft_target(s, t, temperature=temperature), rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
def test_dist_depends_on_relations_only(seed: int, shift: float) -> None:
    student, teacher, _ = logits(seed=seed)
    loss = dist(student, teacher)
    assert -1e-9 <= loss.item() <= 4 + 1e-9
    torch.testing.assert_close(dist(student + shift, teacher), loss)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(dist(student[order], teacher[order]), loss)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(dist(student[:, classes], teacher[:, classes]), loss)
    assert dist(teacher, teacher).abs().item() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_chunks_of_a_large_matrix_equal_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, target = logits(7, 30, dtype=dtype)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 3.0])
    for loss in (
        lambda s: soft_target(s, teacher, weight=weight),
        lambda s: decoupled_kd(s, teacher, target=target, weight=weight),
    ):
        monkeypatch.setattr(_chunked, "CHUNK", 2**17)
        whole = loss(student)
        (expected,) = torch.autograd.grad(whole, student)
        monkeypatch.setattr(_chunked, "CHUNK", 35)  # a row at a time
        parts = loss(student)
        (got,) = torch.autograd.grad(parts, student, create_graph=True)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(got, expected)
        if dtype == torch.float64:
            torch.autograd.gradcheck(loss, (student,))
            torch.autograd.gradgradcheck(loss, (student,))


def test_a_large_matrix_takes_little_more_memory_than_its_gradient() -> None:
    pytest.importorskip("resource")
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc, which only Linux has")
    code = """
import torch
from pathlib import Path
from kdlib.functional import soft_target, decoupled_kd
def resident(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
student, teacher = torch.randn(32, 200_000, requires_grad=True), torch.randn(32, 200_000)
student.grad = torch.zeros_like(student)
target = torch.arange(32)
soft_target(student[:2, :100], teacher[:2, :100]).backward()
for loss in (lambda: soft_target(student, teacher), lambda: decoupled_kd(student, teacher, target=target)):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss().backward()
    print((resident("VmHWM") - before) * 1024 / (4 * student.numel()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    for matrices in map(float, done.stdout.split()):
        assert matrices < 2.5  # the plain formula takes seven for soft targets


# Logits of any size: the divergence computed from logarithms of probabilities is negative for logits near 1e-6.


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1e-1, 1.0, 30.0, 300.0, 3e5])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_of_any_size_are_exact(size: float, temperature: float) -> None:
    target = torch.arange(6)
    for loss, options in ((soft_target, {}), (decoupled_kd, {"target": target}), (dist, {})):
        student, teacher = (size * noise(6, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
        call = partial(loss, temperature=temperature, **options)
        wide = student.double(), teacher.double()
        if size < 0.1:  # the limit for small logits, which float64 reaches without cancellation
            ratio = 2.0 ** round(math.log2(1e-3 / size))
            exact = call(*(ratio * x for x in wide)).item() / (1 if loss is dist else ratio**2)
        else:
            exact = call(*wide).item()
        assert call(student, teacher).item() == pytest.approx(exact, rel=2e-3 if size < 0.1 else 1e-5)
        assert call(student, teacher).item() == pytest.approx(call(*wide).item(), rel=1e-5)
        slopes = gradient(call, student, teacher).double(), gradient(call, *wide)
        atol = 1e-5 * slopes[1].abs().max().item() if size < 10 else 1e-6
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=atol)
        assert call(student, student).item() == 0


def test_tiny_logits_by_hand() -> None:
    """For small logits, soft targets are half the variance of their differences, for any temperature."""
    student, teacher = torch.tensor([[3e-6, -1e-6, 0.0, 2e-6]]), torch.zeros(1, 4)
    for temperature in (1.0, 4.0, 1e3):
        value = soft_target(student, teacher, temperature=temperature).item()
        assert value == pytest.approx(student.double().var(correction=0).item() / 2, rel=1e-5)
    chunks = torch.cat([student.expand(2**15, 4), 1e-3 * noise(8, 4).float()])
    torch.testing.assert_close(
        gradient(soft_target, chunks, 0 * chunks, reduction="mean")[0],
        gradient(soft_target, student, teacher)[0] / len(chunks), rtol=1e-5, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [1, 2])
def test_logits_of_few_classes(classes: int) -> None:
    student, teacher, target = noise(4, classes), noise(4, classes, seed=1), torch.zeros(4, dtype=torch.int64)
    for loss, options in ((soft_target, {}), (decoupled_kd, {"target": target}), (dist, {})):
        value = loss(student, teacher, **options)
        assert torch.isfinite(gradient(loss, student, teacher, **options)).all()
        assert (value.item() == 0) == (classes == 1)


def test_soft_targets_of_a_rare_class_have_the_precision_of_float64() -> None:
    """A class of the probability 1e-4, which the student finds e times as likely: log(1 + (e - 1) p) - p."""
    p = 1e-4
    student, teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    rare = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64)
    value = soft_target(student + rare, teacher + rare, temperature=1.0)
    assert value.item() == pytest.approx(math.log1p(math.expm1(1) * p) - p, rel=1e-11)


def test_soft_targets_with_large_gaps() -> None:
    for gap in (20.0, 120.0, 1e4):
        student, teacher = torch.tensor([[gap, 0.0]]), torch.tensor([[0.0, gap]])
        assert soft_target(student, teacher, temperature=1.0).item() == pytest.approx(gap, rel=1e-5)
        slope = gradient(soft_target, student, teacher, temperature=1.0)
        torch.testing.assert_close(slope, torch.tensor([[1.0, -1.0]]))
    end = torch.finfo(torch.float32).max
    value = soft_target(torch.tensor([[end, -end, 0.0]]), torch.tensor([[-end, end, 0.0]]), temperature=1.0)
    assert value.item() == pytest.approx(1e30)
    # KL of (0, 1) against (1 - e^-119.3, e^-119.3), up to e^-120; the logarithm of a softmax would be infinite.
    student, teacher = torch.tensor([[120.0, 0.0, 0.0]]), torch.tensor([[0.0, 120.0, 0.0]])
    value = decoupled_kd(student, teacher, target=torch.tensor([0]), temperature=1.0, beta=0.0)
    assert value.item() == pytest.approx(120 - math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 0.1])
@each_dtype
def test_a_low_temperature_with_logits_of_any_size(dtype: torch.dtype, temperature: float) -> None:
    end = torch.finfo(dtype).max
    student = (end * torch.eye(4, 6, dtype=dtype)).requires_grad_()
    teacher = -end * torch.eye(4, 6, dtype=dtype).flip(1)
    for loss in (soft_target, dist):
        value = loss(student, teacher, temperature=temperature)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_dist_of_a_nearly_even_student_does_not_overflow_float16(temperature: float) -> None:
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        student = (size * noise(4, 6)).half()
        slope = gradient(DISTLoss(temperature=temperature), student, noise(4, 6, seed=1).half())
        assert torch.isfinite(slope).all()
        assert slope.any() or size < 1e-3 * temperature
