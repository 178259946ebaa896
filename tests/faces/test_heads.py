"""The contract of every margin head: naive NumPy references, exact gradients, precision, state and errors."""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch

from kdlib.testing._meta import on_meta
from kdlib_faces import heads
from kdlib_faces.heads import (
    AdaFaceHead,
    ArcFaceHead,
    CombinedMarginHead,
    CosFaceHead,
    CurricularFaceHead,
    ElasticFaceHead,
    MagFaceHead,
    SubCenterArcFaceHead,
)
from kdlib_faces.heads._margin import MarginHead
from tests.faces import reference_heads as reference
from tests.faces.reference_heads import random

HEADS = [x for x in vars(heads).values() if inspect.isclass(x) and issubclass(x, MarginHead)]
TABLE = {
    ArcFaceHead: (heads.arcface_loss, 0.5),
    CosFaceHead: (heads.cosface_loss, 0.35),
    CombinedMarginHead: (heads.combined_margin_loss, 0.3),
    SubCenterArcFaceHead: (heads.sub_center_arcface_loss, 0.5),
    AdaFaceHead: (heads.adaface_loss, 0.4),
    MagFaceHead: (heads.magface_loss, 0.45),
    CurricularFaceHead: (heads.curricularface_loss, 0.5),
    ElasticFaceHead: (heads.elasticface_loss, 0.5),
}
FUNCTIONS, MARGINS = ({kind: row[column] for kind, row in TABLE.items()} for column in (0, 1))
# Options with which a margin of 0 leaves the plain softmax over cosines. CurricularFace also changes the negatives.
PLAIN = {CombinedMarginHead: {"cosine_margin": 0.0}, MagFaceHead: {"norm_weight": 0.0, "max_margin": 0.0}}


def centers_of(kind, n, d, seed=0, dtype=torch.float64):
    """Centers in the shape of a head."""
    return random(n, *((2,) if kind is SubCenterArcFaceHead else ()), d, seed=seed, dtype=dtype)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"
)  # in torch's own forward mode
def test_second_derivatives_and_forward_mode():
    embeddings, centers = random(3, 4), random(5, 4, seed=1)
    identities = torch.tensor([0, 3, 1])

    def loss(e, c):
        return heads.arcface_loss(e, c, identities, scale=4.0)

    inputs = [x.requires_grad_() for x in (embeddings, centers)]
    assert torch.autograd.gradgradcheck(loss, inputs)
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)
    # A row without a gradient has no second derivative either.
    rows = torch.stack([torch.zeros(4), torch.full((4,), 1e-20), torch.full((4,), 3e37)]).requires_grad_()
    (slope,) = torch.autograd.grad(loss(rows, centers.float()), rows, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), rows)
    assert slope[:2].eq(0).all()
    assert slope.isfinite().all()
    assert second.eq(0).all()


def test_every_head_is_tested():
    assert set(HEADS) == set(FUNCTIONS)


