"""Seeded views: a function of sample id, view number and seed, and of nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib_faces._checks import InputError
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import to_float
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import VIEWS_VERSION, AugmentConfig

STRONG = AugmentConfig(erase=0.5, low_resolution=0.5, grayscale=0.3)


def pixels(count: int = 6, size: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_neighbors_order_and_global_state_do_not_count() -> None:
    images, ids = pixels(), torch.tensor([3, 99, -4, 2**40, 0, 7])
    views = SeededViews(9, seed=5, augment=STRONG)
    numbers = torch.tensor([0, 8, 3, 1, 4, 2])
    state = torch.random.get_rng_state()
    together = views(images, ids, numbers)
    assert torch.equal(torch.random.get_rng_state(), state)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(views(images[order], ids[order], numbers[order]), together[order])
    for row in range(6):
        assert torch.equal(views(images[row : row + 1], ids[row : row + 1], int(numbers[row]))[0], together[row])
    assert together.dtype == torch.float32
    assert together.abs().max() <= 1


def test_sample_view_and_seed_each_count() -> None:
    images = pixels(1).expand(2, -1, -1, -1)
    views = SeededViews(9, seed=5, augment=STRONG)
    one, other = views(images, torch.tensor([1, 2]), 0)
    assert not torch.equal(one, other)
    assert not torch.equal(views(images, torch.tensor([1, 1]), 1)[0], one)
    assert not torch.equal(SeededViews(9, seed=6, augment=STRONG)(images, torch.tensor([1, 1]), 0)[0], one)


def test_without_augment_there_are_the_image_and_its_mirror() -> None:
    images = pixels(2)
    out = SeededViews()(images, torch.arange(2), torch.tensor([0, 1]))
    assert torch.equal(out, to_float(torch.stack([images[0], images[1].flip(-1)])))


PINNED = {
    2: [
        [-0.0623, 0.1379, -0.3611, -0.1006],
        [-0.2294, -0.5451, -0.2072, -0.3649],
        [-0.0328, 0.0210, -0.2184, -0.2451],
    ],
}
"""Means of the quarters of three views, for each version of the augmentation."""


def test_other_views_have_another_version() -> None:
    """If this fails, the views are no longer those of existing caches: raise VIEWS_VERSION, and pin the new means here."""
    coarse = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    out = SeededViews(9, seed=5, augment=STRONG)(images, torch.tensor([3, 99, 7]), torch.tensor([0, 8, 3]))
    means = F.adaptive_avg_pool2d(out.mean(1, keepdim=True), 2).flatten(1)
    # Warping by OpenCV and by torch differs by one step of a byte at most.
    torch.testing.assert_close(means, torch.tensor(PINNED[VIEWS_VERSION]), rtol=0, atol=2e-3)
    old = SeededViews(9, seed=5, augment=STRONG, version=VIEWS_VERSION - 1)
    assert SeededViews.from_text(old.to_text()) == old
    with pytest.raises(ValueError, match="draws other views; build the cache again"):
        old(images, torch.tensor([3, 99, 7]), 0)


def test_text_and_back() -> None:
    for views in (SeededViews(), SeededViews(4, 3, AugmentConfig(rotate=7.5)), SeededViews(1, augment=STRONG)):
        assert SeededViews.from_text(views.to_text()) == views
    for text in ("", "[]", "{}", "3", '{"count": 2, "seed": 0}', '{"count": 2, "seed": 0, "augment": {"x": 1}}', "[" * 9999,
                 '{"count": "2", "seed": 0, "augment": null}', '{"count": 9, "seed": 0, "augment": null}',
                 '{"count": 2, "seed": 0, "augment": null, "path": "/"}'):  # fmt: skip
        with pytest.raises(InputError, match="does not describe views"):
            SeededViews.from_text(text)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="count must be a whole number and >= 1 and <= 2, got 3"):
        SeededViews(3)
    for images, count, view, message in (
        (pixels(), 6, 2, "views must be from 0 to 1, got 2"),
        (pixels().float(), 6, 0, r"images must be uint8, got torch\.float32"),
        (pixels(), 5, 0, r"samples must be \(6,\), got \(5,\)"),
        (pixels()[..., 0], 6, 0, r"images must be \(b, 3, h, w\), got \(6, 3, 24\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            SeededViews()(images, torch.arange(count), view)
    with pytest.raises(TypeError, match="views must be SeededViews, got int"):
        FaceBatches(pixels(), range(6), views=2, batch_size=2, seed=0)


def test_batches_hold_the_views_of_their_samples() -> None:
    views = SeededViews(5, seed=1, augment=STRONG)
    batches = FaceBatches(pixels(), range(6), views=views, batch_size=2, seed=0, sample_ids=[10, 20, 30, 40, 50, 60])
    inputs, targets = next(iter(batches))
    assert torch.equal(inputs, views(pixels()[targets["identity"]], targets["sample"], targets["view"]))
    assert torch.equal(targets["sample"], 10 * (targets["identity"] + 1))
    assert repr(views) in repr(batches)
