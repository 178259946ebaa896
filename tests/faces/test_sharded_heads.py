"""Heads whose centers are computed in chunks, sharded over processes, or sampled: the same as the plain heads."""

import math

import pytest
import torch
from torch import nn

from kdlib_faces import heads
from kdlib_faces.heads import (
    AdaFaceHead,
    ArcFaceHead,
    CosFaceHead,
    SampledHead,
    shard_head,
    skip_rows_without_gradient,
)
from tests.faces.reference_heads import random
from tests.faces.test_heads import FUNCTIONS, HEADS, centers_of
from tests.processes import read_outcomes


def results(kind, embeddings, centers, identities, **options):
    """Losses and both gradients."""
    embeddings, centers = (x.detach().clone().requires_grad_() for x in (embeddings, centers))
    losses = FUNCTIONS[kind](embeddings, centers, identities, reduction="none", **options)
    (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
    return losses.detach(), embeddings.grad, centers.grad


@pytest.mark.parametrize("kind", HEADS)
class TestChunks:
    @pytest.mark.parametrize("chunk_size", [1, 4, 13, 50])
    def test_same_values_and_gradients(self, kind, chunk_size):
        centers, identities = centers_of(kind, 13, 5), torch.arange(12) % 4
        own = centers.reshape(13, -1, 5)[identities, 0]
        embeddings = 30 * random(12, 5, seed=1)
        # At the center, opposite to it, beyond pi - margin, and zero.
        embeddings[:4] = torch.stack([3 * own[0], -3 * own[1], 0.01 * random(5) - own[2], 0 * own[3]])
        expected = results(kind, embeddings, centers, identities)
        for x, y in zip(results(kind, embeddings, centers, identities, chunk_size=chunk_size), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
    )
    def test_low_precision(self, kind, dtype, tolerance):
        embeddings, centers = 30 * random(9, 16, dtype=dtype), centers_of(kind, 40, 16, seed=1, dtype=dtype)
        expected = results(kind, embeddings, centers, torch.arange(9))
        for x, y in zip(results(kind, embeddings, centers, torch.arange(9), chunk_size=7), expected, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * y.abs().max().item())

    def test_gradcheck(self, kind):
        embeddings, centers = 40 * random(4, 3), centers_of(kind, 5, 3, seed=1).requires_grad_()

        def loss(e, c):
            e = 40 * nn.functional.normalize(e) if kind is AdaFaceHead else e  # its quality gets no gradient
            return FUNCTIONS[kind](e, c, torch.tensor([0, 1, 1, 4]), scale=4.0, reduction="none", chunk_size=2)

        assert torch.autograd.gradcheck(loss, (embeddings.requires_grad_(), centers))

    def test_module(self, kind):
        head = kind(4, 7, chunk_size=3)
        assert repr(eval(repr(head), {kind.__name__: kind})) == repr(head)
        plain = kind(4, 7)
        plain.load_state_dict(head.state_dict())
        embeddings, identities = random(5, 4, dtype=torch.float32), torch.arange(5)
        for _ in range(2):  # with running statistics
            torch.testing.assert_close(head(embeddings, identities), plain(embeddings, identities))
        with pytest.raises(ValueError, match=f"{kind.__name__}: chunk_size must be"):
            kind(4, 7, chunk_size=0)

    def test_one_identity_an_empty_batch_and_frozen_centers(self, kind):
        head = kind(4, 1, chunk_size=3)
        embeddings = random(3, 4, dtype=torch.float32).requires_grad_()
        head(embeddings, torch.zeros(3, dtype=torch.long)).backward()
        assert torch.isfinite(embeddings.grad).all()
        assert torch.isfinite(head.weight.grad).all()
        assert head(embeddings[:0], torch.arange(0)).item() == 0
        head = kind(4, 5, chunk_size=2).requires_grad_(False)
        head(embeddings, torch.arange(3)).backward()
        assert head.weight.grad is None

    def test_only_the_given_negatives_count(self, kind):
        centers, identities = centers_of(kind, 13, 5), torch.tensor([2, 7, 2, 11])
        embeddings, kept = 20 * random(4, 5, seed=1), torch.tensor([1, 2, 5, 7, 8, 11])
        got = results(kind, embeddings, centers, identities, negatives=kept, chunk_size=4)
        expected = results(kind, embeddings, centers[kept], torch.searchsorted(kept, identities))
        torch.testing.assert_close(got[:2], expected[:2])
        torch.testing.assert_close(got[2][kept], expected[2])
        others = torch.ones(13, dtype=torch.bool)
        others[kept] = False
        assert not got[2][others].any()


def test_a_second_derivative_in_chunks_is_refused():
    embeddings = random(3, 4).requires_grad_()
    loss = ArcFaceHead(4, 9, chunk_size=2)(embeddings, torch.arange(3))
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_tensor_has_the_size_of_all_logits():
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    head, embeddings = CosFaceHead(4, 1000, chunk_size=10), random(20, 4, dtype=torch.float32)
    with Sizes():
        head(embeddings, torch.arange(20)).backward()
    assert max(sizes) == 4000  # the gradient of the centers; all logits are 20,000
    assert sizes.count(4000) <= 3


class TestSampledHead:
    def test_keeps_positives_and_redraws_negatives(self):
        head = SampledHead(CosFaceHead(8, 1000), 0.1, seed=3)
        identities = torch.tensor([5, 999, 5])
        seen = []
        for _ in range(3):
            rows = head.sample(identities)
            assert len(rows) == 100
            assert {5, 999} <= set(rows.tolist())
            assert torch.equal(rows, rows.unique())
            head(random(3, 8, dtype=torch.float32), identities)
            seen.append(set(rows.tolist()))
        assert len(seen[0] & seen[1]) < 30
        assert head.batches == 3

    def test_every_identity_is_drawn_equally_often(self):
        head, counts = SampledHead(CosFaceHead(2, 50), 0.2), torch.zeros(50)
        for _ in range(400):
            counts[head.sample(torch.tensor([7]))] += 1
            head.batches += 1
        assert counts[7] == 400
        others = counts[torch.arange(50) != 7]
        assert others.mean() == pytest.approx(400 * 9 / 49)
        assert others.min() > 45
        assert others.max() < 105

    def test_more_positives_than_the_rate(self):
        head = SampledHead(CosFaceHead(4, 20), 0.1)
        assert torch.equal(head.sample(torch.arange(6)), torch.arange(6))

    def test_eval_and_rate_one_are_the_head(self):
        embeddings, identities = random(3, 4, dtype=torch.float32), torch.arange(3)
        head = ArcFaceHead(4, 9)
        for sampled in (SampledHead(head, 1.0), SampledHead(head, 0.4).eval()):
            assert torch.equal(sampled(embeddings, identities), head(embeddings, identities))

    def test_state_continues(self):
        head, other = (SampledHead(CosFaceHead(4, 90), 0.3) for _ in range(2))
        embeddings, identities = random(3, 4, dtype=torch.float32), torch.arange(3)
        head(embeddings, identities)
        other.load_state_dict(head.state_dict())
        assert torch.equal(head(embeddings, identities), other(embeddings, identities))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((nn.Linear(2, 2), 0.1), "SampledHead: head must be a margin head, got Linear"),
            ((CosFaceHead(2, 3), 0.0), "SampledHead: rate must be"),
            ((CosFaceHead(2, 3), 1.1), "SampledHead: rate must be"),
        ],
    )
    def test_errors(self, arguments, words):
        with pytest.raises((TypeError, ValueError), match=words):
            SampledHead(*arguments)


