"""Logit standardization, and decoupled distillation and DIST of tokens and pixels."""

import math

import pytest
import torch
from torch import Tensor

from kdlib import DecoupledKDLoss, DISTLoss, LinearSoftTargetLoss, SoftTargetLoss
from kdlib.functional import decoupled_kd, dist, linear_soft_target, soft_target
from kdlib.losses.logits import _chunked
from tests.core.loss_inputs import each_dtype, edge_cases, gradient, noise

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl")
each_chunk = pytest.mark.parametrize("chunk", [2**15, 40], ids=["whole", "chunks"])


def scores(x: Tensor) -> Tensor:
    """Standard scores of rows, with the deviation of the population."""
    return (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True, correction=0).sqrt()


def targets(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(3))


def masks(*shape: int) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.4
    mask[0] = False
    return mask


# Standardization.


def test_standardized_values_by_hand() -> None:
    """Two classes have the scores 1 and -1. For opposite orders the divergence is 2 tanh(1 / T) / T, times T squared."""
    student, teacher = torch.tensor([[0.0, 5.0]]), torch.tensor([[9.0, 8.75]])
    for temperature in (0.5, 1.0, 4.0):
        value = soft_target(student, teacher, temperature=temperature, standardize=True)
        assert value.item() == pytest.approx(2 * temperature * math.tanh(1 / temperature), rel=1e-6)
    # Scores of (0, 0, 1): -1/sqrt 2, -1/sqrt 2, sqrt 2. With the deviation of a sample it would be 2 / sqrt 3.
    student, even = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
    powers = [math.exp(-math.sqrt(0.5))] * 2 + [math.exp(math.sqrt(2))]
    expected = -math.log(3) - sum(math.log(p / sum(powers)) for p in powers) / 3
    assert soft_target(student, even, temperature=1.0, standardize=True).item() == pytest.approx(expected, rel=1e-6)


@each_chunk
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_standardized_equals_soft_target_of_the_scores(
    divergence: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", chunk)
    student, teacher = noise(12, 7).requires_grad_(), noise(12, 7, seed=1)
    options = {"divergence": divergence, "temperature": 1.5, "reduction": "none"}
    value = soft_target(student, teacher, standardize=True, **options)
    expected = soft_target(scores(student), scores(teacher), **options)
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(x.sum(), student)[0] for x in (value, expected))
    torch.testing.assert_close(found, wanted)
    loss = lambda s: soft_target(s, teacher[:3], standardize=True, **options)  # noqa: E731
    torch.autograd.gradcheck(loss, (student[:3],))
    torch.autograd.gradgradcheck(loss, (student[:3],))


def test_standardized_ignores_the_range_of_logits() -> None:
    student, teacher = noise(5, 6), noise(5, 6, seed=1)
    loss = SoftTargetLoss(temperature=2.0, standardize=True)
    torch.testing.assert_close(loss(7 * student - 3, teacher / 9 + 2), loss(student, teacher))
    assert loss(student, student).item() == 0
    assert loss(student, 3 * student + 1).item() == pytest.approx(0, abs=1e-14)
    tokens, mask = student.reshape(1, 5, 6), torch.tensor([[True, False, True, True, False]])
    torch.testing.assert_close(
        SoftTargetLoss(temperature=2.0, standardize=True, dim=-1)(tokens, teacher.reshape(1, 5, 6), mask=mask),
        loss(student[mask[0]], teacher[mask[0]]),
    )


