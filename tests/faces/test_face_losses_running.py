"""Losses with running thresholds or centers: naive references, properties, and numbers computed by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.heads import arcface_loss, cosface_loss
from kdlib_faces.losses import (
    AdaptiveCentersLoss,
    EvaluationOrientedLoss,
    adapted_centers,
    evaluation_oriented,
    negative_thresholds,
)
from tests.faces import reference_face_losses as reference
from tests.faces.reference_face_losses import CENTERS, IDENTITIES, STUDENT, TEACHER, WEIGHT, B, D, N, random


@pytest.mark.parametrize("hardest", [0, 1, 7, 2000])
@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_formula(hardest: int, weighted: bool) -> None:
    weight, w = (WEIGHT, WEIGHT.numpy()) if weighted else (None, np.ones(B))
    teacher = TEACHER[:, :5]
    s, t, y = STUDENT.numpy(), teacher.numpy(), IDENTITIES.numpy()
    tau = [negative_thresholds(x, target=IDENTITIES, weight=weight) for x in (STUDENT, teacher)]
    for thresholds, x in zip(tau, (s, t), strict=True):
        np.testing.assert_allclose(thresholds.numpy(), reference.thresholds(x, y, range(1, 7), w), rtol=1e-12)
    options = {"temperature": 0.1, "num_hard_negatives": hardest}
    value = evaluation_oriented(STUDENT, teacher, *tau, target=IDENTITIES, weight=weight, gather=True, **options)
    expected = reference.evaluation(s, t, y, tau[0].tolist(), tau[1].tolist(), 0.1, hardest, w)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0
    loss = EvaluationOrientedLoss(**options).double()
    assert loss(STUDENT, teacher, target=IDENTITIES, weight=weight).item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_number() -> None:
    """One positive pair: the student's cosine T ln 3 above its threshold, so r is 3/4; the teacher's T ln 4 below: 1/5.

    0.02 * (0.75 - 0.2)^2 = 0.00605.
    """
    cosines = 0.5 + 0.1 * torch.tensor([math.log(3), -math.log(4)], dtype=torch.float64)
    student, teacher = (torch.stack([torch.tensor([1.0, 0.0]), torch.stack([c, (1 - c * c).sqrt()])]) for c in cosines)
    tau = torch.tensor([0.5], dtype=torch.float64)
    value = evaluation_oriented(student, teacher, tau, tau, target=torch.tensor([3, 3]), temperature=0.1)
    assert value.item() == pytest.approx(0.00605, rel=1e-12)
    value = evaluation_oriented(student, teacher, tau, tau, target=torch.tensor([3, 4]), temperature=0.1)
    assert value.item() == pytest.approx(0.003025, rel=1e-12)


@settings(max_examples=40)
@given(batch=st.integers(2, 26), exponent=st.integers(1, 4))
def test_thresholds_are_exceeded_at_most_at_their_rate(batch: int, exponent: int) -> None:
    """The index is the count divided in integers: 0.1 * 30 and 0.3 / 0.1 would not be exact."""
    embeddings = random(batch, 3, seed=batch)
    pairs = batch * (batch - 1) // 2
    (value,) = negative_thresholds(embeddings, target=torch.arange(batch), rates=(10.0**-exponent,))
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(embeddings).T
    above = int((cosines.triu(1)[torch.triu_indices(batch, batch, 1).unbind()] > value + 1e-12).sum())
    assert above == pairs // 10**exponent


def test_thresholds_without_impostor_pairs() -> None:
    assert negative_thresholds(STUDENT, target=torch.zeros(B, dtype=torch.long)).eq(-torch.inf).all()
    assert negative_thresholds(STUDENT[:1], target=torch.tensor([0])).eq(-torch.inf).all()
    assert negative_thresholds(STUDENT, target=torch.arange(B), rates=[1])[0].isfinite()
    embeddings = random(150, 3)  # 11,175 pairs, of which the rate np.float32(1e-4) < 1e-4 allows one
    thresholds = negative_thresholds(
        embeddings, target=torch.arange(150), rates=np.array([1e-4, 0.1], dtype=np.float32)
    )
    assert torch.equal(thresholds, negative_thresholds(embeddings, target=torch.arange(150), rates=[1e-4, 0.1]))
    with pytest.raises(ValueError, match=r"negative_thresholds: rates\[1\] must be .* <= 1, got 2"):
        negative_thresholds(STUDENT, target=torch.arange(B), rates=[1, 2])


def test_thresholds_are_running_means() -> None:
    loss = EvaluationOrientedLoss(momentum=0.25).double()
    batches = [(random(B, D, seed=2 * i), random(B, D, seed=2 * i + 1)) for i in range(3)]
    expected: dict[str, np.ndarray] = {}
    for number, (student, teacher) in enumerate(batches):
        loss(student, teacher, target=IDENTITIES)
        for name, x in (("student", student), ("teacher", teacher)):
            new = np.array(reference.thresholds(x.numpy(), IDENTITIES.numpy(), range(1, 7), np.ones(B)))
            expected[name] = new if number == 0 else 0.75 * expected[name] + 0.25 * new
            np.testing.assert_allclose(getattr(loss, f"{name}_thresholds").numpy(), expected[name], rtol=1e-12)
        assert int(loss.batches) == number + 1
    before = copy.deepcopy(loss.state_dict())
    value = loss.eval()(*batches[0], target=IDENTITIES)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    other = EvaluationOrientedLoss().double().eval()
    other.load_state_dict(before)
    torch.testing.assert_close(other(*batches[0], target=IDENTITIES), value)


def test_batches_without_finite_impostor_pairs_do_not_change_the_thresholds() -> None:
    loss = EvaluationOrientedLoss()
    student = STUDENT.float().requires_grad_()
    one = torch.zeros(B, dtype=torch.long)
    first = loss(student, TEACHER.float(), target=one)  # without thresholds so far
    first.backward()
    assert first.item() == 0
    assert not student.grad.any()
    assert not int(loss.batches)
    loss(STUDENT.float(), TEACHER.float(), target=IDENTITIES)
    before = copy.deepcopy(loss.state_dict())
    assert loss(STUDENT.float(), TEACHER.float(), target=one).item() > 0
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    broken = STUDENT.float().clone()
    broken[3, 2] = torch.nan  # an overflow whose step a gradient scaler skips
    loss(broken, TEACHER.float(), target=IDENTITIES)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    assert loss(STUDENT.float(), TEACHER.float(), target=IDENTITIES).isfinite()


@pytest.mark.parametrize("start", ["given", "zeros"])
def test_centers_formula(start: str) -> None:
    centers = CENTERS.clone() if start == "given" else torch.zeros_like(CENTERS)
    teacher = TEACHER.clone()
    teacher[4:] = 0.5 * STUDENT[4:] + teacher[4:]  # some near the student, so that alpha is not all at its bound
    expected = reference.centers(STUDENT.numpy(), teacher.numpy(), centers.numpy(), IDENTITIES.numpy())
    moved = adapted_centers(STUDENT, teacher, centers, target=IDENTITIES)
    np.testing.assert_allclose(moved.numpy(), expected[IDENTITIES.numpy()], rtol=1e-9, atol=1e-12)
    low = adapted_centers(STUDENT.half().requires_grad_(), teacher.half(), centers.float(), target=IDENTITIES)
    torch.testing.assert_close(low, moved.float(), rtol=5e-3, atol=5e-3)
    assert not low.requires_grad
    weight = torch.tensor([1.0, 0, 2, 0.5, 0, 0, 1, 1, 0.1, 0, 1, 0])
    keep = weight.nonzero().flatten().tolist()
    expected = reference.centers(STUDENT.numpy(), teacher.numpy(), centers.numpy(), IDENTITIES.numpy(), keep)
    moved = adapted_centers(STUDENT, teacher, centers, target=IDENTITIES, weight=weight)
    np.testing.assert_allclose(moved.numpy(), expected[IDENTITIES.numpy()], rtol=1e-9, atol=1e-12)


def test_centers_numbers() -> None:
    """cos(s, t) = 0.8, cos(w, t) = 0.6: alpha = 0.48, and w = 0.48 * (2, 0) + 0.52 * (0.6, 0.8) = (1.272, 0.416).

    A second sample with t = (0, 1) at a right angle to w and along s has alpha = 1e-6: its step alone gives (2e-6,
    1 - 1e-6); the mean of the two is (0.636001, 0.7079995).
    """
    centers = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    student, teacher = torch.tensor([[0.0, 2.0], [0.0, 1.0]]).double(), torch.tensor([[3.0, 4.0], [0.0, 5.0]]).double()
    one = adapted_centers(student[:1], teacher[:1], centers, target=torch.tensor([0]))
    assert one[0].tolist() == pytest.approx([1.272, 0.416], rel=1e-12)
    both = adapted_centers(student, teacher, centers, target=torch.tensor([0, 0]))
    assert both[0].tolist() == pytest.approx([0.636001, 0.7079995], rel=1e-9)
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize(("head", "margin"), [("arcface", 0.45), ("cosface", 0.35)])
def test_adaptive_loss_is_the_head_on_the_moved_centers(head: str, margin: float) -> None:
    loss = AdaptiveCentersLoss(N, D, head=head, centers=CENTERS).double()
    assert (loss.scale, loss.margin) == (64.0, margin)
    np.testing.assert_allclose(loss.centers.norm(dim=1), 1, rtol=1e-6)
    face = arcface_loss if head == "arcface" else cosface_loss
    for step in range(3):
        student, teacher = random(B, D, seed=step), random(B, D, seed=step + 50)
        expected = reference.centers(student.numpy(), teacher.numpy(), loss.centers.numpy(), IDENTITIES.numpy())
        value = loss(student, teacher, target=IDENTITIES, reduction="none")
        np.testing.assert_allclose(loss.centers.numpy(), expected, rtol=1e-9)
        torch.testing.assert_close(
            value, face(student, torch.tensor(expected), IDENTITIES, scale=64.0, margin=margin, reduction="none")
        )


def test_centers_only_change_in_training_mode() -> None:
    loss = AdaptiveCentersLoss(N + 1, D)
    loss(STUDENT.float(), TEACHER.float(), target=IDENTITIES)
    assert not loss.centers[N].any()  # not seen yet
    before = loss.centers.clone()
    value = loss.eval()(STUDENT.float(), -TEACHER.float(), target=IDENTITIES)
    assert torch.equal(loss.centers, before)
    other = AdaptiveCentersLoss(N + 1, D).eval()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(STUDENT.float(), TEACHER.float(), target=IDENTITIES), value)
    assert set(loss.state_dict()) == {"centers"}


def test_zero_and_infinite_embeddings_do_not_change_the_centers() -> None:
    loss = AdaptiveCentersLoss(N, D, centers=CENTERS)
    before = loss.centers.clone()
    student, teacher = STUDENT.float(), TEACHER.float()
    teacher[IDENTITIES == 0] = 0
    teacher[IDENTITIES == 1] = torch.nan
    student[IDENTITIES == 2] = torch.inf
    loss(student, teacher, target=IDENTITIES)
    assert torch.equal(loss.centers[:3], before[:3])
    assert not torch.equal(loss.centers[3], before[3])
    # Beside a good sample of the same identity a broken one counts as absent.
    one, two = AdaptiveCentersLoss(N, D, centers=CENTERS), AdaptiveCentersLoss(N, D, centers=CENTERS)
    pair = torch.stack([TEACHER[0], TEACHER[0] * torch.nan]).float()
    one(STUDENT[:2].float(), pair, target=torch.tensor([1, 1]))
    two(STUDENT[:1].float(), pair[:1], target=torch.tensor([1]))
    assert torch.equal(one.centers, two.centers)
