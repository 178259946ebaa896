"""Embeddings of the `evaluate` command: kept during the run, reused, read from files."""

import os
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from kdlib_faces import cli
from kdlib_faces._checks import InputError
from kdlib_faces.commands import evaluate
from kdlib_faces.evaluation import embed_images
from kdlib_faces.harness import embeddings as embedding
from kdlib_faces.harness.image_sets import ImageSet, images_of_files, images_of_tensor
from tests.faces import set_files
from tests.faces.cache_files import wait_until
from tests.faces.set_files import FAST, network, run_evaluate

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def counts(monkeypatch):
    """Sizes of the batches that are embedded."""
    real, sizes = embedding.embed_batch, []

    def counted(module, images, **options):
        sizes.append(len(images))
        return real(module, images, **options)

    monkeypatch.setattr(embedding, "embed_batch", counted)
    return sizes


def test_an_interrupted_run_continues(tmp_path, monkeypatch, counts):
    model, text = network(tmp_path / "m.pt", 0), f"leave_one_out={set_files.grouped(tmp_path)}"
    config = evaluate.EvaluateConfig(replicates=10, num_failures=0, batch_size=4)
    monkeypatch.setattr(embedding, "KEPT_EVERY", 4)
    counted = embedding.embed_batch

    def stops(module, images, **options):
        if len(counts) == 2:
            raise KeyboardInterrupt
        return counted(module, images, **options)

    monkeypatch.setattr(embedding, "embed_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(config, output=tmp_path / "out", models=[model], protocols=[text])
    monkeypatch.setattr(embedding, "embed_batch", counted)
    assert sorted(path.suffix for path in (tmp_path / "out/work").iterdir()) == [".json", ".part"]
    assert not (tmp_path / "out/report.json").exists()
    counts.clear()
    run_evaluate(config, output=tmp_path / "out", models=[model], protocols=[text])
    assert counts == [4, 3]
    (resumed,) = (tmp_path / "out/work").iterdir()
    run_evaluate(config, output=tmp_path / "whole", models=[model], protocols=[text])
    (straight,) = (tmp_path / "whole/work").iterdir()
    assert resumed.read_bytes() == straight.read_bytes()
    assert resumed.name == straight.name


_SLOW = """
import sys, time
from kdlib_faces import cli
from kdlib_faces.harness import embeddings as embedding
real = embedding.embed_batch
def slow(*given, **more):
    time.sleep(0.2)
    return real(*given, **more)
embedding.embed_batch, embedding.KEPT_EVERY = slow, 4
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_run_ended_by_sigkill_continues(tmp_path, counts):
    model, text = network(tmp_path / "m.pt", 0), f"leave_one_out={set_files.grouped(tmp_path)}"
    words = ["evaluate", "--model", model, "--protocol", text, "--set", "batch_size=4", "--set", "replicates=10"]
    words = [str(word) for word in [*words, "--quiet", "--output", tmp_path / "out"]]
    process = subprocess.Popen([sys.executable, "-c", _SLOW, *words], stderr=subprocess.PIPE)
    assert wait_until(lambda: any((tmp_path / "out/work").glob("*.json")))
    process.kill()
    assert process.wait(20) == -9, process.stderr.read()
    process.stderr.close()
    assert not (tmp_path / "out/report.json").exists()
    assert cli.main(words) == 0
    assert 0 < sum(counts) < 15
    (resumed,) = (tmp_path / "out/work").iterdir()
    assert cli.main([*words[:-1], str(tmp_path / "whole")]) == 0
    (straight,) = (tmp_path / "whole/work").iterdir()
    expected = np.load(straight)
    # Two processes may sum in different orders, so the tolerance is relative to the size of the embeddings.
    np.testing.assert_allclose(np.load(resumed), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_a_damaged_part_file_is_replaced(tmp_path, monkeypatch):
    files = [set_files.put_face(tmp_path / f"{number}.png", number, 0) for number in range(6)]
    images, model = images_of_files("six", files), embedding.open_model(network(tmp_path / "m.pt", 0))
    whole = np.array(embedding.embed_set(model, images, tmp_path / "a"))
    (name,) = (path.name for path in (tmp_path / "a").iterdir())
    notes = ("", "{", '{"format": 1, "done": 4, "width": 16}', '{"format": 9, "done": 1, "width": 16}', "[1]")
    for number, note in enumerate(notes):
        folder = tmp_path / f"b{number}"
        folder.mkdir()
        (folder / f"{name}.part").write_bytes(b"\x93NUMPY short")
        (folder / f"{name}.json").write_text(note)
        np.testing.assert_array_equal(embedding.embed_set(model, images, folder), whole)
        assert [path.name for path in folder.iterdir()] == [name]


def test_the_file_name_depends_on_model_settings_and_images(tmp_path):
    files = [set_files.put_face(tmp_path / f"{number}.png", number, 0) for number in range(3)]
    models = [embedding.open_model(network(tmp_path / f"{seed}.pt", seed)) for seed in (0, 1)]
    folder = tmp_path / "work"
    embedding.embed_set(models[0], images_of_files("x", files), folder)
    embedding.embed_set(models[0], images_of_files("x", files), folder, batch_size=2)
    assert len(list(folder.iterdir())) == 1
    embedding.embed_set(models[0], images_of_files("x", files), folder, flip=False)
    embedding.embed_set(models[1], images_of_files("x", files), folder)
    set_files.put_face(files[2], 7, 7)
    embedding.embed_set(models[0], images_of_files("x", files), folder)
    embedding.embed_set(models[0], images_of_files("x", files[:2]), folder)
    assert len(list(folder.iterdir())) == 5


def test_kept_embeddings_are_not_normalized(tmp_path):
    files = [set_files.put_face(tmp_path / f"{number}.png", number, 0) for number in range(3)]
    images, model = images_of_files("x", files), embedding.open_model(network(tmp_path / "m.pt", 0))
    kept = embedding.embed_set(model, images, tmp_path)
    assert not np.allclose(np.linalg.norm(kept, axis=1), 1, atol=1e-3)
    unit = embed_images(model.module, images.decode(range(3), 32))
    np.testing.assert_allclose(kept / np.linalg.norm(kept, axis=1, keepdims=True), unit, atol=1e-6)


def test_images_in_memory_are_an_image_set():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images_of_tensor("test", pixels, ["a", "b"])
    assert torch.equal(images.decode([1, 0], 8), pixels[[1, 0]])
    assert (images.count, images.label(1), images.picture(0, 16).shape) == (2, "b", (16, 16, 3))
    assert images.fingerprint != images_of_tensor("test", pixels + 1).fingerprint


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN or infinity"), (0.0, "zero")])
def test_an_unusable_embedding_of_a_model_is_reported_with_its_image(tmp_path, monkeypatch, value, what):
    model = network(tmp_path / "m.pt", 0)

    def third(module, images, **_):
        rows = np.ones((len(images), 4), np.float32)
        rows[2] = value
        return rows

    monkeypatch.setattr(embedding, "embed_batch", third)
    with pytest.raises(InputError, match=rf"m\.pt: the model returns {what} for 0_2\.png of grouped"):
        run_evaluate(
            FAST, output=tmp_path / "out", models=[model], protocols=[f"leave_one_out={set_files.grouped(tmp_path)}"]
        )
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN or infinity"), (0.0, "zero")])
def test_an_unusable_row_of_a_file_is_reported(tmp_path, value, what):
    rows = np.ones((15, 4))
    rows[11] = value
    np.save(tmp_path / "good.npy", np.ones((15, 4)))
    np.save(tmp_path / "bad.npy", rows)
    with pytest.raises(InputError, match=rf"bad\.npy: embeddings must be finite and not zero, row 11 is {what}"):
        run_evaluate(
            FAST, output=tmp_path / "out", embeddings=[tmp_path / "good.npy", tmp_path / "bad.npy"],
            protocols=[f"leave_one_out={set_files.grouped(tmp_path)}"],
        )  # fmt: skip


def test_memory_of_the_command_does_not_grow_with_the_set(tmp_path):
    model = embedding.open_model(network(tmp_path / "m.pt", 0))

    def peak(count):
        def read(row, size):
            return np.random.default_rng(row).integers(0, 256, (3, size, size), dtype=np.uint8)

        images = ImageSet(f"n{count}", count, f"n{count}", read, str)
        tracemalloc.start()
        try:
            embedding.embed_set(model, images, tmp_path / "work", batch_size=8)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)  # what the first forward takes once
    small, large = peak(64), peak(640)
    assert large < small + 60_000 < 640 * 3 * 32 * 32


def test_embeddings_of_several_sets_from_a_folder(tmp_path):
    given, rng = tmp_path / "mine", np.random.default_rng(0)
    given.mkdir()
    centers = np.repeat(rng.normal(size=(5, 8)), 3, axis=0)
    np.save(given / "grouped.npy", centers + 0.01 * rng.normal(size=centers.shape))
    np.save(given / "calfw.npy", rng.normal(size=(8, 8)).astype(np.float16))
    text = set_files.two_lines(tmp_path, "calfw").replace(f",images={tmp_path / 'calfw'}", "")
    protocols = [f"leave_one_out={set_files.grouped(tmp_path)}", text]
    report = run_evaluate(FAST, output=tmp_path / "out", embeddings=[given], protocols=protocols)
    entries = {entry["name"]: entry for entry in report["evaluations"]}
    assert entries["leave_one_out"]["models"]["mine"]["measures"]["rank1"]["value"] == 1.0
    assert entries["calfw"]["counts"]["images"] == 8
    assert "pictures" not in entries["calfw"]
    assert entries["calfw"]["convention"]["Alignment"] == "that of the embeddings"
    assert not (tmp_path / "out/work").exists()


def test_models_are_named_by_their_files_or_as_requested(tmp_path):
    rng = np.random.default_rng(0)
    files = [tmp_path / name for name in ("a/same.npy", "b/same.npy", "b/c?.npy", "c_.npy", "x=y.npy")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        np.save(file, rng.normal(size=(15, 4)))
    config = evaluate.EvaluateConfig(replicates=5, num_failures=0)
    protocols = [f"leave_one_out={set_files.grouped(tmp_path)}"]
    given = [*files, files[3], f"mine={files[3]}"]
    model = network(tmp_path / "m.pt", 0)
    report = run_evaluate(
        config, output=tmp_path / "out", models=[f"ours={model}"], embeddings=given, protocols=protocols, scores=True
    )
    names = ["ours", "a/same", "b/same", "c?", "c_ (5)", "x=y", "c_ (7)", "mine"]
    assert {name: model["label"] for name, model in report["models"].items()} == {name: name for name in names}
    (entry,) = report["evaluations"]
    assert entry["convention"]["Alignment"] == "none: images as they are; embeddings from files as they are"
    assert len(entry["differences"]) == 2 * 7
    assert len(set(entry["scores"].values())) == len(list((tmp_path / "out/scores").iterdir())) == 8
    with pytest.raises(InputError, match="two models are named 'm'; name them as in --model NAME=FILE"):
        run_evaluate(config, output=tmp_path / "o", models=[model], embeddings=[f"m={files[0]}"], protocols=protocols)


def test_photographs_that_are_no_aligned_crops_are_noted_in_the_result(tmp_path):
    for at in range(4):
        path = set_files.put_face(tmp_path / f"faces/p{at // 2}/{at}.png", at // 2, at)
        set_files.face(at // 2, at).resize((90, 120)).save(path)
    config, model = evaluate.EvaluateConfig(replicates=5, num_failures=0), network(tmp_path / "m.pt", 0)
    for _ in range(2):  # also if the embeddings are known already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = run_evaluate(config, output=tmp_path / "out", models=[model], data=[tmp_path / "faces"])
        assert any("4 of 4 images are far from the 32 x 32 pixels" in note for note in report["data"]["notes"])
        assert report["evaluations"][0]["convention"]["Alignment"] == "none: images as they are"


def test_names_of_images_in_another_encoding_are_written_as_escapes(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    for at in range(4):
        set_files.put_face(tmp_path / f"faces/p{at // 2}/{name}{at}.png", at // 2, at)
    np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=(4, 4)))
    config = evaluate.EvaluateConfig(replicates=5, num_failures=1)
    report = run_evaluate(
        config, output=tmp_path / "out", embeddings=[tmp_path / f"{name}.npy"], data=[tmp_path / "faces"], scores=True,
        command=f"evaluate {name}",
    )  # fmt: skip
    shown = "\\udcff\\udcfe"
    assert list(report["models"]) == [shown]
    (entry,) = report["evaluations"]
    text = (tmp_path / "out" / entry["scores"][shown]).read_text("utf-8")
    assert f"p0/{shown}0.png" in text
    assert report["command"] == f"evaluate {shown}"


def test_two_different_sets_of_the_same_name_are_refused(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    protocols = [set_files.fgnet(first), set_files.fgnet(second)]
    set_files.put_face(second / "fgnet/001A03.JPG", 9, 9)
    with pytest.raises(InputError, match="two sets of different images are called 'fgnet'"):
        run_evaluate(FAST, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], protocols=protocols)
    assert not (tmp_path / "out").exists()
