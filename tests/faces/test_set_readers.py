"""Pair lists of each face set, on files that these tests make in the published formats: what is read, and what is refused."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlib_faces._checks import InputError
from kdlib_faces.data import (
    FaceDataWarning,
    cacd_vs_pairs,
    parse_agedb_name,
    parse_fgnet_name,
    read_agedb,
    read_agedb_pairs,
    read_calfw_pairs,
    read_cfp_pairs,
    read_cplfw_pairs,
    read_faces,
    read_fgnet,
    read_lfw_pairs,
)
from kdlib_faces.data.formats import matlab as matlab_module
from kdlib_faces.data.image_pairs import assign_folds
from kdlib_faces.data.sets import agedb as agedb_module
from tests.faces.matlab_file import Grid, Writer
from tests.faces.reader_files import agedb_file, lfw_text, put, touch

FUZZ = settings(max_examples=200, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def names(pairs):
    return [(pairs.images[left], pairs.images[right]) for left, right in zip(pairs.left, pairs.right, strict=True)]


# LFW


def test_lfw_as_it_is_published(tmp_path):
    path = put(tmp_path, lfw_text(10, 300, "10\t300"))
    pairs = read_lfw_pairs(path)
    assert (pairs.name, len(pairs), int(pairs.same.sum()), pairs.assigned_folds) == ("LFW View 2", 6000, 3000, False)
    np.testing.assert_array_equal(pairs.fold_ids, np.repeat(np.arange(10), 600))
    assert pairs.same[:300].all()
    assert not pairs.same[300:600].any()
    assert names(pairs)[0] == ("Same_0/Same_0_0001.jpg", "Same_0/Same_0_0002.jpg")
    assert names(pairs)[300] == ("Left_0/Left_0_0001.jpg", "Right_0/Right_0_0002.jpg")
    assert pairs.identities[pairs.right[300]] == "Right_0"
    assert pairs.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert repr(pairs) == "<ImagePairs: LFW View 2, 6000 pairs of 9010 images, 3000 genuine, 10 folds>"
    assert len(set(pairs.images)) == len(pairs.images)


@pytest.mark.parametrize(
    ("each", "name"), [(1100, "LFW View 1 training"), (500, "LFW View 1 test"), (7, "LFW-type pairs")]
)
def test_lfw_lists_whose_first_line_is_one_number(tmp_path, each, name):
    pairs = read_lfw_pairs(put(tmp_path, lfw_text(1, each, str(each))))
    assert (pairs.name, len(pairs), pairs.assigned_folds) == (name, 2 * each, True)
    for fold in range(min(10, each)):
        assert 0 < pairs.same[pairs.fold_ids == fold].mean() < 1


@pytest.mark.parametrize("mark", ["\t", " ", "   "])
def test_lists_without_a_first_line_keep_their_runs_as_folds(tmp_path, mark):
    """RFW's lists start with the first pair; skipping a line would lose it."""
    pairs = read_lfw_pairs(put(tmp_path, lfw_text(10, 30, "", mark)))
    assert (pairs.name, len(pairs), pairs.assigned_folds) == ("LFW-type pairs", 600, False)
    np.testing.assert_array_equal(pairs.fold_ids, np.repeat(np.arange(10), 60))


def test_lists_with_all_of_one_kind_first_get_folds_of_both_kinds(tmp_path):
    """Contiguous folds of such a list hold one kind each, and a rate over them means nothing."""
    text = "".join(f"A 1 {n}\n" for n in range(2, 32)) + "".join(f"A {n} B {n}\n" for n in range(1, 31))
    pairs = read_lfw_pairs(put(tmp_path, text))
    assert pairs.assigned_folds
    for fold in range(10):
        assert np.bincount(pairs.same[pairs.fold_ids == fold]).tolist() == [3, 3]


