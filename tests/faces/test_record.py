"""RecordIO without MXNet: bytes as dmlc writes them, face sets with their header, workers, and files that are none."""

import multiprocessing
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdlib_faces._checks import InputError
from kdlib_faces.data import Record, RecordReader, read_property, save_records
from kdlib_faces.data.formats import record_format as record_format_module
from kdlib_faces.data.formats import record_reader as record_reader_module
from kdlib_faces.data.formats.record_format import frame, pack, payload
from tests.faces.reader_files import Shown

MAGIC = bytes.fromhex("0a23d7ce")
QUIET = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dmlc_write(data):
    """The writer of dmlc-core, step by step as its loop goes over aligned words."""
    out, start = b"", 0
    for at in range(0, len(data) // 4 * 4, 4):
        if data[at : at + 4] == MAGIC:
            out += struct.pack("<II", 0xCED7230A, (1 if start == 0 else 2) << 29 | (at - start)) + data[start:at]
            start = at + 4
    part = data[start:]
    return out + struct.pack("<II", 0xCED7230A, (3 if start else 0) << 29 | len(part)) + part + bytes(-len(part) % 4)


def image_record(image, label, number=0):
    """`mx.recordio.pack(IRHeader(...), image)`: one label in the header, several behind it with their count as the flag."""
    if np.ndim(label):
        values = np.asarray(label, "<f4")
        return struct.pack("<IfQQ", values.size, 0.0, number, 0) + values.tobytes() + image
    return struct.pack("<IfQQ", 0, label, number, 0) + image


def write(tmp_path, records, *, index=True, name="train"):
    """`records` are (key, data of the record); in file order."""
    path, lines = tmp_path / f"{name}.rec", []
    with path.open("wb") as stream:
        for key, data in records:
            lines.append(f"{key}\t{stream.tell()}\n")
            stream.write(dmlc_write(data))
    if index:
        path.with_suffix(".idx").write_text("".join(lines))
    return path


def face_set(images, labels, *, header_first=False):
    """A face set: images from key 1, an identity record each with the range of its images, header with key 0."""
    records = [
        (key, image_record(image, label, key)) for key, (image, label) in enumerate(zip(images, labels, strict=True), 1)
    ]
    end = len(records) + 1
    for at, label in enumerate(sorted(set(labels))):
        keys = [key for key, found in enumerate(labels, 1) if found == label]
        records.append((end + at, image_record(b"", [keys[0], keys[-1] + 1], end + at)))
    head = (0, image_record(b"", [end, end + len(set(labels))], 0))
    return [head, *records] if header_first else [*records, head]


IMAGES = [
    b"first",
    MAGIC + b"at the front",
    b"1234" + MAGIC + b"in the middle" + MAGIC,
    MAGIC * 3,
    b"123" + MAGIC,
    b"x" * 1000,
]
LABELS = [0, 0, 1, 1, 1, 2]
HEADER = (0, image_record(b"", [3, 4]))

ALIGNED = st.lists(st.sampled_from([MAGIC, b"abcd", b"\0\0\0\0", b"a", MAGIC[:2], MAGIC[2:]]), max_size=12).map(
    b"".join
)


@QUIET
@given(st.binary(max_size=200) | ALIGNED)
@example(b"")
@example(MAGIC)
@example(b"a" + MAGIC)
def test_the_frame_is_dmlcs_and_comes_back(data):
    framed = frame(data)
    assert framed == dmlc_write(data)
    assert payload(framed, 0, "x") == (data, len(framed))
    for most in (0, 3, 8, 17):
        assert payload(framed, 0, "x", max_bytes=most)[0][:most] == data[:most]


def test_the_magic_is_put_back_between_the_parts(tmp_path):
    """A reader that only joins the parts loses four bytes at each occurrence, and such images decode wrongly."""
    reader = RecordReader(write(tmp_path, face_set(IMAGES, LABELS)))
    assert [record.image for record in reader] == IMAGES


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("header_first", [True, False])
def test_a_face_set_with_its_header(tmp_path, index, header_first):
    path = write(tmp_path, face_set(IMAGES, LABELS, header_first=header_first), index=index)
    (tmp_path / "property").write_text("3,112,112\n")
    reader = RecordReader(path)
    assert len(reader) == 6
    assert reader.header == (7, 10)
    assert reader.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert [(record.image, record.label, record.key, record.identity) for record in reader] == [
        (image, label, key, label) for key, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True), 1)
    ]
    assert reader[-1].image == IMAGES[-1]
    assert [record.key for record in reader[1:3]] == [2, 3]
    assert reader.labels().tolist() == LABELS
    spans = reader.ranges()
    assert [column.tolist() for column in (spans.keys, spans.starts, spans.ends)] == [[7, 8, 9], [1, 3, 6], [3, 6, 7]]
    assert tuple(reader.properties) == (3, 112, 112)
    assert repr(reader) == "<RecordReader: 6 images of train.rec>"
    assert repr(reader[0]) == "<Record: key 1, label 0.0, 5 bytes>"
    with pytest.raises(IndexError, match=r"index must be in \[-6, 6\)"):
        reader[6]


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_without_a_header_every_record_is_an_image(tmp_path, index, first):
    records = [(first + at, image_record(image, at, first + at)) for at, image in enumerate(IMAGES)]
    reader = RecordReader(write(tmp_path, records, index=index))
    assert [record.image for record in reader] == IMAGES
    assert reader.header is reader.ranges() is reader.properties is None
    assert reader.labels().tolist() == list(range(6))


