"""Losses of generated features: factor transfer and masked generative distillation."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib import FactorTransferLoss, MaskedGenerativeLoss, Paraphraser
from kdlib.functional import factor_transfer
from tests.core import reference_features as reference
from tests.core.loss_inputs import noise, seeded


def array(x: Tensor) -> Any:
    return x.detach().double().numpy()


def affine(layer: Any) -> tuple[Any, Any]:
    return array(layer.weight), array(layer.bias)


# Factor transfer.


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("grid", [(2, 3), (4, 2), (5, 5)])
def test_factor_transfer_equals_the_naive_reference(p: int, grid: tuple[int, int]) -> None:
    student, teacher = noise(5, 3, 4, 3), noise(5, 3, *grid, seed=1)
    student[1] *= 1e20
    got = factor_transfer(student, teacher, p=p, reduction="none")
    np.testing.assert_allclose(got, reference.factor_transfer(array(student), array(teacher), p=p), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda s: factor_transfer(s, teacher, p=p), noise(5, 3, 4, 3).requires_grad_())


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31 - 2), scale=st.floats(1e-6, 1e6), p=st.sampled_from([1, 2]))
def test_factor_transfer_has_limits_and_no_scale(seed: int, scale: float, p: int) -> None:
    """The factors are unit vectors: their distance is at most 2, and at most 2 sqrt(n) by the L1 norm."""
    student, teacher = noise(4, 2, 3, 3, seed=seed), noise(4, 2, 3, 3, seed=seed + 1)
    loss = factor_transfer(student, teacher, p=p, reduction="none")
    assert (loss >= 0).all()
    assert (loss <= (2 if p == 2 else 2 * math.sqrt(18)) + 1e-12).all()
    torch.testing.assert_close(factor_transfer(scale * student, teacher, p=p, reduction="none"), loss)
    torch.testing.assert_close(factor_transfer(teacher, student, p=p, reduction="none"), loss)
    assert factor_transfer(scale * student, student, p=p).item() == pytest.approx(0, abs=1e-7)


def test_factor_transfer_by_hand() -> None:
    """(3, 4) / 5 against (0, 1): 0.6 + 0.2, and the root of 0.36 + 0.04. Opposite factors: 2 by the L2 norm."""
    student, teacher = (torch.tensor(x).reshape(1, 2, 1, 1) for x in ([3.0, 4.0], [0.0, 7.0]))
    assert factor_transfer(student, teacher).item() == pytest.approx(0.8, rel=1e-6)
    assert factor_transfer(student, teacher, p=2).item() == pytest.approx(0.6324555, rel=1e-6)
    assert factor_transfer(student, -student, p=2).item() == pytest.approx(2.0)
    equal = student.clone().requires_grad_()
    factor_transfer(equal, student, p=2).backward()
    assert not equal.grad.any()


def test_factor_transfer_loss_translates_and_paraphrases() -> None:
    loss = seeded(lambda: FactorTransferLoss(2, 4, rate=0.75, p=2)).double()
    loss.paraphraser.freeze()
    assert loss.paraphraser.factors == 3
    student, teacher = noise(3, 2, 4, 3), noise(3, 4, 2, 3, seed=1)
    s = reference.factors_of(array(student), [affine(layer) for layer in loss.translator])
    t = reference.factors_of(array(teacher), [affine(layer) for layer in loss.paraphraser.encoder])
    got = loss(student, teacher, reduction="none")
    np.testing.assert_allclose(array(got), reference.factor_transfer(s, t, p=2), rtol=1e-10)
    np.testing.assert_allclose(array(loss.paraphraser(teacher)), t, rtol=1e-10)


def test_reconstruction_loss_is_the_mean_squared_error_of_the_autoencoder() -> None:
    paraphraser = seeded(lambda: Paraphraser(3, rate=0.5)).double()
    features = noise(2, 3, 4, 4).requires_grad_()
    layers = [affine(layer) for layer in (*paraphraser.encoder, *paraphraser.decoder)]
    expected = reference.hint(reference.factors_of(array(features), layers), array(features)).mean()
    value = paraphraser.reconstruction_loss(features)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    value.backward()
    assert features.grad is None
    assert all(p.grad is not None and p.grad.any() for p in paraphraser.parameters())


def trained() -> tuple[FactorTransferLoss, list[float], list[Tensor]]:
    loss = seeded(lambda: FactorTransferLoss(2, 6))
    mixing = noise(6, 3, seed=9, dtype=torch.float32)  # the teacher's six channels are mixtures of three
    images = [noise(4, 3, 5, 5, seed=k, dtype=torch.float32).relu() for k in range(6)]
    means = loss.paraphraser.fit(images, lambda x: torch.einsum("kc,bchw->bkhw", mixing, x).relu(), epochs=25, lr=0.01)
    return loss, means, images


def test_the_paraphraser_learns_to_reconstruct_and_is_frozen() -> None:
    loss, means, _ = trained()
    assert len(means) == 25
    assert means[-1] < 0.4 * means[0]
    assert not any(p.requires_grad for p in loss.paraphraser.parameters())
    before = copy.deepcopy(loss.paraphraser.state_dict())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, weight_decay=0.1)
    student, teacher = noise(4, 2, 5, 5, dtype=torch.float32), noise(4, 6, 5, 5, dtype=torch.float32)
    first = loss(student, teacher)
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
    assert value < first
    assert all(p.grad is not None for p in loss.translator.parameters())
    assert all(torch.equal(x, before[name]) for name, x in loss.paraphraser.state_dict().items())


def test_an_untrained_paraphraser_is_an_error_until_it_is_trained_frozen_or_loaded() -> None:
    loss, _, _ = trained()
    sides = noise(3, 2, 4, 4, dtype=torch.float32), noise(3, 6, 4, 4, dtype=torch.float32)
    other = FactorTransferLoss(2, 6)
    with pytest.raises(RuntimeError, match=r"FactorTransferLoss: the paraphraser is not trained; call loss\.paraphr"):
        other(*sides)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(*sides), loss(*sides))
    assert copy.deepcopy(loss).paraphraser.trained
    assert other.state_dict()["paraphraser.is_trained"].dtype == torch.bool
    with pytest.raises(
        ValueError, match="Paraphraser: loader must yield at least one batch in each epoch, got none in"
    ):
        Paraphraser(6).fit(iter([torch.ones(1, 6, 3, 3)]), lambda x: x, epochs=2)
    with pytest.raises(
        ValueError, match=r"Paraphraser: features must be \(b, c, h, w\) with c = 6, got \(1, 5, 3, 3\)"
    ):
        Paraphraser(6).fit([torch.ones(1, 5, 3, 3)], lambda x: x)
    with pytest.raises(ValueError, match="factor_transfer: p must be 1 or 2, the order of the norm, got 3"):
        factor_transfer(*2 * [torch.ones(1, 2, 3, 3)], p=3)


# Masked generative distillation.


@pytest.mark.parametrize("options", [{}, {"mask": "channel", "seed": 5}, {"mask_ratio": 0}])
@pytest.mark.parametrize(("channels", "grid"), [((2, 3), (3, 4)), ((3, 3), (5, 2))])
def test_masked_generative_equals_the_naive_reference(
    options: dict[str, Any], channels: tuple[int, int], grid: tuple[int, int]
) -> None:
    loss = seeded(lambda: MaskedGenerativeLoss(*channels, **options)).double()
    student, teacher = noise(4, channels[0], 3, 4), noise(4, channels[1], *grid, seed=1)
    mask = array(loss.kept_positions(4, (3, min(4, grid[1]))))
    assert mask.shape == (4, 3, 1, 1) if "mask" in options else (4, 1, 3, min(4, grid[1]))
    align = None if loss.align is None else affine(loss.align)
    expected = reference.masked_generative(
        array(student), array(teacher), mask, align, affine(loss.first), affine(loss.second)
    )
    np.testing.assert_allclose(array(loss(student, teacher, reduction="none")), expected, rtol=1e-10)


def test_masked_generative_by_hand() -> None:
    """With the identity as both convolutions, the loss is the mean square of mask times relu(s) minus t."""
    loss = MaskedGenerativeLoss(1, 1, mask_ratio=0.5)
    for layer in (loss.first, loss.second):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    student, teacher = torch.tensor([[[[2.0, -3.0, 4.0]]]]), torch.tensor([[[[1.0, 1.0, 1.0]]]])
    kept = loss.kept_positions(1, (1, 3)).flatten().tolist()
    expected = sum((max(s, 0) * k - 1) ** 2 for s, k in zip([2, -3, 4], kept, strict=True)) / 3
    assert loss(student, teacher).item() == pytest.approx(expected)
    plain = MaskedGenerativeLoss(1, 1, mask_ratio=0)
    plain.load_state_dict(loss.state_dict())
    assert plain(student, teacher).item() == pytest.approx((1 + 1 + 9) / 3)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.65, 0.9])
def test_masks_have_the_ratio_and_are_independent(ratio: float) -> None:
    loss, other = MaskedGenerativeLoss(4, 4, mask_ratio=ratio), MaskedGenerativeLoss(4, 4, mask_ratio=ratio, seed=1)
    masks = []
    for _ in range(4):
        masks.append(loss.kept_positions(64, (16, 16)).flatten(1).double())
        loss(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    masks.append(other.kept_positions(64, (16, 16)).flatten(1).double())
    flat = torch.stack([mask.flatten() for mask in masks])
    # Five standard deviations of 16,384 draws.
    assert (flat.mean(1) - (1 - ratio)).abs().max() < 5 * math.sqrt(ratio * (1 - ratio) / flat.shape[1])
    correlation = torch.corrcoef(torch.cat([flat, flat[:1].roll(1, 1), flat[:1].roll(256, 1)]))
    assert (correlation - torch.eye(7)).abs().max() < 5 / math.sqrt(flat.shape[1])
    assert masks[0].mean(1).std() < 2 * math.sqrt(ratio * (1 - ratio) / 256)


def test_masks_are_reproducible_and_leave_the_random_state() -> None:
    loss = seeded(lambda: MaskedGenerativeLoss(2, 3))
    sides = noise(3, 2, 4, 4, dtype=torch.float32), noise(3, 3, 4, 4, dtype=torch.float32)
    state = torch.get_rng_state()
    values = [loss(*sides).item() for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(values)) == 3
    again = MaskedGenerativeLoss(2, 3)
    again.load_state_dict(loss.state_dict())
    assert again(*sides).item() == loss(*sides).item()
    loss.eval()
    assert loss(*sides).item() == loss(*sides).item()
    assert int(loss.calls) == 4
    # Samples of weight 0 leave the masks of the others as they are.
    keep = torch.tensor([False, True, True])
    assert torch.equal(loss.kept_positions(3, (4, 4), keep)[keep], loss.kept_positions(2, (4, 4)))


def test_the_generation_block_learns_masked_positions_from_their_neighbors() -> None:
    loss = seeded(lambda: MaskedGenerativeLoss(2, 2, mask_ratio=0.3))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
    values = []
    for _ in range(150):
        features = torch.rand(16, 2, 1, 1, generator=generator).expand(16, 2, 6, 6)  # smooth: one value per channel
        optimizer.zero_grad()
        value = loss(features, features)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.6 * sum(values[:10])


def test_both_run_on_the_meta_device() -> None:
    for loss in (FactorTransferLoss(2, 3), MaskedGenerativeLoss(2, 3)):
        if isinstance(loss, FactorTransferLoss):
            loss.paraphraser.freeze()
        loss.to("meta")
        for weight in (None, torch.ones(4, device="meta")):
            value = loss(torch.ones(4, 2, 5, 5, device="meta"), torch.ones(4, 3, 3, 3, device="meta"), weight=weight)
            assert value.device.type == "meta"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedGenerativeLoss(2, 3, mask_ratio=1), "MaskedGenerativeLoss: mask_ratio must be a finite number"),
        (lambda: MaskedGenerativeLoss(2, 3, mask="pixel"), "MaskedGenerativeLoss: mask must be"),
        (lambda: MaskedGenerativeLoss(0, 3), "MaskedGenerativeLoss: student_channels must be a whole number"),
        (lambda: FactorTransferLoss(2, 3, rate=0), "FactorTransferLoss: rate must be"),
        (lambda: Paraphraser(2, rate=-1), "Paraphraser: rate must be"),
        (lambda: MaskedGenerativeLoss(2, 3)(torch.ones(1, 2, 3), torch.ones(1, 3, 3, 3)), r"student must be \(b, c, h"),
        (lambda: Paraphraser(2)(torch.ones(1, 3, 4, 4)), r"Paraphraser: features must be \(b, c, h, w\) with c = 2"),
        (lambda: Paraphraser(2)(torch.ones(1, 2, 4, 4).int()), "Paraphraser: features must be a floating-point tensor"),
    ],
)
def test_wrong_arguments_are_named(build: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()
