"""Broken files of every reader of lists: one line names the place, what was expected and what to change."""

import struct
from functools import partial

import numpy as np
import pytest

from kdlib_faces._checks import InputError
from kdlib_faces.data import (
    read_agedb_pairs,
    read_cplfw_pairs,
    read_faces,
    read_feature_file,
    read_ijb_landmarks,
    read_ijb_pairs,
    read_ijb_subjects,
    read_ijb_templates,
    read_lfw_pairs,
    read_longitudinal,
    read_points,
    read_template_list,
)
from kdlib_faces.data.formats.columns import read_integers
from tests.faces.matlab_file import Grid, Writer
from tests.faces.reader_files import agedb_file, lfw_text, points_text, put, touch
from tests.faces.reader_files import feature_head as head

TEN = "1 " * 10


def element(kind, *data):
    return Writer().element(kind, struct.pack(f"{len(data)}i", *data))


FLAGS, SHAPE, NAME = element(6, 6, 0), element(5, 1, 1), Writer().element(1, b"splits")

# A reader, the name of the file, then contents with the messages.
TABLE = [
    (read_lfw_pairs, "list.txt", [
        (lfw_text(10, 3, "10 3").rsplit("\n", 2)[0], r"announces 60 pairs, the file holds 59; it is truncated or ed"),
        (lfw_text(10, 3, "10 300"), "announces 6,000 pairs, the file holds 60"),
        (lfw_text(1, 3, "4"), "announces 8 pairs, the file holds 6"),
        ("2 1\nA 1 2\nA 1 3\nA 1 B 1\nA 1 B 2\n", "announces 1 genuine pairs in each fold, fold 0 has 2"),
        ("0 0\nA 1 2\n", "announces 0 pairs"),
        ("A 1 A 2\n", r"line 1: four fields are an impostor pair, but both identities are 'A'"),
        *((f"A 1 {end}\n", "line 1: must be 'name n1 n2'") for end in ("-2", "9" * 20, "\u0663", "2 B 3", "")),
        ("A\t1\t\t2\n", "line 1: must be 'name n1 n2'"),
        ("/etc 1 2\n/etc 1 x 2\n", "an image must be a path inside the set, got '/etc//etc_0001.jpg'"),
        ("../x 1 2\n", "path inside the set"),
        ("", "contains no pairs"),
        ("Ann;1;2\nAnn;1;Bob;3\n", "line 1: the columns are separated by semicolons; separate them by commas"),
        ("a.jpg;b.jpg;1\n", "line 1: the columns are separated by semicolons"),
        ("a\\b.jpg c\\d.jpg 1\n", "path inside the set, got .*; write slashes instead of backslashes"),
        ("Ann 1 2\rAnn 1 Bob 3\r", "line 1: lines end with CR only; save the file with LF or CRLF line ends"),
        ("Ann 1 2\r" * 2000, "line 1: lines end with CR only"),
        ("Ann 1 2\n".encode("utf-16"), "the file is UTF-16 text; save it as UTF-8"),
        ("Ann 1 2\n".encode("utf-16-be"), "line 1: contains a NUL byte; the file must be UTF-8 text"),
        ("Jos\xe9 1 2\n".encode("latin-1"), "line 1: byte 0xe9 is not UTF-8 text; save the file as UTF-8"),
        ("Ann 1 2\na.jpg b.jpg 1\n", "line 2: must be 'name n1 n2' or"),
        ("a.jpg b.jpg 1\nAnn 1 2\n", "line 2: must be 'path path 0' or 'path path 1', got 'Ann 1 2'"),
        ("a.jpg b.jpg 2\n", "line 1: must be .*, or 'path path 0|1', got"),
    ]),
    (read_faces, "faces.csv", [
        ("", r"faces\.csv: the face list is empty"),
        ("path,identity\n", r"a header and no rows"),
        ("file,identity\na.jpg,A\n", r"line 1: no column named 'path'; .*'file'"),
        ("path,identty\na.jpg,A\n", r"no column named 'identity'; the nearest are 'identty'"),
        ("path,identity,path\na.jpg,A,b.jpg\n", r"'path' occurs 2 times"),
        *((f"path,identity,age\na.jpg,A,7\nb.jpg,B,{age}\n", rf"line 3: age must be .*'{age}'")
          for age in ("old", -1, 131)),
        ("path,identity\na.jpg,A\nb.jpg,A\n", r"at least two identities are needed, got one \('A'\)"),
        ("path,identity\na.jpg,A\na.jpg,B\n", r"line 3: the image .* is listed already .*line 2"),
        ("path,identity\na.jpg,A\nb.jpg\n", r"line 3: the header has 2 columns, this line has 1"),
        ("path,identity\n,A\n", r"line 2: path is empty"),
        ("path,identity\na.jpg,--\n", r"identity must contain a letter or a digit, got '--'"),
        ('path,identity\n"a.jpg,A\n', r"line 2: not a CSV line"),
        (b"path,identity\na.jpg,\xff\n", r"line 2: byte 0xff is not UTF-8"),
        (b"path,identity\na.jpg,A\0\n", r"line 2: contains a NUL byte"),
        (b"path,identity\n" + b"x" * 9000, r"line 2: longer than 8192 bytes"),
        (b"\x89PNG\r\n\x1a\n", r"line 1: byte 0x89 is not UTF-8"),
        ("path,identity\nm1.jpg,A\nm2.jpg,B\nm3.jpg,B\nm4.jpg,B\n", r"4 image files not found: .*m1\.jpg, .*m4\.jpg$"),
        ("path;identity\na.jpg;A\n", "line 1: the columns are separated by semicolons; separate them by commas"),
        ("path\tidentity\na.jpg\tA\n", "line 1: the columns are separated by tabs; separate them by commas"),
        ("path,identity\na\\b.jpg,A\n", "line 2: the path has backslashes; write slashes, got"),
        ("path,identity\ra.jpg,A\r", "lines end with CR only"),
        ("path,identity\na.jpg,A\n".encode("utf-16"), "the file is UTF-16 text; save it as UTF-8"),
    ]),
    (partial(read_cplfw_pairs, published=False), "list.txt", [
        ("a.jpg 1\n", "line 1: the last pair has only one line"),
        ("a.jpg 1\nb.jpg 0\n", "line 2: both lines of a pair must have the same label"),
        *((f"a.jpg{end}\nb.jpg{end}\n", "line 1: must be 'image.jpg label'") for end in ("", " x", " -1")),
        ("../a.jpg 1\nb.jpg 1\n", "path inside the set"),
        ("", "contains no pairs"),
    ]),
    (partial(read_agedb_pairs, published=False), "x.mat", [
        (agedb_file(1, 3, labels=lambda found: [0, *found[1:]]), r"fold 1: labels must be 1 or -1, got 0\.0"),
        (agedb_file(1, 3, labels=lambda found: [np.nan, *found[1:]]), "labels must be 1 or -1, got nan"),
        (agedb_file(1, 3, labels=lambda found: found[1:]), r"must hold a \(2, n\) cell of images and n labels"),
        (agedb_file(1, 3, form="text", name=" "), "fold 1: an image must be a name"),
        (agedb_file(1, 3, form="text", name="a\0b{p}"), "an image must be a path inside the set"),
        (Writer().file(splits=np.arange(3.0)), "splits must be a cell of folds"),
        (Writer().file(split=np.arange(3.0)), "no variable 'splits'; found 'split'"),
        (Writer().file(splits=Grid([["a"]])), r"fold 1: must hold a \(2, n\) cell"),
        (Writer().file(), "no variable 'splits'; found none"),
        (b"MATLAB 7.3 MAT-file, x".ljust(600), r"MATLAB 7\.3 files \(HDF5\) .* save\(file, '-v7'\)"),
        (b"\x89HDF\r\n\x1a\n".ljust(600), "MATLAB 7.3"),
        (b"not matlab", "not a MATLAB 5 file"),
        (b"", "the protocol of AgeDB is empty"),
        *((Writer().file() + Writer().element(14, b"".join(parts)), f"broken MATLAB 5 file: .*{message}")
          for parts, message in [
            ([SHAPE], "a matrix without its flags"),
            ([FLAGS, FLAGS], "a matrix without its shape"),
            ([FLAGS, element(5, -1, 1)], r"a matrix of \(-1, 1\)"),
            ([FLAGS, SHAPE, SHAPE], "a matrix without its name"),
            ([element(6, 0x806, 0), SHAPE, NAME], "complex numbers"),
            ([element(6, 3, 0), SHAPE, NAME], "a variable of class 3"),
            ([element(6, 2, 0), SHAPE, NAME, NAME], "a struct without the length of its names"),
            ([element(6, 4, 0), SHAPE, NAME, Writer().element(16, b"\xff")], "text that does not decode"),
            ([element(6, 4, 0), SHAPE, NAME, element(9, 1)], "text of more than one row, or of an unknown encoding"),
            ([FLAGS, SHAPE, NAME, element(16, 1, 1)], "numbers of element type 16"),
            ([FLAGS, SHAPE, NAME, element(9, 1, 1, 1, 1)], r"\(1, 1\) numbers in 16 bytes"),
        ]),
    ]),
    (partial(read_integers, dtypes=(np.int64,) * 3, what="list", max_rows=100), "list.txt", [
        ("1 2 3\n4 5\n6 7 8\n", r"list\.txt line 2: must be 3 whole numbers, got '4 5'; this is not a list"),
        ("1 2 3\n4 5 6 7\n8 9\n", "line 2: must be 3 whole numbers"),
        ("1 2 3 4 5 6\n", "line 1: must be 3"),
        ("1 2\n3 4 5 6\n", "line 1: must be 3"),
        ("1 2 3\n\n1 2 x\n", "line 3: must be 3"),
        *((f"1 2 {number}\n", "line 1") for number in ("-3", "3.0", "1e3", ":", "/", "12345678901234567")),
        *((text, "line 1|control characters") for text in ("1,2,3\n", b"1\0 2 3\n", b"1 2\x0b3\n", b"1 2 3\x0c\n")),
        *((text, "line 2") for text in ("1 2 3\n1 2 \xb2\n", b"1 2 3\n1 2 \xff\n")),
        ("", "the list is empty"),
        ("\n \n", "the list is empty"),
        ("1 2 3" + " " * 9000 + "4\n", "line 1: must be 3 whole numbers"),
        ("1" * 20_000_00, "a line is longer than 8192 bytes"),
        ("1 2 3\n" * 101, "more than 100 rows; this is not a list"),
    ]),
    (read_ijb_templates, "list.txt", [
        *((f"1.jpg 1{end}\n", "line 1: must be 'image template medium'") for end in ("", " x", " -2")),
        ("1.jpg 1 2\n1.jpg 1 3\n", r"image 2: '1\.jpg' occurs twice"),
        ("../1.jpg 1 2\n", "image 1: must be a path inside the set"),
        ("", "the list is empty"),
    ]),
    (read_ijb_landmarks, "list.txt", [
        *((f"1.jpg {end}\n", "line 1: must be 'image' and 11 numbers") for end in ("1 2 3", TEN + "x")),
        *((f"1.jpg {TEN}{end}\n", "image 1: .* must have 11 finite numbers") for end in ("nan", "1e99")),
    ]),
    (read_ijb_pairs, "list.txt", [
        ("1 2 2\n", "pair 1: the label must be 0 or 1, got 2"),
        ("1 2 1\n1 2\n", "line 2: must be 3 whole numbers, got '1 2'"),
    ]),
    (read_ijb_subjects, "list.txt", [
        ("", "must start with a header line"),
        ("1,2\n3,4\n", "must start with a header line, got '1,2'"),
        ("T,S\n", "a header and no rows"),
        *((f"T,S\n1{end}\n", "line 2: must start with 'template,subject'") for end in ("", ",x")),
        ("T,S\n1,2\n1,3\n", "line 3: template 1 has two subjects, 2 and 3"),
    ]),
    (read_feature_file, "x.bin", [
        (b"", "a feature file has at least 16 bytes, got 0"),
        (head(2)[:15], "at least 16 bytes, got 15"),
        (head(2) + bytes(7), "2 numbers need 8 bytes, the file has 7"),
        (head(2) + bytes(9), "2 numbers need 8 bytes, the file has 9"),
        (head(2, kind=6) + bytes(16), r"the header must be \(d, 1, 4, 5\) for d float32 numbers, got \(2, 1, 4, 6\)"),
        *((head(*values), "the header must be")
          for values in ((2, 1, 8), (0,), (-1,), (2**31 - 1,), (2**16, 2**16, 2**18))),
        (head(2) + struct.pack("<2f", 1, float("nan")), "number 1 is not finite"),
        (head(2) + struct.pack("<2f", float("inf"), 1), "number 0 is not finite"),
    ]),
    (read_template_list, "list.json", [
        *((text, "not a JSON file") for text in ("{", b"\xff\xfe\xff", "[" * 100_000)),
        ("[]", "must be an object with 'path', a list of texts"),
        *((f'{{"path": {value}}}', "must be an object with 'path'") for value in ("[]", "[1]", '"a"')),
        ('{"path": ["a", "a"]}', "image 2: 'a' occurs twice"),
        *((f'{{"path": ["{name}"]}}', "image 1: must be a path inside the set")
          for name in ("../a", "/a", "", "\\u0000", "\\ud800")),
        ('{"path": ["a"], "id": ["1", "2"]}', "1 paths and 2 ids; there must be one id per path"),
        ('{"path": ["a"], "id": [true]}', "'id' must be a list of texts or whole numbers"),
        ('{"path": ["a"], "id": "1"}', "'id' must be a list"),
        ("", "the template list is empty"),
    ]),
    (read_points, "x.pts", [
        (points_text([(1, 2)] * 67), "count is 68, got 67 points"),
        (points_text([(1, 2)] * 68).replace("68", "70", 1), "n_points is 70, got 68 points"),
        (points_text([(1, 2)] * 68)[:-2], "must be enclosed in braces; the file is truncated"),
        (points_text([(1, 2)] * 68) + "1 2\n", "nothing may follow the closing brace"),
        ("n_points: x\n{\n}\n", "n_points must be a whole number"),
        ("hello\n", "line 1: must be 'version: 1', 'n_points: n' or an opening brace"),
        *((f"{{\n1 {end}\n}}\n", "line 2: must be 'x y'") for end in ("2 3", "x")),
        *((f"{{\n1 {end}\n}}\n", "line 2: a point must be within a million pixels") for end in ("nan", "inf")),
        ("", "must be enclosed in braces"),
        ("{\n" + "1 2\n" * 10_002, "more than 10,000 points"),
    ]),
    (read_longitudinal, "people.csv", [
        ("", "the longitudinal list is empty; its first line must name the columns path, identity, age, date"),
        ("path,identity\n", "exactly one of the columns 'age' and 'date' is needed, got neither"),
        ("path,identity,age,date\n", "exactly one of the columns 'age' and 'date' is needed, got both"),
        ("path,person,age\n", "no column named 'identity'"),
        ("path,path,identity,age\n", "the column 'path' occurs 2 times"),
        ("path,identity,age\n", "a header and no rows"),
        ("path,identity,age\na,A,1\nb,B,2\n", "no identity has two images"),
        ("path,identity,age\na,A,1\na,A,2\n", r"line 3: the image 'a' is listed already \(.*people.csv line 2\)"),
        *((f"path,identity,age\na,A,{age}\n", "line 2: age must be a number from 0 to 130")
          for age in ("", "nan", "131")),
        *((f"path,identity,date\na,A,{date}\n", "line 2: date must be YYYY-MM-DD")
          for date in ("2001-13-01", "2001-02-30", "01.02.2001", "0000", "")),
        ("path,identity,age\n,A,1\n", "line 2: path is empty"),
        ("path,identity,age\na,--,1\n", "line 2: identity must contain a letter or a digit"),
        ("path,identity,age\na,A\n", "line 2: the header has 3 columns, this line has 2"),
    ]),
]  # fmt: skip
CASES = [(read, name, content, message) for read, name, cases in TABLE for content, message in cases]


@pytest.mark.parametrize(("read", "name", "content", "message"), CASES)
def test_broken_files_are_refused_in_one_line(tmp_path, read, name, content, message):
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(InputError, match=message) as caught:
        read(put(tmp_path, content, name))
    assert "\n" not in str(caught.value)
