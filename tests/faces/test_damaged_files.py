"""Files that are cut, noise, and names in pickles; `tests/fuzz` damages the files of every reader at random."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlib_faces._checks import InputError
from kdlib_faces.data import RecordReader, load_bin, read_agedb_pairs, read_lfw_pairs
from kdlib_faces.data.lists import read_faces
from tests.faces.reader_files import put
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", ["AgeDB", "feature", "bin 0", "bin 4", "bin of arrays 2"])
def test_a_file_cut_anywhere_is_refused(tmp_path, name):
    ((file, blob),) = TARGETS[name].files().items()
    for end in range(len(blob)):
        put(tmp_path, blob[:end], file)
        with pytest.raises(InputError):
            TARGETS[name].read(tmp_path)


@settings(max_examples=200, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([load_bin, read_lfw_pairs, read_agedb_pairs, RecordReader]), st.binary(max_size=200))
def test_noise_is_refused(tmp_path, read, noise):
    with pytest.raises(InputError):
        read(put(tmp_path, noise, "noise.bin"))


def test_an_escape_in_a_name_is_refused_without_a_warning(tmp_path, recwarn):
    path = tmp_path / "set.bin"
    path.write_bytes(b"\x80\x03cnumpy.core\\qmultiarray\n_reconstruct\n.")
    with pytest.raises(InputError, match="is refused"):
        load_bin(path)
    assert not recwarn


def test_a_refused_name_is_shown_on_one_line(tmp_path):
    path = tmp_path / "set.bin"
    path.write_bytes(b"\x80\x03cnum\x0cpy\n\x1b[31mcore\n.")
    with pytest.raises(InputError, match=r"the name num\\x0cpy\.\\x1b\[31mcore is refused"):
        load_bin(path)


def test_paths_of_a_list_that_no_file_can_have_are_files_not_found(tmp_path):
    for name, shown in (
        ("a" * 300 + ".jpg", "a" * 200),
        ("b\u2028.jpg", r"b\\u2028\.jpg"),
        (r"c\d" + "e" * 300, "has backslashes"),
    ):
        path = put(tmp_path, f"path,identity\n{name},1\n", "faces.csv")
        with pytest.raises(InputError, match=shown):
            read_faces(path)