def test_assign_folds_move_with_what_is_there_and_given_ones_do_not(tmp_path):
    touch(tmp_path / "lfw", *(f"{who}/{who}_{n:04d}.jpg" for who in ("Same_0", "Left_0", "Right_0") for n in (1, 2, 3)))
    touch(tmp_path / "lfw", "Same_1/Same_1_0001.jpg", "Same_1/Same_1_0002.jpg")
    faces = read_faces([tmp_path / "lfw"])
    given_folds = read_lfw_pairs(put(tmp_path, lfw_text(2, 2, "2 2"))).locate(faces)
    assert (given_folds.missing, given_folds.fold_ids.tolist()) == (3, [0, 0, 0, 0, 1])
    dealt = read_lfw_pairs(
        put(tmp_path, "Same_1 1 2\nSame_9 1 2\nSame_0 1 2\nLeft_0 1 Right_0 1\nLeft_0 2 Right_0 2\n")
    )
    assert dealt.locate(faces).fold_ids.tolist() == [0, 1, 0, 1]
    assert dealt.paths(tmp_path / "lfw")[0] == tmp_path / "lfw/Same_1/Same_1_0001.jpg"


def test_an_image_that_a_face_list_has_twice_is_not_guessed(tmp_path):
    touch(tmp_path, "a/A/A_0001.jpg", "b/A/A_0001.jpg", "a/A/A_0002.jpg", "a/B/B_0001.jpg")
    with pytest.warns(FaceDataWarning, match="1 are in more than one list and were merged: 'A'"):
        faces = read_faces([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match=r"the face list has more than one image named 'A/A_0001\.jpg'"):
        read_lfw_pairs(put(tmp_path, "A 1 2\nA 1 B 1\n")).locate(faces)
    with pytest.raises(InputError, match=r"no pair has both its images in the face list; 'Z/Z_0001\.jpg' is missing"):
        read_lfw_pairs(put(tmp_path, "Z 1 2\nZ 1 B 1\n")).locate(faces)


@given(st.lists(st.booleans(), max_size=60))
def test_assign_folds_hold_both_kinds(same):
    same = np.array(same, dtype=bool)
    folds = assign_folds(same)
    assert len(folds) == len(same)
    kinds = min(int(same.sum()), int((~same).sum()))
    if kinds:
        assert sorted(set(folds.tolist())) == list(range(min(10, kinds)))
        for fold in set(folds.tolist()):
            assert 0 < same[folds == fold].mean() < 1


SAME, OTHER = ("Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg", True), ("Ann/Ann_0001.jpg", "Bob/Bob_0003.jpg", False)


@pytest.mark.parametrize(
    "text",
    [
        "name,imagenum1,imagenum2,\nAnn,1,2,\nAnn,1,Bob,3\n",
        "name,imagenum1,name,imagenum2\r\nAnn,1,2\r\nAnn,1,Bob,3\r\n",
        "Ann,1,2\nAnn,1,Bob,3\n",
        *(
            f"{head}{mark.join(SAME[:2])}{mark}{yes}\n\n{mark.join(OTHER[:2])}{mark}{no}\n"
            for head, mark in (
                ("", " "),
                ("", "\t"),
                ("", ","),
                ("left,right,same\n", ","),
                ("left right label\n", " "),
                ("\ufeffa,b,label\n", ", "),
            )
            for yes, no in (("1", "0"), ("True", "False"), ("1", "-1"))
        ),
        ",left,right,same\n0,Ann/Ann_0001.jpg,Ann/Ann_0002.jpg,1.0\n1,Ann/Ann_0001.jpg,Bob/Bob_0003.jpg,0.0\n",
        "1 Ann/Ann_0001.jpg Ann/Ann_0002.jpg\n0 Ann/Ann_0001.jpg Bob/Bob_0003.jpg\n",
        '"Ann/Ann_0001.jpg","Ann/Ann_0002.jpg",1\n"Ann/Ann_0001.jpg","Bob/Bob_0003.jpg",0\n',
    ],
)
def test_pair_lists_as_csv_and_as_paths_with_a_label(tmp_path, text):
    pairs = read_lfw_pairs(put(tmp_path, text))
    assert [(*pair, same) for pair, same in zip(names(pairs), pairs.same.tolist(), strict=True)] == [SAME, OTHER]
    assert pairs.identities == ("Ann", "Ann", "Bob")


def test_paths_are_told_apart_by_as_many_parts_as_they_need(tmp_path):
    touch(tmp_path / "f", "001/front/01.jpg", "001/side/01.jpg", "002/front/01.jpg")
    rows = "001/front/01.jpg 001/side/01.jpg 1\n001/front/01.jpg 002/front/01.jpg 0\n"
    pairs = read_lfw_pairs(put(tmp_path, rows)).locate(read_faces(tmp_path / "f"))
    assert (pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist()) == ([0, 0], [1, 2], [True, False])


@pytest.mark.parametrize(
    "form", ["{0}/{1}.png", "{0}/{1:03d}.jpg", "{0}/{0}_{1}.jpg", "x/{0}-{1:06d}.jpg", "{0}/img_{1}.jpg"]
)
def test_images_with_other_names_are_found_by_identity_and_number(tmp_path, form):
    people = {"Ann Lee": (1, 2, 10), "Bob_2nd": (1, 3)}
    files = [form.format(name, number) for name, numbers in people.items() for number in numbers]
    rows = "".join(f"{file},{name}\n" for file, name in zip(files, ["Ann Lee"] * 3 + ["Bob_2nd"] * 2, strict=True))
    faces = read_faces(put(touch(tmp_path, *files), "path,identity\n" + rows, "faces.csv"))
    pairs = read_lfw_pairs(put(tmp_path, "Ann_Lee\t1\t10\nAnn_Lee\t2\tBob_2nd\t3\nAnn_Lee\t2\tBob_2nd\t9\n")).locate(
        faces
    )
    assert (pairs.left.tolist(), pairs.right.tolist(), pairs.missing) == ([0, 1], [2, 4], 1)


# CALFW and CPLFW


def two_lines(same, different, mark=" ", head=""):
    rows = [head] if head else []
    rows += [f"P_{k:04d}.jpg{mark}{k % 9 + 1}\nP_{k + 1:04d}.jpg{mark}{k % 9 + 1}" for k in range(same)]
    rows += [f"Q_{k:04d}.jpg{mark}0\nR_{k:04d}.jpg{mark}0" for k in range(different)]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(("reader", "name"), [(read_calfw_pairs, "CALFW"), (read_cplfw_pairs, "CPLFW")])
@pytest.mark.parametrize(("mark", "head"), [(" ", ""), ("\t", ""), (" ", "name same_person")])
def test_two_lines_are_a_pair_and_folds_take_three_hundred_of_each_kind(tmp_path, reader, name, mark, head):
    pairs = reader(put(tmp_path, two_lines(3000, 3000, mark, head)))
    assert (pairs.name, len(pairs), int(pairs.same.sum())) == (name, 6000, 3000)
    assert pairs.same[:3000].all()
    for fold in (0, 1, 9):
        rows = np.flatnonzero(pairs.fold_ids == fold)
        np.testing.assert_array_equal(rows, np.r_[fold * 300 : fold * 300 + 300, 3000 + fold * 300 : 3300 + fold * 300])
    assert names(pairs)[3001] == ("Q_0001.jpg", "R_0001.jpg")
    assert (pairs.identities[0], pairs.images[0]) == ("P", "P_0000.jpg")


def test_the_list_of_calfw_that_was_replaced_is_told_by_its_checksum(tmp_path):
    path = put(tmp_path, two_lines(3000, 3000))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_calfw_pairs(path, sha256=digest.upper()).sha256 == digest
    path.write_bytes(path.read_bytes().replace(b"P_0007", b"P_0008", 1))
    with pytest.raises(InputError, match=r"another version of the pair list of CALFW: .* replaced on 2018-09-19"):
        read_calfw_pairs(path, sha256=digest)


def test_counts_other_than_published_are_an_error_unless_asked_for(tmp_path):
    path = put(tmp_path, two_lines(2999, 3000))
    message = r"published pair list of CALFW has 3,000 genuine pairs, 3,000 impostor pairs, got 2,999 genuine pairs"
    with pytest.raises(InputError, match=message):
        read_calfw_pairs(path)
    assert len(read_calfw_pairs(path, published=False)) == 5999


# AgeDB


@pytest.mark.parametrize(("order", "folds", "each"), [("<", 10, 300), (">", 2, 3)])
def test_the_four_protocols_of_agedb(tmp_path, order, folds, each):
    blob = agedb_file(folds, each, form="aged", name="{p}_a_{k}_{s}_b", order=order, packed=order == "<")
    published = each == 300
    pairs = read_agedb_pairs(put(tmp_path, blob, "04_FINAL_protocol_30_years.mat"), published=published)
    assert (pairs.name, len(pairs), int(pairs.same.sum())) == ("AgeDB-30", 2 * folds * each, folds * each)
    np.testing.assert_array_equal(pairs.fold_ids, np.repeat(np.arange(folds), 2 * each))
    assert names(pairs)[0] == ("00_a_0_0_b.jpg", "00_a_0_1_b.jpg")
    assert (pairs.ages[pairs.left] == 20).all()
    assert (pairs.ages[pairs.right] == 50).all()
    assert pairs.identities[pairs.right[2 * each - 1]] == f"0{2 * each - 1}other"


def test_counts_of_agedb_are_the_published_ones(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"fold 1: the published fold of AgeDB has 300 genuine pairs, .* got 3 "):
        read_agedb_pairs(put(tmp_path, agedb_file(10, 3), "x.mat"))
    monkeypatch.setattr(agedb_module, "FOLD_PAIRS", (3, 3))
    with pytest.raises(InputError, match="the published protocol of AgeDB has 10 folds, got 9 folds"):
        read_agedb_pairs(put(tmp_path, agedb_file(9, 3), "x.mat"))


@pytest.mark.parametrize("form", ["text", "struct"])
def test_agedb_names_tell_ages_where_they_fit(tmp_path, form):
    path = put(tmp_path, agedb_file(2, 3, form, "7_Who{p}_{age}_m"), "x.mat")
    pairs = read_agedb_pairs(path, published=False)
    assert (pairs.name, pairs.ages[pairs.left].tolist()) == ("AgeDB", [20.0] * 12)
    assert pairs.identities[0] == "Who00"
    bare = read_agedb_pairs(put(tmp_path, agedb_file(2, 3, form, "{p}{k}{s}"), "y.mat"), published=False)
    assert bare.ages is None
    assert bare.identities is None


def test_people_are_told_only_where_names_agree_with_every_label(tmp_path):
    path = put(tmp_path, agedb_file(2, 3, "text", "{p}_{s}_x", labels=lambda found: [-found[0], *found[1:]]), "x.mat")
    assert read_agedb_pairs(path, published=False).identities is None


def test_matlab_files_cost_no_more_than_their_limit(tmp_path, monkeypatch):
    bomb = zlib.compress(bytes(80 * 2**20))
    path = put(tmp_path, Writer().file() + struct.pack("<II", 15, len(bomb)) + bomb, "x.mat")
    with pytest.raises(InputError, match="it decompresses to more than 67,108,864 bytes"):
        read_agedb_pairs(path)
    deep = "x"
    for _ in range(40):
        deep = Grid([[deep]])
    with pytest.raises(InputError, match="cells more than 32 deep"):
        read_agedb_pairs(put(tmp_path, Writer().file(splits=deep), "x.mat"))
    huge = Writer().matrix(1, (2**30, 2**30), b"", "splits")
    with pytest.raises(InputError, match="1,152,921,504,606,846,976 items, more than its bytes can hold"):
        read_agedb_pairs(put(tmp_path, Writer().file() + huge, "x.mat"))
    monkeypatch.setattr(matlab_module, "MAX_ITEMS", 10)
    with pytest.raises(InputError, match="or than 10 in total"):
        read_agedb_pairs(put(tmp_path, agedb_file(2, 3), "x.mat"))


@FUZZ
@given(
    st.recursive(
        st.text(st.characters(codec="utf-16-le", exclude_categories=["Cs"]), max_size=5) | st.floats(allow_nan=False),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda row: Grid([row])),
        max_leaves=8,
    ),
    st.booleans(),
    st.sampled_from("<>"),
)
def test_matlab_values_come_back(value, packed, order):
    def plain(found):
        if isinstance(found, matlab_module.Cell):
            return Grid([[plain(item) for item in found.items]])
        return found if isinstance(found, str) else float(found[0, 0])

    found = matlab_module.matlab_variable(Writer(order).file(packed, a=1.0, value=value), "value", "x")
    assert plain(found) == value


