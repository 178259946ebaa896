"""`kdlib-faces train --recipe liaad` on teachers whose outputs were computed once: the same student as with the teachers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdlib.cache import CachedTeacher, TeacherCache
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import build_backbone, load_backbone, save_backbone
from kdlib_faces.caching.teachers import is_cache, open_teachers
from kdlib_faces.cli import main
from kdlib_faces.data.lists import read_faces
from kdlib_faces.recipes import LIAADConfig
from kdlib_faces.recipes import build as build_recipe
from kdlib_faces.recipes.liaad import features_read

COUNT, SIZE = 16, 32
PLAIN = [f"augment.{name}=0" for name in ["mirror", "brightness", "contrast", "gamma", "shift", "scale", "rotate"]]
PLAIN += ["augment.low_resolution=0", "augment.grayscale=0"]
SETTINGS = [
    "training.steps=5",
    "training.batch_size=8",
    "training.lr=0.02",
    "recipe.input_size=32",
    "recipe.width=0.25",
]
SETTINGS += ["recipe.embedding_dim=16"]


def words(*given: object) -> list[str]:
    return [str(word) for word in given]


def settings(*given: str) -> list[str]:
    return [word for entry in given for word in ("--set", entry)]


def build(folder: Path, teacher: str, output: Path, *more: object, faces: str = "faces.csv") -> Path:
    given = ("--faces", folder / faces, "--teacher", folder / teacher, "--output", output)
    assert main(words("cache", "build", "--quiet", *given, *more)) == 0
    return output


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list, another, two teachers, and a cache of each: float32 of one, float16 of the other, both with maps."""
    folder = tmp_path_factory.mktemp("cached")
    rows = ["path,identity"]
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,p{number // 2}")
    (folder / "faces.csv").write_text("\n".join(rows) + "\n")
    (folder / "turned.csv").write_text("\n".join([rows[0], *rows[:0:-1]]) + "\n")
    (folder / "fewer.csv").write_text("\n".join(rows[:-4]) + "\n")
    for seed, name in enumerate(("general.pt", "age.pt")):
        network = build_backbone("mobilefacenet", seed=seed, embedding_dim=16, width=0.25, input_size=SIZE)
        save_backbone(network, folder / name)
    build(folder, "general.pt", folder / "general", "--tap", "map=stage2", "--dtype", "float32")
    build(folder, "age.pt", folder / "age", "--tap", "stage2")
    return folder


def train(material: Path, output: Path, *teachers: object, more: tuple[str, ...] = (), faces: str = "faces.csv") -> int:
    given = [word for teacher in teachers for word in ("--teacher", material / str(teacher))]
    return main(
        words(
            "train", "--recipe", "liaad", "--quiet", "--threads", "1", "--faces", material / faces, "--output", output,
            *given, *settings(*SETTINGS, *more),
        )
    )  # fmt: skip


def fails(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("kdlib-faces: error: ")
    return said[0]


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line)["terms"] for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_backbone(output / "model.pt").state_dict()


def same(one: Path, other: Path, *, first: float) -> None:
    """The losses of the first step to `first`; of the later ones and the weights to what steps make of such a difference."""
    ours, theirs = losses(one), losses(other)
    assert len(ours) == len(theirs) == 5
    assert ours[0] == pytest.approx(theirs[0], rel=first)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert sorted(mine) == ["attention", "embedding", "identity", "map"]
        assert mine == pytest.approx(wanted, rel=2e-3, abs=1e-3)
    wanted = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(
            value, wanted[name], rtol=2e-3, atol=1e-3, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("mirror", ["0", "0.5"])
def test_the_student_is_the_one_of_the_live_teachers(material: Path, tmp_path: Path, mirror: str) -> None:
    more = (*PLAIN[1:], f"augment.mirror={mirror}")
    assert train(material, tmp_path / "live", "general.pt", "age.pt", more=more) == 0
    assert train(material, tmp_path / "cached", "general", "age", more=more) == 0
    assert train(material, tmp_path / "one", "general", "age.pt", more=more) == 0
    same(tmp_path / "one", tmp_path / "live", first=1e-5)  # float32 on disk
    same(tmp_path / "cached", tmp_path / "live", first=2e-4)  # float16 on disk
    # A view that does not follow the student's is seen in the losses at once.
    if mirror != "0":
        plain = build(material, "general.pt", tmp_path / "plain", "--views", "1", "--dtype", "float32")
        assert train(material, tmp_path / "other", plain, "age.pt", more=(*more, "recipe.map_weight=0")) == 0
        apart = [
            a["embedding"] - b["embedding"]
            for a, b in zip(losses(tmp_path / "other"), losses(tmp_path / "live"), strict=True)
        ]
        assert abs(apart[0]) > 1e-5


def test_random_views_are_those_that_the_student_is_shown(material: Path, tmp_path: Path, capsys) -> None:
    random = (
        "--tap",
        "stage2",
        "--views",
        "3",
        "--dtype",
        "float32",
        *settings("augment.rotate=20", "augment.mirror=0.5"),
    )
    caches = [build(material, name, tmp_path / name[:3], *random) for name in ("general.pt", "age.pt")]
    assert train(material, tmp_path / "cached", *caches) == 0
    assert train(material, tmp_path / "one", caches[0], "age.pt") == 0  # the live one sees the very same images
    same(tmp_path / "one", tmp_path / "cached", first=1e-5)
    capsys.readouterr()
    said = fails(capsys, train(material, tmp_path / "c", caches[0], "age"))
    assert "both caches must hold the same views, but" in said
    assert "holds 3 random ones by seed 0 (mirror 0.5, rotate 20) and" in said
    assert f"{material / 'age'} holds plain ones" in said


@pytest.mark.parametrize(
    ("faces", "words"),
    [
        ("turned.csv", "what differs is the data, their order, names, sizes or content, though there are 16 in both"),
        ("fewer.csv", "what differs is their number, 16 of faces.csv, 12 here"),
    ],
)
def test_a_cache_of_other_faces_is_refused(material: Path, tmp_path: Path, capsys, faces: str, words: str) -> None:
    said = fails(capsys, train(material, tmp_path / "run", "general", "age.pt", faces=faces))
    assert f"{material / 'general'} was computed from other images" in said
    assert words in said
    assert not (tmp_path / "run").exists()


def test_an_image_that_was_aligned_anew_is_another(material: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / material.name
    shutil.copytree(material, folder)
    assert train(folder, tmp_path / "moved", "general", "age") == 0  # a list may move
    Image.new("RGB", (SIZE, SIZE)).save(folder / "7.png")
    capsys.readouterr()
    assert "what differs is the data" in fails(capsys, train(folder, tmp_path / "run", "general", "age"))


def test_a_missing_map_is_told_with_the_ways_out(material: Path, tmp_path: Path, capsys) -> None:
    bare = build(material, "age.pt", tmp_path / "bare")
    capsys.readouterr()
    said = fails(capsys, train(material, tmp_path / "run", "general", bare))
    assert said.endswith(
        f"train: {bare} holds no 'map', which a term reads of the age teacher; there is 'embedding'; build another cache "
        "with --tap map=stage2, or leave the term out by --set recipe.attention_weight=0"
    )
    # Both ways hold what they promise.
    assert train(material, tmp_path / "run", "general", bare, more=("recipe.attention_weight=0",)) == 0
    assert sorted(losses(tmp_path / "run")[0]) == ["embedding", "identity", "map"]
    other = build(material, "age.pt", tmp_path / "mapped", "--tap", "map=stage2")
    assert train(material, tmp_path / "run2", "general", other) == 0


def test_plain_views_alone_do_for_the_embedding_and_not_for_a_map(material: Path, tmp_path: Path, capsys) -> None:
    plain = build(material, "age.pt", tmp_path / "plain", "--views", "1", "--tap", "stage2")
    capsys.readouterr()
    said = fails(capsys, train(material, tmp_path / "run", "general", plain))
    assert "holds plain views alone" in said
    assert "--views 2, or --set augment.mirror=0, or --set recipe.attention_weight=0" in said
    for setting in ("augment.mirror=0", "recipe.attention_weight=0"):
        assert train(material, tmp_path / setting, "general", plain, more=(setting,)) == 0


def test_only_what_the_terms_read_is_read(material: Path) -> None:
    listed = read_faces([material / "faces.csv"])
    features = features_read(LIAADConfig(map_weight=0.0))
    sources = {role: str(material / role) for role in ("general", "age")}
    found = open_teachers(
        sources, listed, features=features, stage=2, open_file=lambda *_: nn.Identity(), mirrored=True
    )
    general, age = (found.teachers[role] for role in ("general", "age"))
    assert isinstance(general, CachedTeacher)
    assert isinstance(age, CachedTeacher)
    assert (sorted(general.taps), sorted(age.taps)) == (["embedding"], ["embedding", "map"])
    assert found.views is None
    assert found.messages == (
        f"general teacher: general.pt from {material / 'general'}, asked for the plain image, mirrored where the student's is",
        f"age teacher: age.pt from {material / 'age'}, asked for the plain image, mirrored where the student's is",
    )


def test_folders_that_are_no_caches_and_caches_that_tell_nothing(material: Path, tmp_path: Path, capsys) -> None:
    assert is_cache(str(material / "age"))
    assert not is_cache(str(material))
    assert not is_cache(str(material / "age.pt"))
    said = fails(capsys, train(material, tmp_path / "run", material, "age.pt"))
    assert "is no cache of a teacher's outputs: it has no header.json" in said
    (tmp_path / "half").mkdir()
    for file in (material / "age").iterdir():
        shutil.copy(file, tmp_path / "half")
    header = json.loads((material / "age" / "header.json").read_text())

    def told(**changes: object) -> str:
        (tmp_path / "half" / "header.json").write_text(json.dumps({**header, **changes}))
        return fails(capsys, train(material, tmp_path / "run", "general", tmp_path / "half"))

    assert "run the same build again to complete it" in told(checks="", rows=3)
    assert "do not tell its views" in told(notes={})
    assert "does not tell what images it is of" in told(parts={})
    assert "is no header of a cache" in told(dtype=3)
    with pytest.raises(InputError, match="only `kdlib-faces train`"):
        build_recipe(LIAADConfig(general_teacher=str(material / "general"), input_size=SIZE))


def test_a_kill_and_an_interrupt_leave_the_same_student(material: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdlib_faces", "train", "--recipe", "liaad", "--quiet", "--threads", "1"]
    command += words(
        "--faces", material / "faces.csv", "--teacher", material / "general", "--teacher", material / "age"
    )
    command += settings(*SETTINGS[1:], "training.steps=80", "augment.rotate=10")
    log = tmp_path / "killed" / "log.jsonl"
    for sent in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([*command, "--output", str(tmp_path / "killed")], env=os.environ.copy())
        before, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_size > before:
                process.send_signal(sent)
                break
            time.sleep(0.002)
        assert process.wait(60) != 0
    assert list((tmp_path / "killed" / "checkpoints").iterdir())
    assert not (tmp_path / "killed" / "model.pt").exists()
    for name in ("killed", "straight"):
        subprocess.run([*command, "--output", str(tmp_path / name)], check=True, timeout=300)
    wanted = weights(tmp_path / "straight")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "killed").items())


def test_a_folder_of_another_run_is_not_gone_on_with(material: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    assert train(material, output, "general", "age") == 0
    kept = (output / "config.toml").read_text()
    before = weights(output)
    assert train(material, output, "general", "age") == 0  # the same again: nothing to do
    capsys.readouterr()
    for teachers, more, words in (
        (("age", "general"), (), "what differs is general teacher ("),
        (("general.pt", "age"), (), "what differs is general teacher ("),
        (
            ("general", "age"),
            ("augment.rotate=1",),
            "what differs is augment.rotate (5.0, now 1.0); restore the settings",
        ),
        (("general", "age"), ("recipe.map_weight=3", "training.steps=6"), "recipe.map_weight (2.0, now 3.0)"),
    ):
        said = fails(capsys, train(material, output, *teachers, more=more))
        assert f"{output} holds another run" in said
        assert words in said
    said = fails(capsys, train(material, output, "general.pt", "age.pt", faces="turned.csv"))
    assert "what differs is faces (" in said
    assert (output / "config.toml").read_text() == kept
    assert all(torch.equal(value, before[name]) for name, value in weights(output).items())
    # Files that were moved are the same run.
    folder = tmp_path / material.name
    shutil.copytree(material, folder)
    assert train(folder, output, "general", "age") == 0
    capsys.readouterr()
    (output / "run.json").write_text("[]")
    said = fails(capsys, train(material, output, "general", "age"))
    assert "holds checkpoints without a readable run.json" in said


def test_an_onnx_teacher_needs_no_tap_to_be_named(material: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from tests.faces.tiny_graph import tiny_graph

    graph = tiny_graph(tmp_path / "net.onnx")
    held = build(material, str(graph), tmp_path / "c", "--tap", "map=stage2")
    assert json.loads(TeacherCache.open(held).notes["taps"]) == {"map": "middle"}
    assert TeacherCache.open(held).features == {"embedding": (16,), "map": (6, 14, 14)}
    assert train(material, tmp_path / "live", graph, "age.pt") == 0
    assert train(material, tmp_path / "cached", held, "age") == 0
    for name in ("live", "cached"):
        assert sorted(losses(tmp_path / name)[0]) == ["attention", "embedding", "identity", "map"]


def test_a_network_without_maps_names_the_setting(material: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from tests.faces.tiny_graph import tiny_graph

    graph = tiny_graph(tmp_path / "net.onnx")
    monkeypatch.setattr("kdlib_faces.teachers.open.suggest_taps", lambda path: {})
    said = fails(capsys, train(material, tmp_path / "run", "general", graph))
    assert (
        "no square feature map to distill from; is it a convolutional network? attention_weight=0 removes the term"
        in said
    )
    assert train(material, tmp_path / "run", "general", graph, more=("recipe.attention_weight=0",)) == 0


def test_many_images_are_read_from_a_file_in_place_of_memory(material: Path, tmp_path: Path, monkeypatch) -> None:
    assert train(material, tmp_path / "memory", "general", "age") == 0
    assert not (tmp_path / "memory" / "images.npy").exists()
    monkeypatch.setattr("kdlib_faces.training.run.MAX_MEMORY", 1000)
    assert train(material, tmp_path / "file", "general", "age") == 0
    assert np.load(tmp_path / "file" / "images.npy", mmap_mode="r").shape == (COUNT, 3, SIZE, SIZE)
    wanted = weights(tmp_path / "memory")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "file").items())
