"""Images from records, tar shards and files: the same list and pixels from each, and what damaged files say."""

import io
import json
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.caching.source import data_digest
from kdlib_faces.data import FaceDataWarning, RecordReader, read_faces, save_records
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.sources.shards import find_shards
from tests.faces.reader_files import encoded, put

AGES = (7, 40, 8, 41, 9, 42)
PICTURES = [
    encoded(np.random.default_rng(row).integers(0, 256, (6, 6, 3)), codec)
    for row, codec in enumerate(("PNG", "JPEG", "PNG", "JPEG", "PNG", "JPEG"))
]
SUFFIX = ("png", "jpg") * 3


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def shard(path, rows, labels="json", **options):
    """A shard of some of the pictures, as WebDataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for row in rows:
            add(archive, f"set/{row:04}.{SUFFIX[row]}", PICTURES[row])
            if labels == "cls":
                add(archive, f"set/{row:04}.cls", f"{row // 2}\n".encode())
            elif labels == "json":
                label = {"identity": f"Ann{row // 2}", "age": AGES[row], "age_group": "Old" if row % 2 else "young"}
                add(archive, f"set/{row:04}.json", json.dumps(label).encode())
    return path


def records(path, labels=(0, 0, 1, 1, 2, 2), **options):
    save_records(path, PICTURES, labels, **options)
    return path


def folders(path):
    for row, picture in enumerate(PICTURES):
        put(path, picture, f"{row // 2}/{row}.{SUFFIX[row]}")
    return path


def opened(faces):
    return [faces.images[row] for row in range(len(faces))]


def test_records_shards_and_folders_give_the_same_list(tmp_path):
    entries = [records(tmp_path / "train.rec"), folders(tmp_path / "f"), shard(tmp_path / "a.tar", range(6), "cls")]
    lists = [read_faces(entry) for entry in entries]
    for faces in lists:
        assert opened(faces) == PICTURES
        assert faces.identities.tolist() == [0, 0, 1, 1, 2, 2]
        assert faces.identity_names == ("0", "1", "2")
        assert (faces.ages, faces.age_groups) == (None, None)
        assert torch.equal(FaceImages(faces.images, 6)[torch.arange(6)], FaceImages(lists[1].images, 6).preload())
    with pytest.warns(FaceDataWarning, match="are numbers in more than one list and were kept apart"):
        joined = read_faces(entries)
    assert opened(joined) == PICTURES * 3
    assert joined.num_identities == 9  # numbers of different lists are different identities
    part = joined.subset([17, 3, 6])
    assert opened(part) == [PICTURES[5], PICTURES[3], PICTURES[0]]
    assert part.subset([2]).images[0] == PICTURES[0]
    assert [part.images.name(row) for row in range(3)] == [
        f"{tmp_path}/a.tar/set/0005.jpg", f"{tmp_path}/train.rec record 4", f"{tmp_path}/f/0/0.png"
    ]  # fmt: skip


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_carry_identities_ages_and_groups(tmp_path, format_):
    for number, rows in enumerate(([0, 1, 2], [3, 4, 5])):
        shard(tmp_path / f"s/train-{number:03}.tar", rows, format=format_)
    for entry in (tmp_path / "s", f"{tmp_path}/s/train-{{000..001}}.tar"):
        faces = read_faces(entry)
        assert opened(faces) == PICTURES
        assert (faces.identity_names, faces.identities.tolist()) == (("Ann0", "Ann1", "Ann2"), [0, 0, 1, 1, 2, 2])
        assert faces.ages.tolist() == list(AGES)
        assert (faces.group_names, faces.age_groups.tolist()) == (("old", "young"), [1, 0] * 3)
    with pytest.raises(InputError, match=r"train-002\.tar"):
        read_faces(f"{tmp_path}/s/train-{{000..002}}.tar")
    with pytest.raises(InputError, match="the numbers in braces must rise"):
        find_shards("x-{5..1}.tar")
    with pytest.raises(InputError, match="is listed already"):
        read_faces([tmp_path / "s", tmp_path / "s/train-001.tar"])


def test_members_with_long_names_and_of_other_kinds(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a" * 300, "b" * 300):
            add(archive, f"{name}.seg.npy", b"other")
            add(archive, f"{name}.jpg", PICTURES[0])
            add(archive, f"{name}.cls", name[:1].encode())
        archive.addfile(tarfile.TarInfo("folder"))
    faces = read_faces(tmp_path / "x.tar")
    assert faces.identity_names == ("a", "b")
    assert opened(faces) == [PICTURES[0]] * 2
    assert faces.images.name(1) == f"{tmp_path}/x.tar/{'b' * 117}..."


def test_damaged_shards_are_refused(tmp_path):
    good = shard(tmp_path / "good.tar", range(6)).read_bytes()
    cases = {
        "compressed.tar": (b"\x1f\x8b" + bytes(200), "not a tar file without compression, or truncated"),
        "empty.tar": (bytes(1024), "the shards hold no image"),
        "cut.tar": (good[:1300], "the header at byte 1,024 is damaged or truncated"),
        "short.tar": (good[: 1024 + 512 + 20], "are left in the shard"),
    }
    for name, (data, message) in cases.items():
        with pytest.raises(InputError, match=rf"{name}.*{message}"):
            read_faces(put(tmp_path, data, name))
    for name, members, message in (
        ("two", {"1.jpg": b"", "1.png": b""}, "1 has two images"),
        ("lone", {"1.jpg": b"", "2.json": b"{}"}, r"2\.json belongs to no image"),
        ("list", {"1.jpg": b"", "1.json": b"[1]"}, "must hold a JSON object"),
        ("words", {"1.jpg": b"", "1.json": b"{"}, "not readable as UTF-8 json"),
        ("deep", {"1.jpg": b"", "1.json": b"[" * 60_000}, "not readable as UTF-8 json"),
        (
            "float",
            {"1.jpg": b"", "1.json": b'{"identity": 1.5}'},
            "identity must be a text or a whole number, got float",
        ),
        ("age", {"1.jpg": b"", "1.json": b'{"identity": 1, "age": 300}'}, "age must be a number from 0 to 130"),
        ("large", {"1.jpg": b"", "1.json": bytes(70_000)}, "has more than 65,536 bytes"),
        ("none", {"1.jpg": b"", "2.jpg": b""}, r"1\.jpg: has no identity"),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            for member, data in members.items():
                add(archive, member, data)
        with pytest.raises(InputError, match=message):
            read_faces(tmp_path / f"{name}.tar")
    assert read_faces(tmp_path / "none.tar", unlabeled=True).identities.tolist() == [-1, -1]
    header = bytearray(good[:512])
    header[124:136] = b"77777777777\0"  # 8 GiB in a file of 20 kB
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(InputError, match="are left in the shard"):
        read_faces(put(tmp_path, bytes(header) + good[512:], "size.tar"))


def test_a_shard_that_changes_is_an_error_where_it_is_read(tmp_path):
    path = shard(tmp_path / "x.tar", range(6))
    faces = read_faces(path)
    assert faces.images[0] == PICTURES[0]
    images = pickle.loads(pickle.dumps(faces.images))
    with path.open("r+b") as stream:
        stream.truncate(1024)
    with pytest.raises(InputError, match=r"x\.tar: the size of the file has changed"):
        images[5]


def test_identities_of_records_are_those_of_the_labels(tmp_path):
    """Identity records are used where they agree with the labels of the images; else the labels are."""
    cases = {
        "rising": ((0, 0, 1, 1, 2, 2), {}, [0, 0, 1, 1, 2, 2], [0, 1, 2]),
        "turned": ((2, 2, 0, 0, 1, 1), {}, [0, 0, 1, 1, 2, 2], [2, 0, 1]),
        "gaps": ((5, 5, 5, 9, 9, 2), {}, [0, 0, 0, 1, 1, 2], [5, 9, 2]),
        "mixed": ((1, 0, 1, 2, 0, 2), {"header": False}, [0, 1, 0, 2, 1, 2], [1, 0, 2]),
    }
    for name, (labels, options, wanted, names) in cases.items():
        reader = RecordReader(records(tmp_path / f"{name}.rec", labels, **options))
        codes, found = reader.identities()
        assert (codes.tolist(), found.tolist()) == (wanted, names), name
        assert found[codes].tolist() == list(labels)


def test_identities_of_records_read_only_some_images(tmp_path, monkeypatch):
    labels = np.repeat(np.arange(2000), 2)
    save_records(tmp_path / "x.rec", [b"x"] * 4000, labels.tolist())
    reader = RecordReader(tmp_path / "x.rec")
    read = []
    labels_of = RecordReader._labels
    monkeypatch.setattr(RecordReader, "_labels", lambda self, rows: read.append(len(rows)) or labels_of(self, rows))
    assert np.array_equal(reader.identities()[0], labels)
    assert read == [64]


def test_the_digest_changes_with_order_and_content_and_not_with_the_folder(tmp_path):
    def digest(entry):
        return data_digest(read_faces(entry), SeededViews(1))

    for make in (
        records,
        lambda path: shard(path.with_suffix(".tar"), range(6)),
        lambda path: folders(path.with_name("f")),
    ):
        one, two = make(tmp_path / "one" / "x.rec"), make(tmp_path / "two" / "x.rec")
        assert digest(one) == digest(two)
        faces = read_faces(one)
        turned = faces.subset([1, 0, 2, 3, 4, 5])
        assert data_digest(turned, SeededViews(1)) != data_digest(faces, SeededViews(1))
        other = bytearray((two if two.is_file() else two / "0/0.png").read_bytes())
        at = other.find(PICTURES[0][40:60])
        other[at + 45] ^= 1
        (two if two.is_file() else two / "0/0.png").write_bytes(bytes(other))
        assert digest(one) != digest(two)


def test_images_that_cannot_be_read_stop_or_are_black(tmp_path):
    broken = [*PICTURES[:5], b"broken"]
    save_records(tmp_path / "x.rec", broken, [0, 0, 1, 1, 2, 2])
    faces = read_faces(tmp_path / "x.rec")
    with pytest.raises(InputError, match=r"x\.rec record 6: not a readable image"):
        FaceImages(faces.images, 6).preload()
    images = FaceImages(faces.images, 6, on_error="skip")
    with pytest.warns(FaceDataWarning, match=r"skipped what cannot be read: .*record 6: not a readable"):
        pixels = images[torch.tensor([5, 4])]
    assert int(pixels[0].sum()) == 0
    assert int(pixels[1].sum()) > 0
    with pytest.warns(FaceDataWarning, match="cannot be read, and with them all images of 0 identities"):
        assert len(read_faces(tmp_path / "x.rec", on_error="skip")) == 5


def _first(images):
    return [images[row] for row in (0, 5)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_sources_are_read_by_other_processes(tmp_path, method):
    sources = [records(tmp_path / "x.rec"), shard(tmp_path / "x.tar", range(6)), folders(tmp_path / "f")]
    lists = [read_faces(source).images for source in sources]
    for images in lists:
        assert images[0] == PICTURES[0]  # opened here before the other process starts
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_first, lists) == [[PICTURES[0], PICTURES[5]]] * 3