def test_numbers_of_every_kind_come_back():
    for code in ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4"):
        for order in "<>":
            array = np.arange(6).reshape(2, 3).astype(code)
            np.testing.assert_array_equal(
                matlab_module.matlab_variable(Writer(order).file(a=array), "a", "x"), array, strict=False
            )


@pytest.mark.parametrize(
    ("parse", "name", "expected"),
    [
        (parse_agedb_name, "12_Ann-Example_7_f.jpg", (12, "Ann-Example", 7, "f")),
        (parse_agedb_name, "0_A_B_101_M.JPG", (0, "A_B", 101, "m")),
        *(
            (parse_agedb_name, name, None)
            for name in ("12_Ann_7_x.jpg", "12_Ann_131_f.jpg", "Ann_7_f.jpg", "12_Ann_f.jpg")
        ),
        (parse_fgnet_name, "001A02.JPG", (1, 2, "")),
        (parse_fgnet_name, "001a43a.jpg", (1, 43, "a")),
        (parse_fgnet_name, "082A69B", (82, 69, "b")),
        *((parse_fgnet_name, f"{name}.JPG", None) for name in ("01A02", "001A2", "001B02", "001A02ab", "x001A02")),
    ],
)
def test_names_of_files(parse, name, expected):
    assert parse(name) == expected


