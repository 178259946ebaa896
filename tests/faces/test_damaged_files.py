"""Every reader of files, on files with flipped bits: a well-formed result, or one line of `InputError`."""

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlib_faces._checks import InputError
from kdlib_faces.data import (
    RecordReader,
    load_bin,
    read_agedb_pairs,
    read_calfw_pairs,
    read_feature_file,
    read_ijb_landmarks,
    read_ijb_pairs,
    read_ijb_subjects,
    read_ijb_templates,
    read_lfw_pairs,
    read_longitudinal,
    read_points,
    read_template_list,
    save_records,
)
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.images import decode_image
from tests.faces.matlab_file import Grid, Writer
from tests.faces.reader_files import bit_flips, encoded, put

IMAGES = [bytes([value]) * (3 + value) for value in range(8)]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def pair_list(path, read, **options):
    pairs = read(path, **options)
    assert len(pairs.left) == len(pairs.right) == len(pairs.same) == len(pairs.fold_ids) > 0


def bin_set(path):
    found = load_bin(path)
    assert len(found.images) == 2 * len(found.same) > 0
    assert all(type(image) is bytes for image in found.images)


def records(path):
    reader = RecordReader(path)
    assert all(isinstance(record.image, bytes) for record in reader)
    assert (reader.labels() >= 0).all()
    reader.ranges()


def integers(path):
    found = np.stack(read_integers(path, (np.int64,) * 3, what="list", max_rows=1000), 1)
    lines = path.read_bytes().split(b"\n")
    assert found.tolist() == [[int(field) for field in line.split()] for line in lines if line.split()]


def picture(path):
    assert decode_image(path.read_bytes(), 12).shape == (3, 12, 12)


FOLD = Grid([[Grid([["a_1", "b_1"], ["a_2", "c_1"]]), np.array([[1.0, -1.0]])]])
MATLAB = {"splits": Grid([[FOLD]])}
ARRAYS = ([np.frombuffer(image, np.uint8).copy() for image in IMAGES], np.array([True, False] * 2))
READERS = {
    "LFW": (b"2 1\nA\t1\t2\nA\t1\tB\t1\nC\t1\t3\nC\t1\tB\t2\n", lambda path: pair_list(path, read_lfw_pairs)),
    "CALFW": (
        b"A_1.jpg 1\nA_2.jpg 1\nB_1.jpg 0\nC_1.jpg 0\n",
        lambda p: pair_list(p, read_calfw_pairs, published=False),
    ),
    "AgeDB": (Writer().file(**MATLAB), lambda path: pair_list(path, read_agedb_pairs, published=False)),
    "AgeDB packed": (Writer(">").file(True, **MATLAB), lambda path: pair_list(path, read_agedb_pairs, published=False)),
    "columns": (b"".join(b"%d %d %d\n" % (at * 37, at * 1001, at % 2) for at in range(20)), integers),
    "IJB templates": (b"1.jpg 11 0\n2.jpg 11 1\n3.jpg 18 2\n", read_ijb_templates),
    "IJB landmarks": (b"1.jpg 1 2 3 4 5 6 7 8 9 10 0.9\n2.jpg 1 2 3 4 5 6 7 8 9 10.5 0.8\n", read_ijb_landmarks),
    "IJB pairs": (b"11 18 0\n11 25 1\n", read_ijb_pairs),
    "IJB subjects": (b"TEMPLATE_ID,SUBJECT_ID,FILENAME\n11,1,img/1.png\n12,2,img/2.png\n", read_ijb_subjects),
    "template list": (json.dumps({"path": ["001/a.png", "2/c.png"], "id": ["1", "2"]}).encode(), read_template_list),
    "feature": (struct.pack("<4i6f", 6, 1, 4, 5, *range(6)), read_feature_file),
    "points": (b"version: 1\nn_points: 68\n{\n" + b"1.5 2\n" * 68 + b"}\n", read_points),
    "longitudinal": (b"path,identity,date\na.jpg,Ann,1990-07-02\nb.jpg,Ann,2010-07-02\n", read_longitudinal),
    **{f"bin {protocol}": (pickle.dumps(([*IMAGES], [True, False] * 2), protocol), bin_set) for protocol in range(6)},
    **{f"bin of arrays {protocol}": (pickle.dumps(ARRAYS, protocol), bin_set) for protocol in range(6)},
    **{
        codec: (encoded(PIXELS, codec), picture)
        for codec in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "TGA", "PCX")
    },
}


def error_of(read, path):
    try:
        read(path)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore::UserWarning")  # such as of names that differ in case only
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=80, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_give_a_result_or_one_line(tmp_path, name, data):
    blob, read = READERS[name]
    read(put(tmp_path, blob))
    assert "\n" not in error_of(read, put(tmp_path, data.draw(bit_flips(blob))))


@pytest.mark.parametrize("name", ["AgeDB", "feature", "bin 0", "bin 4", "bin of arrays 2"])
def test_a_file_cut_anywhere_is_refused(tmp_path, name):
    blob, read = READERS[name]
    for end in range(len(blob)):
        with pytest.raises(InputError):
            read(put(tmp_path, blob[:end]))


@pytest.mark.parametrize("damaged", ["set.rec", "set.idx", "set.rec without an index"])
@settings(max_examples=150, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_of_records_and_their_index(tmp_path, damaged, data):
    save_records(tmp_path / "set.rec", [b"first", bytes.fromhex("0a23d7ce") * 3, b"x" * 400], [0, 0, 1])
    path = tmp_path / damaged.split()[0]
    path.write_bytes(data.draw(bit_flips(path.read_bytes())))
    if "without" in damaged:
        (tmp_path / "set.idx").unlink()
    assert "\n" not in error_of(records, tmp_path / "set.rec")


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