def test_labels_that_are_arrays_give_their_first(tmp_path):
    records = [(at, image_record(b"image", [at + 7, 0.5, -1], at)) for at in range(3)]
    reader = RecordReader(write(tmp_path, records))
    assert reader[1].labels == (8.0, 0.5, -1.0)
    assert (reader[1].label, reader[1].identity, len(reader)) == (8.0, 8, 3)
    assert reader.labels().tolist() == [7, 8, 9]


def test_ids_that_repeat_give_way_to_places(tmp_path):
    records = [(at, image_record(image, at, 0)) for at, image in enumerate(IMAGES)]
    reader = RecordReader(write(tmp_path, records, index=False))
    assert reader.keys.tolist() == list(range(6))
    assert [record.image for record in reader] == IMAGES


def test_an_index_may_be_elsewhere_and_in_any_order(tmp_path):
    path = write(tmp_path, face_set(IMAGES, LABELS))
    lines = path.with_suffix(".idx").read_text().splitlines()
    path.with_suffix(".idx").unlink()
    other = tmp_path / "other.idx"
    other.write_text("\r\n".join(reversed(lines)))
    assert [record.image for record in RecordReader(path, other)] == IMAGES


def test_labels_are_exact_below_two_to_the_24_only():
    assert Record(b"", float(2**24 - 1), (), 1, 1).identity == 2**24 - 1
    for label in (float(2**24), -1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(
            InputError, match=r"record: an identity must be a whole number from 0 and below 2\^24, got label"
        ):
            _ = Record(b"", label, (), 1, 1).identity


@pytest.mark.parametrize("a", [2**24, 2**24 + 1, 2**24 + 2, 2**24 + 3, 2**25 + 3, 2**25 + 5])
def test_a_header_above_two_to_the_24_finds_where_images_end(tmp_path, a):
    """`a` as a float32 stands for several keys then: the first record without an image near it is the first identity."""
    records = [(0, image_record(b"image", 5)), (1, image_record(b"", [1, 2]))]
    reader = RecordReader(write(tmp_path, records))
    image, identity = reader._offsets
    reader._keys = np.arange(a - 10, a + 10)
    reader._offsets = np.where(reader._keys < a, image, identity)
    assert reader._boundary(int(np.float32(a))) == a


def _labels(reader, rows, queue):
    queue.put((os.getpid(), [reader[row].image for row in rows]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_goes_into_workers(tmp_path, method):
    reader = RecordReader(write(tmp_path, face_set(IMAGES, LABELS)))
    assert reader[0].image == IMAGES[0]  # open before the workers start
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    count = 2 if method == "fork" else 1  # a spawned one imports everything anew
    workers = [context.Process(target=_labels, args=(reader, range(start, 6, count), queue)) for start in range(count)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(images for _, images in found) == sorted(IMAGES[start::count] for start in range(count))
    assert len({process for process, _ in found} | {os.getpid()}) == count + 1


def test_pickling_copies_no_file_and_closing_is_not_the_end(tmp_path):
    path = write(tmp_path, [(at, image_record(b"x" * 100_000, at)) for at in range(20)])
    reader = RecordReader(path)
    assert len(pickle.dumps(reader)) < 3000
    copy = pickle.loads(pickle.dumps(reader))
    with reader:
        assert reader[3].label == 3
    assert reader._map is None
    assert reader[4].label == copy[4].label == 4


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path, face_set(IMAGES, LABELS))
    reader = RecordReader(path)
    reader.close()
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(InputError, match="the file has changed since the reader was created"):
        reader[0]


def test_the_file_is_mapped_not_read(tmp_path):
    path = write(tmp_path, [(at, image_record(bytes(2_000_000), at)) for at in range(20)])
    tracemalloc.start()
    reader = RecordReader(path)
    assert reader[19].label == 19
    reader.labels()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_progress_is_shown_where_the_index_is_made(tmp_path):
    seen = Shown()
    RecordReader(write(tmp_path, face_set(IMAGES, LABELS), index=False), progress=seen)
    assert seen == ["records of train.rec"]


# Broken files


def relabel(data, word):
    """The file with another length and flag of its first record."""
    return data[:4] + struct.pack("<I", word) + data[8:]


def bad(tmp_path, *, data=None, index=None, records=None):
    path = write(tmp_path, face_set(IMAGES, LABELS) if records is None else records)
    if data is not None:
        path.write_bytes(data(path.read_bytes()))
    if index is not None:
        path.with_suffix(".idx").write_text(index(path.with_suffix(".idx").read_text()))
    else:
        path.with_suffix(".idx").unlink()
    return path


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("data", lambda data: b"", r"train\.rec: the record file is empty"),
        (
            "data",
            lambda data: data[:-4],
            r"record 9: the record at byte \d+ has 32 bytes, 28 are left: the file is truncated",
        ),
        ("data", lambda data: data + b"\0", r"record 10: no record can start at byte \d+ of \d+"),
        (
            "data",
            lambda data: data + bytes(8),
            r"record 10: no record starts at byte \d+: found 0x00000000, expected 0xced72",
        ),
        ("data", lambda data: b"x" + data[1:], r"record 0: no record starts at byte 0"),
        ("data", lambda data: relabel(data, 5 << 29 | 29), "has part flag 5; 0 to 3 are known"),
        ("data", lambda data: relabel(data, 2 << 29 | 29), "starts with part flag 2, a part of another"),
        ("data", lambda data: relabel(data, 1 << 29 | 29), "record at byte 0 is incomplete: byte 40 starts"),
        ("data", lambda data: relabel(data, 29 - 8)[:32], "an image record has at least 24 bytes, got 21"),
        ("index", lambda text: "", r"train\.idx: the record index is empty"),
        ("index", lambda text: text.replace("3\t", "2\t", 1), "key 2 occurs twice"),
        (
            "index",
            lambda text: text + "20\t9999999\n",
            r"train\.idx row 11: no record can start at byte 9999999 of train\.rec",
        ),
        ("index", lambda text: text + "20\t3\n", r"row 11: no record can start at byte 3"),
        ("index", lambda text: "x" + text, r"train\.idx line 1: must be 2 whole numbers, got 'x1"),
        ("index", lambda text: text + "7\n", r"line 11: must be 2 whole numbers, got '7'"),
        ("index", lambda text: text + "7 8 9\n", r"line 11: must be 2 whole numbers"),
        ("index", lambda text: text + "-7 8\n", r"line 11: must be 2 whole numbers"),
        ("index", lambda text: text + "\0" * 20000, r"a line is longer than 8192 bytes; this is not a record index"),
        (
            "index",
            lambda text: "".join(text.splitlines(True)[1:]),
            "names images 1 to 6, 1 of them are not in the index",
        ),
    ],
)
def test_broken_records_and_indexes_are_named(tmp_path, part, change, message):
    with pytest.raises(InputError, match=message):
        list(RecordReader(bad(tmp_path, **{part: change})))


def test_an_index_of_another_file_is_noticed(tmp_path):
    path = bad(tmp_path, index=lambda text: text.replace("\t40\n", "\t44\n"))
    reader = RecordReader(path)
    with pytest.raises(InputError, match=r"train\.rec record 2: no record starts at byte 44: found"):
        reader[1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1], "names no image"),
        ([9, 10], "names images 1 to 8, 6 of them are not in the index"),
        ([3, 2], r"record 0: a header's labels must be whole numbers 1 <= a <= b, got 3\.0 and 2\.0"),
        *((labels, "whole numbers") for labels in ([2.5, 3], [np.nan, 3], [0, 3], [np.inf, np.inf])),
    ],
)
def test_headers_that_name_what_is_not_there(tmp_path, labels, message):
    records = [(0, image_record(b"", labels)), (1, image_record(b"a", 0)), (2, image_record(b"b", 0))]
    with pytest.raises(InputError, match=message):
        RecordReader(write(tmp_path, records))


