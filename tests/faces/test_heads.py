"""Margin heads: naive NumPy references, exact gradients at every angle, and the contract of every head."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.testing._meta import on_meta
from kdlib_faces import heads
from kdlib_faces.heads import ArcFaceHead, CosFaceHead, arcface_loss, cosface_loss

HEADS = [getattr(heads, name) for name in heads.__all__ if inspect.isclass(getattr(heads, name))]
FUNCTIONS = {ArcFaceHead: arcface_loss, CosFaceHead: cosface_loss}
MARGINS = {ArcFaceHead: 0.5, CosFaceHead: 0.35}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(kind, embeddings, centers, identities, scale, margin):
    """The formula with an arc cosine, one sample at a time."""
    losses = []
    for embedding, own in zip(embeddings, identities, strict=True):
        lengths = np.linalg.norm(embedding) * np.linalg.norm(centers, axis=1)
        cosines = np.clip(centers @ embedding / lengths, -1, 1) if embedding.any() else np.zeros(len(centers))
        angle = np.arccos(cosines[own])
        if kind is CosFaceHead:
            cosines[own] -= margin
        else:
            cosines[own] = cosines[own] + np.cos(margin) - 1 if angle > np.pi - margin else np.cos(angle + margin)
        logits = scale * (cosines - cosines.max())
        losses.append(np.log(np.exp(logits).sum()) - logits[own])
    return np.array(losses)


def at_angle(angle, d=4, length=3.0):
    """An embedding at `angle` from the first of three orthogonal centers, in the plane with an unused axis."""
    embedding = torch.zeros(1, d, dtype=torch.float64)
    embedding[0, 0], embedding[0, 3] = math.cos(angle), math.sin(angle)
    return length * embedding, torch.eye(3, d, dtype=torch.float64)


def test_every_head_is_tested():
    assert set(HEADS) == set(FUNCTIONS)


@pytest.mark.parametrize("kind", HEADS)
class TestEveryHead:
    @pytest.mark.parametrize(("scale", "margin"), [(64.0, None), (8.0, 0.0), (16.0, 1.2)])
    def test_formula(self, kind, scale, margin):
        margin = MARGINS[kind] if margin is None else margin
        embeddings, centers, identities = random(40, 3), random(7, 3, seed=1), torch.arange(40) % 7
        embeddings[5] = 0
        loss = FUNCTIONS[kind](embeddings, centers, identities, scale=scale, margin=margin, reduction="none")
        expected = reference(kind, embeddings.numpy(), centers.numpy(), identities.numpy(), scale, margin)
        np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9, atol=1e-9)

    def test_module_agrees_with_the_function(self, kind):
        head = kind(4, 3, 8.0, 0.2)
        embeddings, identities, weight = random(5, 4, dtype=torch.float32), torch.arange(5) % 3, torch.rand(5)
        for reduction, dtype in (("mean", torch.int32), ("none", torch.uint8)):
            options = {"weight": weight, "reduction": reduction}
            expected = FUNCTIONS[kind](embeddings, head.weight, identities, scale=8.0, margin=0.2, **options)
            assert torch.equal(head(embeddings, identities.to(dtype), **options), expected)
        assert kind.per_sample
        assert head(embeddings, identities).shape == ()
        assert kind(4, 3, reduction="none")(embeddings, identities).shape == (5,)

    def test_gradient(self, kind):
        centers = random(3, 4, seed=1).requires_grad_()
        identities = torch.tensor([0, 1, 2, 0, 0, 1])  # repeated, so that gathered centers add up
        opposite = 0.05 * random(6, 4) - (centers / centers.norm(dim=1, keepdim=True)).detach()[identities]
        for embeddings in (random(6, 4), opposite):  # the second beyond pi - margin

            def loss(e, c):
                return FUNCTIONS[kind](e, c, identities, scale=4.0, reduction="none")

            assert torch.autograd.gradcheck(loss, (embeddings.requires_grad_(), centers))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_embeddings_at_the_center_and_opposite_to_it(self, kind, sign, dtype):
        centers = random(5, 16, dtype=dtype).requires_grad_()
        embeddings = (sign * 7 * centers.detach()).requires_grad_()
        loss = FUNCTIONS[kind](embeddings, centers, torch.arange(5))
        loss.backward()
        for x in (embeddings, centers):
            assert torch.isfinite(x.grad).all()
            assert (x.grad.norm(dim=1) <= 2 * 64 / x.detach().norm(dim=1)).all()

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            *[(torch.float32, value) for value in (0.0, 1e-40, 1e-20, 1e30, 3e38)],
            *[(torch.float16, value) for value in (300.0, 60000.0, 1e-7, 1e-2)],
            (torch.bfloat16, 1e38),
        ],
    )
    def test_finite_for_any_finite_embedding(self, kind, value, dtype):
        head = kind(8, 3, generator=torch.Generator().manual_seed(0))
        embeddings = (value * random(4, 8).sign()).to(dtype).requires_grad_()
        loss = head(embeddings, torch.tensor([0, 1, 2, 0]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(embeddings.grad).all()
        assert torch.isfinite(head.weight.grad).all()
        if value < 1e-12:
            assert not embeddings.grad.any()

    def test_zero_center(self, kind):
        head = kind(4, 3)
        with torch.no_grad():
            head.weight[1] = 0
        head(random(3, 4, dtype=torch.float32), torch.arange(3)).backward()
        assert torch.isfinite(head.weight.grad).all()
        assert not head.weight.grad[1].any()
        assert head.weight.grad[0].any()

    def test_autocast_keeps_float32(self, kind):
        head = kind(64, 10)
        embeddings, identities = random(6, 64, dtype=torch.float32), torch.arange(6)
        expected = head(embeddings, identities)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = head(embeddings, identities)
            low = head(embeddings.bfloat16(), identities)
        assert torch.equal(loss, expected)
        assert low.dtype == torch.float32
        assert head.double()(embeddings.double(), identities).dtype == torch.float64

    def test_weight(self, kind):
        head = kind(4, 3)
        embeddings, identities = random(3, 4, dtype=torch.float32).requires_grad_(), torch.arange(3)
        each = head(embeddings, identities, reduction="none").detach()
        weight = torch.tensor([1.0, 0.0, 3.0])
        torch.testing.assert_close(head(embeddings, identities, weight=weight), (each[0] + 3 * each[2]) / 4)
        masked = head(embeddings, identities, weight=torch.zeros(3))
        masked.backward()
        assert masked.item() == 0
        assert not embeddings.grad.any()
        empty = head(embeddings[:0], identities[:0])
        empty.backward()
        assert empty.item() == 0

    def test_a_schedule_may_set_the_margin(self, kind):
        head = kind(4, 3, margin=0.0)
        embeddings, identities = random(5, 4, dtype=torch.float32), torch.arange(5) % 3
        losses = []
        for margin in (0.0, 0.2, 0.4):
            head.margin = margin
            losses.append(head(embeddings, identities).item())
        assert losses == sorted(losses)
        assert losses[0] < losses[2]
        cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(head.weight).T
        plain = torch.nn.functional.cross_entropy(64 * cosines, identities)
        assert losses[0] == pytest.approx(plain.item(), rel=1e-5)

    @pytest.mark.parametrize(
        ("embeddings", "identities", "error", "words"),
        [
            (torch.ones(2, 5), torch.arange(2), ValueError, r"embeddings must be \(b, 4\) like centers \(3, 4\)"),
            (torch.ones(2, 4, 1), torch.arange(2), ValueError, r"embeddings must be \(b, d\), got \(2, 4, 1\)"),
            (torch.ones(2, 4).long(), torch.arange(2), TypeError, "embeddings must be a floating-point tensor"),
            (torch.ones(2, 4), torch.tensor([0, 3]), ValueError, "identities must be from 0 to 2, got 3"),
            (torch.ones(2, 4), torch.tensor([-1, 1]), ValueError, "identities must be from 0 to 2, got -1"),
            (torch.ones(2, 4), torch.arange(3), ValueError, r"identities must be \(b,\) = \(2,\)"),
            (torch.ones(2, 4), torch.ones(2), TypeError, "identities must be a tensor of whole numbers, got torch.f"),
            (torch.ones(2, 4), [0, 1], TypeError, "identities must be a tensor of whole numbers, got list"),
            (torch.ones(2, 4), torch.tensor([True, False]), ValueError, "whole numbers, got .* of torch.bool"),
        ],
    )
    def test_invalid_calls(self, kind, embeddings, identities, error, words):
        with pytest.raises(error, match=words):
            kind(4, 3)(embeddings, identities)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"reduction": "sum"}, "reduction must be one of 'mean', 'none', got 'sum'"),
            ({"weight": torch.ones(3)}, r"weight must be \(b,\) = \(2,\), got \(3,\)"),
        ],
    )
    def test_invalid_options(self, kind, options, words):
        with pytest.raises(ValueError, match=words):
            kind(4, 3)(torch.ones(2, 4), torch.arange(2), **options)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"embedding_dim": 0}, "embedding_dim must be"),
            ({"num_identities": 2.5}, "num_identities must be"),
            ({"scale": 0.0}, "scale must be"),
            ({"scale": math.inf}, "scale must be"),
            ({"margin": -0.1}, "margin must be"),
            ({"margin": "0.5"}, "margin must be"),
            ({"reduction": "sum"}, "reduction must be"),
        ],
    )
    def test_invalid_arguments(self, kind, arguments, words):
        with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: {words}"):
            kind(**{"embedding_dim": 4, "num_identities": 3, **arguments})

    def test_repr_rebuilds(self, kind):
        head = kind(4, 3, 32.0, 0.2, reduction="none")
        assert repr(eval(repr(head), {kind.__name__: kind})) == repr(head)
        assert f"margin={head.margin}" in repr(head)

    def test_numpy_numbers(self, kind):
        labels, scale, margin = np.array([0, 2, 1]), np.float32(8), np.float64(0.25)
        generator = torch.Generator().manual_seed(0)
        head = kind(np.int32(4), labels.max() + 1, scale, margin, generator=generator)
        assert repr(head) == repr(kind(4, 3, 8.0, 0.25))
        embeddings = random(3, 4, dtype=torch.float32).requires_grad_()
        loss = FUNCTIONS[kind](embeddings, head.weight, torch.from_numpy(labels), scale=scale, margin=margin)
        assert torch.equal(loss, head(embeddings, torch.from_numpy(labels)))
        assert loss.dtype == torch.float32

    def test_state_of_another_number_of_identities(self, kind):
        message = rf"{kind.__name__}: weight must be .* = \(3, 4\), got \(5, 4\); build the loss with num_identities=5"
        with pytest.raises(RuntimeError, match=message):
            kind(4, 3).load_state_dict(kind(4, 5).state_dict())

    def test_initial_centers(self, kind):
        a, b = (kind(256, 50, generator=torch.Generator().manual_seed(3)).weight for _ in range(2))
        before = torch.get_rng_state()
        kind(4, 3, generator=torch.Generator().manual_seed(3))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(a, b)
        assert a.shape == (50, 256)
        assert a.square().sum(1).mean().item() == pytest.approx(1, abs=0.05)

    def test_compiles_without_graph_breaks(self, kind):
        head = kind(4, 3)
        embeddings, identities = random(5, 4, dtype=torch.float32), torch.arange(5) % 3
        compiled = torch.compile(head, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(embeddings, identities), head(embeddings, identities))


@settings(max_examples=60, deadline=None)
@given(margin=st.floats(0, math.pi), a=st.floats(0, math.pi), b=st.floats(0, math.pi))
def test_arcface_increases_with_the_angle(margin, a, b):
    losses = [
        arcface_loss(*at_angle(angle), torch.tensor([0]), scale=4.0, margin=margin).item() for angle in sorted((a, b))
    ]
    assert losses[1] >= losses[0] - 1e-9


@settings(max_examples=40, deadline=None)
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


@pytest.mark.parametrize("kind", HEADS)
def test_runs_on_the_meta_device(kind):
    """No value is read, and no tensor stays on the CPU."""
    head = kind(6, 4).to("meta")
    embeddings = torch.empty(5, 6, device="meta", requires_grad=True)
    identities = torch.zeros(5, dtype=torch.long, device="meta")
    with on_meta():
        head(embeddings, identities, weight=torch.empty(5, device="meta")).backward()
    assert embeddings.grad.is_meta
    assert head.weight.grad.is_meta
