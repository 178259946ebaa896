"""Soft targets of tokens and pixels, by several divergences, and from hidden states."""

import pytest
import torch
from torch.nn import functional as F

from kdlib import LinearSoftTargetLoss, SoftTargetLoss
from kdlib.functional import linear_soft_target, soft_target

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(student: torch.Tensor, teacher: torch.Tensor, divergence: str, temperature: float, skew: float = 0.1):
    """The definition on rows `(n, c)`, in float64."""
    s, t = ((x.double() / temperature).softmax(1) for x in (student, teacher))

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p.log() - q.log())).sum(1)

    middle = (s + t) / 2
    values = {
        "forward_kl": lambda: kl(t, s),
        "reverse_kl": lambda: kl(s, t),
        "jensen_shannon": lambda: (kl(t, middle) + kl(s, middle)) / 2,
        "skewed_kl": lambda: kl(t, skew * t + (1 - skew) * s),
    }
    return temperature**2 * values[divergence]()


@pytest.mark.parametrize("temperature", [0.7, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_equal_the_definition(divergence, temperature):
    student, teacher = random(40, 7).requires_grad_(), random(40, 7, seed=1)
    options = {"divergence": divergence, "temperature": temperature}
    expected = naive(student, teacher, divergence, temperature)
    torch.testing.assert_close(soft_target(student, teacher, reduction="none", **options), expected)
    (wanted,) = torch.autograd.grad(expected.mean(), student)
    wide = student.detach().repeat(1, 1).requires_grad_()
    soft_target(wide, teacher, **options).backward()
    torch.testing.assert_close(wide.grad, wanted)
    assert torch.autograd.gradcheck(lambda s: soft_target(s, teacher[:4], **options), student[:4])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits_are_processed_in_chunks_with_equal_results(divergence):
    """300 x 700 values are more than one chunk; rows, tokens and pixels take different paths."""
    student, teacher = random(300, 700), random(300, 700, seed=1)
    layouts = {
        "rows": (student, 1),
        "tokens": (student.reshape(20, 15, 700), -1),
        "pixels": (student.reshape(20, 15, 700).transpose(1, 2).reshape(20, 700, 3, 5), 1),
        "one image": (student.T.reshape(1, 700, 300), 1),
    }
    expected = naive(student, teacher, divergence, 2.0).mean()
    small = student.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(naive(small, teacher, divergence, 2.0).mean(), small)
    for name, (logits, dim) in layouts.items():
        against = {
            "rows": teacher,
            "tokens": teacher.reshape(20, 15, 700),
            "pixels": teacher.reshape(20, 15, 700).transpose(1, 2).reshape(20, 700, 3, 5),
            "one image": teacher.T.reshape(1, 700, 300),
        }[name]
        logits = logits.clone().requires_grad_()
        value = soft_target(logits, against, divergence=divergence, temperature=2.0, dim=dim)
        torch.testing.assert_close(value, expected, msg=name)
        value.backward()
        rows = logits.grad.movedim(dim, -1).reshape(300, 700)
        torch.testing.assert_close(rows, wanted, msg=name)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_finite_and_never_negative(divergence, size):
    student, teacher = (size * random(30, 9, seed=seed, dtype=torch.float32) for seed in (0, 1))
    student.requires_grad_()
    value = soft_target(student, teacher, divergence=divergence, temperature=1.0, reduction="none")
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()
    assert (value >= 0).all()
    if divergence == "jensen_shannon":
        assert (value <= 0.6932).all()
    if size == 1e-6:
        expected = naive(student.detach().double(), teacher.double(), divergence, 1.0)
        exact = naive((1e3 * student).detach().double(), 1e3 * teacher.double(), divergence, 1.0) / 1e6
        torch.testing.assert_close(value.double(), exact, rtol=5e-3, atol=0)
        assert expected.shape == value.shape


def test_masked_positions_do_not_count():
    student, teacher = random(3, 5, 11).requires_grad_(), random(3, 5, 11, seed=1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    loss = SoftTargetLoss(temperature=2.0, dim=-1)
    rows = naive(student[mask], teacher[mask], "forward_kl", 2.0)
    value = loss(student, teacher, mask=mask)
    torch.testing.assert_close(value, rows.mean())
    value.backward()
    assert not student.grad[~mask].any()
    assert student.grad[mask].any(1).all()
    each = loss(student, teacher, mask=mask, reduction="none")
    torch.testing.assert_close(each, torch.stack([rows[:2].mean(), rows[2:].mean(), rows.new_zeros(())]))
    weight = torch.tensor([2.0, 0.0, 1.0])
    torch.testing.assert_close(loss(student, teacher, mask=mask, weight=weight), rows[:2].mean())
    assert loss(student, teacher, mask=torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_linear_soft_target_equals_soft_target_of_the_logits(divergence, chunk_size):
    h_s, w_s = random(2, 5, 6).requires_grad_(), random(13, 6, seed=1).requires_grad_()
    h_t, w_t = random(2, 5, 8, seed=2), random(13, 8, seed=3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
    options = {"temperature": 1.7, "divergence": divergence, "skew": 0.3}
    plain = soft_target(h_s @ w_s.T, h_t @ w_t.T, dim=-1, mask=mask, **options)
    wanted = torch.autograd.grad(3 * plain, (h_s, w_s))
    value = linear_soft_target(h_s, w_s, h_t, w_t, mask=mask, chunk_size=chunk_size, **options)
    module = LinearSoftTargetLoss(chunk_size=chunk_size, **options)
    torch.testing.assert_close(module(h_s, w_s, h_t, w_t, mask=mask), value, rtol=0, atol=0)
    found = torch.autograd.grad(3 * value, (h_s, w_s))
    torch.testing.assert_close(value, plain)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("learned", [0, 1])
def test_linear_soft_target_with_one_learned_side(learned):
    """The gradient by the hidden states alone, or by the output matrix alone."""
    tensors = [random(6, 4), random(9, 4, seed=1), random(6, 4, seed=2), random(9, 4, seed=3)]
    leaf = tensors[learned].requires_grad_()
    h_s, w_s, h_t, w_t = tensors
    (expected,) = torch.autograd.grad(soft_target(h_s @ w_s.T, h_t @ w_t.T, temperature=1.0), leaf)
    (found,) = torch.autograd.grad(linear_soft_target(*tensors), leaf)
    torch.testing.assert_close(found, expected)


def test_standardized_logits_without_spread_have_no_gradient():
    student, teacher = torch.full((2, 5), 3.0, requires_grad=True), random(2, 5).float()
    (gradient,) = torch.autograd.grad(soft_target(student, teacher, standardize=True), student)
    assert torch.equal(gradient, torch.zeros(2, 5))


def test_linear_soft_target_of_a_single_position():
    h_s, w_s, h_t, w_t = random(6, 4), random(9, 4, seed=1), random(6, 4, seed=2), random(9, 4, seed=3)
    alone = torch.arange(6) == 2
    expected = soft_target((h_s @ w_s.T)[2:3], (h_t @ w_t.T)[2:3], temperature=1.0)
    assert expected > 0.01
    torch.testing.assert_close(linear_soft_target(h_s, w_s, h_t, w_t, mask=alone), expected)


def test_linear_soft_target_in_half_precision_and_with_frozen_weights():
    tensors = random(6, 8), random(20, 8, seed=1), random(6, 8, seed=2), random(20, 8, seed=3)
    exact = linear_soft_target(*tensors)
    for dtype in (torch.bfloat16, torch.float16):
        h_s, *others = (x.to(dtype) for x in tensors)
        h_s.requires_grad_()
        value = linear_soft_target(h_s, *others)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=0.05)
        value.backward()
        assert h_s.grad.dtype == dtype
    h_s = tensors[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_soft_target(h_s, *tensors[1:]), h_s, create_graph=True)


def test_linear_soft_target_never_holds_all_logits():
    """2,000 positions of 3,000 words are 24 MB of logits on each side; every tensor is a chunk of 20 at most."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    h_s, w_s = torch.randn(2000, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    with Watch():
        LinearSoftTargetLoss(chunk_size=20)(h_s, w_s, torch.randn(2000, 4), torch.randn(3000, 4)).backward()
    assert largest <= 20 * 3000


def test_what_does_not_fit_is_an_error():
    tokens = torch.zeros(2, 5, 7)
    h_s, w_s, h_t, w_t = torch.zeros(2, 5, 4), torch.zeros(9, 4), torch.zeros(2, 5, 3), torch.zeros(9, 3)
    cases = [
        (lambda: soft_target(tokens, tokens, dim=0), r"dim must be from 1 to 2, or from -2 to -1, got 0"),
        (lambda: soft_target(tokens, tokens, dim=3), r"dim must be from 1 to 2, or from -2 to -1, got 3"),
        (lambda: soft_target(tokens, tokens[:, :4], dim=-1), "teacher must have the shape of student"),
        (lambda: soft_target(tokens, tokens, dim=-1, mask=torch.ones(2, 5)), "mask must be a boolean tensor"),
        (lambda: soft_target(tokens, tokens, dim=-1, mask=torch.ones(2, 7) > 0), r"mask must be \(2, 5\)"),
        (lambda: soft_target(tokens, tokens, divergence="kl"), "divergence must be one of 'forward_kl'"),
        (lambda: soft_target(tokens, tokens, divergence="skewed_kl", skew=1.0), "skew must be a finite number"),
        (lambda: linear_soft_target(h_s, w_s, h_t, w_t[:8]), "both vocabularies must have the same size, got v = 9"),
        (lambda: linear_soft_target(h_s, w_t, h_t, w_t), r"student_weight must be \(v, d\) with d = 4"),
        (
            lambda: linear_soft_target(h_s, w_s, h_t[:1], w_t),
            "teacher_hidden must have the positions of student_hidden",
        ),
        (lambda: linear_soft_target(h_s, w_s, h_t, w_t, chunk_size=0), "chunk_size must be a whole number"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_pixels_agree_with_the_loop_over_positions():
    student, teacher = random(2, 6, 4, 3), random(2, 6, 4, 3, seed=1)
    rows = [F.kl_div(s.log_softmax(0), t.softmax(0), reduction="sum") for i in range(2) for s, t in zip(
        student[i].flatten(1).T, teacher[i].flatten(1).T, strict=True)]  # fmt: skip
    torch.testing.assert_close(soft_target(student, teacher, temperature=1.0), torch.stack(rows).mean())
