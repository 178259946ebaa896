"""`kdlib-faces train --recipe liaad` from cached teachers gives the same student as with live teachers."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib.cache import CachedTeacher, TeacherCache, read_header
from kdlib.training import load_checkpoint
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import load_backbone
from kdlib_faces.caching.teachers import TeacherSource, is_cache, open_teachers
from kdlib_faces.data.lists import read_faces
from kdlib_faces.data.samplers import ShuffledOrder
from kdlib_faces.recipes import LIAADConfig
from kdlib_faces.recipes import build as build_recipe
from kdlib_faces.recipes.liaad import features_read
from tests.faces.cache_files import (
    COUNT,
    SIZE,
    build,
    build_words,
    fails,
    make_faces,
    noise,
    put_list,
    run,
    settings,
    wait_until,
)
from tests.faces.tiny_graph import unit_graph

PLAIN = [f"augment.{name}=0" for name in ["mirror", "brightness", "contrast", "gamma", "shift", "scale", "rotate"]]
PLAIN += ["augment.low_resolution=0", "augment.grayscale=0"]
SETTINGS = ["training.steps=5", "training.batch_size=8", "training.lr=0.02"]
SETTINGS += ["recipe.input_size=32", "recipe.width=0.25", "recipe.embedding_dim=16"]


@pytest.fixture(scope="module")
def faces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Face lists, two teachers, and a cache with maps of each: float32 of the first, float16 of the second."""
    folder = make_faces(tmp_path_factory.mktemp("cached"))
    rows = (folder / "faces.csv").read_text().splitlines()
    (folder / "turned.csv").write_text("\n".join([rows[0], *rows[:0:-1]]) + "\n")
    (folder / "fewer.csv").write_text("\n".join(rows[:-4]) + "\n")
    build(folder, "general.pt", folder / "general", "--tap", "map=stage2", "--dtype", "float32")
    build(folder, "age.pt", folder / "age", "--tap", "stage2")
    return folder


def command(
    folder: Path, output: Path, *teachers: object, more: tuple[str, ...] = (), faces: str = "faces.csv"
) -> list[object]:
    """Return the words of `train --recipe liaad` with two teachers in `folder`."""
    given = [word for teacher in teachers for word in ("--teacher", folder / str(teacher))]
    start = ("train", "--recipe", "liaad", "--quiet", "--threads", "1", "--data", folder / faces)
    return [*start, "--output", output, *given, *settings(*SETTINGS, *more)]


def train(folder: Path, output: Path, *teachers: object, **options: object) -> Path:
    assert run(*command(folder, output, *teachers, **options)) == 0
    return output


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line)["terms"] for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_backbone(output / "student.safetensors").state_dict()


