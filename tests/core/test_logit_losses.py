"""Losses of logits: soft targets, decoupled distillation, DIST. Values by hand, properties, memory."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib.functional import decoupled_kd, dist, soft_target
from kdlib.losses.logits import _chunked


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


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), offset=st.floats(-100, 100), temperature=st.floats(0.5, 10))
def test_soft_target_ignores_offsets_and_is_never_negative(seed: int, offset: float, temperature: float) -> None:
    student, teacher = logits(3, 5, seed)[:2]
    value = soft_target(student, teacher, temperature=temperature)
    moved = soft_target(student + offset, teacher - offset, temperature=temperature)
    torch.testing.assert_close(moved, value)
    assert value.item() >= 0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8), b=st.integers(1, 5), c=st.integers(2, 7))
def test_the_parts_of_decoupled_add_up_to_the_soft_target(seed: int, temperature: float, b: int, c: int) -> None:
    student, teacher, target = logits(b, c, seed)
    for row in range(b):
        s, t, y = student[row : row + 1], teacher[row : row + 1], target[row : row + 1]
        rest = 1 - float((t / temperature).softmax(1)[0, y])
        got = decoupled_kd(s, t, target=y, alpha=1.0, beta=rest, temperature=temperature)
        torch.testing.assert_close(got, soft_target(s, t, temperature=temperature), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
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
