"""Alignment by five points: exact on synthetic similarities, and equal to a pixel-by-pixel reference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdlib_faces._checks import InputError
from kdlib_faces.data.alignment import (
    ARCFACE_TEMPLATE,
    align_face,
    similarity_transform,
    template_for,
)


def similarity(scale, angle, dx, dy):
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[c, -s, dx], [s, c, dy]])


def moved(matrix, points):
    return points @ matrix[:, :2].T + matrix[:, 2]


def umeyama(source, target):
    """The singular value form of the paper, as a second computation."""
    x, y = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(y.T @ x / len(x))
    sign = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / x.var(0).sum()
    return np.column_stack([scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)])


def naive_warp(image, matrix, rows, columns):
    """Sample one pixel at a time, by the definition of bilinear sampling with a black surround."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    out = np.zeros((rows, columns), np.uint8)
    for row in range(rows):
        for column in range(columns):
            x, y, _ = inverse @ (column, row, 1)
            value = 0.0
            for j in range(math.floor(y), math.floor(y) + 2):
                for i in range(math.floor(x), math.floor(x) + 2):
                    if 0 <= j < image.shape[0] and 0 <= i < image.shape[1]:
                        value += image[j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
            out[row, column] = np.rint(value)
    return out


@settings(max_examples=50)
@given(
    st.floats(0.05, 20), st.floats(-math.pi, math.pi), st.floats(-500, 500), st.floats(-500, 500), st.integers(0, 99)
)
def test_similarity_is_recovered_exactly(scale, angle, dx, dy, seed):
    truth = similarity(scale, angle, dx, dy)
    points = np.random.default_rng(seed).uniform(0, 100, (5, 2))
    assert similarity_transform(points, moved(truth, points)) == pytest.approx(truth, rel=1e-7, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_noisy_points_give_umeyamas_solution(seed):
    rng = np.random.default_rng(seed)
    points = moved(similarity(2.5, 0.4, 30, -10), ARCFACE_TEMPLATE) + rng.normal(0, 4, (5, 2))
    assert similarity_transform(points) == pytest.approx(umeyama(points, ARCFACE_TEMPLATE), rel=1e-9, abs=1e-9)


def test_a_mirrored_face_is_never_reflected():
    mirrored = ARCFACE_TEMPLATE * (-1, 1) + (112, 0)
    matrix = similarity_transform(mirrored)
    assert np.linalg.det(matrix[:, :2]) > 0
    assert matrix == pytest.approx(umeyama(mirrored, ARCFACE_TEMPLATE), abs=1e-9)


@pytest.mark.parametrize(
    ("landmarks", "words"),
    [
        (np.ones((5, 2)), "two different points"),
        (np.zeros((5, 3)), r"landmarks must be \(n, 2\)"),
        (np.zeros((4, 2)), r"template must be \(4, 2\), got \(5, 2\)"),
        (np.full((5, 2), np.nan), "finite"),
        (np.arange(10.0).reshape(5, 2) * 1e300, "finite"),
        ([["a", "b"]] * 5, "must be numbers"),
    ],
)
def test_unusable_landmarks_are_refused(landmarks, words):
    with pytest.raises(InputError, match=words):
        similarity_transform(landmarks)
    with pytest.raises(InputError, match="no similarity"):
        similarity_transform([(1, 0), (-1, 0), (0, 1), (0, -1)], [(1, 0), (-1, 0), (0, -1), (0, 1)])


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_identity_gives_the_image_back(channels):
    shape = (112, 112) if channels is None else (112, 112, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(align_face(image, ARCFACE_TEMPLATE), image)


def test_whole_pixel_shift_and_quarter_turn_are_exact():
    image = np.random.default_rng(1).integers(0, 256, (150, 160, 3), dtype=np.uint8)
    assert np.array_equal(align_face(image, ARCFACE_TEMPLATE + np.array([20, 30])), image[30:142, 20:132])
    # (x, y) -> (111 - y, x) is a quarter turn of the crop, the same as numpy's turn by -90 degrees.
    crop = image[:112, :112]
    turned = np.column_stack([111 - ARCFACE_TEMPLATE[:, 1], ARCFACE_TEMPLATE[:, 0]])
    assert np.array_equal(align_face(np.ascontiguousarray(np.rot90(crop, -1)), turned), crop)


@pytest.mark.parametrize("size", [24, (28, 20)])
def test_warp_equals_the_definition_also_across_the_border(size):
    image = np.random.default_rng(2).integers(0, 256, (40, 50), dtype=np.uint8)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    points = moved(similarity(0.4, 0.7, 10, -12), ARCFACE_TEMPLATE)
    want = naive_warp(image, similarity_transform(points, template_for(size)), rows, columns)
    got = align_face(image, points, size)
    assert (want == 0).any()
    assert (want > 0).any()
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1


def test_points_land_on_the_template_of_every_size():
    image = np.zeros((300, 300), np.uint8)
    points = moved(similarity(1.5, 0.2, 60, 40), ARCFACE_TEMPLATE)
    for size in (112, 224, 128, (112, 96)):
        for which in range(5):
            dotted = image.copy()
            x, y = np.rint(points[which]).astype(int)
            dotted[y - 6 : y + 7, x - 6 : x + 7] = 255
            ys, xs = np.nonzero(align_face(dotted, points, size) > 127)
            assert (xs.mean(), ys.mean()) == pytest.approx(template_for(size)[which], abs=1)


def test_template_sizes():
    assert template_for(112) == pytest.approx(ARCFACE_TEMPLATE)
    assert template_for(224) == pytest.approx(2 * ARCFACE_TEMPLATE)
    assert template_for((112, 96)) == pytest.approx(ARCFACE_TEMPLATE - np.array([8, 0]))
    assert template_for(128) == pytest.approx(ARCFACE_TEMPLATE + np.array([8, 0]))
    assert template_for(256) == pytest.approx(2 * (ARCFACE_TEMPLATE + np.array([8, 0])))
    for size in (0, (112, 0), 11.5):
        with pytest.raises(InputError, match="whole pixels"):
            template_for(size)


def test_pil_images_come_back_as_rgb():
    gray = Image.fromarray(np.random.default_rng(3).integers(0, 256, (120, 130), dtype=np.uint8))
    crop = align_face(gray, ARCFACE_TEMPLATE + np.array([5, 4]))
    assert isinstance(crop, Image.Image)
    assert (crop.mode, crop.size) == ("RGB", (112, 112))
    assert np.array_equal(np.asarray(crop)[..., 1], np.asarray(gray)[4:116, 5:117])


def test_a_face_far_outside_the_picture_is_black():
    image = np.full((20, 20, 3), 255, np.uint8)
    assert align_face(image, ARCFACE_TEMPLATE * 1e6 + 1e7).max() == 0


def test_unusable_images_are_refused_and_the_template_cannot_be_changed_by_accident():
    for image in (np.zeros((20, 20)), np.zeros((0, 5), np.uint8), np.zeros(5, np.uint8), "face.jpg"):
        with pytest.raises(InputError, match="align_face: image must be"):
            align_face(image, ARCFACE_TEMPLATE)
    with pytest.raises(ValueError, match="read-only"):
        ARCFACE_TEMPLATE[0, 0] = 0
