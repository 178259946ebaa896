"""Lists of IJB-B and IJB-C, MegaFace's files, landmarks, longitudinal lists, and columns of numbers by the million."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdlib_faces._checks import InputError
from kdlib_faces.data import (
    FeatureSet,
    TemplateList,
    five_points,
    read_feature_file,
    read_ijb,
    read_ijb_landmarks,
    read_ijb_pairs,
    read_ijb_subjects,
    read_ijb_templates,
    read_longitudinal,
    read_points,
    read_template_list,
    write_feature_file,
)
from kdlib_faces.data.formats import columns as columns_module
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.sets import ijb_lists as ijb_lists_module
from tests.faces.reader_files import Shown, feature_head, points_text, put

THREE = (np.int64,) * 3
QUIET = [HealthCheck.function_scoped_fixture]


# Columns of whole numbers


@settings(max_examples=150, suppress_health_check=QUIET)
@given(
    st.lists(st.tuples(*[st.integers(0, 10**16 - 1) | st.integers(0, 99)] * 3), min_size=1, max_size=40),
    st.sampled_from([" ", "\t", "  ", " \t"]),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    st.booleans(),
    st.integers(20, 200),
)
@example([(0, 99999999, 100000000)], " ", "\n", True, 40)
@example([(10**16 - 1, 10**8, 10**8 - 1)], "\t", "\r\n", False, 40)
def test_columns_are_what_int_reads(tmp_path, rows, mark, end, closed, block):
    text = end.join(mark.join(str(number) for number in row) for row in rows) + (end if closed else "")
    saved, columns_module.BLOCK = columns_module.BLOCK, block
    try:
        found = np.stack(read_integers(put(tmp_path, text), THREE, what="list", max_rows=100), 1)
    finally:
        columns_module.BLOCK = saved
    assert found.dtype == np.int64
    assert found.tolist() == [list(row) for row in rows]


def test_lines_that_grow_longer_or_shorter_make_no_difference(tmp_path):
    """The first block determines the allocation."""
    for first, second in ((b"1 2 1\n", b"1000000 2000000 1\n"), (b"1000000 2000000 1\n", b"1 2 1\n")):
        path = put(tmp_path, first * 100_000 + second * 100_000)
        one, _, last = read_integers(path, (np.int64, np.int32, np.bool_), what="list", max_rows=10**9)
        assert [len(one), int(one.sum()), int(last.sum())] == [200_000, 100_000 * 1_000_001, 200_000]


def test_the_line_is_named_far_into_the_file(tmp_path):
    rows = 100_000
    path = put(tmp_path, "10 20 1\n" * rows + "10 20\n" + "10 20 1\n" * 10)
    with pytest.raises(InputError, match=rf"line {rows + 1}: must be 3 whole numbers, got '10 20'"):
        read_integers(path, THREE, what="list", max_rows=10**9)


# IJB


def ijb_lists(folder, name="ijbc", images=60, subjects=5):
    """A small set in the published format: template ids are not contiguous, media hold several frames."""
    rng = np.random.default_rng(0)
    template = 7 * (np.arange(images) // 3) + 11
    put(folder, "".join(f"{k + 1}.jpg {template[k]} {k // 2}\n" for k in range(images)), f"{name}_face_tid_mid.txt")
    points = rng.uniform(0, 112, (images, 10)).round(3)
    put(
        folder,
        "".join(f"{k + 1}.jpg {' '.join(map(str, points[k]))} 0.9{k % 10}\n" for k in range(images)),
        f"{name}_name_5pts_score.txt",
    )
    ids = np.unique(template)
    who = np.arange(len(ids)) % subjects
    pairs = [(a, b, int(who[i] == who[j])) for i, a in enumerate(ids) for j, b in enumerate(ids) if i < j]
    put(folder, "".join(f"{a} {b} {same}\n" for a, b, same in pairs), f"{name}_template_pair_label.txt")
    letter = "S" if name == "ijbb" else "G"
    lists = {f"gallery_{letter}1": slice(0, 3), f"gallery_{letter}2": slice(3, 5), "probe_mixed": slice(5, None)}
    for part, rows in lists.items():
        body = "".join(
            f"{t},{s},img/{t}.png,1\n{t},{s},frames/{t}.png,2\n" for t, s in zip(ids[rows], who[rows], strict=True)
        )
        put(folder, "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n" + body, f"{name}_1N_{part}.csv")
    return ids, who, pairs, points


@pytest.mark.parametrize(("name", "short"), [("IJB-B", "ijbb"), ("IJB-C", "ijbc")])
@pytest.mark.parametrize("inside", ["meta", ""])
def test_a_whole_set(tmp_path, name, short, inside):
    ids, who, pairs, points = ijb_lists(tmp_path / inside, short)
    found = read_ijb(tmp_path, name, published=False)
    assert len(found.templates) == 60
    np.testing.assert_array_equal(np.unique(found.templates.template_ids), ids)
    assert found.templates.images[:2] == ("1.jpg", "2.jpg")
    np.testing.assert_array_equal(found.templates.media_ids, np.arange(60) // 2)
    np.testing.assert_array_equal(np.stack([found.pairs.left, found.pairs.right, found.pairs.same], 1), np.array(pairs))
    np.testing.assert_allclose(found.landmarks.points.reshape(60, 10), points, rtol=1e-6)
    np.testing.assert_allclose(found.landmarks.scores, [0.9 + k % 10 / 100 for k in range(60)], rtol=1e-6)
    assert [len(gallery) for gallery in found.galleries] == [3, 2]
    np.testing.assert_array_equal(found.galleries[1].subject_ids, who[3:5])
    np.testing.assert_array_equal(found.probes.template_ids, ids[5:])
    assert repr(found) == f"<IJBSet: {name}, 60 images, 190 pairs, galleries of 3 and 2>"
    assert read_ijb(tmp_path, name, published=False, pairs=False).pairs is None


def test_parts_that_are_absent_are_none(tmp_path):
    ijb_lists(tmp_path)
    for name in ("name_5pts_score.txt", "template_pair_label.txt", "1N_probe_mixed.csv", "1N_gallery_G1.csv"):
        (tmp_path / f"ijbc_{name}").unlink()
    with pytest.raises(InputError, match=r"one of the two galleries ijbc_1N_gallery_G1\.csv and _G2\.csv is missing"):
        read_ijb(tmp_path, published=False)
    (tmp_path / "ijbc_1N_gallery_G2.csv").unlink()
    found = read_ijb(tmp_path, published=False)
    assert found.landmarks is found.pairs is found.galleries is found.probes is None
    with pytest.raises(InputError, match=r"template list not found: .*ijbb_face_tid_mid\.txt"):
        read_ijb(tmp_path, "IJB-B")


def test_counts_are_the_published_ones(tmp_path):
    ijb_lists(tmp_path)
    for reader, file, message in (
        (read_ijb_templates, "face_tid_mid.txt", "template list of IJB-C has 469,375 images, 23,124 templates, got 60"),
        (read_ijb_landmarks, "name_5pts_score.txt", "landmark list of IJB-C has 469,375 images, got 60 images"),
        (
            read_ijb_pairs,
            "template_pair_label.txt",
            "list of IJB-C has 19,557 genuine pairs, 15,638,932 impostor pairs",
        ),
    ):
        with pytest.raises(InputError, match=message):
            reader(tmp_path / f"ijbc_{file}", published="IJB-C")
    lists = (("G1", "gallery_G1", "1,772"), ("G2", "gallery_G2", "1,759"), ("probes", "probe_mixed", "19,593"))
    for part, file, count in lists:
        with pytest.raises(InputError, match=f"list of IJB-C {part} has {count} templates"):
            read_ijb_subjects(tmp_path / f"ijbc_1N_{file}.csv", published=f"IJB-C {part}")
    with pytest.raises(InputError, match="template list of IJB-B has 227,630 images, 12,115 templates"):
        read_ijb_templates(tmp_path / "ijbc_face_tid_mid.txt", published="IJB-B")
    assert ijb_lists_module.PAIRS["IJB-B"] == (10_270, 8_000_000)
    with pytest.raises(ValueError, match="published must be"):
        read_ijb_pairs(tmp_path / "ijbc_template_pair_label.txt", published="IJB-A")


@pytest.mark.parametrize("table", [0, 10**6])
def test_a_pair_with_an_unknown_template_is_named(tmp_path, monkeypatch, table):
    """A lookup in a table of zeros gives such a pair the first template, and a number comes out."""
    monkeypatch.setattr(ijb_lists_module, "MAX_TABLE", table)
    ijb_lists(tmp_path)
    templates = read_ijb_templates(tmp_path / "ijbc_face_tid_mid.txt")
    path = tmp_path / "ijbc_template_pair_label.txt"
    assert len(read_ijb_pairs(path, templates=templates)) == 190
    path.write_text(path.read_text() + "11 12 0\n")
    with pytest.raises(InputError, match=r"label\.txt pair 191: no image belongs to template 12"):
        read_ijb_pairs(path, templates=templates)
    path.write_text("11 18 1\n999999 11 0\n")
    with pytest.raises(InputError, match="pair 2: no image belongs to template 999999"):
        read_ijb_pairs(path, templates=templates)
    with pytest.raises(InputError, match="no image belongs to template 5"):
        read_ijb_subjects(put(tmp_path, "T,S\n11,1\n5,2\n"), templates=templates)


def test_landmarks_in_another_order_are_named(tmp_path):
    ijb_lists(tmp_path)
    templates = read_ijb_templates(tmp_path / "ijbc_face_tid_mid.txt")
    path = tmp_path / "ijbc_name_5pts_score.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], lines[6], lines[5], *lines[7:]]))
    with pytest.raises(InputError, match=r"image 6: '7\.jpg', the template list has '6\.jpg' there"):
        read_ijb_landmarks(path, templates=templates)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match="59 images, the template list has 60"):
        read_ijb_landmarks(path, templates=templates)


def test_pairs_take_little_more_memory_than_they_are(tmp_path):
    rows = 300_000
    path = put(tmp_path, b"12345 23456 0\n" * rows)
    tracemalloc.start()
    pairs = read_ijb_pairs(path)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == rows
    assert size < 20 * rows
    assert peak < 22 * rows + 6_000_000


# MegaFace


@settings(max_examples=50, suppress_health_check=QUIET)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=600))
def test_features_come_back(tmp_path, numbers):
    path = tmp_path / "x.bin"
    write_feature_file(path, numbers)
    assert path.read_bytes()[:16] == struct.pack("<4i", len(numbers), 1, 4, 5)
    np.testing.assert_array_equal(read_feature_file(path), np.array(numbers, np.float32))


def test_a_row_of_columns_is_a_feature_too(tmp_path):
    blob = feature_head(1, 3, 12) + struct.pack("<3f", 1, 2, 3)
    assert read_feature_file(put(tmp_path, blob)).tolist() == [1, 2, 3]
    for wrong in ([], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="feature must be"):
            write_feature_file(tmp_path / "no.bin", wrong)
    assert not (tmp_path / "no.bin").exists()


def test_template_lists(tmp_path):
    content = {"path": ["001/a.png", "001/b.png", "2/c.png"], "id": ["1", "1", "2"]}
    probes = read_template_list(put(tmp_path, json.dumps(content)))
    assert (probes.paths[2], probes.ids) == ("2/c.png", ("1", "1", "2"))
    assert repr(probes) == "<TemplateList: 3 images, 2 identities>"
    distractors = read_template_list(put(tmp_path, json.dumps({"path": ["1.jpg"]})))
    assert (distractors.ids, repr(distractors)) == (None, "<TemplateList: 1 images>")
    assert read_template_list(put(tmp_path, '{"path": ["a"], "id": [7]}')).ids == ("7",)


def test_features_come_in_shards_and_missing_ones_are_said(tmp_path):
    images = TemplateList(tuple(f"{k % 3}/{k}.jpg" for k in range(10)))
    features = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    for image, feature in zip(images.paths, features, strict=True):
        write_feature_file(tmp_path / f"{image}_r50.bin", feature)
    seen = Shown()
    kept = FeatureSet(tmp_path, images, "_r50.bin", rows=4, progress=seen)
    for _ in range(2):
        shards = list(kept)
        assert [shard.shape for shard in shards] == [(4, 4), (4, 4), (2, 4)]
        np.testing.assert_array_equal(np.concatenate(shards), features)
    assert seen == ["features", "features"]
    kept.file(images.paths[3]).unlink()
    with pytest.raises(InputError, match=r"feature file not found: .*3\.jpg_r50\.bin"):
        list(kept)
    skipping = FeatureSet(tmp_path, images, "_r50.bin", rows=4, missing="skip")
    assert skipping.present().sum() == 9
    np.testing.assert_array_equal(np.concatenate(list(skipping)), np.delete(features, 3, axis=0))
    write_feature_file(kept.file(images.paths[3]), [1.0, 2.0])
    with pytest.raises(InputError, match=r"3\.jpg_r50\.bin: 2 numbers, the files before have 4"):
        list(kept)
    with pytest.raises(ValueError, match="missing must be"):
        FeatureSet(tmp_path, images, missing="zero")


# Landmarks


def test_sixty_eight_points_and_five_of_them(tmp_path):
    points = np.random.default_rng(0).uniform(0, 500, (68, 2)).round(3)
    found = read_points(put(tmp_path, points_text(points), "001a02.pts"))
    np.testing.assert_allclose(found, points, rtol=1e-6)
    five = five_points(found)
    np.testing.assert_allclose(five[0], (points[36] + points[39]) / 2, rtol=1e-6)
    np.testing.assert_allclose(five[1], (points[42] + points[45]) / 2, rtol=1e-6)
    np.testing.assert_allclose(five[2:], points[[30, 48, 54]], rtol=1e-6)
    np.testing.assert_array_equal(five_points(np.stack([found] * 3))[2], five)
    with pytest.raises(ValueError, match=r"points must be \(..., 68, 2\), got \(5, 2\)"):
        five_points(five)


# Longitudinal lists


def test_ages_and_dates_become_years(tmp_path):
    ages = read_longitudinal(put(tmp_path, "identity,Path,x,age\nAnn,a.jpg,1,7.5\nAnn,b.jpg,,37\nBob,c.jpg,,40\n"))
    assert (ages.kind, ages.years.tolist(), ages.identities.tolist()) == ("age", [7.5, 37.0, 40.0], [0, 0, 1])
    assert (ages.identity_names, ages.paths[1]) == (("Ann", "Bob"), tmp_path / "b.jpg")
    text = "path,identity,date\na,A,2000-01-01\nb,A,2001-01-01\nc,A,2010\nd,A,2010-07\ne,A,1970-12-31\n"
    dates = read_longitudinal(put(tmp_path, text))
    assert dates.kind == "date"
    np.testing.assert_allclose(dates.years, [2000.0, 2001.0, 2010.5, 2010.54, 1971.0], atol=0.01)
    np.testing.assert_allclose(dates.elapsed, dates.years - dates.years[4])
    np.testing.assert_allclose(ages.elapsed, [0, 29.5, 0])
    assert repr(dates) == "<LongitudinalList: 5 images, 1 identities, up to 39.5 years>"