def same(one: Path, other: Path, *, first: float) -> None:
    """Compare the losses of the first step with tolerance `first`; later losses and weights with larger tolerances."""
    ours, theirs = losses(one), losses(other)
    assert len(ours) == len(theirs) == 5
    assert ours[0] == pytest.approx(theirs[0], rel=first)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert sorted(mine) == ["attention", "embedding", "identity", "map"]
        assert mine == pytest.approx(wanted, rel=2e-3, abs=1e-3)
    wanted = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(
            value, wanted[name], rtol=4e-3, atol=1e-3, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("mirror", ["0", "0.5"])
def test_cached_and_live_teachers_give_the_same_student(faces_folder: Path, tmp_path: Path, mirror: str) -> None:
    more = (*PLAIN[1:], f"augment.mirror={mirror}")
    train(faces_folder, tmp_path / "live", "general.pt", "age.pt", more=more)
    train(faces_folder, tmp_path / "cached", "general", "age", more=more)
    train(faces_folder, tmp_path / "one", "general", "age.pt", more=more)
    same(tmp_path / "one", tmp_path / "live", first=1e-5)  # float32 on disk
    same(tmp_path / "cached", tmp_path / "live", first=2e-4)  # float16 on disk
    # A view that does not follow the student's changes the first loss.
    if mirror != "0":
        plain = build(faces_folder, "general.pt", tmp_path / "plain", "--views", "1", "--dtype", "float32")
        train(faces_folder, tmp_path / "other", plain, "age.pt", more=(*more, "recipe.map_weight=0"))
        first, wanted = (losses(tmp_path / name)[0]["embedding"] for name in ("other", "live"))
        assert abs(first - wanted) > 1e-5


def test_random_views_are_shared_by_student_and_cache(faces_folder: Path, tmp_path: Path, capsys) -> None:
    views = ("--views", "3", *settings("augment.rotate=20", "augment.mirror=0.5"))
    random = ("--tap", "stage2", "--dtype", "float32", *views)
    caches = [build(faces_folder, name, tmp_path / name[:3], *random) for name in ("general.pt", "age.pt")]
    train(faces_folder, tmp_path / "cached", *caches)
    train(faces_folder, tmp_path / "one", caches[0], "age.pt")  # the live teacher sees the same images
    same(tmp_path / "one", tmp_path / "cached", first=1e-5)
    message = fails(capsys, *command(faces_folder, tmp_path / "c", caches[0], "age"))
    assert "both caches must have the same views, but" in message
    assert "has 3 random views with seed 0 (mirror 0.5, rotate 20) and" in message
    assert f"{faces_folder / 'age'} has the plain and the mirrored image" in message
    # A cache that an older augmentation has made.
    header = json.loads((caches[0] / "header.json").read_text())
    header["notes"]["views"] = json.dumps({**json.loads(header["notes"]["views"]), "version": 1})
    (caches[0] / "header.json").write_text(json.dumps(header))
    message = fails(capsys, *command(faces_folder, tmp_path / "old", *caches))
    assert f"{caches[0]} holds random views of version 1 of the augmentation" in message
    assert "build the cache again" in message
    words = ("--data", faces_folder / "faces.csv", "--teacher", faces_folder / "general.pt")
    assert "draws other views; build the cache again" in fails(capsys, "cache", "verify", caches[0], *words)


@pytest.mark.parametrize(
    ("faces", "words"),
    [
        ("turned.csv", "order, names, sizes or content differ, although both have 16 images"),
        ("fewer.csv", "it has 16 images of faces.csv, the lists have 12"),
    ],
)
def test_a_cache_of_other_faces_is_refused(faces_folder: Path, tmp_path: Path, capsys, faces: str, words: str) -> None:
    message = fails(capsys, *command(faces_folder, tmp_path / "run", "general", "age.pt", faces=faces))
    assert f"{faces_folder / 'general'} was computed from other images" in message
    assert words in message
    assert not (tmp_path / "run").exists()


def test_a_changed_image_is_detected(faces_folder: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / faces_folder.name
    shutil.copytree(faces_folder, folder)
    train(folder, tmp_path / "moved", "general", "age")  # a list may move
    Image.new("RGB", (SIZE, SIZE)).save(folder / "7.png")
    assert "order, names, sizes or content differ" in fails(
        capsys, *command(folder, tmp_path / "run", "general", "age")
    )


def test_a_missing_map_is_reported_with_remedies(faces_folder: Path, tmp_path: Path, capsys) -> None:
    bare = build(faces_folder, "age.pt", tmp_path / "bare")
    message = fails(capsys, *command(faces_folder, tmp_path / "run", "general", bare))
    assert message.endswith(
        f"train: {bare} has no feature 'map', which a term of the age teacher needs; it has 'embedding'; build another cache "
        "with --tap map=stage2, or remove the term by --set recipe.attention_weight=0"
    )
    train(faces_folder, tmp_path / "run", "general", bare, more=("recipe.attention_weight=0",))
    assert sorted(losses(tmp_path / "run")[0]) == ["embedding", "identity", "map"]


def test_plain_views_suffice_for_embeddings_but_not_for_maps(faces_folder: Path, tmp_path: Path, capsys) -> None:
    plain = build(faces_folder, "age.pt", tmp_path / "plain", "--views", "1", "--tap", "stage2")
    message = fails(capsys, *command(faces_folder, tmp_path / "run", "general", plain))
    assert "has plain views only" in message
    assert "--views 2, or --set augment.mirror=0, or --set recipe.attention_weight=0" in message
    for setting in ("augment.mirror=0", "recipe.attention_weight=0"):
        train(faces_folder, tmp_path / setting, "general", plain, more=(setting,))


def test_only_features_of_active_terms_are_read(faces_folder: Path) -> None:
    listed = read_faces([faces_folder / "faces.csv"])
    config = LIAADConfig(
        general_teacher=str(faces_folder / "general"),
        age_teacher=str(faces_folder / "age"),
        input_size=SIZE,
        map_weight=0.0,
    )
    sources = [
        TeacherSource(role, path, reads, config.stage)
        for (role, reads), path in zip(
            features_read(config).items(), (config.general_teacher, config.age_teacher), strict=True
        )
    ]
    found = open_teachers(sources, listed, open_file=lambda source: pytest.fail("no file"), mirrored=True)
    general, age = (found.teachers[role] for role in ("general", "age"))
    assert isinstance(general, CachedTeacher)
    assert isinstance(age, CachedTeacher)
    assert (sorted(general.taps), sorted(age.taps)) == (["embedding"], ["embedding", "map"])
    assert found.views is None
    assert found.messages == (
        f"general teacher: general.pt from {faces_folder / 'general'}, outputs for the plain and the mirrored image",
        f"age teacher: age.pt from {faces_folder / 'age'}, outputs for the plain and the mirrored image",
    )


def test_folders_without_a_valid_cache_are_refused(faces_folder: Path, tmp_path: Path, capsys) -> None:
    assert is_cache(str(faces_folder / "age"))
    assert not is_cache(str(faces_folder))
    assert not is_cache(str(faces_folder / "age.pt"))
    message = fails(capsys, *command(faces_folder, tmp_path / "run", faces_folder, "age.pt"))
    assert "is not a cache of teacher outputs: it has no header.json" in message
    (tmp_path / "half").mkdir()
    for file in (faces_folder / "age").iterdir():
        shutil.copy(file, tmp_path / "half")
    header = json.loads((faces_folder / "age" / "header.json").read_text())

    def error(**changes: object) -> str:
        (tmp_path / "half" / "header.json").write_text(json.dumps({**header, **changes}))
        return fails(capsys, *command(faces_folder, tmp_path / "run", "general", tmp_path / "half"))

    assert "run the same build again to complete it" in error(checks="", rows=3)
    assert "do not describe its views" in error(notes={})
    assert "does not identify its images" in error(parts={})
    assert "is not a valid cache header" in error(dtype=3)
    with pytest.raises(InputError, match="only `kdlib-faces train`"):
        build_recipe(LIAADConfig(general_teacher=str(faces_folder / "general"), input_size=SIZE))


def test_sigterm_and_sigkill_leave_the_same_student(faces_folder: Path, tmp_path: Path) -> None:
    def process_of(name: str) -> subprocess.Popen[bytes]:
        more = ("training.steps=80", "augment.rotate=10")
        words = command(faces_folder, tmp_path / name, "general", "age", more=more)
        return subprocess.Popen([sys.executable, "-m", "kdlib_faces", *map(str, words)])

    log = tmp_path / "interrupted" / "log.jsonl"
    for sent in (signal.SIGTERM, signal.SIGKILL):
        process = process_of("interrupted")
        before = log.stat().st_size if log.exists() else 0
        assert wait_until(lambda before=before: log.exists() and log.stat().st_size > before, 120)
        process.send_signal(sent)
        assert process.wait(60) != 0
    assert list((tmp_path / "interrupted" / "checkpoints").iterdir())
    assert not (tmp_path / "interrupted" / "student.safetensors").exists()
    for name in ("interrupted", "straight"):
        assert process_of(name).wait(300) == 0
    wanted = weights(tmp_path / "straight")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "interrupted").items())


