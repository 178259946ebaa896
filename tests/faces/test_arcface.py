"""ArcFace at every angle, and the heads that extend it: combined margins, sub-centers and random margins."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.heads import (
    ArcFaceHead,
    CombinedMarginHead,
    CosFaceHead,
    ElasticFaceHead,
    SubCenterArcFaceHead,
    adaface_loss,
    arcface_loss,
    combined_margin_loss,
    cosface_loss,
    elasticface_loss,
    magface_loss,
    sub_center_arcface_loss,
)
from kdlib_faces.heads._random import normal_numbers
from tests.faces import reference_heads as reference
from tests.faces.reference_heads import (
    ALL,
    CENTERS,
    EMBEDDINGS,
    IDENTITIES,
    NONE,
    B,
    D,
    N,
    at_angle,
    close,
    expected,
    random,
)


@settings(max_examples=60)
@given(margin=st.floats(0, math.pi), a=st.floats(0, math.pi), b=st.floats(0, math.pi))
def test_arcface_increases_with_the_angle(margin, a, b):
    losses = [
        arcface_loss(*at_angle(angle), torch.tensor([0]), scale=4.0, margin=margin).item() for angle in sorted((a, b))
    ]
    assert losses[1] >= losses[0] - 1e-9


@settings(max_examples=40)
@given(margin=st.floats(0.01, 3.1))
def test_arcface_is_continuous(margin):
    edge, step = math.pi - margin, 1e-7
    a, b = (
        arcface_loss(*at_angle(angle), torch.tensor([0]), scale=4.0, margin=margin).item()
        for angle in (edge - step, edge + step)
    )
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("degrees", [0.001, 1, 30, 60, 90, 120, 150])
def test_arcface_gradient_is_exact(degrees):
    """The own logit decreases by scale * sin(theta + m) per radian; one radian moves the embedding by its length.

    With d cos(theta + m) / d cos(theta) = sin(theta + m) / sin(theta), that is 73.9 per cosine at 60 degrees, m = 0.5.
    """
    angle = math.radians(degrees)
    embedding, centers = at_angle(angle)
    arcface_loss(embedding.requires_grad_(), centers, torch.tensor([0]), scale=64.0, margin=0.5).backward()
    logits = torch.tensor([64 * math.cos(angle + 0.5), 0, 0], dtype=torch.float64)
    tangent = torch.tensor([-math.sin(angle), 0, 0, math.cos(angle)], dtype=torch.float64)
    gradient, others = (embedding.grad[0] @ tangent).item(), 1 - logits.softmax(0)[0].item()
    assert gradient == pytest.approx(others * 64.0 * math.sin(angle + 0.5) / 3.0, rel=1e-7, abs=1e-12)
    if degrees == 60:
        assert 64 * math.sin(angle + 0.5) / math.sin(angle) == pytest.approx(73.9, abs=0.05)


def test_arcface_margin_is_at_most_pi():
    with pytest.raises(ValueError, match=r"ArcFaceHead: margin must be a finite number and >= 0 and <= 3\.14"):
        ArcFaceHead(4, 3, margin=3.2)


@pytest.mark.parametrize("angle", [1e-5, 1e-4, 1e-3])
def test_float32_is_accurate_near_the_center(angle):
    """The root of 1 - cos^2 in float32 would be wrong by factors at these angles: 4e-5 in this loss."""
    embedding, centers = at_angle(angle)
    exact = arcface_loss(embedding, centers, torch.tensor([0]), scale=8.0, margin=1.0)
    single = arcface_loss(embedding.float(), centers.float(), torch.tensor([0]), scale=8.0, margin=1.0)
    assert single.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.4, math.pi])
def test_special_cases_of_arcface_and_cosface(margin):
    arc, cos = arcface_loss(*ALL, margin=margin, **NONE), cosface_loss(*ALL, margin=margin, **NONE)
    close(combined_margin_loss(*ALL, margin=margin, cosine_margin=0.0, **NONE), arc)
    close(combined_margin_loss(*ALL, margin=0.0, cosine_margin=margin, **NONE), cos)
    close(sub_center_arcface_loss(EMBEDDINGS, CENTERS.unsqueeze(1), IDENTITIES, margin=margin, **NONE), arc)
    twice = CENTERS.unsqueeze(1).expand(N, 2, D)
    close(sub_center_arcface_loss(EMBEDDINGS, twice, IDENTITIES, margin=margin, **NONE), arc)
    noise = random(B)
    close(elasticface_loss(*ALL, margin=margin, **NONE), arc)
    close(elasticface_loss(*ALL, noise=noise, margin=margin, std=0.0, **NONE), arc)
    close(elasticface_loss(*ALL, noise=noise, margin=margin, std=0.0, form="cosface", **NONE), cos)
    unscaled = {"concentration": 1.0, "norm_std": 1.0, "margin": margin}
    close(adaface_loss(*ALL, norm_mean=1e6, **unscaled, **NONE), arc)  # all norms are small
    close(adaface_loss(*ALL, margin=margin, concentration=0.0, **NONE), cos)  # all norms count as the mean
    close(magface_loss(*ALL, margin=margin, max_margin=margin, norm_weight=0.0, **NONE), arc)


@pytest.mark.parametrize("factor", [1.35, 2.0, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_angle_factor(factor, margin):
    options = {"margin": margin, "cosine_margin": 0.1, "angle_factor": factor}
    close(
        combined_margin_loss(*ALL, scale=16.0, **options, **NONE), expected(CombinedMarginHead, scale=16.0, **options)
    )
    inputs = (random(6, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(
        lambda e, c: combined_margin_loss(e, c, torch.arange(6) % 3, scale=4.0, **options), inputs
    )  # fmt: skip


def test_only_the_nearest_sub_center_counts():
    centers = random(N, 4, D, seed=2).requires_grad_()
    loss = sub_center_arcface_loss(EMBEDDINGS, centers, IDENTITIES, **NONE)
    close(loss, expected(SubCenterArcFaceHead, margin=0.5, centers=centers.detach()))
    sub_center_arcface_loss(EMBEDDINGS[:1], centers, IDENTITIES[:1], scale=1.0).backward()
    cosines = torch.nn.functional.normalize(centers.detach(), dim=-1) @ EMBEDDINGS[0]
    moved = centers.grad.any(-1)
    assert torch.equal(moved, cosines == cosines.amax(1, keepdim=True))
    with pytest.raises(ValueError, match=r"centers must be \(n, k, d\), got \(7, 3\)"):
        sub_center_arcface_loss(*ALL)
    message = r"\(num_identities, sub_centers, embedding_dim\) = \(3, 2, 4\), got \(3, 5, 4\); .* sub_centers=5, "
    with pytest.raises(RuntimeError, match=message):
        SubCenterArcFaceHead(4, 3, sub_centers=2).load_state_dict(
            SubCenterArcFaceHead(4, 3, sub_centers=5).state_dict()
        )


def test_wrong_labels_gather_at_another_sub_center():
    """A third of an identity's images shows another: one sub-center stays with the rest, unlike a single center."""
    clean, wrong = torch.eye(8)[0], torch.eye(8)[1]
    faces = torch.nn.functional.normalize(torch.stack([clean, clean, wrong] * 20) + 0.05 * random(60, 8).float())
    identities = torch.zeros(60, dtype=torch.long)
    cosines = []
    for head in (SubCenterArcFaceHead(8, 2, 16.0, sub_centers=2), SubCenterArcFaceHead(8, 2, 16.0, sub_centers=1)):
        with torch.no_grad():
            head.weight.copy_(random(8).float() + torch.stack([2 * clean, 2 * wrong])[: head.sub_centers])
        optimizer = torch.optim.SGD(head.parameters(), 1.0)
        for _ in range(200):
            optimizer.zero_grad()
            head(faces, identities).backward()
            optimizer.step()
        cosines.append((torch.nn.functional.normalize(head.weight[0], dim=1) @ clean).max().item())
    assert cosines[0] > 0.99
    assert cosines[1] < 0.95


