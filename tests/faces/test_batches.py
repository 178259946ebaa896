"""Batches and views: the same for the same seed, epoch and step; every view does what it says and no more."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.data import views as views_module
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import to_float
from kdlib_faces.data.samplers import choose_samples_per_identity, count_cross_age_identities
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import (
    AugmentConfig,
    augment,
    draw_views,
    erase,
    find_opencv,
    grayscale,
    low_resolution,
    mirror,
    photometric,
    similarities,
    warp,
)

OFF = AugmentConfig.none()
ALL = AugmentConfig(erase=0.5)


def pixels(count=10, size=8):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(count, seed=0):
    return draw_views(count, generator(seed))


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
        ({"min_age_gap": 10.0, "samples_per_identity": 2}, "min_age_gap must come with .*, got no identity_age$"),
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
    out, view = augment(images, replace(OFF, mirror=0.5), draws(64))
    assert 0 < int(view.sum()) < 64
    plain = to_float(images)
    for at, mirrored in enumerate(view.tolist()):
        assert torch.equal(out[at], plain[at].flip(-1) if mirrored else plain[at])
    assert torch.equal(mirror(images, np.ones(64, bool)), images.flip(-1))


@pytest.mark.parametrize(
    "name", [field.name for field in fields(AugmentConfig) if field.name not in ("erase_area", "low_resolution_factor")]
)
def test_each_part_can_be_used_alone(name):
    images = pixels(32, 16)
    strong = {"rotate": 20.0, "gamma": 1.0}.get(name, 0.5)
    out, _ = augment(images, replace(OFF, **{name: strong}), draws(32))
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert -1 <= out.min() <= out.max() <= 1
    assert not torch.allclose(out, to_float(images), atol=1e-3)
    again, _ = augment(images, replace(OFF, **{name: strong}), draws(32))
    assert torch.equal(out, again)


def test_off_is_the_plain_image_and_input_stays():
    images = pixels()
    kept = images.clone()
    out, view = augment(images, OFF, draws(10))
    assert torch.equal(out, to_float(images))
    assert view.sum() == 0
    for strength in (ALL, replace(OFF, low_resolution=1.0, grayscale=1.0)):
        augment(images, strength, draws(10))
        assert torch.equal(images, kept)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_photometric_is_the_formula(memory):
    images = pixels(5, 6).contiguous(memory_format=memory)
    gamma, contrast, brightness = (
        np.array([0.5, 1, 2, 1, 1]),
        np.array([1, 0.6, 1.4, 1, 1]),
        np.array([0, 0, 0.1, -0.2, 0]),
    )
    out = photometric(images, gamma, contrast, brightness)
    for at, (image, g, c, d) in enumerate(zip(images.double() / 255, gamma, contrast, brightness, strict=True)):
        middle = image.mean() ** g
        want = (c * (image**g - middle) + middle + d).clamp(0, 1) * 2 - 1
        torch.testing.assert_close(out[at].double(), want, atol=1e-6, rtol=0)
    assert out.is_contiguous(memory_format=memory)


def geometry(angle, size, move, mirrored, sides):
    return similarities(np.array([angle]), np.array([size]), np.array([move]), np.array([mirrored]), sides)


@pytest.fixture(params=["torch", "opencv"])
def sampler(request, monkeypatch):
    """Either way of sampling."""
    if request.param == "torch":
        monkeypatch.setattr(views_module, "find_opencv", lambda: None)
    elif find_opencv() is None:
        pytest.skip("OpenCV 5 is not installed")


@pytest.mark.usefixtures("sampler")
def test_warp_shows_the_points_of_the_matrices():
    flat = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(warp(flat, geometry(20.0, 0.8, (0.2, -0.2), True, (9, 9))), flat)
    image = pixels(1, 11)[..., :9]
    still = geometry(0.0, 1.0, (0.0, 0.0), False, (11, 9))
    assert torch.equal(warp(image, still), image)
    assert torch.equal(warp(image, geometry(0.0, 1.0, (0.0, 0.0), True, (11, 9))), image.flip(-1))
    moved = warp(image, geometry(0.0, 1.0, (2 / 9, -1 / 11), False, (11, 9)))
    assert torch.equal(moved[:, :, 1:, :-2], image[:, :, :-1, 2:])
    assert torch.equal(moved[:, :, 0, 0], image[:, :, 0, 2])  # edges are repeated
    square = pixels(1, 9)
    assert torch.equal(warp(square, geometry(90.0, 1.0, (0.0, 0.0), False, (9, 9))), square.rot90(1, (2, 3)))
    ramp = (torch.arange(11, dtype=torch.uint8) * 20).expand(1, 3, 11, 11).contiguous()
    wider = warp(ramp, geometry(0.0, 2.0, (0.0, 0.0), False, (11, 11)))
    assert wider[0, 0, 0].tolist() == [50 + 10 * at for at in range(11)]


def test_opencv_and_torch_differ_by_rounding(monkeypatch):
    if find_opencv() is None:
        pytest.skip("OpenCV 5 is not installed")
    images, drawn = pixels(64, 40), draws(64)
    strong = AugmentConfig(shift=0.2, scale=0.3, rotate=40.0)
    matrices = similarities(80 * drawn[:, 0] - 40, 0.7 + drawn[:, 1], drawn[:, 2:4] - 0.5, drawn[:, 4] < 0.5, (40, 40))
    fast, (whole, view) = warp(images, matrices), augment(images, strong, drawn)
    parts = [replace(OFF, grayscale=1.0), replace(OFF, brightness=0.2, contrast=0.3, gamma=0.5)]
    others = [augment(images, each, drawn)[0] for each in parts]
    monkeypatch.setattr(views_module, "find_opencv", lambda: None)
    difference = (warp(images, matrices).int() - fast.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    again, same = augment(images, strong, drawn)
    assert torch.equal(view, same)
    assert (again - whole).abs().mean() < 1e-4
    for each, want, limit in zip(parts, others, (2 / 255, 0.0), strict=True):
        torch.testing.assert_close(augment(images, each, drawn)[0], want, atol=limit + 1e-6, rtol=0)


def test_blur_gray_and_erase_touch_the_chosen_images_only():
    images, chosen = pixels(6, 16), np.array([True, False] * 3)
    blurred = low_resolution(images.clone(), np.where(chosen, 0.3, 1.0))
    grayed = grayscale(images.clone(), chosen)
    places = np.array([0.0, 0.0, 0.5, 0.0, 1.0, 0.0])
    erased = erase(to_float(images), np.where(chosen, 0.25, 0.0), np.full(6, 2**0.5), places, places)
    for out, want in ((blurred, images), (grayed, images), (erased, to_float(images))):
        assert torch.equal((out != want).flatten(1).any(1), torch.from_numpy(chosen))
    luma = (images.double() * torch.tensor([0.299, 0.587, 0.114])[:, None, None].double()).sum(1)
    assert ((grayed[0::2].double() - luma[0::2, None]).abs() <= 1).all()
    assert (blurred[0::2].float().std((1, 2, 3)) < 0.8 * images[0::2].float().std((1, 2, 3))).all()
    hidden = (erased == 0).all(1)[0::2]  # 11.3 x 5.7 pixels at the corners and in the middle
    assert hidden.flatten(1).sum(1).tolist() == [66, 72, 66]
    for box, (top, left) in zip(hidden, ((0, 0), (2, 5), (5, 10)), strict=True):
        assert box[top : top + 11, left : left + 6].all()


def test_strengths_are_checked():
    for wrong in ({"mirror": 1.5}, {"gamma": -1}, {"scale": 0.95}, {"low_resolution_factor": 0.0}, {"rotate": 200}):
        with pytest.raises(ValueError, match=f"AugmentConfig: {next(iter(wrong))} must be"):
            AugmentConfig(**wrong)