class TestSkippedRows:
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
    def test_rows_are_updated_as_parameters_of_their_own(self, kind):
        """Each row is a parameter of its own that has a gradient only in some steps."""
        options = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
        weight = nn.Parameter(random(4, 3))
        rows = [nn.Parameter(row.clone()) for row in weight.detach()]
        optimizer = kind([weight], lr=0.1, weight_decay=0.1, **options)
        skip_rows_without_gradient(optimizer, weight)
        expected = kind(rows, lr=0.1, weight_decay=0.1, **options)
        for step, active in enumerate([(0, 1), (1, 2), (), (0, 1, 2)]):
            gradient = random(4, 3, seed=step + 5)
            weight.grad = torch.zeros_like(weight)
            for index, row in enumerate(rows):
                row.grad = gradient[index] if index in active else None
                if index in active:
                    weight.grad[index] = gradient[index]
                if kind is torch.optim.AdamW and step and expected.state[row]:
                    expected.state[row]["step"].fill_(step)  # which counts the steps of all rows
                elif kind is torch.optim.AdamW and index in active:
                    zeros = torch.zeros_like(row)
                    state = {"step": torch.tensor(float(step)), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
                    expected.state[row] = state
            optimizer.step()
            expected.step()
        torch.testing.assert_close(weight.detach(), torch.stack(rows).detach())
        assert optimizer.param_groups[0]["params"] == [weight]
        assert list(optimizer.state) == [weight]

    def test_errors(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))])
        with pytest.raises(ValueError, match="parameter must be one of the optimizer's, got another"):
            skip_rows_without_gradient(optimizer, nn.Parameter(torch.ones(2, 2)))
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
            skip_rows_without_gradient([], nn.Parameter(torch.ones(2, 2)))