@each_chunk
@each_dtype
def test_standardized_edge_cases(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", chunk)
    for which, sides in edge_cases(dtype).items():
        student, teacher = (x.to(dtype).clone() for x in sides)
        for temperature in (0.3, 4.0):
            call = SoftTargetLoss(temperature=temperature, standardize=True)
            value, slope = call(student, teacher), gradient(call, student, teacher)
            expected = call(student.double(), teacher.double()).item()
            assert value.item() == pytest.approx(expected, rel=1e-4, abs=2e-5), which
            assert torch.isfinite(slope).all(), which
    constant = torch.full((2, 5), 0.1, dtype=dtype)
    assert not gradient(SoftTargetLoss(standardize=True), constant, noise(2, 5, dtype=dtype)).any()


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_linear_soft_target_standardizes(chunk_size: int | None) -> None:
    h_s, w_s = noise(2, 5, 6).requires_grad_(), noise(13, 6, seed=1).requires_grad_()
    h_t, w_t = noise(2, 5, 8, seed=2), noise(13, 8, seed=3)
    loss = LinearSoftTargetLoss(temperature=1.7, standardize=True, chunk_size=chunk_size)
    value = loss(h_s, w_s, h_t, w_t)
    plain = soft_target(h_s @ w_s.T, h_t @ w_t.T, dim=-1, temperature=1.7, standardize=True)
    torch.testing.assert_close(value, plain)
    for found, wanted in zip(*(torch.autograd.grad(x, (h_s, w_s)) for x in (value, plain)), strict=True):
        torch.testing.assert_close(found, wanted)


# A second backward pass, because the first one overwrites what the forward pass computed.


def test_small_gradients_of_half_logits_are_scaled_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", 4)
    student, teacher = torch.tensor([[0.0, 0.0, -18.0]] * 4), torch.tensor([[0.0, 0.0, -19.0]] * 4)
    found, expected = (
        gradient(lambda s: 2**18 * soft_target(s, teacher, temperature=1.0), student.to(dtype))
        for dtype in (torch.float16, torch.float32)
    )
    assert expected[:, 2].min() > 1e-4
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["soft_target", "decoupled_kd", "dist", "linear_soft_target"])
def test_the_gradient_can_be_computed_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", 40)
    student, teacher, target = noise(12, 7).requires_grad_(), noise(12, 7, seed=1), targets(12, classes=7)
    value = {
        "soft_target": lambda: soft_target(student, teacher),
        "decoupled_kd": lambda: decoupled_kd(student, teacher, target=target),
        "dist": lambda: dist(student, teacher),
        "linear_soft_target": lambda: linear_soft_target(student, teacher, student.detach(), student.detach()),
    }[name]()
    (first,) = torch.autograd.grad(2 * value, student, retain_graph=True)
    (second,) = torch.autograd.grad(2 * value, student)
    assert first.any()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_transforms_of_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", 40)
    student, teacher, target = noise(12, 7), noise(12, 7, seed=1), targets(12, classes=7)
    for loss in (soft_target, dist, lambda s, t: decoupled_kd(s, t, target=target)):
        found = torch.func.grad(lambda s, loss=loss: loss(s, teacher))(student)
        torch.testing.assert_close(found, gradient(loss, student, teacher))


# Decoupled distillation.


