"""Margin and triplet distillation: naive references, properties, and numbers computed by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib_faces.heads import arcface_loss
from kdlib_faces.losses import MarginDistillLoss, centers_from, margin_distill, triplet_distill
from tests.faces import reference_face_losses as reference
from tests.faces.reference_face_losses import CENTERS, IDENTITIES, STUDENT, TEACHER, WEIGHT, B, D, N, random


@pytest.mark.parametrize(("scale", "min_margin", "max_margin"), [(64.0, 0.2, 0.5), (8.0, 0.0, 1.4), (4.0, 0.3, 0.3)])
def test_margin_formula(scale: float, min_margin: float, max_margin: float) -> None:
    options = {"scale": scale, "min_margin": min_margin, "max_margin": max_margin}
    losses = margin_distill(STUDENT, TEACHER, CENTERS, target=IDENTITIES, reduction="none", **options)
    arrays = [x.numpy() for x in (STUDENT, TEACHER, CENTERS, IDENTITIES)]
    np.testing.assert_allclose(losses.numpy(), reference.margin(*arrays, scale, min_margin, max_margin), rtol=1e-9)
    # Masked samples do not count in the largest cosine.
    own = torch.nn.functional.cosine_similarity(TEACHER, CENTERS[IDENTITIES])
    weight = torch.where(own == own.max(), 0.0, 1.0)
    keep = weight.nonzero().flatten().tolist()
    losses = margin_distill(STUDENT, TEACHER, CENTERS, target=IDENTITIES, weight=weight, **options)
    expected = reference.margin(*arrays, scale, min_margin, max_margin, keep)
    assert losses.item() == pytest.approx(expected.mean(), rel=1e-9)


def test_margin_numbers() -> None:
    """Student on its center, the others at a right angle: log(1 + e^(-s cos m)); m = .5 at most, .2 + .3 * .6 = .38."""
    teacher = torch.tensor([[2.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    losses = margin_distill(eye, teacher, eye, target=torch.arange(2), scale=5.0, reduction="none")
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-5 * math.cos(m))) for m in (0.5, 0.38)], rel=1e-12)
    assert losses.tolist() == pytest.approx([0.01235006, 0.00957963], abs=1e-8)


def test_margins_stay_within_their_bounds_for_a_wrong_teacher() -> None:
    centers = torch.eye(3, dtype=torch.float64)
    student = centers + 0.1
    plain = arcface_loss(student, centers, torch.arange(3), scale=8.0, margin=0.2, reduction="none")
    away = margin_distill(student, -centers, centers, target=torch.arange(3), scale=8.0, reduction="none")
    torch.testing.assert_close(away, plain)
    teacher = torch.stack([centers[0], -centers[1], 1e-9 * centers[2]])
    mixed = margin_distill(student, teacher, centers, target=torch.arange(3), scale=8.0, reduction="none")
    torch.testing.assert_close(mixed[1], plain[1])
    wide = arcface_loss(student, centers, torch.arange(3), scale=8.0, margin=0.5, reduction="none")
    torch.testing.assert_close(mixed[[0, 2]], wide[[0, 2]])


@settings(max_examples=40)
@given(margin=st.floats(0, math.pi), scale=st.floats(1, 64))
def test_equal_margins_are_arcface_on_frozen_centers(margin: float, scale: float) -> None:
    centers = CENTERS.clone().requires_grad_()
    options = {"scale": scale, "min_margin": margin, "max_margin": margin}
    losses = margin_distill(STUDENT.clone().requires_grad_(), TEACHER, centers, target=IDENTITIES, **options)
    losses.backward()
    expected = arcface_loss(STUDENT, CENTERS, IDENTITIES, scale=scale, margin=margin)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-9, atol=1e-12)
    assert centers.grad is None


def test_margin_needs_centers() -> None:
    loss = MarginDistillLoss(N, D)
    with pytest.raises(ValueError, match=r"centers must be there before the first loss.*centers_from"):
        loss(STUDENT, TEACHER, target=IDENTITIES)
    loss.centers_from(TEACHER, IDENTITIES)
    value = loss(STUDENT, TEACHER, target=IDENTITIES)
    other = MarginDistillLoss(N, D)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(STUDENT, TEACHER, target=IDENTITIES), value)
    unset = MarginDistillLoss(N, D)
    other.load_state_dict(unset.state_dict())
    with pytest.raises(ValueError, match="centers must be there"):
        other(STUDENT, TEACHER, target=IDENTITIES)
    assert torch.equal(copy.deepcopy(loss)(STUDENT, TEACHER, target=IDENTITIES), value)


def test_centers_from_embeddings() -> None:
    losses = centers_from(TEACHER, IDENTITIES)
    for identity in range(N):
        rows = [reference.unit(row) for row, own in zip(TEACHER.numpy(), IDENTITIES, strict=True) if own == identity]
        np.testing.assert_allclose(losses[identity].numpy(), reference.unit(sum(rows)), rtol=1e-12)
    assert centers_from(TEACHER.half(), IDENTITIES).dtype == torch.float32
    many = random(2**15 + 3, 2)
    own = torch.arange(len(many)) % 2
    losses = centers_from(many, own)
    expected = torch.nn.functional.normalize(many)[own == 1].mean(0)
    torch.testing.assert_close(losses[1], expected / expected.norm())
    with pytest.raises(ValueError, match=r"every identity from 0 to 5 must have .*none of 2 of them, first of 4"):
        centers_from(TEACHER, IDENTITIES, num_identities=6)
    with pytest.raises(ValueError, match="none of 1 of them, first of 0"):
        centers_from(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="identities must be from 0 to 1, got 3"):
        centers_from(TEACHER, IDENTITIES, num_identities=2)
    with pytest.raises(ValueError, match=r"embeddings must be \(n, d\), got \(6,\)"):
        centers_from(TEACHER[0], IDENTITIES)


@pytest.mark.parametrize("mining", ["hardest", "semihard"])
@pytest.mark.parametrize("distance", reference.DISTANCES)
@pytest.mark.parametrize("weighted", [False, True])
def test_triplet_formula(distance: str, mining: str, weighted: bool) -> None:
    weight, w = (WEIGHT, WEIGHT.numpy()) if weighted else (None, np.ones(B))
    teacher = TEACHER[:, :4]
    s, t, y = STUDENT.numpy(), teacher.numpy(), IDENTITIES.numpy()
    triplets = reference.triplets(s, y, reference.DISTANCES[distance], mining, w)
    assert len(triplets) == (20 if weighted else 26)
    expected = reference.triplet_loss(s, t, triplets, reference.DISTANCES[distance], 0.2, 0.5, w)
    mined = triplet_distill(STUDENT, teacher, target=IDENTITIES, distance=distance, mining=mining, weight=weight)
    assert mined.item() == pytest.approx(expected, rel=1e-9)
    given = triplet_distill(STUDENT, teacher, target=torch.tensor(triplets), distance=distance, weight=weight)
    assert given.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", ["squared", "angle"])
def test_triplet_of_given_triplets(distance: str) -> None:
    triplets = torch.randint(0, B, (30, 3), generator=torch.Generator().manual_seed(0))
    expected = reference.triplet_loss(
        STUDENT.numpy(), TEACHER.numpy(), triplets.tolist(), reference.DISTANCES[distance], 0.1, 0.9, np.ones(B)
    )
    loss = triplet_distill(STUDENT, TEACHER, target=triplets, distance=distance, min_margin=0.1, max_margin=0.9)
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: triplet_distill(x, TEACHER, target=triplets, distance=distance), student)
    empty = triplet_distill(student, TEACHER, target=triplets[:0])
    empty.backward()
    assert empty.item() == 0
    assert not student.grad.any()


def test_triplet_numbers() -> None:
    """Rows at 0, 30 and 90 degrees; the teacher puts the negative at 120 and the positive at 0 from the anchor.

    Angles: anchor 0: pi/6 - pi/2 + m, anchor 1: pi/6 - pi/3 + m. The teacher's gaps are both 2 pi / 3, so m is 0.5 for
    both; only the first falls under 0: (0 + 0.5 - pi / 6) / 2 is under 0 too. With margins of 2: (2 - pi/3 + 2 - pi/6) / 2.
    """
    degrees = torch.tensor([[0.0, 30.0, 90.0], [0.0, 0.0, 120.0]], dtype=torch.float64).deg2rad()
    student, teacher = torch.stack([degrees.cos(), degrees.sin()], 2)
    target = torch.tensor([5, 5, -1])
    assert triplet_distill(student, teacher, target=target, distance="angle").item() == 0
    loss = triplet_distill(student, teacher, target=target, distance="angle", max_margin=2.0)
    assert loss.item() == pytest.approx((4 - math.pi / 2) / 2, rel=1e-12)
    # Squared distances are 2 - 2 cos: 2 - sqrt 3 to the positive, 2 and 1 to the negative.
    loss = triplet_distill(student, teacher, target=target, max_margin=2.0)
    assert loss.item() == pytest.approx((2 - math.sqrt(3) + 2 - math.sqrt(3) - 3 + 4) / 2, rel=1e-12)
    assert loss.item() == pytest.approx(0.767949, abs=1e-6)


def test_semihard_selects_the_nearest_beyond_the_positive() -> None:
    degrees = torch.tensor([0.0, 40.0, 20.0, 50.0, 80.0], dtype=torch.float64).deg2rad()
    student = torch.stack([degrees.cos(), degrees.sin()], 1)
    target, weight = torch.tensor([0, 0, 1, 2, 3]), torch.ones(5)
    options = {"min_margin": 1.0, "max_margin": 1.0, "distance": "angle"}
    rad = math.radians
    hard = triplet_distill(student, student, target=target, weight=weight, **options)
    assert hard.item() == pytest.approx(1 + ((rad(40) - rad(20)) + (rad(40) - rad(10))) / 2, rel=1e-9)
    semi = triplet_distill(student, student, target=target, mining="semihard", **options)
    # Anchor at 0: the one at 50. Anchor at 40: only ties at 40 away or nearer; the farthest is at 80.
    assert semi.item() == pytest.approx(1 + ((rad(40) - rad(50)) + 0) / 2, rel=1e-6)


@pytest.mark.parametrize("distance", ["squared", "angle"])
@pytest.mark.parametrize("target", [torch.arange(B), torch.zeros(B, dtype=torch.long)])
def test_triplet_without_a_triplet(distance: str, target: Tensor) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = triplet_distill(student, TEACHER, target=target, distance=distance)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-4])
def test_triplet_angle_of_near_and_opposite_rows(gap: float, dtype: torch.dtype) -> None:
    """An arc cosine would give NaN at 0 and pi, and in float32 be wrong by whole factors next to them."""
    degrees = torch.tensor([0.0, gap, math.pi], dtype=torch.float64)
    rows = torch.stack([degrees.cos(), degrees.sin()], 1).to(dtype).requires_grad_()
    options = {"min_margin": math.pi, "max_margin": math.pi, "distance": "angle"}
    loss = triplet_distill(rows, TEACHER[:3].to(dtype), target=torch.tensor([[0, 1, 2]]), **options)
    loss.backward()
    assert loss.item() == pytest.approx(gap, rel=1e-2, abs=4e-7)  # the angle to the positive, pi less, and pi more
    assert torch.isfinite(rows.grad).all()
    assert rows.grad[1].norm().item() == pytest.approx(1 if gap else 0, rel=1e-3)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (torch.tensor([[0, 1]]), ValueError, r"target must be identities \(b,\) or triplets \(t, 3\), got \(1, 2\)"),
        (torch.tensor([[0, 1, 12]]), ValueError, "triplets must be rows from 0 to 11, got 12"),
        (torch.tensor([[0, 1, -1]]), ValueError, "triplets must be rows from 0 to 11, got -1"),
        (torch.ones(2, 3), TypeError, "target must be whole numbers, got torch.float32"),
    ],
)
def test_triplet_invalid_targets(target: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"triplet_distill: {words}".replace("triplet_distill: triplets", ".*triplets")):
        triplet_distill(STUDENT, TEACHER, target=target)
    with pytest.raises(ValueError, match=r"triplet_distill: target, with gather, must be \(b\)"):
        triplet_distill(STUDENT, TEACHER, target=torch.tensor([[0, 1, 2]]), gather=True)