def test_the_raw_set_from_a_folder(tmp_path):
    folder = touch(tmp_path, "1_Ann_30_f.jpg", "2_Ann_60_f.jpg", "sub/3_Bob_40_m.jpg", "4_Eve_5_f.txt")
    with pytest.warns(
        FaceDataWarning, match=r"skipped files that are not images: 1 \(\.txt 1, such as .*4_Eve_5_f\.txt"
    ):
        faces = read_agedb(folder)
    assert (faces.identity_names, faces.identities.tolist(), faces.ages.tolist()) == (
        ("Ann", "Bob"),
        [0, 0, 1],
        [30, 60, 40],
    )


# CFP


def cfp(folder, kind="FP", folds=10, each=350):
    protocol = folder / "Protocol"
    for letter, what, count in (("F", "frontal", 10), ("P", "profile", 4)):
        rows = [
            f"{person * count + shot + 1} ../Data/Images/{person + 1:03d}/{what}/{shot + 1:02d}.jpg"
            for person in range(500)
            for shot in range(count)
        ]
        put(protocol, "\n".join(rows) + "\n", f"Pair_list_{letter}.txt")
    for fold in range(folds):
        same = [(fold * 500 + k + 1, (fold * 50 + k // 10) * (4 if kind == "FP" else 10) + 1) for k in range(each)]
        different = [(left, right + 400 if fold < 4 else right - 400) for left, right in same]
        for name, pairs in (("same", same), ("diff", different)):
            put(protocol / "Split" / kind / f"{fold + 1:02d}", "".join(f"{a},{b}\n" for a, b in pairs), f"{name}.txt")
    return folder


@pytest.mark.parametrize("kind", ["FP", "FF"])
def test_cfp_as_it_is_published(tmp_path, kind):
    pairs = read_cfp_pairs(cfp(tmp_path, kind), kind)
    assert (pairs.name, len(pairs), int(pairs.same.sum())) == (f"CFP-{kind}", 7000, 3500)
    np.testing.assert_array_equal(pairs.fold_ids, np.repeat(np.arange(10), 700))
    what = "profile" if kind == "FP" else "frontal"
    assert names(pairs)[10] == ("Data/Images/002/frontal/01.jpg", f"Data/Images/002/{what}/01.jpg")
    people = np.array(pairs.identities)
    np.testing.assert_array_equal(people[pairs.left] == people[pairs.right], pairs.same)


def test_cfp_images_are_found_by_three_parts_of_their_path(tmp_path):
    pairs = read_cfp_pairs(cfp(tmp_path, folds=1, each=4), published=False)
    touch(tmp_path / "crops", *(image.removeprefix("Data/Images/") for image in pairs.images))
    rows = "".join(
        f"{image.removeprefix('Data/Images/')},{who}\n"
        for image, who in zip(pairs.images, pairs.identities, strict=True)
    )
    faces = read_faces(put(tmp_path / "crops", "path,identity\n" + rows, "faces.csv"))
    found = pairs.locate(faces)
    assert (len(found), found.missing) == (8, 0)
    assert [str(faces.paths[row]).split("/")[-3:] for row in found.right[:1]] == [["001", "profile", "01.jpg"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("Pair_list_F.txt", "1 a/b/c/d.jpg more\n", "must be 'number path'"),
        ("Pair_list_F.txt", "1 d.jpg\n", "the path must end in 'identity/frontal/image'"),
        ("Pair_list_P.txt", "1 ../../../etc/x/y.jpg\n", "no image has number|path inside the set"),
        ("Pair_list_F.txt", "1 a/b/c.jpg\n1 a/b/d.jpg\n", "line 2: image 1 occurs twice"),
        ("Split/FP/01/same.txt", "1,2,3\n", r"same\.txt line 1: must be 'number,number'"),
        ("Split/FP/01/same.txt", "1,9999\n", "line 1: no image has number 9999; there are 2,000"),
        ("Split/FP/01/diff.txt", "1,2\n", "01: the published fold of CFP-FP has 350 .* got 350 .*, 1 impostor pairs"),
    ],
)
def test_cfp_files_that_are_none(tmp_path, name, text, message):
    cfp(tmp_path, folds=2)
    put(tmp_path / "Protocol", text, name)
    with pytest.raises(InputError, match=message):
        read_cfp_pairs(tmp_path)


def test_cfp_needs_all_its_files(tmp_path):
    with pytest.raises(InputError, match=r"image list of CFP not found: .*Pair_list_F\.txt"):
        read_cfp_pairs(tmp_path)
    cfp(tmp_path, folds=9)
    with pytest.raises(InputError, match="published protocol of CFP-FP has 10 folds, got 9 folds"):
        read_cfp_pairs(tmp_path)
    with pytest.raises(InputError, match="no folds found; CFP has them in folders 01 to 10"):
        read_cfp_pairs(tmp_path, "FF")
    with pytest.raises(ValueError, match="kind must be"):
        read_cfp_pairs(tmp_path, "PP")


# CACD-VS


def test_cacd_vs_is_told_by_its_names_and_counts_what_is_missing(tmp_path):
    pairs = cacd_vs_pairs()
    assert (len(pairs), int(pairs.same.sum()), len(pairs.images)) == (4000, 2000, 8000)
    for fold in range(10):
        rows = np.flatnonzero(pairs.fold_ids == fold)
        np.testing.assert_array_equal(rows, np.arange(400 * fold, 400 * fold + 400))
        assert pairs.same[rows].tolist() == [True] * 200 + [False] * 200
    assert names(pairs)[3999] == ("3999_0.jpg", "3999_1.jpg")
    touch(tmp_path, *(f"c/{pair:04d}_{side}.png" for pair in (0, 1, 250) for side in (0, 1)), "c/0002_0.png")
    rows = "".join(f"{file.name},x{at}\n" for at, file in enumerate(sorted((tmp_path / "c").iterdir())))
    found = pairs.locate(read_faces(put(tmp_path / "c", "path,identity\n" + rows, "faces.csv")))
    assert (len(found), found.missing, found.same.tolist()) == (3, 3997, [True, True, False])


# FG-NET


def fgnet(folder, images, subjects=82):
    touch(folder, *(f"{k % subjects + 1:03d}A{k // subjects:02d}{'a' if k % 2 else ''}.JPG" for k in range(images)))
    return folder


def test_fgnet_as_it_is_published(tmp_path):
    touch(tmp_path, "points/001a00.pts", "notes.txt", ".001A05.jpg")
    with pytest.warns(FaceDataWarning, match=r"skipped files that are not images: 1 \(\.txt 1, such as .*notes\.txt"):
        faces = read_fgnet(fgnet(tmp_path, 1002))
    assert (len(faces), faces.num_identities) == (1002, 82)
    assert faces.identity_names[:2] == ("001", "002")
    for path, who, age in list(zip(faces.paths, faces.identities, faces.ages, strict=True))[::100]:
        assert parse_fgnet_name(path.name)[:2] == (int(faces.identity_names[who]), age)


def test_a_part_of_fgnet_is_no_fgnet_unless_asked_for(tmp_path):
    with pytest.raises(InputError, match="the published FG-NET has 1,002 images, 82 subjects, got 1,001 images, 82"):
        read_fgnet(fgnet(tmp_path / "a", 1001))
    assert len(read_fgnet(tmp_path / "a", published=False)) == 1001
    with pytest.raises(InputError, match="at least two identities are needed, got one"):
        read_fgnet(fgnet(tmp_path / "b", 5, 1), published=False)
    with pytest.raises(InputError, match=r"no image has a name like 001A02\.JPG"):
        read_fgnet(touch(tmp_path / "c", "x.jpg"))
    with pytest.raises(InputError, match="folder of images not found"):
        read_fgnet(tmp_path / "none")