@pytest.mark.parametrize("kind", HEADS)
class TestEveryHead:
    @pytest.mark.parametrize(("scale", "margin"), [(64.0, None), (8.0, 0.0), (16.0, 1.2)])
    def test_formula(self, kind, scale, margin):
        assert kind(4, 3).margin == MARGINS[kind]
        options = {} if margin is None else {"margin": margin}
        embeddings, centers, identities = random(40, 3), centers_of(kind, 7, 3, seed=1), torch.arange(40) % 7
        embeddings *= torch.linspace(0.1, 80, 40).unsqueeze(1)
        embeddings[5] = 0
        loss = FUNCTIONS[kind](embeddings, centers, identities, scale=scale, reduction="none", **options)
        margin = MARGINS[kind] if margin is None else margin
        expected = reference.losses(kind, embeddings.numpy(), centers.numpy(), identities.numpy(), scale, margin)
        np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9, atol=1e-9)

    def test_module_agrees_with_the_function(self, kind):
        head = kind(4, 3, 8.0, 0.2).eval()
        embeddings, identities, weight = random(5, 4, dtype=torch.float32), torch.arange(5) % 3, torch.rand(5)
        for reduction, dtype in (("mean", torch.int32), ("none", torch.uint8)):
            options = {"weight": weight, "reduction": reduction}
            expected = FUNCTIONS[kind](embeddings, head.weight, identities, scale=8.0, margin=0.2, **options)
            assert torch.equal(head(embeddings, identities.to(dtype), **options), expected)
        assert kind.per_sample
        assert head(embeddings, identities).shape == ()
        assert kind(4, 3, reduction="none")(embeddings, identities).shape == (5,)

    def test_gradient(self, kind):
        centers = centers_of(kind, 3, 4, seed=1).requires_grad_()
        identities = torch.tensor([0, 1, 2, 0, 0, 1])  # repeated, so that gathered centers add up
        own = torch.nn.functional.normalize(centers.detach().reshape(3, -1, 4)[:, 0], dim=1)[identities]
        near, opposite = (0.05 * random(6, 4) + sign * own for sign in (1, -1))  # the second beyond pi - margin
        for embeddings in (random(6, 4), 40 * random(6, 4, seed=2), 70 * near, opposite):
            norms = embeddings.norm(dim=1, keepdim=True)

            def loss(e, c, norms=norms):
                # The quality of AdaFace gets no gradient: compare directions at constant norms.
                e = norms * torch.nn.functional.normalize(e) if kind is AdaFaceHead else e
                return FUNCTIONS[kind](e, c, identities, scale=4.0, reduction="none")

            assert torch.autograd.gradcheck(loss, (embeddings.requires_grad_(), centers))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_embeddings_at_the_center_and_opposite_to_it(self, kind, sign, dtype):
        centers = centers_of(kind, 5, 16, dtype=dtype).requires_grad_()
        embeddings = (sign * 7 * centers.detach().reshape(5, -1, 16)[:, 0]).requires_grad_()
        loss = FUNCTIONS[kind](embeddings, centers, torch.arange(5))
        loss.backward()
        for x in (embeddings, centers):
            assert torch.isfinite(x.grad).all()
            assert (x.grad.norm(dim=-1) <= 2 * 64 / x.detach().norm(dim=-1)).all()

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
        head = kind(64, 10).eval()
        embeddings, identities = random(6, 64, dtype=torch.float32), torch.arange(6)
        expected = head(embeddings, identities)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = head(embeddings, identities)
            low = head(embeddings.bfloat16(), identities)
        assert torch.equal(loss, expected)
        assert low.dtype == torch.float32
        assert head.double()(embeddings.double(), identities).dtype == torch.float64

    def test_weight(self, kind):
        head = kind(4, 3).eval()
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
        head = kind(4, 3, margin=0.0, **PLAIN.get(kind, {})).eval()
        if kind is CurricularFaceHead:
            head.t.fill_(1)  # from here on hard negatives count more than others
        embeddings, identities = random(5, 4, dtype=torch.float32), torch.arange(5) % 3
        losses = []
        for margin in (0.0, 0.2, 0.4):
            head.margin = margin
            losses.append(head(embeddings, identities).item())
        assert losses == sorted(losses)
        assert losses[0] < losses[2]
        if kind is not CurricularFaceHead:
            centers = torch.nn.functional.normalize(head.weight, dim=-1).reshape(3, -1, 4)
            cosines = torch.einsum("bd,nkd->bnk", torch.nn.functional.normalize(embeddings), centers).amax(2)
            plain = torch.nn.functional.cross_entropy(64 * cosines, identities)
            assert losses[0] == pytest.approx(plain.item(), rel=1e-5)

    @pytest.mark.parametrize(
        ("embeddings", "identities", "error", "words"),
        [
            (torch.ones(2, 5), torch.arange(2), ValueError, r"embeddings must be \(b, 4\) like centers \(3, (3, )?4\)"),
            (torch.ones(2, 4, 1), torch.arange(2), ValueError, r"embeddings must be \(b, d\), got \(2, 4, 1\)"),
            (torch.ones(2, 4).long(), torch.arange(2), TypeError, "embeddings must be a floating-point tensor"),
            (torch.ones(2, 4), torch.tensor([0, 3]), ValueError, "identities must be from 0 to 2, got 3"),
            (torch.ones(2, 4), torch.tensor([-1, 1]), ValueError, "identities must be from 0 to 2, got -1"),
            (torch.ones(2, 4), torch.arange(3), ValueError, r"identities must be \(b,\) with b = 2"),
            (torch.ones(2, 4), torch.ones(2), TypeError, "identities must be whole numbers, got torch.f"),
            (torch.ones(2, 4), [0, 1], TypeError, "identities must be a torch.Tensor, got list"),
            (torch.ones(2, 4), torch.tensor([True, False]), TypeError, "whole numbers, got torch.bool"),
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
        assert torch.equal(loss, head.eval()(embeddings, torch.from_numpy(labels)))
        assert loss.dtype == torch.float32

    def test_state_of_another_number_of_identities(self, kind):
        middle = "3, " if kind is SubCenterArcFaceHead else ""
        message = (
            rf"{kind.__name__}: weight must be .* = \(3, {middle}4\), got \(5, {middle}4\); build the loss with "
            rf"num_identities=5, .*embedding_dim=4"
        )
        with pytest.raises(RuntimeError, match=message):
            kind(4, 3).load_state_dict(kind(4, 5).state_dict())

    def test_initial_centers(self, kind):
        a, b = (kind(256, 50, generator=torch.Generator().manual_seed(3)).weight for _ in range(2))
        before = torch.get_rng_state()
        kind(4, 3, generator=torch.Generator().manual_seed(3))
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(a, b)
        assert a.shape == ((50, 3, 256) if kind is SubCenterArcFaceHead else (50, 256))
        assert a.square().sum(-1).mean().item() == pytest.approx(1, abs=0.05)

    def test_compiles_without_graph_breaks(self, kind):
        head = kind(4, 3)
        other = copy.deepcopy(head)
        embeddings, identities = random(5, 4, dtype=torch.float32), torch.arange(5) % 3
        compiled = torch.compile(other, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(embeddings, identities), head(embeddings, identities))
        for name, value in head.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value)

    def test_runs_on_the_meta_device(self, kind):
        """No value is read, and no tensor stays on the CPU."""
        head = kind(6, 4).to("meta")
        embeddings = torch.empty(5, 6, device="meta", requires_grad=True)
        identities = torch.zeros(5, dtype=torch.long, device="meta")
        with on_meta():
            head(embeddings, identities, weight=torch.empty(5, device="meta")).backward()
        assert embeddings.grad.is_meta
        assert head.weight.grad.is_meta

    def test_state_continues_in_a_copy(self, kind):
        head = kind(4, 3)
        identities = torch.arange(5) % 3

        def losses(each):
            return [each(20 * random(5, 4, seed=i, dtype=torch.float32), identities).item() for i in range(3)]

        losses(head)
        loaded = kind(4, 3)
        loaded.load_state_dict(head.state_dict())
        copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded]
        expected = losses(head)
        assert [losses(each) for each in copies] == [expected] * 3
        state = copy.deepcopy(head.eval().state_dict())
        generator = torch.get_rng_state()
        assert losses(head) == losses(head)
        head.train()(torch.ones(5, 4), identities)
        assert torch.equal(generator, torch.get_rng_state())
        buffers = {name for name, _ in head.named_buffers()}
        changed = {name for name, x in head.state_dict().items() if not torch.equal(x, state[name])}
        assert changed == buffers

    def test_two_forward_passes_before_backward(self, kind):
        head = kind(4, 3)
        embeddings, identities = random(5, 4, dtype=torch.float32).requires_grad_(), torch.arange(5) % 3
        (head(embeddings, identities) + head(2 * embeddings, identities)).backward()
        assert torch.isfinite(embeddings.grad).all()
        assert not any(x.requires_grad for x in head.buffers())