@pytest.mark.parametrize("span", [[0, 2], [1, 1], [1, 9], [1.5, 2], [np.nan, 2], [3], [0]])
def test_identity_records_that_name_what_is_not_there(tmp_path, span):
    reader = RecordReader(write(tmp_path, [*face_set([b"a", b"b"], [0, 0])[:2], (3, image_record(b"", span)), HEADER]))
    with pytest.raises(InputError, match=r"record 3: an identity's images must be keys from 1 to 2"):
        reader.ranges()


def test_labels_come_from_the_records_and_ranges_are_checked_against_them(tmp_path):
    records = face_set([b"a", b"b", b"c"], [0, 0, 0])
    for first, second, third in ((7, 7, 0), (0, 7, 0)):
        changed = [(1, image_record(b"a", first)), (2, image_record(b"b", second)), (3, image_record(b"c", third))]
        reader = RecordReader(write(tmp_path, [*changed, *records[3:]]))
        assert reader.labels().tolist() == [first, second, third]
        with pytest.raises(InputError, match=r"record 4: its images 1 and [23] have labels \d and \d"):
            reader.ranges()
    twice = [(4, image_record(b"", [1, 3])), (5, image_record(b"", [2, 4])), (0, image_record(b"", [4, 6]))]
    with pytest.raises(InputError, match="identity records 4 and 5 name the same images"):
        RecordReader(write(tmp_path, [*records[:3], *twice])).ranges()
    reader = RecordReader(write(tmp_path, [*records[:3], (0, image_record(b"", [4, 6]))]))
    with pytest.raises(InputError, match="names identities 4 to 5, 2 are not in the index"):
        reader.ranges()
    assert reader.labels().tolist() == [0, 0, 0]


