"""Batches and views: the same for the same seed, epoch and step; every view does what it says and no more."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import to_float
from kdlib_faces.data.samplers import choose_samples_per_identity, count_cross_age_identities
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig, augment, erase, grayscale, low_resolution, mirror, photometric, warp

OFF = AugmentConfig.none()
ALL = AugmentConfig(erase=0.5)


def pixels(count=10, size=8):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(one, two):
    assert torch.equal(one[0], two[0])
    assert sorted(one[1]) == sorted(two[1])
    for name, column in one[1].items():
        assert torch.equal(torch.nan_to_num(column, -1), torch.nan_to_num(two[1][name], -1))


def test_batches_carry_the_rows_that_they_say():
    images, ages = pixels(), np.array([np.nan, *range(1, 10)])
    columns = {"ages": ages, "age_groups": np.arange(10) % 2, "sample_ids": range(100, 110)}
    batches = FaceBatches(images, np.arange(10) // 2, batch_size=3, seed=5, **columns)
    assert len(batches) == 3
    seen = []
    for inputs, targets in batches:
        rows = targets["sample"] - 100
        assert torch.equal(inputs, to_float(images[rows]))
        assert torch.equal(targets["identity"], rows // 2)
        assert torch.equal(targets["age_group"], rows % 2)
        np.testing.assert_array_equal(targets["age"].numpy(), ages[rows].astype(np.float32))
        assert {name: column.dtype for name, column in targets.items() if name != "age"} == dict.fromkeys(
            ("identity", "sample", "view", "age_group"), torch.int64
        )
        assert targets["view"].tolist() == [0, 0, 0]
        seen += rows.tolist()
    assert len(set(seen)) == 9


@pytest.mark.parametrize(
    "options",
    [{"augment": ALL}, {"augment": ALL, "samples_per_identity": 2}, {"views": SeededViews(5, seed=1, augment=ALL)}],
)
def test_any_step_of_any_epoch_comes_again(options):
    def make(seed=3):
        return FaceBatches(pixels(24), np.arange(24) % 6, batch_size=4, seed=seed, **options)

    batches = make()
    state = torch.get_rng_state()
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert torch.equal(torch.get_rng_state(), state)
    for step in range(len(batches) + 1):
        again = make()
        again.set_epoch(1)
        rest = list(again.iter_from(step))
        assert len(rest) == len(batches) - step
        for one, two in zip(rest, second[step:], strict=True):
            equal(one, two)
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(first, second, strict=True))
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(first, list(make(4)), strict=True))


def test_each_batch_holds_k_images_of_different_identities():
    identities = np.array([0] * 9 + [1] * 3 + [2] * 2 + [7] * 1 + [9] * 5)
    batches = FaceBatches(pixels(20), identities, batch_size=6, seed=0, samples_per_identity=2)
    people = set()
    for epoch in range(8):
        batches.set_epoch(epoch)
        for _, targets in batches:
            who = targets["identity"].view(3, 2)
            assert torch.equal(who[:, 0], who[:, 1])
            assert len(set(who[:, 0].tolist())) == 3
            for person, samples in zip(who[:, 0].tolist(), targets["sample"].view(3, 2).tolist(), strict=True):
                assert len(set(samples)) == (1 if person == 7 else 2)
                assert (identities[samples] == person).all()
            people |= set(who[:, 0].tolist())
    assert people == {0, 1, 2, 7, 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 11}, r"batch_size must be at most the 10 images, got 11"),
        ({"identities": np.zeros(9)}, r"identity must be \(n,\) = \(10,\), got \(9,\)"),
        ({"ages": [1.0]}, r"age must be \(n,\)"),
        ({"images": torch.zeros(10, 1, 4, 4, dtype=torch.uint8)}, r"images must be \(b, 3, h, w\)"),
        ({"samples_per_identity": 3}, "batch_size must be a multiple of samples_per_identity 3, .* got 4"),
        ({"samples_per_identity": 1, "identities": np.arange(10) % 3}, ".* at most 1 x 3 identities, got 4"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"images": torch.zeros(10, 3, 4, 4)}, r"images must be uint8, got torch\.float32"),
    ],
)
def test_wrong_arguments(change, message):
    given = {"images": pixels(), "identities": np.arange(10), "batch_size": 4, "seed": 0} | change
    with pytest.raises((TypeError, ValueError), match=f"FaceBatches: {message}"):
        FaceBatches(given.pop("images"), given.pop("identities"), **given)


def test_cross_age_pairs_need_identities_of_two_ages():
    assert [choose_samples_per_identity(size, 2) for size in (4, 8, 6, 5)] == [4, 4, 3, 5]
    with pytest.raises(InputError, match="batch_size 4 cannot hold cross-age pairs of 0 identities"):
        choose_samples_per_identity(4, 0)
    assert count_cross_age_identities([0, 0, 1, 1, 2, 2], [3, 40, 20, 25, 7, np.nan], 10.0) == 1
    assert count_cross_age_identities([0], [np.nan], 10.0) == 0


def test_the_view_tells_which_images_were_mirrored():
    images = pixels(64)
    out, view = augment(images, replace(OFF, mirror=0.5), generator())
    assert 0 < int(view.sum()) < 64
    plain = to_float(images)
    for at, mirrored in enumerate(view.tolist()):
        torch.testing.assert_close(out[at], plain[at].flip(-1) if mirrored else plain[at], atol=1e-6, rtol=0)
    assert mirror(images, 0.0, generator())[1].sum() == 0
    assert mirror(images, 1.0, generator())[1].sum() == 64


@pytest.mark.parametrize(
    "name", [field.name for field in fields(AugmentConfig) if field.name not in ("erase_area", "low_resolution_factor")]
)
def test_each_part_can_be_used_alone(name):
    images = pixels(32, 16)
    strong = {"rotate": 20.0, "gamma": 1.0}.get(name, 0.5)
    out, _ = augment(images, replace(OFF, **{name: strong}), generator())
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert -1 <= out.min() <= out.max() <= 1
    assert not torch.allclose(out, to_float(images), atol=1e-3)
    again, _ = augment(images, replace(OFF, **{name: strong}), generator())
    assert torch.equal(out, again)


def test_off_is_the_plain_image_and_input_stays():
    images = pixels()
    kept = images.clone()
    out, view = augment(images, OFF, generator())
    torch.testing.assert_close(out, to_float(images), atol=1e-6, rtol=0)
    assert view.sum() == 0
    augment(images, ALL, generator())
    assert torch.equal(images, kept)


def test_photometric_is_the_formula():
    x = torch.rand(4, 3, 6, 6, generator=generator(1)) * 0.2 + 0.4
    out = photometric(x.clone(), 0.0, 0.4, 0.0, generator())
    mean = x.mean(dim=(1, 2, 3))
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), mean)
    ratio = out.std(dim=(1, 2, 3)) / x.std(dim=(1, 2, 3))
    assert ((ratio > 0.6) & (ratio < 1.4)).all()
    shifted = photometric(x.clone(), 0.2, 0.0, 0.0, generator())
    difference = shifted - x
    assert difference.std(dim=(1, 2, 3)).max() < 1e-6
    assert difference.abs().max() <= 0.2


def test_warp_moves_a_spot_by_the_shift_and_keeps_a_flat_image():
    flat = torch.full((3, 3, 9, 9), 0.3)
    torch.testing.assert_close(warp(flat, 0.2, 0.2, 20.0, generator()), flat)
    x = torch.rand(2, 3, 9, 9, generator=generator(1))
    torch.testing.assert_close(warp(x, 0.0, 0.0, 0.0, generator()), x, atol=1e-5, rtol=0)
    spot = torch.zeros(64, 3, 21, 21)
    spot[:, :, 10, 10] = 1
    moved = warp(spot, 0.2, 0.0, 0.0, generator()).sum(1)
    at = torch.arange(21.0)
    column = (moved.sum(1) * at).sum(1) / moved.sum((1, 2)) - 10
    assert column.abs().max() <= 0.2 * 21 + 0.01
    assert column.abs().max() > 0.1 * 21


def test_blur_gray_and_erase_touch_the_chosen_images_only():
    x = torch.rand(64, 3, 16, 16, generator=generator(1))
    blurred = low_resolution(x.clone(), 0.5, 0.3, generator())
    grayed = grayscale(x.clone(), 0.5, generator())
    erased = erase(x.clone(), 0.5, 0.25, generator())
    for out in (blurred, grayed, erased):
        same = (out == x).flatten(1).all(1)
        assert 16 < int(same.sum()) < 48
    gray = (grayed != x).flatten(1).any(1)
    assert (grayed[gray].std(1) < 1e-6).all()
    assert (blurred.std((1, 2, 3)) <= x.std((1, 2, 3)) + 1e-6).all()
    hidden = (erased == 0.5).all(1).flatten(1).float().mean(1)
    assert hidden.max() <= 0.25 + 0.12  # whole rows and columns of 16
    assert hidden.max() > 0.1


def test_strengths_are_checked():
    for wrong in ({"mirror": 1.5}, {"gamma": -1}, {"scale": 0.95}, {"low_resolution_factor": 0.0}, {"rotate": 200}):
        with pytest.raises(ValueError, match=f"AugmentConfig: {next(iter(wrong))} must be"):
            AugmentConfig(**wrong)
