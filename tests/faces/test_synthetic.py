"""Synthetic faces: deterministic, with the requested ages, and harder to match across age gaps."""

import pytest
import torch

from kdlib_faces.data import SyntheticFaces
from kdlib_faces.data.synthetic_drawing import IDENTITY_TRAITS, NUISANCES, draw_faces


def test_the_same_arguments_give_the_same_faces_one_by_one_or_all_at_once() -> None:
    faces = SyntheticFaces(identities=4, images_per_identity=3, size=32, seed=5)
    images = faces.images()
    assert images.shape == (12, 3, 32, 32)
    assert torch.equal(images, SyntheticFaces(4, 3, 32, 5).images())
    single = torch.stack([(faces[i].image + 1) * 127.5 for i in range(12)])
    assert float((single - images).abs().max()) <= 1.01  # vectorized maths may differ in the last bit of a pixel
    assert not torch.equal(images, SyntheticFaces(4, 3, 32, 6).images())


def test_labels_and_ages_are_exact_and_cover_a_life_or_a_window() -> None:
    faces = SyntheticFaces(6, 8, 32, 0)
    assert faces.labels.tolist() == [i // 8 for i in range(48)]
    assert faces[11].identity == 1
    assert faces[11].age == pytest.approx(float(faces.ages[11]))
    spans = faces.ages.view(6, 8).max(1).values - faces.ages.view(6, 8).min(1).values
    assert float(spans.min()) > 50
    windowed = SyntheticFaces(6, 8, 32, 0, age_window=5.0).ages.view(6, 8)
    assert float((windowed.max(1).values - windowed.min(1).values).max()) <= 5.0


def test_a_face_of_another_age_is_further_away_than_one_of_the_same_age() -> None:
    """Same identity, pose and light, but older: the distance grows with the gap."""
    generator = torch.Generator().manual_seed(1)
    count, ages = 60, torch.tensor([25.0, 30.0, 45.0, 60.0, 75.0])
    traits = torch.randn(count, IDENTITY_TRAITS, generator=generator)
    still = torch.zeros(count, NUISANCES)
    seeds = torch.arange(count)
    drawn = [draw_faces(traits, age.expand(count), still, seeds, 40).float() for age in ages]
    distance = [float((face - drawn[0]).square().mean()) for face in drawn[1:]]
    assert distance == sorted(distance)
    assert distance[-1] > 3 * distance[0]
    assert float((drawn[0] - drawn[0].roll(1, dims=0)).square().mean()) > distance[0]


def test_a_child_differs_less_from_other_children_than_adults_from_adults() -> None:
    generator = torch.Generator().manual_seed(2)
    traits = torch.randn(80, IDENTITY_TRAITS, generator=generator)
    still, seeds = torch.zeros(80, NUISANCES), torch.zeros(80, dtype=torch.int64)
    spread = [
        float(draw_faces(traits, torch.full((80,), age), still, seeds, 40).float().std(dim=0)[:, 12:32, 8:32].mean())
        for age in (3.0, 40.0)
    ]
    assert spread[0] < spread[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identities": 0}, "identities must be a whole number and >= 1, got 0"),
        ({"size": 8}, "size must be a whole number and >= 16"),
        ({"age_range": (30, 20)}, r"age_range\[1\] must be a finite number and > 30"),
    ],
)
def test_bad_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticFaces(**{"identities": 2, "images_per_identity": 2, **arguments})
    with pytest.raises(IndexError, match="index must be in"):
        SyntheticFaces(2, 2, 32)[4]
