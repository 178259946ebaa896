"""Losses of logits: soft targets, decoupled distillation, DIST. Naive references, properties, edge cases, memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib import DecoupledKDLoss, DISTLoss
from kdlib.functional import decoupled_kd, dist, soft_target
from kdlib.losses.logits import _chunked
from tests.core import reference_logits as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def logits(b: int = 6, c: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(b, c, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randint(c, (b,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.3, "beta": 2.0, "temperature": 1.0}, {"alpha": 0.0}, {"beta": 0.0}]
)
def test_decoupled_is_the_formula(options: dict[str, float]) -> None:
    student, teacher, target = logits()
    expected = reference.decoupled_kd(student.detach().numpy(), teacher.numpy(), target.tolist(), **options)
    got = decoupled_kd(student, teacher, target=target, reduction="none", **options)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.5, "gamma": 2.0, "temperature": 4.0}, {"beta": 0.0}, {"gamma": 0.0}]
)
def test_dist_is_the_formula(options: dict[str, float]) -> None:
    student, teacher, _ = logits()
    expected = reference.dist(student.detach().numpy(), teacher.numpy(), **options)
    assert dist(student, teacher, **options).item() == pytest.approx(expected, rel=1e-10)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 3.0])
    kept = weight > 0
    expected = reference.dist(
        student.detach()[kept].numpy(), teacher[kept].numpy(), weight=weight[kept].tolist(), **options
    )
    assert dist(student, teacher, weight=weight, **options).item() == pytest.approx(expected, rel=1e-10)


def test_values_by_hand() -> None:
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


@pytest.mark.parametrize("loss", ["decoupled", "decoupled_hot", "dist", "dist_weighted"])
def test_gradients_are_those_of_finite_differences(loss: str) -> None:
    student, teacher, target = logits(4, 4)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    call = {
        "decoupled": lambda s: decoupled_kd(s, teacher, target=target),
        "decoupled_hot": lambda s: decoupled_kd(s, teacher, target=target, temperature=0.7, weight=weight),
        "dist": lambda s: dist(s, teacher, temperature=2.0),
        "dist_weighted": lambda s: dist(s, teacher, weight=weight),
    }[loss]
    assert torch.autograd.gradcheck(call, (student,))


def edge_cases() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 6, generator=generator)
    gap = torch.zeros(4, 6)
    gap[:, 0] = 120.0
    return {
        "zeros": (torch.zeros(4, 6), torch.zeros(4, 6)),
        "uniform student": (torch.zeros(4, 6), noise[1]),
        "uniform teacher": (noise[0], torch.zeros(4, 6)),
        "equal": (noise[0], noise[0]),
        "difference of 120": (gap, gap.flip(1)),
        "difference against even": (gap, noise[1]),
        "three hundred": (300 * noise[0].sign(), -300 * noise[1].sign()),
        "large": (3e4 * noise[0].sign(), 3e4 * noise[1].sign()),
        "equal rows": (noise[0, :1].expand(4, 6), noise[1, :1].expand(4, 6)),
        "nearly equal": (noise[0], noise[0] * (1 + 1e-4)),
        "one row": (noise[0, :1], noise[1, :1]),
        "one class": (noise[0, :, :1], noise[1, :, :1]),
        "two classes": (noise[0, :, :2], noise[1, :, :2]),
        "no row": (noise[0, :0], noise[1, :0]),
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", edge_cases())
def test_values_and_gradients_are_finite(name: str, dtype: torch.dtype, autocast: bool) -> None:
    for loss in ("soft_target", "decoupled", "dist"):
        student, teacher = (x.to(dtype).contiguous() for x in edge_cases()[name])
        student.requires_grad_()
        target = torch.zeros(len(student), dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = {
                "soft_target": lambda s, t: soft_target(s, t),
                "decoupled": lambda s, t, target=target: decoupled_kd(s, t, target=target),
                "dist": lambda s, t: dist(s, t),
            }[loss](student, teacher)
        value.backward()
        assert torch.isfinite(value), loss
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all(), loss


@pytest.mark.parametrize("temperature", [1e-6, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_temperature_with_logits_of_any_size(dtype: torch.dtype, temperature: float) -> None:
    end = torch.finfo(dtype).max
    student = (end * torch.eye(4, 6, dtype=dtype)).requires_grad_()
    teacher = -end * torch.eye(4, 6, dtype=dtype).flip(1)
    for loss in (soft_target, dist):
        value = loss(student, teacher, temperature=temperature)
        (slope,) = torch.autograd.grad(value, student)
        assert torch.isfinite(value)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_dist_of_a_nearly_even_student_does_not_overflow_float16(temperature: float) -> None:
    noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        student = (size * noise[0]).half().requires_grad_()
        dist(student, noise[1].half(), temperature=temperature).backward()
        assert torch.isfinite(student.grad).all()
        assert student.grad.any() or size < 1e-3 * temperature


def test_decoupled_where_the_logarithm_of_a_softmax_is_infinite() -> None:
    student = torch.tensor([[120.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 120.0, 0.0]])
    value = decoupled_kd(student, teacher, target=torch.tensor([0]), temperature=1.0, beta=0.0)
    # KL of (0, 1) against (1 - e^-119.3, e^-119.3), up to e^-120.
    assert value.item() == pytest.approx(120 - np.log(2), rel=1e-6)


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


def test_compiled_whole() -> None:
    student, teacher, target = logits()
    for loss in (
        lambda s, t: soft_target(s, t),
        lambda s, t: decoupled_kd(s, t, target=target),
        lambda s, t: dist(s, t),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: decoupled_kd(s, t, target=torch.tensor([0, 5])), ValueError, "target"),
        (lambda s, t: decoupled_kd(s, t, target=torch.tensor([0.0, 1.0])), TypeError, "target"),
        (lambda s, t: decoupled_kd(s, t, target=torch.tensor([0])), ValueError, "target"),
        (lambda s, t: decoupled_kd(s, t, target=torch.tensor([0, 1]), beta=-1), ValueError, "beta must be"),
        (lambda s, t: dist(s, t, reduction="none"), ValueError, "no per-sample form"),
        (lambda s, t: dist(s, t[:1]), ValueError, "teacher must be"),
        (lambda s, t: DISTLoss(temperature=0), ValueError, "temperature must be"),
        (lambda s, t: DecoupledKDLoss(alpha=-1), ValueError, "alpha must be"),
    ],
)
def test_bad_input_is_named(call, error: type[Exception], message: str) -> None:
    student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        call(student, teacher)