def test_shard_head_refuses_what_it_cannot_shard():
    with pytest.raises(TypeError, match="shard_head: head must be a margin head, got Linear"):
        shard_head(nn.Linear(2, 2), None)
    with pytest.raises(TypeError, match="shard_head: mesh must be a DeviceMesh, got NoneType; use init_device_mesh"):
        shard_head(CosFaceHead(2, 2), None)


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """What all processes returned in each scenario of `head_processes`."""
    scenarios = read_outcomes("tests.faces.head_processes", tmp_path_factory.mktemp("heads"), request.param)
    assert not any(isinstance(each, str) for ranks in scenarios.values() for each in ranks), scenarios
    return scenarios


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
class TestProcesses:
    def test_every_head_equals_one_process_with_the_whole_batch(self, found):
        for differences in found["every_head"]:
            assert set(differences) == {kind.__name__ for kind in HEADS}
            assert max(differences.values()) < 1e-5

    def test_centers_from_the_meta_device(self, found):
        world = len(found["drawn_centers"])
        each = math.ceil(9001 / world)
        for rank, result in enumerate(found["drawn_centers"]):
            count = min(each, 9001 - each * rank)
            assert (result["local"], result["values"]) == ([count, 4], 4 * count)
            assert result["sum"] == pytest.approx(-130.941355, abs=1e-4)  # for any number of processes
            assert result["std"] == pytest.approx(0.5, abs=0.01)
            assert (result["equal_rows"], result["norm_mean"]) == (0, 20.0)

    def test_fewer_identities_than_processes(self, found):
        assert max(found["fewer_identities_than_processes"]) < 1e-5

    def test_sampled_negatives(self, found):
        for result in found["sampled"]:
            assert result["difference"] < 1e-5
            assert result["positives"]
            assert result["only_kept"]
            assert result["redrawn"]
            rows = [len(x) for x in torch.arange(40).chunk(len(result["kept"]))]
            assert result["kept"] == [round(0.6 * count) for count in rows]

    def test_skipped_rows(self, found):
        for result in found["optimizers"]:
            for each in result.values():
                assert each["difference"] < 1e-5
                assert each["still"]
                assert each["moved"] > 1e-3


def test_the_scenarios_cover_every_head():
    assert {kind.__name__ for kind in HEADS} == {
        name for name in heads.__all__ if name.endswith("Head") and name != "SampledHead"
    }
