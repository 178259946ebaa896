"""Losses for faces: naive references, properties, numbers computed by hand, buffers, and two processes."""

import copy
import gc
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib import Objective, Term
from kdlib.testing import check_loss
from kdlib_faces import losses as package
from kdlib_faces.heads import arcface_loss, cosface_loss
from kdlib_faces.losses import (
    AdaptiveCentersLoss,
    EvaluationOrientedLoss,
    MarginDistillLoss,
    TripletDistillLoss,
    adapted_centers,
    centers_from,
    evaluation_oriented,
    margin_distill,
    negative_thresholds,
    triplet_distill,
)

IDENTITIES = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 3, 3, 0])
B, D, N = len(IDENTITIES), 6, 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


STUDENT, TEACHER, CENTERS = random(B, D, seed=1), random(B, D, seed=2), random(N, D, seed=3)


def warm(loss: nn.Module) -> nn.Module:
    """The same loss after one batch, in evaluation mode, in which no buffer changes."""
    loss.double()(random(B, D, seed=8), random(B, D, seed=9), target=IDENTITIES)
    return loss.eval()


MAKERS = {
    "margin": lambda: MarginDistillLoss(N, D, scale=8.0, centers=CENTERS),
    "triplet": lambda: TripletDistillLoss(),
    "triplet angle": lambda: TripletDistillLoss(distance="angle"),
    "triplet semihard": lambda: TripletDistillLoss(mining="semihard"),
    "evaluation": lambda: EvaluationOrientedLoss(temperature=0.2, num_hard_negatives=10),
    "adaptive arc": lambda: AdaptiveCentersLoss(N, D, scale=8.0),
    "adaptive cos": lambda: AdaptiveCentersLoss(N, D, scale=8.0, head="cosface", centers=CENTERS),
}
# In training mode their buffers (thresholds, centers) depend on the student, so that finite differences are wrong.
STATEFUL = {"evaluation", "adaptive arc", "adaptive cos"}


# --- naive references ------------------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    length = math.sqrt(float(sum(value**2 for value in x)))
    return x / length if length else x


def softmax_loss(logits: list[float], own: int) -> float:
    top = max(logits)
    return top + math.log(sum(math.exp(value - top) for value in logits)) - logits[own]


def reference_margin(s, t, w, y, scale, least, most, keep=None):
    keep = range(len(s)) if keep is None else keep
    d = {i: max(float(unit(t[i]) @ unit(w[y[i]])), 0.0) for i in keep}
    top = max(d.values())
    losses = []
    for i in keep:
        margin = (most - least) * d[i] / top + least if top else least
        cosines = [float(unit(s[i]) @ unit(center)) for center in w]
        angle = math.acos(min(1.0, max(-1.0, cosines[y[i]])))
        own = math.cos(angle + margin) if angle <= math.pi - margin else math.cos(angle) + math.cos(margin) - 1
        cosines[y[i]] = own
        losses.append(softmax_loss([scale * value for value in cosines], y[i]))
    return np.array(losses)


def reference_triplets(s, y, distance, mining, w):
    found = []
    for a in range(len(y)):
        for p in range(len(y)):
            others = [n for n in range(len(y)) if y[n] != y[a] and w[n] > 0]
            if a == p or y[a] != y[p] or not others or not w[a] * w[p] > 0:
                continue
            farther = [n for n in others if distance(s[a], s[n]) > distance(s[a], s[p])]
            if mining == "hardest":
                n = min(others, key=lambda n: distance(s[a], s[n]))
            elif farther:
                n = min(farther, key=lambda n: distance(s[a], s[n]))
            else:
                n = max(others, key=lambda n: distance(s[a], s[n]))
            found.append((a, p, n))
    return found


DISTANCES = {
    "squared": lambda a, b: float(((unit(a) - unit(b)) ** 2).sum()),
    "angle": lambda a, b: math.acos(min(1.0, max(-1.0, float(unit(a) @ unit(b))))),
}


def reference_triplet_loss(s, t, triplets, distance, least, most, w):
    gaps = [max(distance(t[a], t[n]) - distance(t[a], t[p]), 0.0) for a, p, n in triplets]
    top = max(gaps, default=0.0)
    total = below = 0.0
    for (a, p, n), gap in zip(triplets, gaps, strict=True):
        margin = (most - least) * gap / top + least if top else least
        counts = w[a] * w[p] * w[n]
        total += counts * max(distance(s[a], s[p]) - distance(s[a], s[n]) + margin, 0.0)
        below += counts
    return total / below if below else 0.0