def test_a_damaged_row_of_a_cache_stops_the_run_and_keeps_its_checkpoint(
    faces_folder: Path, tmp_path: Path, capsys
) -> None:
    samples = ShuffledOrder(COUNT, 8, seed=0).rows(0, 1)  # those of the second batch
    shutil.copytree(faces_folder / "general", tmp_path / "cache")
    header = read_header(tmp_path / "cache")
    assert header is not None
    with (tmp_path / "cache" / "shard-00000.bin").open("r+b") as file:
        file.seek(int(samples[3]) * header.row_bytes)
        file.write(np.float32("nan").tobytes())
    more = ("recipe.embedding_projection=linear", "training.checkpoint_seconds=1e-6", *PLAIN)
    words = command(faces_folder, tmp_path / "run", tmp_path / "cache", "age", more=more)
    line = fails(capsys, *words)
    assert f"of sample {samples[3]}, view 0 is not finite; build the cache again; in batch 1 of epoch 0" in line
    kept = tmp_path / "run" / "checkpoints" / "step-000000001.pt"
    assert f"(samples {', '.join(map(str, samples))}); the last good checkpoint is {kept}" in line
    assert load_checkpoint(kept)["step"] == 1
    shutil.copy(faces_folder / "general" / "shard-00000.bin", tmp_path / "cache")
    assert run(*words) == 0
    whole = train(faces_folder, tmp_path / "whole", "general", "age", more=more)
    assert losses(tmp_path / "run") == losses(whole)


