"""Identities of one list and of several: what is the same, what stays apart, and what is reported."""

import pytest

from kdlib_faces.data.identities import identity_key
from tests.faces.reader_files import put, touch
from tests.faces.test_image_files import notes_of


def csv(folder, name, *identities):
    touch(folder, *(f"{name}{row}.jpg" for row in range(len(identities))))
    rows = "".join(f"{name}{row}.jpg,{identity}\n" for row, identity in enumerate(identities))
    return put(folder, f"path,identity\n{rows}", f"{name}.csv")


@pytest.mark.parametrize(
    "names",
    [
        ("कमल", "कमला", "कमली"),
        ("สมชาย", "สมชาย์", "สมชัย"),
        ("কমল", "কমলা"),
        ("שָׁלוֹם", "שלום"),
        ("José", "Jose"),
        ("Anna²", "Anna2"),
    ],
)  # fmt: skip
def test_names_that_differ_in_marks_are_different_identities(tmp_path, names):
    faces, notes = notes_of(csv(tmp_path, "a", *names))
    assert (faces.num_identities, notes) == (len(names), "")
    faces, _ = notes_of(csv(tmp_path, "a", *names), csv(tmp_path, "b", *names))
    assert faces.identities.tolist() == [*range(len(names))] * 2


def test_composed_and_decomposed_names_are_one_identity(tmp_path):
    faces, notes = notes_of(csv(tmp_path, "a", "Jose\u0301", "Jos\u00e9 ", "Bob"))
    assert (faces.identities.tolist(), faces.identity_names, notes) == ([0, 0, 1], ("José", "Bob"), "")
    assert identity_key("Jose\u0301 ") == identity_key("JOSÉ")


def test_variants_within_one_list_stay_apart_and_are_reported(tmp_path):
    faces, notes = notes_of(csv(tmp_path, "a", "Ann Lee", "ann_lee", "Ann-Lee", "Bob", "Ann Lee"))
    assert faces.identities.tolist() == [0, 1, 2, 3, 0]
    assert "2 differ only in case or punctuation within one list and were kept apart: 'Ann Lee' and 'ann_lee'" in notes


def test_names_of_two_lists_are_merged_and_reported(tmp_path):
    touch(tmp_path, "lfw/Halle_Berry/1.jpg", "lfw/Zed/1.jpg")
    faces, notes = notes_of(tmp_path / "lfw", csv(tmp_path, "b", "halle--berry", "José", "HALLE BERRY"))
    assert faces.identity_names == ("Halle_Berry", "Zed", "José", "HALLE BERRY")
    assert faces.identities.tolist() == [0, 1, 0, 2, 3]
    assert "1 are in more than one list and were merged: 'halle--berry'" in notes


@pytest.mark.parametrize("name", ["{}", "00{}", "n00{}", "p{}", "id_{}", "Person {}", "class-{}", "{}.0", "١{}"])
def test_numbers_of_two_lists_are_not_merged_unless_the_lists_are_joined(tmp_path, name):
    names = [name.format(number) for number in (0, 1)]
    first, second = csv(tmp_path, "a", *names), csv(tmp_path, "b", *names)
    faces, notes = notes_of(first, second)
    assert faces.identities.tolist() == [0, 1, 2, 3]
    assert len(set(faces.identity_names)) == 4
    assert "2 are numbers in more than one list and were kept apart" in notes
    joined, notes = notes_of(f"{first}+{second}")
    assert (joined.identities.tolist(), joined.identity_names, notes) == ([0, 1, 0, 1], tuple(names), "")


@pytest.mark.parametrize("name", ["m.0107{}", "Ann {}", "Louis XVI {}", "a1b{}"])
def test_names_with_a_number_are_names(tmp_path, name):
    faces, _ = notes_of(csv(tmp_path, "a", name.format(1), "x"), csv(tmp_path, "b", name.format(1), "y"))
    assert faces.num_identities == 3
