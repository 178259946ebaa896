"""Weightings for one teacher, equal teachers and extreme values; constant, confidence and entropy weights."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdlib.weighting
from kdlib.weighting import (
    CenterConfidenceWeighting,
    ConfidenceWeighting,
    EntropyWeighting,
    FixedWeighting,
    GateWeighting,
    GradientWeighting,
    UncertaintyWeighting,
    UniformWeighting,
)  # fmt: skip

B, D = 4, 3
LOSSES = torch.rand(3, 5)
REST: dict[str, Any] = {"student": torch.zeros(5, 1), "teachers": [], "targets": {}}


def made(k: int) -> dict[str, nn.Module]:
    return {
        "UniformWeighting": UniformWeighting(),
        "FixedWeighting": FixedWeighting([1.0] * k),
        "CenterConfidenceWeighting": CenterConfidenceWeighting(D),
        "ConfidenceWeighting": ConfidenceWeighting(),
        "EntropyWeighting": EntropyWeighting(),
        "UncertaintyWeighting": UncertaintyWeighting(k),
        "GradientWeighting": GradientWeighting(),
        "GateWeighting": GateWeighting(D, k, hidden=4),
    }


def batch(teachers: list[Tensor], seed: int = 0) -> tuple[Tensor, dict[str, object]]:
    """Losses of a student against these teachers, with their graph, and the other arguments of a weighting."""
    generator = torch.Generator().manual_seed(seed)
    b = teachers[0].shape[0]
    student = torch.randn(b, D, generator=generator).requires_grad_()
    losses = torch.stack([(student - teacher.float()).square().mean(1) for teacher in teachers])
    targets = {"label": torch.arange(b) % D, "identity": torch.arange(b) % D}
    return losses, {"student": student, "teachers": teachers, "targets": targets}


@pytest.mark.parametrize("name", kdlib.weighting.__all__)
def test_equal_teachers_have_equal_weights(name: str) -> None:
    teacher = torch.randn(B, D, generator=torch.Generator().manual_seed(7))
    for k in (1, 2, 3):
        weighting = made(k)[name]
        for _ in range(2):  # the second call uses the centers of the first
            losses, rest = batch([teacher] * k)
            weights = weighting(losses, **rest)
            torch.testing.assert_close(weights, torch.full((k, B), 1 / k), rtol=0, atol=1e-6)


def test_fixed_weights_of_float64_losses_have_their_precision() -> None:
    losses, rest = batch([torch.zeros(B, D), torch.ones(B, D)])
    weights = FixedWeighting([1, 2])(losses.double(), **rest)
    torch.testing.assert_close(weights[0], torch.full((B,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-16)


@pytest.mark.parametrize("name", kdlib.weighting.__all__)
def test_dtype_graph_and_rank(name: str) -> None:
    weighting = made(3)[name]
    for parameter in weighting.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    losses, rest = batch([torch.randn(B, D, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8, 9)])
    weighting(losses, **rest)  # creates the centers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = copy.deepcopy(weighting)(losses.bfloat16(), **rest)
    weights = weighting(losses, **rest)
    assert (weights.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), weights, rtol=1e-2, atol=1e-2)
    assert weights.requires_grad == (name == "GateWeighting")
    with pytest.raises(ValueError, match=rf"^{name}: losses must be \(k, b\), got \({B},\)"):
        weighting(losses[0], **rest)
    with pytest.raises(TypeError, match=f"^{name}: losses must be a floating-point tensor, got torch.int64"):
        weighting(losses.long(), **rest)


@pytest.mark.parametrize("name", kdlib.weighting.__all__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_values_give_finite_weights_that_sum_to_one(name: str, dtype: torch.dtype) -> None:
    huge = {torch.float16: 6e4, torch.bfloat16: 1e38, torch.float32: 1e38, torch.float64: 1e38}[dtype]
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    teachers = [(huge * signs).to(dtype), torch.zeros(B, D, dtype=dtype), (1e-7 * signs).to(dtype)]
    labels = torch.tensor([0, 1, 2, -1])
    rest = {"teachers": teachers, "targets": {"label": labels, "identity": labels}}
    all_losses = torch.zeros(3, B), torch.full((3, B), 1e38), torch.tensor([[0.0], [1e-38], [1e38]]).expand(3, B)
    for losses, feature in itertools.product(all_losses, teachers):
        student = feature.clone().requires_grad_()
        live = (losses + 0 * student.float().sum()) if name == "GradientWeighting" else losses
        weighting = made(3)[name]
        for _ in range(2):
            weights = weighting(live, student=student, **rest)
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum(0), torch.ones(B), rtol=0, atol=1e-5)
        if weights.requires_grad:
            weights[0].sum().backward()
            assert all(torch.isfinite(parameter.grad).all() for parameter in weighting.parameters())
            assert student.grad is None


def test_uniform_and_fixed_values() -> None:
    assert torch.equal(UniformWeighting()(LOSSES, **REST), torch.full((3, 5), 1 / 3))
    fixed = FixedWeighting([1, 0, 3])(LOSSES, **REST)
    assert torch.equal(fixed, torch.tensor([[0.25], [0.0], [0.75]]).expand(3, 5))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, r"weights must hold a number > 0, got \[\]"),
        ([0, 0.0], ValueError, r"weights must hold a number > 0"),
        ([1, -1], ValueError, r"weights\[1\] must be a finite number and >= 0, got -1"),
        ([1, float("nan")], TypeError, r"weights\[1\] must be a finite number and >= 0, got nan"),
        (3, TypeError, r"weights must be a sequence of numbers, got int"),
        ("12", TypeError, r"weights must be a sequence of numbers, got str"),
    ],
)
def test_invalid_fixed_weights_are_errors(weights: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^FixedWeighting: {message}"):
        FixedWeighting(weights)


def test_fixed_needs_a_weight_for_each_teacher() -> None:
    with pytest.raises(ValueError, match=r"^FixedWeighting: losses must be \(k, b\) with k = 2, got \(3, 5\)"):
        FixedWeighting([1, 2])(LOSSES, **REST)


# Confidence and entropy, against loops.


def soft(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def confidence(logits: list[np.ndarray], labels: list[int]) -> np.ndarray:
    k = len(logits)
    weights = np.full((k, len(labels)), 1 / k)
    for i, label in enumerate(labels):
        if label >= 0 and k > 1:
            weights[:, i] = (1 - soft(np.array([-math.log(soft(z[i])[label]) for z in logits]))) / (k - 1)
    return weights


def entropy(logits: list[np.ndarray], labels: list[int]) -> np.ndarray:
    k = len(logits)
    weights = np.ones((k, len(labels)))
    for i in range(len(labels)):
        if k > 1:
            each = np.array([-sum(p * math.log(p) for p in soft(z[i])) for z in logits])
            weights[:, i] = (1 - each / each.sum()) / (k - 1)
    return weights


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    k=st.integers(1, 4),
    c=st.integers(2, 5),
    labels=st.lists(st.integers(-1, 1), min_size=1, max_size=5),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_confidence_and_entropy_follow_their_formulas(
    seed: int, k: int, c: int, labels: list[int], scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = len(labels)
    teachers = [scale * torch.randn(b, c, generator=generator, dtype=torch.float64) for _ in range(k)]
    rest = {"student": torch.zeros(b, 1), "teachers": teachers, "targets": torch.tensor(labels)}
    for weighting, reference in [(ConfidenceWeighting(), confidence), (EntropyWeighting(), entropy)]:
        weights = weighting(torch.zeros(k, b, dtype=torch.float64), **rest)
        expected = reference([each.numpy() for each in teachers], labels)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_confidence_and_entropy_by_hand() -> None:
    # Cross-entropies log 2 and log 4 make a softmax of 1/3 and 2/3; entropies log 2 and 0 make shares of 1 and 0.
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    weights = ConfidenceWeighting(target="y")(
        torch.zeros(2, 1), student=half, teachers=[half, quarter], targets={"y": torch.tensor([0])}
    )
    torch.testing.assert_close(weights, torch.tensor([[2 / 3], [1 / 3]]))
    confident = torch.tensor([[1e4, 0.0]])
    weights = EntropyWeighting()(torch.zeros(2, 1), student=half, teachers=[half, confident], targets={})
    assert weights.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ({"label": torch.arange(4)}, ValueError, "labels must be below c = 3, got 3"),
        (torch.ones(4), TypeError, "labels must be whole numbers, got torch.float32"),
        (torch.tensor([0, 1]), ValueError, r"labels must be \(b,\) with b = 4, got \(2,\)"),
        ({"sample": torch.arange(4)}, ValueError, "no target named 'label'; there are 'sample'"),
    ],
)
def test_invalid_labels_are_errors(targets: object, error: type[Exception], message: str) -> None:
    losses, rest = batch([torch.zeros(B, D)] * 2)
    with pytest.raises(error, match=f"^ConfidenceWeighting: {message}"):
        ConfidenceWeighting()(losses, **{**rest, "targets": targets})


@pytest.mark.parametrize("weighting", [ConfidenceWeighting(), EntropyWeighting()], ids=repr)
def test_teachers_must_be_logits_on_the_same_classes(weighting: nn.Module) -> None:
    losses, rest = batch([torch.zeros(B, D)] * 2)
    rest["teachers"] = [torch.zeros(B, D), torch.zeros(B, D + 1)]
    with pytest.raises(ValueError, match=r": teachers must be logits \(b, c\) .* got \(4, 3\), \(4, 4\)"):
        weighting(losses, **rest)


def test_shares_have_the_precision_of_the_losses() -> None:
    losses = LOSSES.double()
    weights = FixedWeighting([1, 2, 4])(losses, **REST)
    np.testing.assert_allclose(weights.numpy(), np.tile([[1 / 7], [2 / 7], [4 / 7]], 5), rtol=1e-15)
    weighting = UncertaintyWeighting(3)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([0.5, -1.0, 2.0]))
    s, means = np.array([0.5, -1.0, 2.0]), losses.mean(1).numpy()
    assert weighting.penalty(losses).dtype == torch.float64
    assert weighting.penalty(losses).item() == pytest.approx((np.exp(-s) * means + s).sum(), rel=1e-12)
    assert weighting.half().penalty(losses.half()).dtype == torch.float32
    np.testing.assert_allclose(
        UncertaintyWeighting(3)(losses, **REST).detach().numpy(), np.full((3, 5), 1 / 3), rtol=1e-6
    )