@pytest.mark.parametrize("span", [lambda start, end: [start], lambda start, end: start])
def test_a_range_of_one_number_ends_where_the_next_starts(tmp_path, span):
    images = [(key, image_record(b"image", label)) for key, label in ((1, 5), (2, 5), (3, 8))]
    spans = [(4, image_record(b"", span(1, 3))), (5, image_record(b"", span(3, 4)))]
    reader = RecordReader(write(tmp_path, [*images, *spans, (0, image_record(b"", [4, 6]))]))
    assert reader.labels().tolist() == [5, 5, 8]
    assert (reader.ranges().starts.tolist(), reader.ranges().ends.tolist()) == ([1, 3], [3, 4])


def test_announced_sizes_cost_nothing(tmp_path, monkeypatch):
    path = write(tmp_path, [(0, struct.pack("<IfQQ", 2**31, 0, 0, 0) + b"image")])
    with pytest.raises(
        InputError, match=r"record 0 at byte 0: the header announces 2147483648 labels, the record can hold 1"
    ):
        RecordReader(path)[0]
    monkeypatch.setattr(record_format_module, "MAX_RECORD", 100)
    split = write(tmp_path, [(1, image_record(MAGIC * 40, 0))], name="split")
    with pytest.raises(InputError, match="the record at byte 0 is longer than 100 bytes"):
        RecordReader(split)[0]
    monkeypatch.setattr(record_reader_module, "MAX_RECORDS", 5)
    with pytest.raises(InputError, match="more than 5 rows; this is not a record index"):
        RecordReader(bad(tmp_path, index=lambda text: text))


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"record file not found: .*no\.rec"):
        RecordReader(tmp_path / "no.rec")
    with pytest.raises(InputError, match="record file must be a file, got the folder"):
        RecordReader(tmp_path)
    with pytest.raises(InputError, match="record index not found"):
        RecordReader(write(tmp_path, face_set(IMAGES, LABELS)), tmp_path / "no.idx")


