"""Losses with learned parts: variational information and contrastive representation."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib import (
    AttentionTransferLoss,
    AttentiveSimilarityLoss,
    ContrastiveRepresentationLoss,
    FactorTransferLoss,
    MaskedGenerativeLoss,
    VariationalInformationLoss,
)
from kdlib.functional import contrastive_representation, variational_information
from tests.core import reference_features as reference
from tests.core.loss_inputs import DTYPES, LEARNED, noise, seeded


def pair(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return noise(*shape, seed=2 * seed, dtype=dtype).requires_grad_(), noise(*shape, seed=2 * seed + 1, dtype=dtype)


def vid(**options: Any) -> VariationalInformationLoss:
    return seeded(lambda: VariationalInformationLoss(3, 3, **options))


def crd(**options: Any) -> ContrastiveRepresentationLoss:
    return seeded(lambda: ContrastiveRepresentationLoss(6, 6, feature_dim=4, **options))


@pytest.mark.parametrize(
    "build",
    [
        lambda: MaskedGenerativeLoss(3, 3), lambda: VariationalInformationLoss(3, 3), AttentionTransferLoss,
        AttentiveSimilarityLoss,
    ],
    ids=["masked generative", "variational information", "attention", "attentive similarity"],
)  # fmt: skip
def test_pooling_of_large_values_stays_finite(build: Callable[[], nn.Module]) -> None:
    """A cell of four values of 3e38 would sum to infinity."""
    student, teacher = pair((2, 3, 4, 4), dtype=torch.float32)[0].sign() * 3e38, noise(2, 3, 2, 2, seed=1).sign() * 3e38
    student = student.detach().requires_grad_()
    value = seeded(build)(student, teacher.float())
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LEARNED)
def test_parameters_of_any_dtype(name: str) -> None:
    for dtype in DTYPES:
        loss = LEARNED[name].build().to(dtype)
        value = loss(*LEARNED[name].sides(dtype=dtype))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        value.backward()
        assert all(p.grad is not None and p.grad.any() for p in loss.parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_variational_information_equals_the_naive_reference(shape: tuple[int, ...]) -> None:
    mean, teacher = pair(shape)
    per_channel = torch.tensor([0.1, 1.0, 5.0, 1000.0], dtype=torch.float64)
    for variance in (1.0, 2.5, torch.tensor(0.3, dtype=torch.float64), per_channel):
        got = variational_information(mean, teacher, variance=variance, reduction="none")
        known = variance.numpy() if isinstance(variance, Tensor) else variance
        expected = reference.variational_information(mean.detach().numpy(), teacher.numpy(), variance=known)
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-12)
    per_channel.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, v: variational_information(m, teacher, variance=v), (mean, per_channel), atol=1e-6
    )


def test_variational_information_is_gaussian_nll_loss() -> None:
    """`torch.nn.functional.gaussian_nll_loss` is half of square over variance plus logarithm, mean over all values."""
    mean, teacher = pair((5, 4))
    variance = torch.tensor([0.1, 1.0, 5.0, 1000.0], dtype=torch.float64)
    expected = nn.functional.gaussian_nll_loss(mean, teacher, variance.expand(5, 4))
    torch.testing.assert_close(variational_information(mean, teacher, variance=variance), expected)


def test_variational_information_by_hand() -> None:
    """Difference 2, variance 4: (4 / 4 + log 4) / 2; the best variance for a difference of 2 is its square."""
    mean, teacher = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    variance = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    value = variational_information(mean, teacher, variance=variance)
    assert value.item() == pytest.approx(1.1931471805599454, rel=1e-15)
    value.backward()
    assert variance.grad.item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("shape", "teacher_shape"), [((4, 3), (4, 5)), ((4, 3, 4, 6), (4, 5, 4, 6))])
def test_variational_information_of_the_mean_network(shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    loss = seeded(lambda: VariationalInformationLoss(3, 5, hidden=7, initial_variance=2.0)).double()
    student, teacher = pair(shape)[0], pair(teacher_shape, 1)[1]
    maps = [layer.weight.detach().numpy() for layer in (loss.first, loss.second, loss.third)]
    mean = reference.mean_network(student.detach().numpy(), *maps)
    np.testing.assert_allclose(loss.mean(student).detach().numpy(), mean, rtol=1e-12)
    expected = reference.variational_information(mean, teacher.numpy(), variance=2.0)
    got = loss(student, teacher, reduction="none").detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # the variance was made in float32


def test_variational_information_pools_the_larger_grid() -> None:
    loss = seeded(lambda: VariationalInformationLoss(3, 5))
    student, teacher = pair((2, 3, 4, 4), 1, torch.float32)[0], pair((2, 5, 8, 8), 2, torch.float32)[1]
    pooled = nn.functional.avg_pool2d(teacher, 2)
    torch.testing.assert_close(loss(student, teacher), loss(student, pooled))
    pooled = nn.functional.avg_pool2d(student, 2)
    torch.testing.assert_close(loss(student, teacher[:, :, :2, :2]), loss(pooled, teacher[:, :, :2, :2]))


@pytest.mark.parametrize("variance", [1.1e-5, 0.01, 1.0, 5.0, 30.0, 1000.0, 1e6])
def test_variational_information_starts_from_its_variance(variance: float) -> None:
    """`log(exp(v) - 1)` is infinite from 710 on in float64, from 89 on in float32."""
    loss = vid(initial_variance=variance)
    torch.testing.assert_close(loss.variance(), torch.full((3,), variance), rtol=1e-5, atol=1e-8)
    student, teacher = pair((5, 3, 4, 4), 1, torch.float32)
    value = loss(student, teacher)
    value.backward()
    assert math.isfinite(value.item())
    assert torch.isfinite(loss.raw_variance.grad).all()
    assert loss.raw_variance.grad.any()


def test_variational_information_learns_predictable_channels() -> None:
    """The teacher is a linear map of the student except for one channel of noise: only that variance stays high."""
    generator = torch.Generator().manual_seed(0)
    loss = seeded(lambda: VariationalInformationLoss(4, 3, hidden=16, initial_variance=1.0))
    student = torch.randn(256, 4, generator=generator)
    teacher = student[:, :3].clone()
    teacher[:, 2] = torch.randn(256, generator=generator)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.3
    learned = loss.variance().tolist()
    assert max(learned[:2]) < 0.6 * learned[2]


# Contrastive representation.


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_contrastive_equals_the_naive_reference(temperature: float) -> None:
    student, teacher = pair((5, 6))
    negatives, target = pair((7, 6), 1)[1], torch.tensor([3, 1, 3, -4, 1])
    negatives_target = torch.tensor([3, 9, 1, -4, -4, 8, 3])
    for options in (
        {},
        {"negatives": negatives},
        {"target": target},
        {"negatives": negatives, "target": target},
        {"negatives": negatives, "target": target, "negatives_target": negatives_target},
    ):
        got = contrastive_representation(student, teacher, temperature=temperature, **options, reduction="none")
        known = {name: x.numpy() for name, x in options.items()}
        expected = reference.contrastive_representation(
            student.detach().numpy(), teacher.numpy(), temperature=temperature, **known
        )
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10, atol=1e-13)
        assert torch.autograd.gradcheck(
            lambda s, options=options: contrastive_representation(s, teacher, temperature=temperature, **options),
            (student,),
        )


def test_contrastive_weights_mask_negatives_too() -> None:
    student, teacher = pair((5, 6))
    weight = torch.tensor([1.0, 0.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    each = contrastive_representation(student, teacher, weight=weight, reduction="none")
    present = (weight != 0).numpy()
    expected = reference.contrastive_representation(student.detach().numpy(), teacher.numpy(), present=present)
    np.testing.assert_allclose(each.detach().numpy(), weight.numpy() * expected, rtol=1e-10)
    mean = contrastive_representation(student, teacher, weight=weight)
    assert mean.item() == pytest.approx(each.sum().item() / 4.25, rel=1e-12)
    kept = weight != 0
    torch.testing.assert_close(
        mean, contrastive_representation(student[kept], teacher[kept], weight=weight[kept]), rtol=1e-12, atol=0
    )


def test_contrastive_of_basis_vectors() -> None:
    """b orthonormal pairs at temperature 1: log(1 + (b - 1) / e) in either direction."""
    for b in (1, 2, 5):
        value = contrastive_representation(torch.eye(b), 3 * torch.eye(b), temperature=1.0)
        assert value.item() == pytest.approx(math.log1p((b - 1) / math.e), rel=1e-6)
    # Two further negatives at right angles to all: they count in one of the two directions.
    rows = torch.eye(5)
    value = contrastive_representation(rows[:3], rows[:3], temperature=1.0, negatives=rows[3:])
    assert value.item() == pytest.approx((math.log1p(4 / math.e) + math.log1p(2 / math.e)) / 2, rel=1e-6)


def test_contrastive_is_cross_entropy_both_ways() -> None:
    student, teacher = pair((5, 6), 3)
    logits = nn.functional.normalize(student) @ nn.functional.normalize(teacher).T / 0.07
    own = torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive_representation(student, teacher), expected)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), a=st.floats(1e-6, 1e6), m=st.integers(0, 4))
def test_contrastive_ignores_length_and_grows_with_negatives(seed: int, a: float, m: int) -> None:
    student, teacher = pair((5, 6), seed)
    negatives = pair((m, 6), seed)[1]
    alone = contrastive_representation(student, teacher, reduction="none")
    value = contrastive_representation(student, teacher, negatives=negatives, reduction="none")
    scaled = contrastive_representation(a * student, teacher / a, negatives=a * negatives, reduction="none")
    torch.testing.assert_close(scaled, value)
    assert (value >= alone - 1e-12).all()
    assert (alone >= 0).all()


def in_order(loss: ContrastiveRepresentationLoss) -> Tensor:
    """Return the entries of the queue, oldest first."""
    seen, size = int(loss.queue_seen), loss.queue_size
    filled = min(seen, size)
    return loss.queue[[(seen - filled + i) % size for i in range(filled)]]


@settings(max_examples=60)
@given(
    size=st.integers(1, 7),
    batches=st.lists(st.lists(st.booleans(), max_size=10), max_size=5),
    weigh=st.booleans(),
)
def test_queue_is_first_in_first_out(size: int, batches: list[list[bool]], weigh: bool) -> None:
    """The queue holds the last `size` unmasked samples in order, for batches of any size."""
    loss = ContrastiveRepresentationLoss(2, 1, feature_dim=2, queue_size=size)
    written, counter = [], 1
    for keep in batches:
        teacher = torch.arange(counter, counter + len(keep), dtype=torch.float32)[:, None]
        counter += len(keep)
        mask = torch.tensor(keep, dtype=torch.bool)
        value = loss(torch.ones(len(keep), 2), teacher, weight=mask.float() if weigh else None)
        assert math.isfinite(value.item())
        written.append((teacher, mask if weigh else torch.ones_like(mask)))
    rows = torch.cat([torch.zeros(0, 1), *(teacher[keep] for teacher, keep in written)])
    expected = rows[max(0, len(rows) - size) :]
    assert torch.equal(in_order(loss), expected)
    assert int(loss.queue_seen) == sum(int(mask.sum()) for _, mask in written)


def test_queue_counts_as_negatives_when_partly_filled_and_when_full() -> None:
    loss = crd(queue_size=7).double()
    earlier: list[tuple[Tensor, Tensor]] = []
    for step in range(4):
        student, teacher = pair((3, 6), step)
        kept = torch.tensor([True, True, step != 1])
        past = [teacher_[mask] for teacher_, mask in earlier]
        outside = torch.cat(past)[-7:] if past else torch.zeros(0, 6, dtype=torch.float64)
        expected = contrastive_representation(
            loss.student_map(student), loss.teacher_map(teacher), negatives=loss.teacher_map(outside), weight=kept
        )
        torch.testing.assert_close(loss(student, teacher, weight=kept), expected)
        earlier.append((teacher, kept))
    assert int(loss.queue_seen) == 11


def test_queue_leaves_out_samples_of_the_same_identity() -> None:
    loss = crd(queue_size=8).double()
    first, second = pair((4, 6), 1), pair((4, 6), 2)
    target = torch.tensor([5, 6, 7, 0])
    loss(*first, target=target)
    unknown = pair((2, 6), 3)
    loss(*unknown)  # no identities: negatives of everyone, of identity 0 too
    now = torch.tensor([7, 0, 8, 5])
    expected = contrastive_representation(
        loss.student_map(second[0]),
        loss.teacher_map(second[1]),
        negatives=loss.teacher_map(torch.cat([first[1], unknown[1]])),
        target=now,
        negatives_target=torch.tensor([5, 6, 7, 0, -1, -1]),
    )
    torch.testing.assert_close(loss.eval()(*second, target=now), expected)
    assert int(loss.queue_seen) == 6


def test_queue_is_updated_in_training_only_and_is_in_the_state_dict() -> None:
    loss = crd(queue_size=4)
    student, teacher = pair((3, 6), 1, torch.float32)
    loss(student, teacher)
    loss.eval()
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    values = [loss(student, teacher).item() for _ in range(2)]
    assert values[0] == values[1]
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    again = ContrastiveRepresentationLoss(6, 6, feature_dim=4, queue_size=4).eval()
    again.load_state_dict(before)
    assert again(student, teacher).item() == values[0]
    assert {name for name in before if name.startswith("queue")} == {
        "queue",
        "queue_target",
        "queue_known",
        "queue_seen",
    }


def test_gradient_of_the_queue_reaches_the_map() -> None:
    """With two forward calls before one backward, the gradient is that of the queue as it was read."""
    loss = crd(queue_size=5).double()
    first, second = pair((3, 6), 1), pair((3, 6), 2)
    (loss(*first) + loss(*second)).backward()
    got = loss.teacher_map.weight.grad.clone()
    again = crd().double()
    s, t = again.student_map, again.teacher_map
    value = contrastive_of(s(first[0]), t(first[1]), None) + contrastive_of(s(second[0]), t(second[1]), t(first[1]))
    value.backward()
    torch.testing.assert_close(got, again.teacher_map.weight.grad)


def contrastive_of(student: Tensor, teacher: Tensor, negatives: Tensor | None) -> Tensor:
    """Return the loss by cross entropy, with a gradient for the teacher."""
    s, t = nn.functional.normalize(student), nn.functional.normalize(teacher)
    wide = t if negatives is None else torch.cat([t, nn.functional.normalize(negatives)])
    own = torch.arange(len(s))
    forth, back = nn.functional.cross_entropy(s @ wide.T / 0.07, own), nn.functional.cross_entropy(t @ s.T / 0.07, own)
    return (forth + back) / 2


def test_contrastive_with_a_queue_compiles_whole() -> None:
    torch._dynamo.reset()
    loss, other = crd(queue_size=4), crd(queue_size=4)
    compiled = torch.compile(lambda s, t, y: loss(s, t, target=y), fullgraph=True, backend="aot_eager")
    for step in range(3):
        student, teacher = pair((3, 6), step, torch.float32)
        target = torch.tensor([step, 7, 8])
        torch.testing.assert_close(compiled(student, teacher, target), other(student, teacher, target=target))
    assert torch.equal(loss.queue, other.queue)
    assert int(loss.queue_seen) == 9


def test_the_paraphraser_is_trained_by_fit_alone() -> None:
    loss = seeded(lambda: FactorTransferLoss(3, 4))
    assert not any(parameter.requires_grad for parameter in loss.paraphraser.parameters())
    assert all(parameter.requires_grad for parameter in loss.translator.parameters())
    batches = [noise(4, 4, 5, 5, seed=k).float() for k in range(3)]
    with pytest.raises(RuntimeError, match="the paraphraser is not trained"):
        loss(noise(4, 3, 5, 5).float(), batches[0])
    with pytest.raises(TypeError, match=r"Paraphraser: features must be a floating-point tensor, got torch\.int64"):
        loss.paraphraser(batches[0].long())
    for name, wrong, message in (("epochs", 0, "a whole number and >= 1"), ("lr", 0, "a finite number and > 0")):
        with pytest.raises(ValueError, match=f"Paraphraser: {name} must be {message}, got 0"):
            loss.paraphraser.fit(batches, lambda x: x, **{name: wrong})
    with pytest.raises(TypeError, match=r"Paraphraser: epochs must be a whole number and >= 1, got 1\.5"):
        loss.paraphraser.fit(batches, lambda x: x, epochs=1.5)
    with torch.no_grad():
        start = torch.stack([loss.paraphraser.reconstruction_loss(x) for x in batches]).mean()
    slow = loss.paraphraser.fit(batches, lambda x: x, epochs=1, lr=1e-9)
    assert slow == pytest.approx([start.item()], rel=1e-4)
    means = loss.paraphraser.fit(batches, lambda x: x, epochs=8, lr=0.01)
    assert len(means) == 8
    assert means[-1] < 0.98 * start
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in loss.paraphraser.parameters())


@pytest.mark.parametrize("grid", [(2, 4), (4, 2), (2, 2)])
def test_a_masked_student_has_the_smaller_grid(grid: tuple[int, int]) -> None:
    """Maps of another grid are averaged to the smaller height and width first."""
    loss = seeded(lambda: MaskedGenerativeLoss(3, 3, mask_ratio=0.0)).eval()
    student, teacher = noise(5, 3, 4, 4).float(), noise(5, 3, *grid, seed=1).float()
    pooled = nn.functional.adaptive_avg_pool2d(student, grid)
    torch.testing.assert_close(loss(student, teacher), loss(pooled, teacher))
    torch.testing.assert_close(loss(teacher, student), loss(teacher, pooled))