def test_an_image_for_which_a_graph_returns_nan_is_named(faces_folder: Path, tmp_path: Path, capsys) -> None:
    graph = unit_graph(tmp_path / "unit.onnx", SIZE)
    rows = [(noise(number) * (number != 9), f"p{number // 2}") for number in range(COUNT)]
    faces = put_list(tmp_path, "identity", rows)
    line = fails(capsys, "embed", faces, "--model", graph, "--output", tmp_path / "embed")
    assert line.endswith("unit.onnx: the model returns NaN or infinity for 9.png of faces")
    line = fails(capsys, *build_words(tmp_path, graph, tmp_path / "cache"))
    assert (
        "unit.onnx returns NaN or infinity for image 9 of the batch; in the batch of 16 samples from sample 0 to 15"
        in line
    )
    more = ("recipe.embedding_projection=linear", "recipe.map_weight=0", "recipe.attention_weight=0", *PLAIN)
    line = fails(capsys, *command(tmp_path, tmp_path / "run", graph, graph, more=more))
    at, samples = re.search(
        r"for image (\d+) of the batch; in batch \d of epoch 0 \(samples ([\d, ]+)\)", line
    ).groups()
    assert samples.split(", ")[int(at)] == "9"


def test_a_folder_of_another_run_is_refused(faces_folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    train(faces_folder, output, "general", "age")
    kept = (output / "run.toml").read_text()
    before = weights(output)
    train(faces_folder, output, "general", "age")  # the same again: nothing to do
    capsys.readouterr()
    for teachers, more, difference in (
        (("age", "general"), (), "what differs is general teacher ("),
        (("general.pt", "age"), (), "what differs is general teacher ("),
        (("general", "age"), ("augment.rotate=1",), "what differs is augment.rotate (5.0, now 1.0); restore"),
        (("general", "age"), ("recipe.map_weight=3", "training.steps=6"), "recipe.map_weight (2.0, now 3.0)"),
    ):
        message = fails(capsys, *command(faces_folder, output, *teachers, more=more))
        assert f"{output} holds another run" in message
        assert difference in message
    message = fails(capsys, *command(faces_folder, output, "general.pt", "age.pt", faces="turned.csv"))
    assert "what differs is faces (" in message
    assert (output / "run.toml").read_text() == kept
    assert all(torch.equal(value, before[name]) for name, value in weights(output).items())
    # Files that were moved are the same run.
    folder = tmp_path / faces_folder.name
    shutil.copytree(faces_folder, folder)
    train(folder, output, "general", "age")
    capsys.readouterr()
    (output / "run.toml").write_text("[")
    message = fails(capsys, *command(faces_folder, output, "general", "age"))
    assert "holds checkpoints without a readable run.toml" in message


def test_an_onnx_teacher_needs_no_tap_name(faces_folder: Path, tmp_path: Path, graph: Path, capsys) -> None:
    held = build(faces_folder, str(graph), tmp_path / "c", "--tap", "map=stage2")
    assert json.loads(TeacherCache.open(held).notes["taps"]) == {"map": "middle"}
    assert TeacherCache.open(held).features == {"embedding": (16,), "map": (6, 14, 14)}
    project = ("recipe.embedding_projection=linear",)
    train(faces_folder, tmp_path / "live", graph, "age.pt", more=project)
    train(faces_folder, tmp_path / "cached", held, "age", more=project)
    for name in ("live", "cached"):
        assert sorted(losses(tmp_path / name)[0]) == ["attention", "embedding", "identity", "map"]


def test_a_network_without_maps_names_the_setting(
    faces_folder: Path, tmp_path: Path, graph: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("kdlib_faces.teachers.open.suggest_taps", lambda path, layout: {})
    message = fails(capsys, *command(faces_folder, tmp_path / "run", "general", graph))
    assert (
        "no feature map to distill from; is it a convolutional network? recipe.attention_weight=0 removes the term"
        in message
    )
    settings = ("recipe.attention_weight=0", "recipe.embedding_projection=linear")
    train(faces_folder, tmp_path / "run", "general", graph, more=settings)


def test_large_lists_are_decoded_in_every_epoch(faces_folder: Path, tmp_path: Path, monkeypatch) -> None:
    train(faces_folder, tmp_path / "memory", "general", "age")
    monkeypatch.setattr("kdlib_faces.training.run.MAX_MEMORY", 1000)
    train(faces_folder, tmp_path / "file", "general", "age")
    wanted = weights(tmp_path / "memory")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(tmp_path / "file").items())