@pytest.mark.parametrize(
    "text",
    ["", "3,112\n", "3,112,112\nmore\n", "x,112,112", "3,112,1e2", "0,112,112", "3,0,1", "-3,1,1", "9" * 12 + ",1,1"],
)
def test_property_files_of_another_form(tmp_path, text):
    path = tmp_path / "property"
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"property: (must be one line 'identities,height,width'|identities, height and)"
    ):
        read_property(path)


# Writing


@QUIET
@given(st.lists(st.tuples(st.binary(max_size=60) | ALIGNED, st.integers(0, 5)), min_size=1, max_size=12), st.booleans())
def test_a_written_set_comes_back(tmp_path, items, header):
    items = [(image + b".", label) for image, label in items]
    if header:
        items.sort(key=lambda item: item[1])
    path = tmp_path / "own.rec"
    save_records(path, [image for image, _ in items], [label for _, label in items], header=header)
    reader = RecordReader(path)
    assert [(record.image, record.identity) for record in reader] == items
    assert reader.labels().tolist() == [label for _, label in items]
    path.with_suffix(".idx").unlink()
    assert [(record.image, record.identity) for record in RecordReader(path)] == items
    if header:
        assert reader.properties.num_identities == len(reader.ranges()) == len({label for _, label in items})


def test_a_written_set_is_the_bytes_that_the_tools_write(tmp_path):
    save_records(tmp_path / "own.rec", IMAGES, LABELS)
    assert (tmp_path / "own.rec").read_bytes() == write(tmp_path, face_set(IMAGES, LABELS)).read_bytes()
    assert (tmp_path / "own.idx").read_text() == (tmp_path / "train.idx").read_text()
    assert (tmp_path / "property").read_text() == "3,112,112\n"
    assert pack(b"x", (1.0, 2.0), 7) == image_record(b"x", [1, 2], 7)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([b"a"], [2**24], "identities must be from 0 to 16777215, got 16777216"),
        ([b"a"], [-1], "identities must be from 0"),
        ([b"a", b"b", b"c"], [0, 1, 0], "images of identity 0 must be adjacent, got 1 and 3"),
        ([], [], "images must hold at least one"),
        ([b"a", b"b"], [0], "shorter"),
    ],
)
def test_sets_that_cannot_be_written_leave_nothing(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message):
        save_records(tmp_path / "own.rec", images, labels)
    assert list(tmp_path.iterdir()) == []
