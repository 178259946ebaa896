"""`kdlib-faces cache`: build, info and verify, and identical views for student and teacher."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kdlib import OUTPUT, TeacherAdapter
from kdlib.cache import CachedTeacher, CacheError, TeacherCache
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import load_backbone
from kdlib_faces.caching import build as recipe
from kdlib_faces.caching.source import CacheSource
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.lists import read_faces
from kdlib_faces.data.seeded_views import SeededViews
from tests.faces.cache_files import COUNT, build, build_words, fails, make_faces, run, settings, wait_until


@pytest.fixture(scope="module")
def faces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_faces(tmp_path_factory.mktemp("cache"))


def words(folder: Path, output: Path, *more: object) -> list[object]:
    return build_words(folder, "general.pt", output, *more)


def adapter(faces_folder: Path, **taps: str) -> TeacherAdapter:
    network = load_backbone(faces_folder / "general.pt")
    return TeacherAdapter(network, {"embedding": OUTPUT, **taps})


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_a_cache_contains_the_outputs_for_both_views(faces_folder: Path, tmp_path: Path, capsys, dtype: str) -> None:
    tap = load_backbone(faces_folder / "general.pt").stages[-1]
    assert run(*words(faces_folder, tmp_path / "c", "--dtype", dtype, "--tap", tap, "--set", "batch_size=4")) == 0
    output = capsys.readouterr().out
    assert f"complete, {2 * COUNT} rows" in output
    assert "the plain and the mirrored image\n" in output
    assert "1 - cos" in output
    cache = TeacherCache.open(tmp_path / "c")
    images = load_images(read_faces(faces_folder / "faces.csv"), 32)
    images = images.float().sub(127.5).div(127.5)
    for view in (0, 1):
        wanted = adapter(faces_folder, map=tap)(images.flip(3) if view else images)
        held = cache.read(range(COUNT), view)
        assert set(held) == {"embedding", "map"}
        for name, x in held.items():
            largest = wanted[name].abs().max()
            precision = {"float16": 1e-3, "int8": 1e-2, "float32": 1e-5}[dtype]
            torch.testing.assert_close(x, wanted[name], rtol=1e-5, atol=float(precision * largest))
    assert run("cache", "info", tmp_path / "c") == 0
    assert capsys.readouterr().out == output
    assert run("cache", "verify", "--quiet", tmp_path / "c") == 0
    assert capsys.readouterr().out.startswith(
        f"good: {2 * COUNT} rows in 1 file have correct checksums and finite values\n"
    )
    faces, teacher = faces_folder / "faces.csv", faces_folder / "general.pt"
    assert run("cache", "verify", "--quiet", tmp_path / "c", "--data", faces, "--teacher", teacher, "--rows", 7) == 0
    assert "; 7 rows recomputed, maximum 1 - cos" in capsys.readouterr().out


def test_several_workers_and_one_give_the_same_bytes(faces_folder: Path, tmp_path: Path) -> None:
    batches = ["--set", "batch_size=1", "--threads", "1"]
    assert run(*words(faces_folder, tmp_path / "one", *batches)) == 0
    assert run(*words(faces_folder, tmp_path / "two", *batches, "--workers", "2")) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # The same command on a complete cache reads it and computes nothing.
    before = (tmp_path / "one" / "shard-00000.bin").stat().st_mtime_ns
    assert run(*words(faces_folder, tmp_path / "one", *batches)) == 0
    assert (tmp_path / "one" / "shard-00000.bin").stat().st_mtime_ns == before


def test_an_interrupted_build_resumes(faces_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    options = ["--set", "batch_size=2", "--threads", "1"]
    assert run(*words(faces_folder, tmp_path / "whole", *options)) == 0
    seen = []

    fetch = CacheSource.fetch

    def stops(self, samples, view):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(samples)
        return fetch(self, samples, view)

    with monkeypatch.context() as patch:
        patch.setattr(CacheSource, "fetch", stops)
        assert run(*words(faces_folder, tmp_path / "part", *options)) == 130
    capsys.readouterr()
    assert run("cache", "info", tmp_path / "part") == 0
    output = capsys.readouterr().out
    assert f" of {2 * COUNT} rows; run the same build again to complete it" in output
    assert f"of {2 * COUNT} rows; run the same build again" in fails(capsys, "cache", "verify", tmp_path / "part")
    assert run(*words(faces_folder, tmp_path / "part", *options)) == 0
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(faces_folder: Path, tmp_path: Path, sent: signal.Signals) -> None:
    options = ("--workers", "2", "--views", "200", *settings("augment.rotate=5", "batch_size=1", "sync_seconds=0"))
    command = [sys.executable, "-m", "kdlib_faces", *map(str, words(faces_folder, tmp_path / "c", *options))]
    parent = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    def running() -> list[str]:
        """The processes of the session that have not ended; a zombie has."""
        states = subprocess.run(
            ["ps", "-o", "stat=", "-s", str(parent.pid)], check=False, capture_output=True, text=True
        )
        return [state for state in states.stdout.split() if not state.startswith("Z")]

    try:
        assert wait_until(lambda: (tmp_path / "c" / "shard-00000.bin").exists() and len(running()) >= 3)
        parent.send_signal(sent)
        assert parent.wait(60) == (143 if sent is signal.SIGTERM else -signal.SIGKILL)
        assert wait_until(lambda: not running())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    if sent is signal.SIGTERM:
        assert not list((tmp_path / "c").glob(".*"))


def test_an_onnx_teacher(tmp_path: Path, faces_folder: Path, graph: Path, capsys) -> None:
    from kdlib_faces.teachers import OnnxTeacher
    from tests.faces.tiny_graph import tiny_graph

    build(faces_folder, graph, tmp_path / "c", "--tap", "grid=middle", "--views", 1)
    images = load_images(read_faces(faces_folder / "faces.csv"), 112).float().sub(127.5).div(127.5)
    wanted = OnnxTeacher(graph, {"embedding": None, "grid": "middle"})(images)
    held = TeacherCache.open(tmp_path / "c").read(range(COUNT))
    for name, x in held.items():
        torch.testing.assert_close(x, wanted[name], rtol=2e-3, atol=2e-3)
    assert "views           the plain image\n" in capsys.readouterr().out
    other = tiny_graph(tmp_path / "other.onnx", seed=1)
    verify = ["cache", "verify", "--quiet", tmp_path / "c", "--data", faces_folder / "faces.csv", "--teacher"]
    assert run(*verify, graph) == 0
    assert "the difference is the teacher (weights, code or taps); its" in fails(capsys, *verify, other)


def test_the_error_names_what_differs(faces_folder: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved" / faces_folder.name
    shutil.copytree(faces_folder, moved)
    assert run(*words(faces_folder, tmp_path / "c")) == 0
    # A list may lie elsewhere, as long as it is the same list.
    assert run(*words(moved, tmp_path / "c")) == 0
    lines = (moved / "faces.csv").read_text().splitlines()
    (moved / "faces.csv").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    assert "the difference is the data; its fingerprint" in fails(capsys, *words(moved, tmp_path / "c"))
    (moved / "faces.csv").write_text("\n".join(lines) + "\n")
    shutil.copy(moved / "2.png", moved / "3.png")
    assert "the difference is the data; its fingerprint" in fails(capsys, *words(moved, tmp_path / "c"))
    other = build_words(faces_folder, "age.pt", tmp_path / "c")
    assert "another teacher, preprocessing or data: the difference is the teacher" in fails(capsys, *other)
    assert "its views is 2, expected 1" in fails(capsys, *words(faces_folder, tmp_path / "c", "--views", 1))
    assert "its dtype is 'float16', expected 'int8'" in fails(
        capsys, *words(faces_folder, tmp_path / "c", "--dtype", "int8")
    )
    random = ["--set", "augment.rotate=5", "--seed"]
    assert run(*words(faces_folder, tmp_path / "r", *random, 1)) == 0
    assert "the difference is the data; " in fails(capsys, *words(faces_folder, tmp_path / "r", *random, 2))


def test_the_student_sees_the_view_whose_output_is_cached(faces_folder: Path, tmp_path: Path) -> None:
    """Maps and embeddings from the cache are those of the very images in the batch, whatever is drawn."""
    tap = load_backbone(faces_folder / "general.pt").stages[-1]
    augmented = ["--set", "augment.mirror=0.5", "--set", "augment.rotate=20", "--set", "augment.low_resolution=0.5",
                 "--set", "augment.erase=0.5", "--set", "augment.brightness=0.2"]  # fmt: skip
    options = ("--views", 3, "--seed", 4, *augmented, "--tap", tap, "--dtype", "float32")
    build(faces_folder, "general.pt", tmp_path / "c", *options)
    cache = TeacherCache.open(tmp_path / "c")
    views = SeededViews.from_text(cache.notes["views"])
    assert (views.count, views.seed) == (3, 4)
    faces = read_faces(faces_folder / "faces.csv")
    batches = FaceBatches(load_images(faces, 32), faces.identities, views=views, batch_size=5, seed=9)
    online, cached = adapter(faces_folder, map=tap), CachedTeacher(cache)
    drawn = set()
    for epoch in range(3):
        batches.set_epoch(epoch)
        for inputs, targets in batches:
            drawn |= set(zip(targets["sample"].tolist(), targets["view"].tolist(), strict=True))
            held, wanted = cached(targets["sample"], targets["view"]), online(inputs)
            for name, x in held.items():
                torch.testing.assert_close(x, wanted[name], rtol=1e-4, atol=1e-5)
    assert len(drawn) > 15


def test_mistakes_are_one_line(faces_folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "c"
    assert "there is no cache at" in fails(capsys, "cache", "info", tmp_path)
    assert "there is no cache at" in fails(capsys, "cache", "verify", tmp_path / "none")
    assert "see kdlib-faces cache --help" in fails(capsys, "cache")
    assert "invalid choice: 'make'" in fails(capsys, "cache", "make")
    assert "required: --teacher, --output" in fails(capsys, "cache", "build")
    assert "--data must be given" in fails(capsys, "cache", "build", "--teacher", "no.pt", "--output", output)
    assert "no.pt does not exist" in fails(capsys, *build_words(faces_folder, "no.pt", output))
    assert "no module at path 'layer9'; the nearest are" in fails(
        capsys, *words(faces_folder, output, "--tap", "layer9")
    )
    assert "--tap must be FEATURE=NAME" in fails(capsys, *words(faces_folder, output, "--tap", "embedding=linear"))
    assert "views must be 1 (plain) or 2" in fails(capsys, *words(faces_folder, output, "--views", 3))
    assert "views must be a whole number and >= 1" in fails(capsys, *words(faces_folder, output, "--views", 0))
    assert "--workers: must be a whole number from 1 to 1024" in fails(
        capsys, *words(faces_folder, output, "--workers", 0)
    )
    assert "invalid choice: 'int4'" in fails(capsys, *words(faces_folder, output, "--dtype", "int4"))
    assert not output.exists()
    output.write_text("a file")
    assert "the output must be a folder" in fails(capsys, *words(faces_folder, output))
    with pytest.raises(InputError, match="--data and --teacher must be given together"):
        recipe.verify(tmp_path, data=["x.csv"])


def test_an_image_that_cannot_be_read_is_named_and_the_rest_is_kept(faces_folder: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(faces_folder, broken)
    (broken / "7.png").write_bytes(b"no image")
    assert "7.png: not a readable image" in fails(capsys, *words(broken, tmp_path / "c", "--set", "batch_size=2"))
    header = json.loads((tmp_path / "c" / "header.json").read_text())
    assert header["rows"] >= 4


def test_a_header_cannot_steer_the_terminal(faces_folder: Path, tmp_path: Path, capsys) -> None:
    assert run(*words(faces_folder, tmp_path / "c")) == 0
    header = json.loads((tmp_path / "c" / "header.json").read_text())
    header["notes"] = {"views": "[" * 5000, "x": "\x1b[2J" + "y" * 1000}
    (tmp_path / "c" / "header.json").write_text(json.dumps(header))
    capsys.readouterr()
    assert run("cache", "info", tmp_path / "c") == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) < 500
    faces, teacher = faces_folder / "faces.csv", faces_folder / "general.pt"
    line = fails(capsys, "cache", "verify", tmp_path / "c", "--data", faces, "--teacher", teacher)
    assert "do not describe the build" in line


def test_damage_is_found_by_the_command(faces_folder: Path, tmp_path: Path, capsys) -> None:
    assert run(*words(faces_folder, tmp_path / "c")) == 0
    shard = tmp_path / "c" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 4
    shard.write_bytes(content)
    assert "shard-00000.bin is damaged: the checksum of rows 0 to 15 does not match" in fails(
        capsys, "cache", "verify", tmp_path / "c"
    )
    shard.write_bytes(content[:-1])
    with pytest.raises(CacheError, match="must have"):
        recipe.verify(tmp_path / "c", progress=False)
