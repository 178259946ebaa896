"""Loading of batches: the same for any number of workers and after any step, by rank, and with broken images."""

import numpy as np
import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.data import RecordReader, save_records
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.samplers import BalancedOrder, CrossAgeOrder, ShuffledOrder
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.sources.records import RecordImages
from kdlib_faces.data.views import AugmentConfig
from tests.faces.reader_files import encoded

COUNT = 24
IDENTITIES = np.arange(COUNT) // 4
AGES = np.array([3.0, 40.0, 20.0, 60.0] * (COUNT // 4))
# A loader of two workers on a machine of one core.
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "train.rec"
    pictures = [
        encoded(np.random.default_rng(row).integers(0, 256, (8, 8, 3)), "JPEG" if row % 2 else "PNG")
        for row in range(COUNT)
    ]
    save_records(path, pictures, IDENTITIES.tolist())
    return FaceImages(RecordImages(RecordReader(path)), 8)


def same(one, two):
    assert len(one) == len(two)
    for (inputs, targets), (others, labels) in zip(one, two, strict=True):
        assert torch.equal(inputs, others)
        assert sorted(targets) == sorted(labels)
        for name, column in targets.items():
            assert torch.equal(column, labels[name])


OPTIONS = [
    {"augment": AugmentConfig(), "ages": AGES},
    {"views": SeededViews(3, seed=1, augment=AugmentConfig())},
    {"augment": AugmentConfig(), "samples_per_identity": 2},
    {"samples_per_identity": 2, "min_age_gap": 15, "identity_age": "age", "ages": AGES},
]


@few_cores
@pytest.mark.parametrize("options", OPTIONS)
def test_any_number_of_workers_gives_the_same_batches(images, options):
    state = torch.get_rng_state()
    wanted = []
    for workers in (0, 1, 2):
        batches = FaceBatches(images, IDENTITIES, batch_size=4, seed=3, workers=workers, **options)
        found = [list(batches)]
        assert len(found[0]) == len(batches) == 6
        batches.set_epoch(1)
        next(iter(batches))  # an iteration that is not finished
        found += [list(batches), list(batches.iter_from(4))]
        batches.close()
        wanted = wanted or found
        for one, two in zip(found, wanted, strict=True):
            same(one, two)
        same(found[2], found[1][4:])
    assert torch.equal(torch.get_rng_state(), state)
    decoded = FaceBatches(images.preload(), IDENTITIES, batch_size=4, seed=3, **options)
    same(list(decoded), wanted[0])


@pytest.mark.parametrize("options", [{}, *OPTIONS[2:]])
def test_processes_share_each_batch(images, options):
    """Their parts are those of one process, with the same random views."""

    def read(rank, count):
        given = options if "views" in options else {"augment": AugmentConfig(), **options}
        batches = FaceBatches(images, IDENTITIES, batch_size=8, seed=3, **given)
        batches.shard(rank, count)
        batches.set_epoch(1)
        return list(batches)

    alone, shared = read(0, 1), [read(rank, 2) for rank in range(2)]
    assert [len(each) for each in (alone, *shared)] == [3, 3, 3]
    for (inputs, targets), *parts in zip(alone, *shared, strict=True):
        assert torch.equal(torch.cat([part for part, _ in parts]), inputs)
        for name, target in targets.items():
            assert torch.equal(torch.cat([part[name] for _, part in parts]), target)
    if not options:
        assert sorted(row for _, targets in alone for row in targets["sample"].tolist()) == list(range(COUNT))
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of \d+ for 3 processes, got 8"):
        read(0, 3)


def test_cross_age_pairs_are_far_apart_in_age():
    rng = np.random.default_rng(0)
    identities, ages = rng.integers(0, 30, 400), rng.integers(0, 80, 400).astype(float)
    ages[rng.random(400) < 0.2] = np.nan
    ages[identities == 7] = 30  # never far apart
    order = CrossAgeOrder(identities, ages, 25, batch_size=16, samples_per_identity=4, seed=5)
    seen = set()
    for number in range(60):
        rows = order.rows(0, number)
        pairs = ages[rows].reshape(-1, 2)
        assert (np.abs(np.diff(pairs, axis=1)) >= 25).all()
        owners = identities[rows].reshape(4, 4)
        assert (owners == owners[:, :1]).all()
        assert len(set(owners[:, 0].tolist())) == 4
        seen |= set(owners[:, 0].tolist())
    assert seen == set(range(30)) - {7}
    with pytest.raises(InputError, match="needs 40 identities with images at least 25 apart in age, got 29; reduce"):
        CrossAgeOrder(identities, ages, 25, batch_size=80, samples_per_identity=2, seed=5)
    with pytest.raises(InputError, match="samples_per_identity must be even, got 3"):
        CrossAgeOrder(identities, ages, 25, batch_size=3, samples_per_identity=3, seed=5)


def test_balanced_batches_draw_every_image_equally_often():
    identities = np.repeat([4, 9, 2], [5, 3, 2])
    order = BalancedOrder(identities, 6, 2, seed=1)
    counts = np.zeros(10)
    for number in range(3000):
        rows = order.rows(0, number)
        for k in (4, 9, 2):
            own = rows[identities[rows] == k]
            assert len(set(own.tolist())) == 2
        counts[rows] += 1
    expected = 3000 * 2 / np.array([5] * 5 + [3] * 3 + [2] * 2)
    # Five standard deviations of a binomial count.
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all()
    repeated = BalancedOrder(identities, 12, 4, seed=1).rows(0, 0)
    for k, drawn in ((4, 4), (9, 3), (2, 2)):
        assert len(set(repeated[identities[repeated] == k].tolist())) == drawn


def test_an_order_does_not_depend_on_what_was_drawn_before():
    identities = np.arange(40) // 4
    for make in (lambda: ShuffledOrder(40, 4, 7), lambda: BalancedOrder(identities, 4, 2, 7)):
        whole = [make().rows(epoch, number).tolist() for epoch in range(2) for number in range(10)]
        order = make()
        backward = [order.rows(epoch, number).tolist() for epoch in (1, 0) for number in range(9, -1, -1)]
        assert backward[::-1] == whole
        assert whole[:10] != whole[10:]


@few_cores
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_stop_or_give_way_to_others(tmp_path, workers):
    pictures = [b"broken" if row in (1, 8, 9, 10, 11) else encoded(np.full((8, 8, 3), 10 * row)) for row in range(12)]
    save_records(tmp_path / "x.rec", pictures, [row // 4 for row in range(12)])
    source = RecordImages(RecordReader(tmp_path / "x.rec"))
    options = {"batch_size": 12, "seed": 0, "workers": workers}
    batches = FaceBatches(FaceImages(source, 8), np.arange(12) // 4, **options)
    with pytest.raises(InputError, match=r"^5 of 12 images cannot be read: .*x\.rec record"):
        next(iter(batches))
    batches.close()
    batches = FaceBatches(FaceImages(source, 8, on_error="skip"), np.arange(12) // 4, **options)
    inputs, targets = next(iter(batches))
    batches.close()
    assert sorted(batches.unreadable) == [1, 8, 9, 10, 11]
    assert all(f"record {row + 1}: not a readable image" in text for row, text in batches.unreadable.items())
    rows = targets["sample"].tolist()
    assert len(rows) == 12
    assert not {1, 8, 9, 10, 11} & set(rows)
    values = ((inputs[:, 0, 0, 0] + 1) * 12.75).round().int().tolist()
    assert values == rows  # each image comes with its own targets
    assert targets["identity"].tolist() == [row // 4 for row in rows]
    assert sum(row in (0, 2, 3) for row in rows) >= 4  # an image of the same identity takes the place of image 1
    alone = FaceBatches(FaceImages(source, 8, on_error="skip"), np.arange(12) // 4, batch_size=1, seed=0)
    with pytest.raises(InputError, match="not a readable image"):
        list(alone)