@each_chunk
def test_decoupled_of_tokens_and_pixels_equals_that_of_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", chunk)
    student, teacher, target = noise(3, 7, 4, 5), noise(3, 7, 4, 5, seed=1), targets(3, 4, 5, classes=7)
    mask, loss = masks(3, 4, 5), DecoupledKDLoss(beta=2.0, temperature=2.0)
    target = torch.where(mask, target, 255)  # an ignore index
    rows = [x.movedim(1, -1)[mask] for x in (student, teacher)]
    expected = loss(*rows, target=target[mask])
    slope = gradient(loss, *rows, target=target[mask])
    for dim in (1, -1, 2):
        leaf = student.movedim(1, dim).clone().requires_grad_()
        value = DecoupledKDLoss(beta=2.0, temperature=2.0, dim=dim)(
            leaf, teacher.movedim(1, dim), target=target, mask=target != 255
        )
        torch.testing.assert_close(value, expected)
        value.backward()
        found = leaf.grad.movedim(dim, -1)
        torch.testing.assert_close(found[mask], slope)
        assert not found[~mask].any()
    each = loss(student, teacher, target=target, mask=mask, reduction="none")
    counts = mask.flatten(1).sum(1)
    assert each[0].item() == 0
    torch.testing.assert_close((each * counts).sum() / counts.sum(), expected)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        loss(student, teacher, target=target, mask=mask, weight=weight),
        (each * counts * weight).sum() / (counts * weight).sum(),
    )
    nothing = loss(student.requires_grad_(), teacher, target=target, mask=torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()


def test_decoupled_gradient_of_nearly_equal_logits() -> None:
    """Rounding makes several of the largest log-probabilities equal, which share the gradient of a maximum."""
    student, teacher, target = 1e-300 * noise(4, 6), noise(4, 6, seed=1), targets(4, classes=6)
    expected = gradient(decoupled_kd, 0 * student, teacher, target=target)
    torch.testing.assert_close(gradient(decoupled_kd, student, teacher, target=target), expected)


# DIST.


def correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def naive_dist(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = ((x / temperature).softmax(1) for x in (student, teacher))
    return temperature**2 * ((1 - correlation(p, q)).mean() + (1 - correlation(p.T, q.T)).mean())


@each_chunk
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_of_tokens_and_pixels_takes_positions_as_samples(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", chunk)
    student, teacher, mask = noise(3, 7, 4, 5), noise(3, 7, 4, 5, seed=1), masks(3, 4, 5)
    for kept in (mask, None):
        chosen = torch.ones_like(mask) if kept is None else kept
        rows = [x.movedim(1, -1)[chosen] for x in (student, teacher)]
        expected, slope = naive_dist(*rows, temperature), gradient(naive_dist, *rows, temperature=temperature)
        for dim in (1, -1):
            leaf = student.movedim(1, dim).clone().requires_grad_()
            value = DISTLoss(temperature=temperature, dim=dim)(leaf, teacher.movedim(1, dim), mask=kept)
            torch.testing.assert_close(value, expected)
            value.backward()
            found = leaf.grad.movedim(dim, -1)
            torch.testing.assert_close(found[chosen], slope)
            assert not found[~chosen].any()
    # The weight of a sample is that of its positions; all masked is 0 with a graph.
    weight = torch.tensor([0.0, 3.0, 3.0])
    torch.testing.assert_close(dist(student, teacher, weight=weight), dist(student[1:], teacher[1:]))
    nothing = dist(student.requires_grad_(), teacher, mask=torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0
    assert not student.grad.any()


@each_chunk
def test_dist_in_chunks_is_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        for which, sides in edge_cases(dtype).items():
            student, teacher = (x.to(dtype).clone() for x in sides)
            monkeypatch.setattr(_chunked, "CHUNK", 2**15)
            value, slope = dist(student, teacher), gradient(dist, student, teacher)
            monkeypatch.setattr(_chunked, "CHUNK", chunk)
            assert dist(student, teacher).item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), which
            torch.testing.assert_close(
                gradient(dist, student, teacher),
                slope,
                rtol=1e-3,
                atol=1e-6,
                msg=lambda text, which=which: which + text,
            )
    assert dist(student, student).item() == 0
    weight = torch.tensor([1.0, 0.0, 2.0])
    loss = lambda s: dist(s, noise(3, 4, seed=1), weight=weight, temperature=2.0)  # noqa: E731
    leaf = noise(3, 4).requires_grad_()
    monkeypatch.setattr(_chunked, "CHUNK", min(chunk, 5))
    torch.autograd.gradcheck(loss, (leaf,))
    torch.autograd.gradgradcheck(loss, (leaf,))


# Compilation and errors.


def test_compiled_losses_of_tokens() -> None:
    tokens, teacher, mask = noise(2, 5, 7), noise(2, 5, 7, seed=1), masks(2, 5)
    inputs = {"target": targets(2, 5, classes=7)}
    for loss, more in (
        (SoftTargetLoss(dim=-1, standardize=True), {}),
        (DecoupledKDLoss(dim=-1), inputs),
        (DISTLoss(dim=-1), {}),
    ):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(tokens, teacher, mask=mask, **more), loss(tokens, teacher, mask=mask, **more)
        )
        found = gradient(compiled, tokens, teacher, mask=mask, **more)
        torch.testing.assert_close(found, gradient(loss, tokens, teacher, mask=mask, **more))


def test_what_does_not_fit_is_an_error() -> None:
    tokens, target = torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.long)
    ignored = torch.full_like(target, -100)
    cases = [
        (lambda: soft_target(tokens, tokens, standardize=1), "standardize must be a bool, got int"),
        (lambda: soft_target(tokens, tokens[..., :6], dim=-1), "the logits must be of the same classes and positions"),
        (lambda: decoupled_kd(tokens, tokens, target=target), r"target must be \(2, 7\), one class per position, got"),
        (lambda: decoupled_kd(tokens, tokens, target=ignored, dim=-1), "got -100; leave an ignore index out by mask="),
        (
            lambda: decoupled_kd(tokens, tokens, target=ignored, dim=-1, mask=target == 0),
            "target must be from 0 to below c = 7, got -100 where mask is True",
        ),
        (lambda: decoupled_kd(tokens, tokens, target=target, dim=0), "dim must be from 1 to 2"),
        (lambda: dist(tokens, tokens, dim=-1, mask=target), "mask must be a boolean tensor, got torch.int64"),
        (lambda: dist(tokens, tokens, dim=-1, mask=torch.ones(2, 7) > 0), r"mask must be \(2, 5\)"),
        (lambda: dist(tokens, tokens, dim=-1, weight=torch.ones(5)), r"weight must be \(b,\) = \(2,\), got \(5,\)"),
        (lambda: dist(tokens, tokens, dim=-1, reduction="none"), "reduction must be 'mean'"),
        (lambda: DISTLoss(dim=1.5), "DISTLoss: dim must be a whole number"),
        (lambda: LinearSoftTargetLoss(standardize=None), "LinearSoftTargetLoss: standardize must be a bool"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