@pytest.mark.parametrize("sort", [False, True])
def test_elastic_formula(sort):
    noise = random(B, seed=5)
    margins = 0.5 + 0.3 * noise.numpy()
    if sort:
        cosines = [
            reference.cosines_of(e, CENTERS.numpy())[i] for e, i in zip(EMBEDDINGS.numpy(), IDENTITIES, strict=True)
        ]
        assigned = np.empty(B)
        assigned[np.argsort(cosines)] = np.sort(margins)[::-1]  # the largest margin at the smallest cosine
        margins = assigned
    loss = elasticface_loss(*ALL, noise=noise, std=0.3, sort=sort, **NONE)
    close(loss, expected(ElasticFaceHead, margin=margins))
    loss = elasticface_loss(*ALL, noise=noise, std=0.3, sort=sort, margin=0.5, form="cosface", **NONE)
    close(loss, expected(CosFaceHead, margin=margins))
    inputs = (random(6, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_())
    for form in ("arcface", "cosface"):
        assert torch.autograd.gradcheck(
            lambda e, c, form=form: elasticface_loss(
                e, c, torch.arange(6) % 3, noise=noise[:6], std=0.3, form=form, sort=sort, scale=4.0
            ),
            inputs,
        )


def test_elastic_margins_are_normal_and_new_for_each_batch():
    numbers = torch.stack([normal_numbers(512, torch.tensor(counter), 7) for counter in range(200)]).double()
    assert numbers.mean().item() == pytest.approx(0, abs=0.01)
    assert numbers.std().item() == pytest.approx(1, abs=0.01)
    assert (numbers**3).mean().item() == pytest.approx(0, abs=0.05)
    assert (numbers**4).mean().item() == pytest.approx(3, abs=0.1)
    for a, b in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert (a * b).mean().item() == pytest.approx(0, abs=0.01)
    assert len(numbers.unique()) > 0.99 * numbers.numel()
    others = [normal_numbers(512, torch.tensor(0), seed).double() for seed in (8, 7 + 2**40)]
    for other in others:
        assert abs((numbers[0] * other).mean().item()) < 0.2


def test_elastic_seeds():
    def margins(head):
        x = torch.eye(2)[[0] * 4]
        return -head(x, torch.zeros(4, dtype=torch.long), **NONE).detach()

    heads = [ElasticFaceHead(2, 2, 1.0, seed=seed, std=0.3, form="cosface") for seed in (0, 0, 1)]
    for head in heads:
        head.weight.data.copy_(torch.eye(2))
    a, b, c = (margins(head) for head in heads)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(a.unique()) == 4
    assert not torch.equal(margins(heads[0]), a)
    assert ElasticFaceHead(2, 2, form="cosface").margin == 0.35
    with pytest.raises(ValueError, match="ElasticFaceHead: form must be one of 'arcface', 'cosface', got 'sphere'"):
        ElasticFaceHead(2, 2, form="sphere")
    with pytest.raises(ValueError, match=r"elasticface_loss: noise must be \(b,\) with b = 40, got \(3,\)"):
        elasticface_loss(*ALL, noise=torch.ones(3))


def test_elastic_margins_differ_between_processes(monkeypatch):
    first = ElasticFaceHead(D, N, std=0.3, generator=torch.Generator().manual_seed(0))
    value = first(EMBEDDINGS.float(), IDENTITIES)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    second = ElasticFaceHead(D, N, std=0.3, generator=torch.Generator().manual_seed(0))
    assert second(EMBEDDINGS.float(), IDENTITIES) != value
