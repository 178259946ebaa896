"""Heads whose margin or logits depend on norms or running values, and the monotonicity of all heads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.heads import (
    AdaFaceHead,
    CurricularFaceHead,
    ElasticFaceHead,
    MagFaceHead,
    adaface_loss,
    arcface_loss,
    combined_margin_loss,
    curricularface_loss,
    elasticface_loss,
    magface_loss,
)
from tests.faces.reference_heads import ALL, EMBEDDINGS, IDENTITIES, NONE, B, D, N, at_angle, close, expected, random

ANGULAR = {
    "combined": lambda m, *x: combined_margin_loss(*x, margin=m, angle_factor=1.0 + m, scale=4.0),
    "adaface, small norm": lambda m, *x: adaface_loss(*x, margin=m, norm_mean=100, norm_std=1, scale=4.0),
    "adaface, large norm": lambda m, *x: adaface_loss(*x, margin=m, norm_mean=0, norm_std=1, scale=4.0),
    "magface": lambda m, *x: magface_loss(*x, margin=m, max_margin=math.pi, min_norm=1.0, max_norm=5.0, scale=4.0),
    "curricular": lambda m, *x: curricularface_loss(*x, margin=m, t=1.0, scale=4.0),
    "elastic": lambda m, *x: elasticface_loss(*x, margin=0.0, noise=torch.ones(1), std=m - 0.5, scale=4.0),
}


@pytest.mark.parametrize("loss", ANGULAR.values(), ids=ANGULAR)
@settings(max_examples=40)
@given(margin=st.floats(0, math.pi), a=st.floats(0, math.pi), b=st.floats(0, math.pi))
def test_losses_increase_with_the_angle(loss, margin, a, b):
    losses = []
    for angle in sorted((a, b)):
        embedding, centers = at_angle(angle)
        losses.append(loss(margin, embedding.requires_grad_(), centers, torch.tensor([0])))
        losses[-1].backward()
        assert torch.isfinite(embedding.grad).all()
    assert losses[1].item() >= losses[0].item() - 1e-9


@pytest.mark.parametrize("loss", [x for name, x in ANGULAR.items() if name != "curricular"])
@settings(max_examples=20)
@given(margin=st.floats(0, 3.1), angle=st.floats(0.01, 3.13))
def test_losses_are_continuous(loss, margin, angle):
    a, b = (loss(margin, *at_angle(angle + step), torch.tensor([0])).item() for step in (-1e-8, 1e-8))
    assert a == pytest.approx(b, abs=1e-5)


# AdaFace.


def test_adaface_formula_and_number():
    options = {"margin": 0.4, "concentration": 0.5, "norm_mean": 60.0, "norm_std": 25.0}
    tensors = {**options, "norm_mean": torch.tensor(60.0).double(), "norm_std": torch.tensor(25.0).double()}
    close(adaface_loss(*ALL, **tensors, **NONE), expected(AdaFaceHead, **options))
    # One standard deviation above the mean: angle 0.6 - 0.4 * 0.5, cosine margin 0.4 * 1.5.
    embedding, centers = at_angle(0.6, length=85.001)
    loss = adaface_loss(embedding, centers[:2], torch.tensor([0]), scale=4.0, **options).item()
    assert loss == pytest.approx(math.log1p(math.exp(-4 * (math.cos(0.4) - 0.6))), rel=1e-12)


def test_adaface_emphasizes_hard_samples_of_large_norm():
    """The pull on an embedding at 80 degrees, relative to one at 35 degrees."""

    def pull(angle, norm):
        embedding, centers = at_angle(math.radians(angle), length=norm)
        options = {"scale": 0.1, "norm_mean": 20, "norm_std": 5}
        adaface_loss(embedding.requires_grad_(), centers[:1].repeat(2, 1), torch.tensor([0]), **options).backward()
        return norm * embedding.grad.norm().item()

    assert pull(80, 35.0) / pull(35, 35.0) > 1.5 * pull(80, 5.0) / pull(35, 5.0)


def test_adaface_statistics():
    head = AdaFaceHead(D, N, momentum=0.1, max_norm=70.0)
    mean, std = 20.0, 100.0
    for seed in range(3):
        embeddings = EMBEDDINGS + random(B, D, seed=seed)
        norms = np.minimum(np.linalg.norm(embeddings.numpy(), axis=1), 70)
        mean, std = mean + 0.1 * (norms.mean() - mean), std + 0.1 * (norms.std(ddof=1) - std)
        loss = head(embeddings.float(), IDENTITIES, **NONE)
        assert head.norm_mean.item() == pytest.approx(mean, rel=1e-5)
        assert head.norm_std.item() == pytest.approx(std, rel=1e-5)
    again = adaface_loss(
        embeddings.float(), head.weight, IDENTITIES, norm_mean=head.norm_mean, norm_std=head.norm_std, **NONE
    )  # fmt: skip
    assert torch.equal(loss, again)


@pytest.mark.parametrize("kind", [AdaFaceHead, CurricularFaceHead])
def test_masked_and_broken_samples_do_not_enter_the_running_values(kind):
    embeddings, weight = EMBEDDINGS.float(), torch.ones(B)
    weight[[0, 9, 17]] = 0
    broken = embeddings.clone()
    broken[0], broken[9, 1] = torch.nan, torch.inf
    one, two, three = (kind(D, N, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    one(embeddings[weight > 0], IDENTITIES[weight > 0])
    two(broken, IDENTITIES, weight=weight)
    keep = torch.arange(B) != 17
    three(broken[keep], IDENTITIES[keep])
    initial = dict(kind(D, N).named_buffers())
    for name, value in one.named_buffers():
        assert not torch.equal(value, initial[name])
        torch.testing.assert_close(dict(two.named_buffers())[name], value)
        torch.testing.assert_close(dict(three.named_buffers())[name], value)
    for x, w in ((embeddings, torch.zeros(B)), (broken * torch.nan, None), (embeddings[:0], torch.ones(0))):
        before = [buffer.clone() for buffer in one.buffers()]
        one(x, IDENTITIES[: len(x)], weight=w)
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), before, strict=True))
    if kind is AdaFaceHead:
        one(embeddings[:1], IDENTITIES[:1])  # a single norm has no standard deviation
        assert all(torch.equal(a, b) for a, b in zip(one.buffers(), before, strict=True))


@pytest.mark.parametrize("kind", [AdaFaceHead, CurricularFaceHead, ElasticFaceHead])
def test_an_invalid_call_does_not_change_the_state(kind):
    head = kind(D, N)
    for bad in ({"weight": torch.ones(3)}, {"identities": IDENTITIES + 1}):
        with pytest.raises(ValueError, match="must be"):
            head(EMBEDDINGS.float(), bad.get("identities", IDENTITIES), weight=bad.get("weight"))
        assert all(torch.equal(a, b) for a, b in zip(head.buffers(), kind(D, N).buffers(), strict=True))


# MagFace.


def test_magface_formula_and_number():
    options = {"margin": 0.2, "max_margin": 1.0, "min_norm": 20.0, "max_norm": 60.0, "norm_weight": 5.0}
    close(magface_loss(*ALL, **options, **NONE), expected(MagFaceHead, **options))
    # The norm 40 is in the middle: margin 0.6, and 5 * (1 / 40 + 40 / 3600).
    embedding, centers = at_angle(0.4, length=40.0)
    loss = magface_loss(embedding, centers[:2], torch.tensor([0]), scale=4.0, **options).item()
    assert loss == pytest.approx(math.log1p(math.exp(-4 * math.cos(1.0))) + 5 * (1 / 40 + 40 / 3600), rel=1e-12)


def test_magface_norm_is_optimal_inside_its_bounds_and_larger_near_the_center():
    def slope(angle, length):
        """Derivative of the loss along the embedding, that is by the norm alone."""
        embedding, centers = at_angle(angle, length=length)
        magface_loss(embedding.requires_grad_(), centers, torch.tensor([0])).backward()
        return (embedding.grad * embedding.detach() / length).sum().item()

    lengths = np.linspace(11, 109, 99)
    optima = [lengths[int(np.abs([slope(angle, length) for length in lengths]).argmin())] for angle in (0.7, 0.9, 1.2)]
    assert optima == sorted(optima, reverse=True)
    assert slope(0.3, 10.5) < 0
    assert slope(0.3, 9.0) == slope(0.3, 111.0) == 0
    with pytest.raises(ValueError, match=r"MagFaceHead: max_margin must be .* >= 0\.9"):
        MagFaceHead(4, 3, margin=0.9)
    with pytest.raises(ValueError, match=r"MagFaceHead: max_norm must be .* > 10"):
        MagFaceHead(4, 3, max_norm=10.0)


# CurricularFace.


@pytest.mark.parametrize("t", [-0.3, 0.0, 0.6])
def test_curricular_formula(t):
    value = expected(CurricularFaceHead, scale=16.0, margin=0.5, t=t)
    close(curricularface_loss(*ALL, scale=16.0, t=torch.tensor(t, dtype=torch.float64), **NONE), value)
    close(curricularface_loss(*ALL, scale=16.0, t=t, **NONE), value)


def test_curricular_without_hard_negatives_is_arcface():
    embeddings = torch.eye(4)[:3] + 0.01
    args = (embeddings, torch.eye(4)[:3], torch.arange(3))
    torch.testing.assert_close(curricularface_loss(*args, t=0.7), arcface_loss(*args))


def test_curricular_t_is_the_running_mean_of_target_cosines():
    head = CurricularFaceHead(D, N, momentum=0.2)
    t = 0.0
    for seed in range(3):
        embeddings = EMBEDDINGS + random(B, D, seed=seed)
        cosines = torch.nn.functional.cosine_similarity(embeddings, head.weight.detach().double()[IDENTITIES])
        t += 0.2 * (cosines.mean().item() - t)
        loss = head(embeddings.float(), IDENTITIES, **NONE)
        assert head.t.item() == pytest.approx(t, abs=1e-6)
    again = curricularface_loss(embeddings.float(), head.weight, IDENTITIES, t=head.t, **NONE)
    assert torch.equal(loss, again)
