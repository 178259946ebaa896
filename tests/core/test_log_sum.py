"""The log-sum of normalized differences: a naive reference, a number by hand, its properties, and safe gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdlib import LogSumLoss
from kdlib.functional import log_sum
from tests.core.loss_inputs import each_dtype, edge_cases, gradient, noise

WEIGHT = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25], dtype=torch.float64)


def reference(student: Tensor, teacher: Tensor, weight: Tensor, exponent: float) -> float:
    """By BatchNorm's formula, one number at a time."""
    s, t, share = student.flatten(1).numpy(), teacher.flatten(1).numpy(), (weight / weight.sum()).tolist()
    total = 0.0
    for k in range(s.shape[1]):
        columns = []
        for x in (s[:, k], t[:, k]):
            mean = sum(p * v for p, v in zip(share, x, strict=True))
            variance = sum(p * (v - mean) ** 2 for p, v in zip(share, x, strict=True))
            columns.append([(v - mean) / math.sqrt(variance + 1e-4) for v in x])
        total += sum(p * abs(a - b) ** exponent for p, a, b in zip(share, *columns, strict=True))
    return math.log(total)


@pytest.mark.parametrize("exponent", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("shape", [(12,), (3, 2, 2)])
def test_equals_the_naive_reference(exponent: float, shape: tuple[int, ...]) -> None:
    student, teacher = noise(5, *shape), 0.01 * noise(5, *shape, seed=1) + 3
    value = log_sum(student, teacher, exponent=exponent, weight=WEIGHT)
    assert value.item() == pytest.approx(reference(student, teacher, WEIGHT, exponent), rel=1e-9)
    value = log_sum(student, teacher, exponent=exponent)
    assert value.item() == pytest.approx(reference(student, teacher, torch.ones(5).double(), exponent), rel=1e-9)


def test_equals_batch_norm_layers() -> None:
    """As public code computes it: two BatchNorm layers, the absolute difference, the sum over the batch, the logarithm."""
    student, teacher = noise(8, 6).float(), noise(8, 6, seed=1).float()
    one, two = (nn.BatchNorm1d(6, eps=1e-4, affine=False) for _ in range(2))
    published = (one(student) - two(teacher)).abs().pow(4).sum().log()
    torch.testing.assert_close(log_sum(student, teacher) + math.log(8), published)


def test_two_samples_by_hand() -> None:
    """Standardized, both sides are 1 and -1 in another order, but for the constant: 2^4 at both samples."""
    student = torch.tensor([[5.0], [9.0]], dtype=torch.float64)
    assert log_sum(student, -student).item() == pytest.approx(math.log(16) - 4 * math.log1p(1e-4 / 4) / 2, rel=1e-12)
    assert log_sum(student, student).item() == pytest.approx(math.log(np.finfo(np.float64).tiny))


def test_properties() -> None:
    student, teacher = noise(16, 5), noise(16, 5, seed=1)
    value = log_sum(student, teacher)
    order = torch.arange(16).flip(0)
    torch.testing.assert_close(log_sum(student[order], teacher[order]), value)
    torch.testing.assert_close(log_sum(teacher, student), value)
    torch.testing.assert_close(log_sum(student + 7, 3 * teacher - 2), value, rtol=1e-3, atol=1e-3)
    nearer = [log_sum(teacher + scale * student, teacher).item() for scale in (0.5, 0.1, 0.01, 0.001)]
    assert nearer == sorted(nearer, reverse=True)
    slopes = [gradient(log_sum, teacher + scale * student, teacher).abs().max().item() for scale in (0.1, 0.01, 0.001)]
    assert slopes == sorted(slopes)  # the logarithm: the nearer, the larger
    assert not gradient(log_sum, teacher, teacher).any()


def test_descent_brings_the_sides_together() -> None:
    student, teacher = noise(16, 5), noise(16, 5, seed=1)
    first = log_sum(student, teacher).item()
    for _ in range(50):
        student = student - 0.1 * gradient(log_sum, student, teacher)
    assert log_sum(student, teacher).item() < first - 0.5


@each_dtype
def test_values_and_gradients_are_finite(dtype: torch.dtype) -> None:
    for exponent in (1.0, 4.0, 8.0):
        for which, sides in edge_cases(dtype).items():
            student, teacher = (x.to(dtype).clone().requires_grad_() for x in sides)
            value = log_sum(student, teacher, exponent=exponent)
            value.backward()
            assert math.isfinite(value.item()), which
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), which
            assert student.grad is not None, which
            assert student.grad.isfinite().all(), which
            assert teacher.grad is None, which


def test_masked_samples_of_any_size_have_no_influence() -> None:
    student, teacher, weight = noise(6, 4), noise(6, 4, seed=1), torch.tensor([1.0, 1, 0, 1, 1, 1])
    wanted = log_sum(student[weight > 0], teacher[weight > 0])
    student[2], teacher[2] = 1e30, -1e30
    torch.testing.assert_close(log_sum(student, teacher, weight=weight), wanted)
    assert not gradient(log_sum, student, teacher, weight=weight)[2].any()


def test_masked_samples_have_no_influence_beside_large_constant_features() -> None:
    weight = torch.tensor([1.0, 1.0, 0.0])
    student, teacher = torch.full((3, 4), 1e10), torch.eye(3, 4)
    value = log_sum(student, teacher, weight=weight)
    torch.testing.assert_close(value, log_sum(student[:2], teacher[:2]))


def test_compiles_without_graph_breaks() -> None:
    student, teacher = noise(6, 4).float(), noise(6, 4, seed=1).float()
    compiled = torch.compile(LogSumLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), log_sum(student, teacher))


def test_errors() -> None:
    x = noise(4, 3)
    for options in ({"exponent": 0.5}, {"exponent": 9}):
        with pytest.raises(ValueError, match="log_sum: exponent must be a finite number and >= 1 and <= 8"):
            log_sum(x, x, **options)
        with pytest.raises(ValueError, match="LogSumLoss: exponent must be"):
            LogSumLoss(**options)
    with pytest.raises(ValueError, match=r"teacher must be .* like student"):
        log_sum(x, x[:, :2])
    with pytest.raises(ValueError, match="reduction must be 'mean'"):
        log_sum(x, x, reduction="none")  # type: ignore[arg-type]
