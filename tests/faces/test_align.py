"""`kdlib-faces align`: faces where a detector sees them, crops in the same folders, and exact resumption."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdlib_faces._checks import InputError
from kdlib_faces.alignment import AlignConfig, FaceDetector, align_photos
from kdlib_faces.alignment import run as runner
from kdlib_faces.alignment.decode import Candidates, decode_scrfd, decode_yunet, suppress_overlaps
from kdlib_faces.alignment.photographs import Crop, PhotographAligner, misfit_and_scale
from kdlib_faces.data import read_faces
from tests.faces.cache_files import fails, make_faces, run
from tests.faces.detector_graph import BOX, CORNER, POINTS, SIDE, detector, photograph, put_photograph
from tests.faces.tiny_graph import tiny_graph

pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)
STRIDES = (8, 16, 32)


@pytest.fixture(scope="module")
def yunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detector(tmp_path_factory.mktemp("detector") / "yunet.onnx")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ann: one face, and one turned; Bob: two faces, and none, one folder deeper."""
    folder = tmp_path / "photos"
    put_photograph(folder / "ann" / "1.png", {(2, 2): 250})
    put_photograph(folder / "ann" / "2.tif", {(1, 2): 245}, seed=1, orientation=6)
    put_photograph(folder / "bob" / "trip" / "3.png", {(1, 1): 230, (3, 3): 250}, seed=2)
    put_photograph(folder / "bob" / "trip" / "none.png", {}, seed=3)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def crop_of(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    """The region of a face of a photograph, which its crop equals, as no scaling is needed."""
    left, top = (32 * np.array([column, row]) + CORNER).astype(int)
    padded = np.pad(pixels, [(100, 100), (100, 100), (0, 0)])
    return padded[top + 100 : top + 212, left + 100 : left + 212]


def is_crop(path: Path, pixels: np.ndarray, row: int, column: int) -> bool:
    """Whether a file is the crop of a face; points are rounded to hundredths of a pixel."""
    return np.abs(pixels_of(path).astype(int) - crop_of(pixels, row, column)).max() <= 6


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_yunet_is_decoded_as_published() -> None:
    sides = (64, 96)
    widths = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
    cells = {stride: [(y, x) for y in range(64 // stride) for x in range(96 // stride)] for stride in STRIDES}
    outputs = {
        f"{kind}_{stride}": RNG.normal(0.5, 1, (1, len(cells[stride]), width)).astype(np.float32)
        for kind, width in widths.items()
        for stride in STRIDES
    }
    found = decode_yunet(outputs, sides)
    at = 0
    for stride in STRIDES:
        for row, (y, x) in enumerate(cells[stride]):
            cls, obj, box, points = (outputs[f"{kind}_{stride}"][0, row].astype(float) for kind in widths)
            assert found.scores[at] == pytest.approx((min(max(cls[0], 0), 1) * min(max(obj[0], 0), 1)) ** 0.5)
            middle, size = ((x + box[0]) * stride, (y + box[1]) * stride), np.exp(box[2:]) * stride
            assert found.boxes[at][:2] == pytest.approx(middle - size / 2)
            assert found.boxes[at][2:] == pytest.approx(middle + size / 2)
            for point in range(5):
                expected = (x + points[2 * point]) * stride, (y + points[2 * point + 1]) * stride
                assert found.points[at, point] == pytest.approx(expected)
            at += 1
    assert at == len(found.scores)


def test_scrfd_is_decoded_as_published() -> None:
    sides = (64, 32)
    anchors = {
        stride: [(y, x) for y in range(64 // stride) for x in range(32 // stride) for _ in range(2)]
        for stride in STRIDES
    }
    widths = {"score": 1, "bbox": 4, "kps": 10}
    names = {(kind, stride): f"{kind}{stride}" for kind in widths for stride in STRIDES}
    outputs = {name: RNG.random((len(anchors[stride]), widths[kind])) for (kind, stride), name in names.items()}
    found = decode_scrfd(outputs, names, sides)
    at = 0
    for stride in STRIDES:
        for row, (y, x) in enumerate(anchors[stride]):
            score, box, points = (outputs[f"{kind}{stride}"][row] for kind in widths)
            assert found.scores[at] == score[0]
            center = np.array([x, y]) * stride
            assert found.boxes[at] == pytest.approx([*(center - box[:2] * stride), *(center + box[2:] * stride)])
            assert found.points[at] == pytest.approx(center + points.reshape(5, 2) * stride)
            at += 1
    assert at == len(found.scores)


@settings(max_examples=60)
@given(st.integers(0, 999), st.floats(0, 1))
def test_overlaps_are_suppressed_as_by_definition(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (25, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(-1, 15, (25, 2))], 1)
    points = rng.normal(size=(25, 5, 2))
    points[3, 2, 1], boxes[7, 0] = np.nan, np.inf
    scores = rng.integers(0, 12, 25) / 10  # with ties
    found = suppress_overlaps(Candidates(scores, boxes, points), 0.4, limit)
    kept: list[int] = []
    for row in sorted(range(25), key=lambda row: -scores[row]):
        x0, y0, x1, y1 = boxes[row]
        valid = row not in (3, 7) and scores[row] >= 0.4 and x0 < x1 and y0 < y1
        for other in kept if valid else ():
            u0, v0, u1, v1 = boxes[other]
            common = max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
            union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - common
            valid = valid and common <= limit * union
        kept += [row] if valid else []
    assert np.array_equal(found.boxes, boxes[kept])
    assert np.array_equal(found.points, points[kept])


@pytest.mark.parametrize(("kind", "side"), [("yunet", SIDE), ("yunet", "side"), ("scrfd", SIDE), ("scrfd", "side")])
def test_faces_are_found_where_they_are(tmp_path: Path, kind: str, side: int | str) -> None:
    find = FaceDetector(detector(tmp_path / "d.onnx", kind, side=side), min_score=0.7)
    assert (find.kind, find.sides) == (kind, (SIDE, SIDE) if side == SIDE else (640, 640))
    first, second = find(Image.fromarray(photograph({(1, 3): 204, (3, 0): 255})))
    for face, score, corner in ((first, 1.0, (0, 96)), (second, 0.8, (96, 32))):
        assert face.score == pytest.approx(score, abs=1e-4)
        assert face.points == pytest.approx(POINTS + corner, abs=1e-3)
        assert face.box == pytest.approx(BOX + np.tile(corner, 2), abs=1e-3)
    assert find(Image.fromarray(photograph({(0, 0): 170}))) == []


@pytest.mark.parametrize("factor", [2, 3])
def test_points_of_a_larger_photograph(yunet: Path, factor: int) -> None:
    """The outer edges of the pixels keep their place, half a pixel from their centers."""
    large = photograph({(1, 3): 255}, height=SIDE * factor - 30, width=SIDE * factor, scale=factor)
    (face,) = FaceDetector(yunet)(Image.fromarray(large))
    assert face.points == pytest.approx((POINTS + (96, 32) + 0.5) * factor - 0.5, abs=0.01)


def test_another_input_size_can_be_set(tmp_path: Path) -> None:
    find = FaceDetector(detector(tmp_path / "d.onnx"), size=320)
    assert find.sides == (320, 320)
    (face,) = find(Image.fromarray(photograph({(8, 7): 255}, height=320, width=300)))
    assert face.points == pytest.approx(POINTS + np.array([224, 256]), abs=1e-3)
    with pytest.raises(ValueError, match="size must be a multiple of 32, got 100"):
        FaceDetector(tmp_path / "d.onnx", size=100)


def test_a_face_too_large_for_the_network_is_found_at_half_the_size(tmp_path: Path, monkeypatch) -> None:
    find = FaceDetector(detector(tmp_path / "d.onnx"), min_score=0.9)
    seen = []
    plain = FaceDetector._run
    monkeypatch.setattr(FaceDetector, "_run", lambda self, canvas: seen.append(canvas.copy()) or plain(self, canvas))
    checks = photograph({}, height=64, width=64)
    checks[:32, :32, 0] = np.tile([255, 0], 16)  # an average below the limit: found at no scale
    assert find(Image.fromarray(checks)) == []
    first, second = seen
    assert np.array_equal(first[:64, :64], checks)
    assert not first[64:].any()
    assert not second[32:].any()
    assert second[:32, :32].any()


def test_crops_have_the_folders_names_and_pixels_of_the_photographs(
    yunet: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "crops"
    assert run("align", photos, "--detector", yunet, "--output", output) == 0
    message = capsys.readouterr().err
    assert "4 photographs: 3 crops, 1 without a face, 2 rows in" in message
    assert sorted(contents(output)) == [
        "ann/1.png", "ann/2.png", "bob/trip/3.png", "doubtful.csv", "doubtful.png", "faces.csv", "manifest.jsonl",
    ]  # fmt: skip
    assert is_crop(output / "ann/1.png", photograph({(2, 2): 250}), 2, 2)
    assert is_crop(output / "ann/2.png", photograph({(1, 2): 245}, seed=1), 1, 2)
    rows = rows_of(output / "faces.csv")
    assert [(row["path"], row["identity"], row["source"], row["faces"]) for row in rows] == [
        ("ann/1.png", "ann", "ann/1.png", "1"),
        ("ann/2.png", "ann", "ann/2.tif", "1"),
        ("bob/trip/3.png", "bob", "bob/trip/3.png", "2"),
    ]
    assert float(rows[0]["nose_x"]) == pytest.approx(POINTS[2, 0] + 64, abs=0.01)
    assert float(rows[1]["bottom"]) == pytest.approx(BOX[3] + 32, abs=0.01)
    faces = read_faces(output / "faces.csv")
    assert faces.identity_names == ("ann", "bob")
    doubtful = [(row["source"], row["reason"], row["path"]) for row in rows_of(output / "doubtful.csv")]
    assert doubtful == [("bob/trip/3.png", "several faces", "bob/trip/3.png"), ("bob/trip/none.png", "no face", "")]
    with Image.open(output / "doubtful.png") as sheet:
        assert sheet.size == (320, 188)


def test_the_choice_among_several_faces(yunet: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    cells = {(0, 0): 250, (2, 1): 200, (4, 4): 245}
    put_photograph(photos / "a" / "1.png", cells)
    pixels = photograph(cells)

    def crops(several: str, **fields: object) -> dict[str, tuple[int, int]]:
        output = tmp_path / f"{several}{len(fields)}"
        align_photos(photos, yunet, output, config=AlignConfig(several=several, **fields))
        paths = [row["path"] for row in rows_of(output / "faces.csv")]
        return {path: next(at for at in cells if is_crop(output / path, pixels, *at)) for path in paths}

    assert crops("largest") == {"a/1.png": (0, 0)}  # all have one size: the highest score
    assert crops("center") == {"a/1.png": (2, 1)}
    assert crops("center", min_score=0.8) == {"a/1.png": (4, 4)}
    assert crops("all") == {"a/1.png": (0, 0), "a/1_face2.png": (4, 4), "a/1_face3.png": (2, 1)}
    assert [row["identity"] for row in rows_of(tmp_path / "all0" / "faces.csv")] == ["a", "", ""]
    with pytest.raises(InputError, match=r"no crop was made of 1 photographs; .*doubtful.csv lists the reasons"):
        crops("refuse")
    assert rows_of(tmp_path / "refuse0" / "doubtful.csv")[0]["reason"] == "several faces"
    with pytest.raises(InputError, match="no crop was made"):
        crops("largest", min_size=95)


def test_photographs_without_a_face(yunet: Path, photos: Path, tmp_path: Path, capsys) -> None:
    words = ["align", photos, "--detector", yunet, "--output"]
    line = fails(capsys, *words, tmp_path / "stop", "--no-face", "stop")
    assert "none.png: no face found; --no-face skip leaves such photographs out" in line
    assert run(*words, tmp_path / "kept", "--no-face", "keep-resized", "--set", "size=64", "--set", "format=jpg") == 0
    rows = {row["path"]: row for row in rows_of(tmp_path / "kept" / "faces.csv")}
    assert (rows["bob/trip/none.jpg"]["score"], rows["bob/trip/none.jpg"]["faces"]) == ("", "0")
    assert pixels_of(tmp_path / "kept" / "bob/trip/none.jpg").shape == (64, 64, 3)
    assert len(read_faces(tmp_path / "kept" / "faces.csv")) == 4


def test_doubtful_crops_are_listed_with_their_reasons(yunet: Path, tmp_path: Path) -> None:
    put_photograph(tmp_path / "photos" / "a" / "low.png", {(2, 2): 180})
    put_photograph(tmp_path / "photos" / "a" / "good.png", {(2, 2): 250})

    def reasons(model: Path, name: str, **fields: float) -> dict[str, str]:
        align_photos(tmp_path / "photos", model, tmp_path / name, config=AlignConfig(**fields))
        return {row["source"]: row["reason"] for row in rows_of(tmp_path / name / "doubtful.csv")}

    assert reasons(yunet, "crops") == {"a/low.png": "score 0.71"}
    # These limits may change without new crops.
    assert reasons(yunet, "crops", low_score=0) == {}
    assert not (tmp_path / "crops" / "doubtful.png").exists()
    assert (
        reasons(detector(tmp_path / "small.onnx", spread=0.4), "tiny", low_score=0)["a/good.png"]
        == "tiny, enlarged 2.5 times"
    )


def test_misfit_is_the_distance_from_the_template() -> None:
    def measure(points: np.ndarray) -> tuple[float, float]:
        return misfit_and_scale(Crop(1.0, (0, 0, 1, 1), tuple(points.ravel())), 112)

    assert measure(POINTS * 2 + 9) == pytest.approx((0, 0.5), abs=1e-6)
    assert measure(POINTS * (0.3, 1))[0] > 6  # a profile


def test_names_that_differ_in_the_suffix_only(yunet: Path, tmp_path: Path) -> None:
    put_photograph(tmp_path / "p" / "a" / "1.png", {(1, 1): 250})
    put_photograph(tmp_path / "p" / "a" / "1.tif", {(1, 1): 250}, seed=1)
    put_photograph(tmp_path / "p" / "1_face2.png", {(1, 1): 250}, seed=2)
    align_photos(tmp_path / "p", yunet, tmp_path / "c", config=AlignConfig(several="all"))
    rows = rows_of(tmp_path / "c" / "faces.csv")
    assert {row["source"]: (row["path"], row["identity"]) for row in rows} == {
        "1_face2.png": ("1_face2_.png", ""), "a/1.png": ("a/1_png.png", "a"), "a/1.tif": ("a/1_tif.png", "a"),
    }  # fmt: skip
    put_photograph(tmp_path / "p" / "a" / "1_tif.png", {(1, 1): 250})
    with pytest.raises(
        InputError, match=r"'a/1_tif.png' would get the crop of another photograph, a/1_tif.png; rename it"
    ):
        align_photos(tmp_path / "p", yunet, tmp_path / "c", config=AlignConfig(several="all"))


def test_an_interrupted_run_goes_on_and_changed_photographs_are_done_again(
    yunet: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    words = ["align", photos, "--detector", yunet, "--quiet", "--output"]
    assert run(*words, tmp_path / "whole") == 0
    seen: list[str] = []
    align_one = PhotographAligner.__call__

    def counted(self: PhotographAligner, path: Path) -> object:
        if seen.count("stop") == 0 and len(seen) == 2:
            seen.append("stop")
            raise KeyboardInterrupt
        seen.append(path.name)
        return align_one(self, path)

    monkeypatch.setattr(PhotographAligner, "__call__", counted)
    assert run(*words, tmp_path / "part") == 130
    assert not (tmp_path / "part" / "faces.csv").exists()
    with (tmp_path / "part" / "manifest.jsonl").open("ab") as file:
        file.write(b'["bob/trip/3.png", 1')  # a line that was cut
    assert run(*words, tmp_path / "part") == 0
    assert seen == ["1.png", "2.tif", "stop", "3.png", "none.png"]
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    # A complete run does nothing; a changed photograph, a missing crop and a new photograph are done.
    del seen[3:]
    assert run(*words, tmp_path / "part") == 0
    assert seen[3:] == []
    put_photograph(photos / "ann" / "1.png", {(1, 1): 250}, seed=9)
    os.utime(photos / "ann" / "1.png", ns=(1, 1))
    put_photograph(photos / "cy" / "4.png", {(1, 1): 250}, seed=8)
    (tmp_path / "part" / "ann" / "2.png").unlink()
    assert run(*words, tmp_path / "part") == 0
    assert seen[3:] == ["1.png", "2.tif", "4.png"]
    assert is_crop(tmp_path / "part/ann/1.png", photograph({(1, 1): 250}, seed=9), 1, 1)
    assert [row["identity"] for row in rows_of(tmp_path / "part" / "faces.csv")] == ["ann", "ann", "bob", "cy"]


def test_several_processes_write_the_same_files(yunet: Path, photos: Path, tmp_path: Path) -> None:
    first = align_photos(photos, yunet, tmp_path / "one")
    second = align_photos(photos, yunet, tmp_path / "two", workers=2)
    assert (second.photographs, second.crops, second.without_face, second.doubtful) == (4, 3, 1, 2)
    assert first.crops == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_files_that_cannot_be_read_are_named_or_left_out(yunet: Path, photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "ann" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    words = ["align", photos, "--detector", yunet, "--output", tmp_path / "crops"]
    line = fails(capsys, *words)
    assert "1 of 5 photographs cannot be read" in line
    assert "broken.jpg: not a readable image" in line
    assert "--on-error skip" in line
    assert run(*words, "--on-error", "skip") == 0
    rows = rows_of(tmp_path / "crops" / "doubtful.csv")
    assert [row["source"] for row in rows if row["reason"] == "cannot be read"] == ["ann/broken.jpg"]


@pytest.mark.filterwarnings("default::kdlib_faces.data.lists.FaceDataWarning")
def test_files_that_are_no_images_are_counted_and_named(yunet: Path, photos: Path, tmp_path: Path, capsys) -> None:
    for name in ("notes.txt", "ann/a.TXT", "ann/b.mp4"):
        (photos / name).write_text("no image")
    assert run("align", photos, "--detector", yunet, "--output", tmp_path / "crops", "--quiet") == 0
    line = f"warning: {photos}: skipped files that are not images: 3 (.txt 2, .mp4 1, such as "
    assert line in capsys.readouterr().err
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("no image")
    line = fails(capsys, "align", folder, "--detector", yunet, "--output", tmp_path / "none")
    assert f"{folder}: no images found among .txt 1, such as {folder / 'a.txt'}" in line


def test_a_detector_given_as_a_model_is_refused(yunet: Path, tmp_path: Path, capsys) -> None:
    make_faces(tmp_path)
    for words in (
        ("evaluate", "--data", tmp_path / "faces.csv", "--model", yunet),
        ("embed", tmp_path / "faces.csv", "--model", yunet),
        ("cache", "build", "--data", tmp_path / "faces.csv", "--teacher", yunet),
        ("train", "--data", tmp_path / "faces.csv", "--teacher", yunet, "--teacher", tmp_path / "age.pt"),
    ):
        line = fails(capsys, *words, "--output", tmp_path / "output")
        assert f"{yunet.name} is no face recognition network: none of its 12 outputs holds one vector" in line
        assert line.endswith("a face detector is given as --detector")


def test_files_that_are_no_detector(tmp_path: Path, photos: Path, capsys) -> None:
    words = ["align", photos, "--output", tmp_path / "crops", "--detector"]
    (tmp_path / "net").mkdir()
    assert "sides that are multiples of 32, got 3 x 112 x 112" in fails(
        capsys, *words, tiny_graph(tmp_path / "net" / "a.onnx")
    )
    assert "gray.onnx does not exist" in fails(capsys, *words, tmp_path / "gray.onnx")
    (tmp_path / "text.onnx").write_text("not a network")
    assert "is not an ONNX file" in fails(capsys, *words, tmp_path / "text.onnx")
    import onnx

    model = onnx.load(detector(tmp_path / "d.onnx", "scrfd"))
    del model.graph.output[8]
    onnx.save(model, tmp_path / "eight.onnx")
    line = fails(capsys, *words, tmp_path / "eight.onnx")
    assert "must have the 12 outputs cls_8 to kps_32 of YuNet (2023), or the 9 of SCRFD with landmarks, got 8" in line
    damaged = (tmp_path / "eight.onnx").read_bytes().replace(b"442", b"44\xff")  # protobuf returns this name as bytes
    (tmp_path / "bytes.onnx").write_bytes(damaged)
    assert "got 8: " in (line := fails(capsys, *words, tmp_path / "bytes.onnx"))
    assert "xff" in line
    model.graph.output.append(onnx.ValueInfoProto(name="red"))
    onnx.save(model, tmp_path / "other.onnx")
    assert "outputs must be scores (n, 1), boxes (n, 4) and points (n, 10) with n = 800, 200, 50" in fails(
        capsys, *words, tmp_path / "other.onnx"
    )
    assert not (tmp_path / "crops").exists()


def test_outputs_that_cannot_be_used(yunet: Path, photos: Path, tmp_path: Path, capsys) -> None:
    words = ["align", photos, "--detector", yunet, "--output"]
    assert "must not be in the folder of photographs" in fails(capsys, *words, photos / "crops")
    for name in ("empty", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "ann").symlink_to(tmp_path / "empty")
    assert "ann is one; remove it" in fails(capsys, *words, tmp_path / "linked")
    assert "no images found" in fails(capsys, "align", tmp_path / "empty", *words[2:], tmp_path / "crops")
    assert run(*words, tmp_path / "crops") == 0
    line = fails(capsys, *words, tmp_path / "crops", "--min-score", "0.5")
    assert "holds crops of other settings: what differs is min_score (0.6, now 0.5); restore the settings" in line
    line = fails(capsys, *words, tmp_path / "crops", "--set", "sise=3")
    assert "the nearest are 'size'" in line
    line = fails(capsys, *words, tmp_path / "new", "--set", "low_score=-1")
    assert "low_score must be a finite number and >= 0, got -1" in line
    with runner.locked(tmp_path / "crops"):
        assert "is in use by process" in fails(capsys, *words, tmp_path / "crops")
    manifest = tmp_path / "crops" / "manifest.jsonl"
    whole = manifest.read_bytes()
    for broken in (
        b"",
        b"[1]\n",
        whole.replace(b'"ann/1.png"', b"3"),
        whole + b'["x", 1, 1, 1, [[1, [1], [], 0]], ""]\n',
        whole + b"[" * 2000 + b"\n",
    ):
        manifest.write_bytes(broken)
        assert re.search("manifest.*remove the file to make all crops again", fails(capsys, *words, tmp_path / "crops"))
    manifest.write_bytes(whole)
    assert run(*words, tmp_path / "crops") == 0
    assert json.loads(manifest.read_bytes().splitlines()[0])["size"] == "112"