def reference_pairs(x, y, w):
    pairs = [(i, j) for i in range(len(y)) for j in range(i + 1, len(y)) if w[i] * w[j] > 0]
    return {(i, j): (float(unit(x[i]) @ unit(x[j])), y[i] == y[j], w[i] * w[j]) for i, j in pairs}


def reference_thresholds(x, y, exponents, w):
    negative = sorted((c for c, same, _ in reference_pairs(x, y, w).values() if not same), reverse=True)
    return [negative[len(negative) // 10**k] for k in exponents]


def reference_evaluation(s, t, y, tau_s, tau_t, temperature, hardest, w):
    def rank(c, thresholds):
        return sum(1 / (1 + math.exp(-(c - tau) / temperature)) for tau in thresholds)

    of_s, of_t = reference_pairs(s, y, w), reference_pairs(t, y, w)
    positive = [pair for pair in of_s if of_s[pair][1]]
    negative = sorted((pair for pair in of_s if not of_s[pair][1]), key=lambda pair: -of_s[pair][0])[:hardest]
    loss = 0.0
    for factor, pairs in ((0.02, positive), (0.01, negative)):
        below = sum(of_s[pair][2] for pair in pairs)
        above = sum(of_s[pair][2] * (rank(of_s[pair][0], tau_s) - rank(of_t[pair][0], tau_t)) ** 2 for pair in pairs)
        loss += factor * above / below if below else 0.0
    return loss


def reference_centers(s, t, w, y, keep=None):
    """Each sample's step from the center as it was; their mean."""

    def held(x: float) -> float:
        return min(1.0, max(1e-6, x))

    keep = range(len(s)) if keep is None else keep
    moved = w.copy()
    for identity in set(y):
        steps = []
        for i in keep:
            if y[i] == identity:
                alpha = held(float(unit(s[i]) @ unit(t[i])) * held(float(unit(w[identity]) @ unit(t[i]))))
                steps.append(alpha * w[identity] + (1 - alpha) * unit(t[i]))
        if steps:
            moved[identity] = sum(steps) / len(steps)
    return moved


# --- every loss --------------------------------------------------------------------------------------------------------


def test_every_loss_is_tested() -> None:
    modules = {name for name in package.__all__ if inspect.isclass(getattr(package, name))}
    assert modules == {type(make()).__name__ for make in MAKERS.values()}
    assert set(package.__all__) - modules == {
        "adapted_centers", "centers_from", "evaluation_oriented", "margin_distill", "negative_thresholds",
        "triplet_distill",
    }  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
class TestEveryLoss:
    def test_contract(self, name: str) -> None:
        per_sample = name.startswith(("margin", "adaptive"))
        expected = 28 if per_sample else 26
        ran = check_loss(
            MAKERS[name](), STUDENT, TEACHER, target=IDENTITIES, exclude=["gradcheck"] if name in STATEFUL else []
        )
        assert len(ran) == expected - (name in STATEFUL)
        loss = warm(MAKERS[name]()).float()
        assert len(check_loss(loss, STUDENT, TEACHER, target=IDENTITIES)) == expected
        assert type(loss).per_sample is per_sample

    def test_compiles_without_graph_breaks(self, name: str) -> None:
        student = STUDENT.float().requires_grad_()
        results = []
        for compiled in (False, True):
            loss = MAKERS[name]()
            call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
            value = call(student, TEACHER.float(), target=IDENTITIES)
            results.append((value, *torch.autograd.grad(value, student), *loss.buffers()))
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            *[(torch.float32, value) for value in (1e-40, 1e-20, 1e30, 3e38)],
            *[(torch.float16, value) for value in (300.0, 60000.0, 1e-7, 1e-2)],
            (torch.bfloat16, 1e38),
            (torch.float64, 1e300),
        ],
    )
    def test_finite_for_any_finite_embedding(self, name: str, value: float, dtype: torch.dtype) -> None:
        loss = MAKERS[name]()
        student = (value * STUDENT.sign()).to(dtype).requires_grad_()
        loss_value = loss(student, (value * TEACHER.sign()).to(dtype), target=IDENTITIES)
        loss_value.backward()
        assert torch.isfinite(loss_value)
        assert torch.isfinite(student.grad).all()
        assert all(torch.isfinite(buffer).all() for buffer in loss.buffers())
        if 1e-12 < value < 6e4 and dtype != torch.float16:
            assert student.grad.any()

    def test_common_offset(self, name: str) -> None:
        student = (1000 + STUDENT).float().requires_grad_()
        loss_value = MAKERS[name]()(student, (1000 + TEACHER).float(), target=IDENTITIES)
        loss_value.backward()
        exact = MAKERS[name]().double()(1000 + STUDENT, 1000 + TEACHER, target=IDENTITIES)
        assert torch.isfinite(student.grad).all()
        assert loss_value.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-4)

    @settings(max_examples=15, deadline=None)
    @given(order=st.permutations(range(B)))
    def test_invariance_to_the_order(self, name: str, order: list[int]) -> None:
        losses = MAKERS[name]().double(), MAKERS[name]().double()
        for _ in range(2):
            one = losses[0](STUDENT, TEACHER, target=IDENTITIES)
            two = losses[1](STUDENT[order], TEACHER[order], target=IDENTITIES[order])
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
        for a, b in zip(losses[0].buffers(), losses[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_in_an_objective(self, name: str) -> None:
        term = Term(MAKERS[name](), student="embedding", teacher="embedding", target="identity")
        objective = Objective({"faces": term})
        student = STUDENT.float().requires_grad_()
        features = {"general": {"embedding": TEACHER.float()}}
        out = objective({"embedding": student}, features, {"identity": IDENTITIES})
        out.total.backward()
        expected = MAKERS[name]()(STUDENT.float(), TEACHER.float(), target=IDENTITIES)
        torch.testing.assert_close(out.total.detach(), expected)
        assert student.grad.any()
        assert not list(objective.parameters())
        before = {key: value.clone() for key, value in objective.state_dict().items()}
        objective.report({"embedding": student}, features, {"identity": IDENTITIES})
        assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())

    def test_small_integer_identities(self, name: str) -> None:
        expected = MAKERS[name]()(STUDENT.float(), TEACHER.float(), target=IDENTITIES)
        for dtype in (torch.int32, torch.uint8):
            assert torch.equal(MAKERS[name]()(STUDENT.float(), TEACHER.float(), target=IDENTITIES.to(dtype)), expected)

    @pytest.mark.parametrize(
        ("student", "teacher", "target", "error", "words"),
        [
            (STUDENT.long(), TEACHER, IDENTITIES, TypeError, "student must be a floating-point tensor"),
            (STUDENT, TEACHER.long(), IDENTITIES, TypeError, "teacher must be a floating-point tensor"),
            (STUDENT.unsqueeze(2), TEACHER, IDENTITIES, ValueError, r"student must be \(b, d\), got \(12, 6, 1\)"),
            (STUDENT, TEACHER[1:], IDENTITIES, ValueError, "teacher must"),
            (STUDENT, TEACHER, IDENTITIES[1:], ValueError, r"must be .*12.*, got .*11"),
            (STUDENT, TEACHER, IDENTITIES.float(), TypeError, "must be .*whole numbers, got torch.float32"),
        ],
    )
    def test_invalid_calls(
        self, name: str, student: Tensor, teacher: Tensor, target: Tensor, error: type[Exception], words: str
    ) -> None:
        loss = MAKERS[name]()
        with pytest.raises(error, match=words) as caught:
            loss(student, teacher, target=target)
        assert type(loss).__name__.removesuffix("Loss").lower()[:6] in str(caught.value).split(":")[0].replace(
            "_", ""
        ).lower().replace("adaptedcenters", "adaptivecenters")
        with pytest.raises(ValueError, match=r"weight must be \(b,\) = \(12,\), got \(3,\)"):
            loss(STUDENT, TEACHER, target=IDENTITIES, weight=torch.ones(3))
        with pytest.raises(ValueError, match=r"reduction must be .*got 'sum'"):
            loss(STUDENT, TEACHER, target=IDENTITIES, reduction="sum")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MarginDistillLoss(0, 4), "MarginDistillLoss: num_identities must be"),
        (lambda: MarginDistillLoss(4, 2.5), "MarginDistillLoss: embedding_dim must be"),
        (lambda: MarginDistillLoss(4, 4, scale=0.0), "MarginDistillLoss: scale must be"),
        (lambda: MarginDistillLoss(4, 4, min_margin=-0.1), "MarginDistillLoss: min_margin must be"),
        (lambda: MarginDistillLoss(4, 4, max_margin=0.1), "MarginDistillLoss: max_margin must be .* >= 0.2"),
        (lambda: MarginDistillLoss(4, 4, reduction="sum"), "MarginDistillLoss: reduction must be one of"),
        (lambda: MarginDistillLoss(4, 4, centers=torch.ones(4, 5)), r"centers must be \(n, d\) with n = 4 and d = 4"),
        (lambda: MarginDistillLoss(2, 2, centers=torch.eye(2) * torch.inf), "centers must be finite"),
        (lambda: MarginDistillLoss(2, 2, centers=torch.tensor([[1.0, 0], [0, 0]])), "no row of zeros, got row 1"),
        (lambda: TripletDistillLoss(distance="l1"), "TripletDistillLoss: distance must be one of 'squared', 'angle'"),
        (lambda: TripletDistillLoss(mining="all"), "TripletDistillLoss: mining must be one of 'hardest', 'semihard'"),
        (lambda: TripletDistillLoss(max_margin=0.1), "TripletDistillLoss: max_margin must be .* >= 0.2"),
        (lambda: TripletDistillLoss(min_margin=4, max_margin=4, distance="angle"), "min_margin must be .*3.14"),
        (lambda: EvaluationOrientedLoss(rates=()), "EvaluationOrientedLoss: rates must hold at least one number"),
        (lambda: EvaluationOrientedLoss(rates=(0.0,)), r"EvaluationOrientedLoss: rates\[0\] must be .* > 0"),
        (lambda: EvaluationOrientedLoss(rates="0.1"), "EvaluationOrientedLoss: rates must be a sequence"),
        (lambda: EvaluationOrientedLoss(temperature=0.0), "EvaluationOrientedLoss: temperature must be"),
        (
            lambda: EvaluationOrientedLoss(num_hard_negatives=2.0),
            "EvaluationOrientedLoss: num_hard_negatives must be a whole number",
        ),
        (lambda: EvaluationOrientedLoss(positive_weight=-1.0), "EvaluationOrientedLoss: positive_weight must be"),
        (lambda: EvaluationOrientedLoss(momentum=0.0), "EvaluationOrientedLoss: momentum must be"),
        (lambda: AdaptiveCentersLoss(0, 4), "AdaptiveCentersLoss: num_identities must be"),
        (lambda: AdaptiveCentersLoss(4, 4, head="adaface"), "AdaptiveCentersLoss: head must be one of 'arcface'"),
        (lambda: AdaptiveCentersLoss(4, 4, margin=3.2), "AdaptiveCentersLoss: margin must be .*3.14"),
        (lambda: AdaptiveCentersLoss(4, 4, centers=torch.ones(3, 4)), "AdaptiveCentersLoss: centers must be"),
    ],
)
def test_invalid_arguments(make: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()


# --- margin distillation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "least", "most"), [(64.0, 0.2, 0.5), (8.0, 0.0, 1.4), (4.0, 0.3, 0.3)])
def test_margin_formula(scale: float, least: float, most: float) -> None:
    options = {"scale": scale, "min_margin": least, "max_margin": most}
    loss_value = margin_distill(STUDENT, TEACHER, CENTERS, target=IDENTITIES, reduction="none", **options)
    arrays = [x.numpy() for x in (STUDENT, TEACHER, CENTERS, IDENTITIES)]
    np.testing.assert_allclose(loss_value.numpy(), reference_margin(*arrays, scale, least, most), rtol=1e-9)
    # Masked samples have no say in the largest cosine.
    own = torch.nn.functional.cosine_similarity(TEACHER, CENTERS[IDENTITIES])
    weight = torch.where(own == own.max(), 0.0, 1.0)
    keep = weight.nonzero().flatten().tolist()
    loss_value = margin_distill(STUDENT, TEACHER, CENTERS, target=IDENTITIES, weight=weight, **options)
    assert loss_value.item() == pytest.approx(reference_margin(*arrays, scale, least, most, keep).mean(), rel=1e-9)


def test_margin_defaults() -> None:
    loss = MarginDistillLoss(N, D, centers=CENTERS)
    assert (loss.scale, loss.min_margin, loss.max_margin) == (64.0, 0.2, 0.5)


def test_margin_numbers() -> None:
    """Student on its center, the others at a right angle: log(1 + e^(-s cos m)); m = .5 at most, .2 + .3 * .6 = .38."""
    teacher = torch.tensor([[2.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    loss_value = margin_distill(eye, teacher, eye, target=torch.arange(2), scale=5.0, reduction="none")
    assert loss_value.tolist() == pytest.approx([0.01235006, 0.00957963], abs=1e-8)
    assert loss_value.tolist() == pytest.approx(
        [math.log1p(math.exp(-5 * math.cos(m))) for m in (0.5, 0.38)], rel=1e-12
    )


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


@settings(max_examples=40, deadline=None)
@given(margin=st.floats(0, math.pi), scale=st.floats(1, 64))
def test_equal_margins_are_arcface_on_frozen_centers(margin: float, scale: float) -> None:
    centers = CENTERS.clone().requires_grad_()
    options = {"scale": scale, "min_margin": margin, "max_margin": margin}
    loss_value = margin_distill(STUDENT.clone().requires_grad_(), TEACHER, centers, target=IDENTITIES, **options)
    loss_value.backward()
    torch.testing.assert_close(
        loss_value.detach(),
        arcface_loss(STUDENT, CENTERS, IDENTITIES, scale=scale, margin=margin),
        rtol=1e-9,
        atol=1e-12,
    )
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
    loss_value = centers_from(TEACHER, IDENTITIES)
    for identity in range(N):
        rows = [unit(row) for row, own in zip(TEACHER.numpy(), IDENTITIES, strict=True) if own == identity]
        np.testing.assert_allclose(loss_value[identity].numpy(), unit(sum(rows)), rtol=1e-12)
    assert centers_from(TEACHER.half(), IDENTITIES).dtype == torch.float32
    many = random(2**15 + 3, 2)
    own = torch.arange(len(many)) % 2
    loss_value = centers_from(many, own)
    expected = torch.nn.functional.normalize(many)[own == 1].mean(0)
    torch.testing.assert_close(loss_value[1], expected / expected.norm())
    with pytest.raises(ValueError, match=r"every identity from 0 to 5 must have .*none of 2 of them, first of 4"):
        centers_from(TEACHER, IDENTITIES, num_identities=6)
    with pytest.raises(ValueError, match="none of 1 of them, first of 0"):
        centers_from(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="identities must be from 0 to 1, got 3"):
        centers_from(TEACHER, IDENTITIES, num_identities=2)
    with pytest.raises(ValueError, match=r"embeddings must be \(n, d\), got \(6,\)"):
        centers_from(TEACHER[0], IDENTITIES)


# --- triplet distillation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mining", ["hardest", "semihard"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("weighted", [False, True])
def test_triplet_formula(distance: str, mining: str, weighted: bool) -> None:
    weight = torch.tensor([0.5, 2, 0, 1, 1, 0.25, 3, 1, 1, 1, 0, 1.5], dtype=torch.float64) if weighted else None
    w = np.ones(B) if weight is None else weight.numpy()
    s, t, y = STUDENT.numpy(), TEACHER[:, :4].numpy(), IDENTITIES.numpy()
    triplets = reference_triplets(s, y, DISTANCES[distance], mining, w)
    assert len(triplets) == (20 if weighted else 26)
    expected = reference_triplet_loss(s, t, triplets, DISTANCES[distance], 0.2, 0.5, w)
    loss_value = triplet_distill(
        STUDENT, TEACHER[:, :4], target=IDENTITIES, distance=distance, mining=mining, weight=weight
    )
    assert loss_value.item() == pytest.approx(expected, rel=1e-9)
    given = triplet_distill(STUDENT, TEACHER[:, :4], target=torch.tensor(triplets), distance=distance, weight=weight)
    assert given.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", ["squared", "angle"])
def test_triplet_of_given_triplets(distance: str) -> None:
    triplets = torch.randint(0, B, (30, 3), generator=torch.Generator().manual_seed(0))
    expected = reference_triplet_loss(
        STUDENT.numpy(), TEACHER.numpy(), triplets.tolist(), DISTANCES[distance], 0.1, 0.9, np.ones(B)
    )
    loss_value = triplet_distill(STUDENT, TEACHER, target=triplets, distance=distance, min_margin=0.1, max_margin=0.9)
    assert loss_value.item() == pytest.approx(expected, rel=1e-7)
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
    loss_value = triplet_distill(student, teacher, target=target, distance="angle", max_margin=2.0)
    assert loss_value.item() == pytest.approx((4 - math.pi / 2) / 2, rel=1e-12)
    # Squared distances are 2 - 2 cos: 2 - sqrt 3 to the positive, 2 and 1 to the negative.
    loss_value = triplet_distill(student, teacher, target=target, max_margin=2.0)
    assert loss_value.item() == pytest.approx((2 - math.sqrt(3) + 2 - math.sqrt(3) - 3 + 4) / 2, rel=1e-12)
    assert loss_value.item() == pytest.approx(0.767949, abs=1e-6)


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
    loss_value = triplet_distill(student, TEACHER, target=target, distance=distance)
    loss_value.backward()
    assert loss_value.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-4])
def test_triplet_angle_of_near_and_opposite_rows(gap: float, dtype: torch.dtype) -> None:
    """An arc cosine would give NaN at 0 and pi, and in float32 be wrong by whole factors next to them."""
    degrees = torch.tensor([0.0, gap, math.pi], dtype=torch.float64)
    rows = torch.stack([degrees.cos(), degrees.sin()], 1).to(dtype).requires_grad_()
    options = {"min_margin": math.pi, "max_margin": math.pi, "distance": "angle"}
    loss_value = triplet_distill(rows, TEACHER[:3].to(dtype), target=torch.tensor([[0, 1, 2]]), **options)
    loss_value.backward()
    assert loss_value.item() == pytest.approx(
        gap, rel=1e-2, abs=4e-7
    )  # the angle to the positive, pi less, and pi more
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


def test_triplets_are_not_gathered() -> None:
    with pytest.raises(ValueError, match=r"triplet_distill: target, with gather, must be \(b\)"):
        triplet_distill(STUDENT, TEACHER, target=torch.tensor([[0, 1, 2]]), gather=True)


# --- evaluation-oriented distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("hardest", [0, 1, 7, 2000])
@pytest.mark.parametrize("weighted", [False, True])
def test_evaluation_formula(hardest: int, weighted: bool) -> None:
    weight = torch.tensor([0.5, 2, 0, 1, 1, 0.25, 3, 1, 1, 1, 0, 1.5], dtype=torch.float64) if weighted else None
    w = np.ones(B) if weight is None else weight.numpy()
    s, t, y = STUDENT.numpy(), TEACHER[:, :5].numpy(), IDENTITIES.numpy()
    exponents = (1, 2, 3, 4, 5, 6)
    tau = [negative_thresholds(x, target=IDENTITIES, weight=weight) for x in (STUDENT, TEACHER[:, :5])]
    for loss_value, x in zip(tau, (s, t), strict=True):
        np.testing.assert_allclose(loss_value.numpy(), reference_thresholds(x, y, exponents, w), rtol=1e-12)
    loss_value = evaluation_oriented(
        STUDENT, TEACHER[:, :5], *tau, target=IDENTITIES, temperature=0.1, num_hard_negatives=hardest, weight=weight
    )
    expected = reference_evaluation(s, t, y, tau[0].tolist(), tau[1].tolist(), 0.1, hardest, w)
    assert loss_value.item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0
    loss = EvaluationOrientedLoss(temperature=0.1, num_hard_negatives=hardest).double()
    assert loss(STUDENT, TEACHER[:, :5], target=IDENTITIES, weight=weight).item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_defaults() -> None:
    loss = EvaluationOrientedLoss()
    assert loss.rates == (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    assert (loss.temperature, loss.num_hard_negatives, loss.momentum) == (0.01, 2000, 0.01)
    assert (loss.positive_weight, loss.negative_weight) == (0.02, 0.01)


def test_evaluation_number() -> None:
    """One positive pair: the student's cosine T ln 3 above its threshold, so r is 3/4; the teacher's T ln 4 below: 1/5.

    0.02 * (0.75 - 0.2)^2 = 0.00605.
    """
    cosines = 0.5 + 0.1 * torch.tensor([math.log(3), -math.log(4)], dtype=torch.float64)
    student, teacher = (torch.stack([torch.tensor([1.0, 0.0]), torch.stack([c, (1 - c * c).sqrt()])]) for c in cosines)
    tau = torch.tensor([0.5], dtype=torch.float64)
    loss_value = evaluation_oriented(student, teacher, tau, tau, target=torch.tensor([3, 3]), temperature=0.1)
    assert loss_value.item() == pytest.approx(0.00605, rel=1e-12)
    loss_value = evaluation_oriented(student, teacher, tau, tau, target=torch.tensor([3, 4]), temperature=0.1)
    assert loss_value.item() == pytest.approx(0.003025, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(2, 26), exponent=st.integers(1, 4))
def test_thresholds_are_exceeded_at_most_at_their_rate(batch: int, exponent: int) -> None:
    """The place is the count divided in whole numbers, as 0.1 * 30 and 0.3 / 0.1 would not be."""
    embeddings = random(batch, 3, seed=batch)
    pairs = batch * (batch - 1) // 2
    (loss_value,) = negative_thresholds(embeddings, target=torch.arange(batch), rates=(10.0**-exponent,))
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(embeddings).T
    above = int((cosines.triu(1)[torch.triu_indices(batch, batch, 1).unbind()] > loss_value + 1e-12).sum())
    assert above == pairs // 10**exponent


def test_thresholds_without_impostor_pairs() -> None:
    assert negative_thresholds(STUDENT, target=torch.zeros(B, dtype=torch.long)).eq(-torch.inf).all()
    assert negative_thresholds(STUDENT[:1], target=torch.tensor([0])).eq(-torch.inf).all()
    assert negative_thresholds(STUDENT, target=torch.arange(B), rates=[1])[0].isfinite()
    with pytest.raises(ValueError, match=r"negative_thresholds: rates\[1\] must be .* <= 1, got 2"):
        negative_thresholds(STUDENT, target=torch.arange(B), rates=[1, 2])


def test_thresholds_are_running_means() -> None:
    loss = EvaluationOrientedLoss(momentum=0.25).double()
    batches = [(random(B, D, seed=2 * i), random(B, D, seed=2 * i + 1)) for i in range(3)]
    expected: dict[str, np.ndarray] = {}
    for number, (student, teacher) in enumerate(batches):
        loss(student, teacher, target=IDENTITIES)
        for name, x in (("student", student), ("teacher", teacher)):
            new = np.array(reference_thresholds(x.numpy(), IDENTITIES.numpy(), range(1, 7), np.ones(B)))
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
    first = loss(student, TEACHER.float(), target=one)  # no threshold is known yet: empty to compare
    first.backward()
    assert first.item() == 0
    assert not student.grad.any()
    assert not int(loss.batches)
    loss(STUDENT.float(), TEACHER.float(), target=IDENTITIES)
    before = copy.deepcopy(loss.state_dict())
    assert loss(STUDENT.float(), TEACHER.float(), target=one).item() > 0
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    broken = STUDENT.float().clone()
    broken[3, 2] = torch.nan  # an overflow that a gradient scaler skips must not stay in the thresholds
    loss(broken, TEACHER.float(), target=IDENTITIES)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    assert loss(STUDENT.float(), TEACHER.float(), target=IDENTITIES).isfinite()


# --- adaptive centers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["given", "zeros"])
def test_centers_formula(start: str) -> None:
    centers = CENTERS.clone() if start == "given" else torch.zeros_like(CENTERS)
    teacher = TEACHER.clone()
    teacher[4:] = 0.5 * STUDENT[4:] + teacher[4:]  # some near the student, so that alpha is not all at its bound
    expected = reference_centers(STUDENT.numpy(), teacher.numpy(), centers.numpy(), IDENTITIES.numpy())
    moved = adapted_centers(STUDENT, teacher, centers, target=IDENTITIES)
    np.testing.assert_allclose(moved.numpy(), expected[IDENTITIES.numpy()], rtol=1e-9, atol=1e-12)
    weight = torch.tensor([1.0, 0, 2, 0.5, 0, 0, 1, 1, 0.1, 0, 1, 0])
    keep = weight.nonzero().flatten().tolist()
    expected = reference_centers(STUDENT.numpy(), teacher.numpy(), centers.numpy(), IDENTITIES.numpy(), keep)
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
        expected = reference_centers(student.numpy(), teacher.numpy(), loss.centers.numpy(), IDENTITIES.numpy())
        loss_value = loss(student, teacher, target=IDENTITIES, reduction="none")
        np.testing.assert_allclose(loss.centers.numpy(), expected, rtol=1e-9)
        torch.testing.assert_close(
            loss_value, face(student, torch.tensor(expected), IDENTITIES, scale=64.0, margin=margin, reduction="none")
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


def test_centers_have_no_gradient_and_full_precision() -> None:
    loss = AdaptiveCentersLoss(N, D)
    student = STUDENT.half().requires_grad_()
    loss(student, TEACHER.half().requires_grad_(), target=IDENTITIES).backward()
    assert not loss.centers.requires_grad
    assert loss.centers.dtype == torch.float32
    assert loss.centers.any(1).all()
    rows = adapted_centers(student, TEACHER.half(), CENTERS.float(), target=IDENTITIES)
    assert not rows.requires_grad
    assert rows.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = adapted_centers(STUDENT.float(), TEACHER.float(), CENTERS.float(), target=IDENTITIES)
    assert torch.equal(low, adapted_centers(STUDENT.float(), TEACHER.float(), CENTERS.float(), target=IDENTITIES))


# --- two processes ---------------------------------------------------------------------------------------------------

SPLITS = {"uneven": [5, 7], "one empty": [0, 12]}
GATHERED = {
    "triplet": lambda: TripletDistillLoss(gather=True),
    "triplet angle": lambda: TripletDistillLoss(distance="angle", mining="semihard", gather=True),
    "evaluation": lambda: EvaluationOrientedLoss(temperature=0.2, num_hard_negatives=10, gather=True),
    "adaptive": lambda: AdaptiveCentersLoss(N, D, scale=8.0),
}
WEIGHT = torch.linspace(0.0, 2.0, B, dtype=torch.float64)


def steps(make: Any, rows: slice) -> dict[str, Tensor]:
    """Three steps of a loss on some rows: the values, the gradients and what it remembers."""
    loss, results = make().double(), {}
    for step in range(3):
        student = random(B, D, seed=step)[rows].requires_grad_()
        teacher, target = random(B, D, seed=step + 50)[rows], IDENTITIES.roll(step)[rows]
        value = loss(student, teacher, target=target, weight=WEIGHT[rows] if step == 1 else None)
        value.backward()
        results[f"value {step}"], results[f"gradient {step}"] = value.detach(), student.grad
        results.update({f"{name} {step}": x.clone() for name, x in loss.named_buffers()})
    return results


def process(rank: int, directory: Path) -> None:
    """One of two processes that share each batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=2)
    results = {}
    for split, (first, _) in SPLITS.items():
        rows = slice(0, first) if rank == 0 else slice(first, B)
        results.update({f"{split}/{name}": steps(make, rows) for name, make in GATHERED.items()})
    torch.save(results, directory / f"rank{rank}.pt")
    gc.collect()  # no cycle may keep the group's threads until the interpreter dies
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error::UserWarning", __file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    ends = [each.communicate(timeout=120)[1] for each in started]
    for each, errors in zip(started, ends, strict=True):
        assert each.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, make in GATHERED.items():
        expected = steps(make, slice(0, B))
        for split, (first, _) in SPLITS.items():
            results = [rank[f"{split}/{name}"] for rank in ranks]
            for key, value in expected.items():
                if key.startswith("gradient"):
                    if name == "adaptive":
                        continue  # each process takes the mean over its own samples, as every per-sample loss does
                    # The mean of the two processes' gradients is the whole batch's.
                    torch.testing.assert_close(torch.cat([each[key] for each in results]) / 2, value)
                elif key.startswith("value") and name == "adaptive":
                    continue
                else:
                    assert torch.equal(results[0][key], results[1][key]), f"{split}, {name}: {key} differs"
                    torch.testing.assert_close(results[0][key], value)
            if name == "adaptive":
                parts = [first * results[0]["value 0"], (B - first) * results[1]["value 0"]]
                torch.testing.assert_close(sum(parts) / B, expected["value 0"])


def test_gather_without_processes() -> None:
    for make, plain in [
        (GATHERED["triplet"], TripletDistillLoss()),
        (GATHERED["evaluation"], EvaluationOrientedLoss(temperature=0.2, num_hard_negatives=10)),
        (GATHERED["adaptive"], AdaptiveCentersLoss(N, D, scale=8.0, gather=False)),
    ]:
        one, two = make().double(), plain.double()
        assert torch.equal(one(STUDENT, TEACHER, target=IDENTITIES), two(STUDENT, TEACHER, target=IDENTITIES))


if __name__ == "__main__":
    process(int(sys.argv[1]), Path(sys.argv[2]))
