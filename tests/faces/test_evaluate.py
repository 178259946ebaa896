"""The `evaluate` command: embeddings, pairs, taps, interruption, full disks."""

import errno
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib_faces.backbones import MobileFaceNet, save_backbone
from kdlib_faces.data.lists import read_faces
from kdlib_faces.harness.embeddings import embed_set, open_model, read_embeddings
from kdlib_faces.harness.image_sets import images_of_files
from tests.faces.cache_files import run

IDENTITIES, EACH = 6, 4
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def folder(tmp_path):
    rows = ["path,identity,age"]
    rng = np.random.default_rng(0)
    for identity in range(IDENTITIES):
        base = rng.integers(0, 256, (8, 8, 3))
        for at in range(1, EACH + 1):
            name = f"P{identity}_{at:04d}.png"
            noisy = np.clip(base + rng.integers(-20, 21, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((32, 32)).save(tmp_path / name)
            rows.append(f"{name},P{identity},{'' if identity == 5 else 10 * at}")
    (tmp_path / "faces.csv").write_text("\n".join(rows) + "\n")
    pairs = [f"P{identity} 1 2" for identity in range(IDENTITIES)] + [
        f"P{identity} 1 P{identity - 1} 2" for identity in range(1, IDENTITIES)
    ]
    (tmp_path / "pairs.txt").write_text("\n".join([*pairs, "Q 1 2"]) + "\n")
    rng = np.random.default_rng(1)
    centers = np.repeat(rng.normal(size=(IDENTITIES, 16)), EACH, axis=0)
    np.save(tmp_path / "good.npy", centers + 0.01 * rng.normal(size=centers.shape))
    return tmp_path


def fails(capsys, *words, code=2):
    assert run(*words) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kdlib-faces: error: ")
    return lines[0]


def evaluate(folder, *more):
    fast = ["--set", "replicates=20", "--set", "bins=[0, 15]", "--quiet"]
    return ["evaluate", "--data", folder / "faces.csv", "--output", folder / "out", *fast, *more]


def reported(folder, *words):
    """Run the command that writes to `folder`, and read its report."""
    assert run(*words) == 0
    return json.loads((folder / "out/report.json").read_text())


def test_embeddings_from_a_file_are_evaluated(folder):
    words = evaluate(folder, "--embeddings", folder / "good.npy", "--pairs", folder / "pairs.txt", "--seed", 7)
    report = reported(folder, *words)
    assert report["seeds"] == [7]
    assert report["config"]["replicates"] == 20
    assert (report["data"]["test_images"], report["data"]["test_identities"]) == (IDENTITIES * EACH, IDENTITIES)
    notes = " ".join(report["data"]["notes"])
    assert "20 of 24 images, the others have no known age" in notes
    assert "1 of 12 pairs left out" in notes
    protocols = report["models"]["good"]["protocols"]
    assert protocols["leave_one_out"]["rank1"]["value"] == 1.0
    assert protocols["verification"]["accuracy"] == 1.0
    assert [(entry["name"], entry["genuine"]) for entry in protocols["age_gap"]["bins"]] == [("0-14", 15), ("15+", 15)]
    assert {path.name for path in (folder / "out").iterdir()} == {"figures", "report.html", "report.json", "report.md"}
    assert not list(folder.glob(".out*"))


def test_a_model_file_is_evaluated_with_mirrored_images(folder):
    torch.manual_seed(0)
    network = MobileFaceNet(embedding_dim=16, width=0.25, input_size=32).eval()
    save_backbone(network, folder / "m.pt")
    entry = reported(folder, *evaluate(folder, "--model", folder / "m.pt"))["models"]["m"]
    assert entry["backbone"] == "MobileFaceNet"
    assert entry["parameters"] == sum(p.numel() for p in network.parameters())
    files = read_faces(folder / "faces.csv").paths
    model = open_model(folder / "m.pt")
    both, plain = (
        embed_set(model, images_of_files("x", files), folder / "work", batch_size=5, flip=flip)
        for flip in (True, False)
    )
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files])).permute(0, 3, 1, 2)
    with torch.no_grad():
        x = pixels.float() / 127.5 - 1
        expected = network(x), network(x.flip(-1))
    for rows, reference in ((both, expected[0] + expected[1]), (plain, expected[0])):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(unit, torch.nn.functional.normalize(reference).numpy(), atol=1e-5)


def test_age_groups_are_used_if_fewer_images_have_an_age(folder):
    lines = (folder / "faces.csv").read_text().splitlines()
    rows = [lines[0] + ",age_group"] + [f"{line},{'young' if at % 2 else 'adult'}" for at, line in enumerate(lines[1:])]
    (folder / "faces.csv").write_text("\n".join(rows))
    report = reported(folder, *evaluate(folder, "--embeddings", folder / "good.npy"))
    protocols = report["models"]["good"]["protocols"]
    assert list(protocols) == ["age_gap", "between_groups", "leave_one_out"]
    bins = protocols["age_gap"]["bins"]
    assert [entry["name"] for entry in bins] == ["adult-adult", "adult-young", "young-young"]
    assert protocols["between_groups"]["groups"] == ["young", "adult"]


def test_protocols_use_the_faces_of_the_command(folder):
    protocols = ["--protocol", "longitudinal", "--protocol", "age_errors"]
    report = reported(folder, *evaluate(folder, "--embeddings", folder / "good.npy", *protocols))
    for entry in report["evaluations"]:
        assert (entry["counts"]["images"], entry["counts"]["identities"]) == (20, 5)
        assert entry["notes"] == ["20 of 24 images, the others have no known age"]


def test_unusable_embeddings_are_reported(folder, capsys):
    good = np.load(folder / "good.npy")
    bad = folder / "bad.npy"
    holes = good.copy()
    holes[3, 2] = np.nan
    for array, message in (
        (good[:5], "one row for each of the 24 images, got 5"),
        (holes, "must be finite and not zero, row 3 is NaN"),
        (good[0], r"must be \(n, d\) numbers"),
        (np.array([{"a": 1}] * 24, dtype=object), "not a .npy file of numbers"),
    ):
        np.save(bad, array, allow_pickle=True)
        assert re.search(message, fails(capsys, *evaluate(folder, "--embeddings", bad)))
    whole = (folder / "good.npy").read_bytes()
    for content in (
        b"\x93NUMPY",
        whole.replace(b"}", b"{"),
        whole.replace(b"(24", b"(-1"),
        whole.replace(b"(24", b"(08"),
    ):
        bad.write_bytes(content)
        assert "bad.npy: not a .npy file" in fails(capsys, *evaluate(folder, "--embeddings", bad))
    assert "embeddings not found" in fails(capsys, *evaluate(folder, "--embeddings", folder / "no.npy"))
    assert "at least one model" in fails(capsys, *evaluate(folder))
    assert "--data or --protocol must be given" in fails(capsys, "evaluate", "--embeddings", bad)
    assert not (folder / "out").exists()
    for dtype in ("<f4", ">f4", "<f8", ">f8", "longdouble", "<f2", "<i8"):
        np.save(bad, good.astype(dtype) + 1)
        read = read_embeddings(bad, 24)
        assert read.dtype in (np.float16, np.float32, np.float64)
        np.testing.assert_allclose(read, (good.astype(dtype) + 1).astype(float), rtol=1e-6)


def test_a_wrong_tap_names_the_nearest(folder, capsys):
    save_backbone(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32), folder / "m.pt")
    stage = MobileFaceNet(embedding_dim=16, width=0.25, input_size=32).stages[2]
    assert run("inspect", folder / "m.pt", "--tap", stage) == 0
    assert re.fullmatch(rf"{stage}  \(b, 32, 4, 4\)", capsys.readouterr().out.strip())
    line = fails(capsys, "inspect", folder / "m.pt", "--tap", stage + "x")
    assert stage in line.partition("nearest")[2]


def test_a_full_disk_leaves_nothing_behind(folder, capsys, monkeypatch):
    def full(stage, content, **_):
        (stage / "report.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device", str(stage / "report.md"))

    monkeypatch.setattr("kdlib_faces.report.write", full)
    line = fails(capsys, *evaluate(folder, "--embeddings", folder / "good.npy"))
    assert line.endswith("report.md: No space left on device")
    left = {path.name for path in folder.iterdir() if path.suffix != ".png"}
    assert left == {"faces.csv", "good.npy", "pairs.txt"}


def test_interrupts_bugs_and_debug(folder, capsys, monkeypatch):
    def fail(error):
        def stop(*_args, **_options):
            raise error

        monkeypatch.setattr("kdlib_faces.harness.run.read_faces", stop)

    words = evaluate(folder, "--embeddings", folder / "good.npy")
    fail(KeyboardInterrupt())
    assert run(*words) == 130
    assert capsys.readouterr().err.count("\n") == 1
    fail(KeyError("stage"))
    assert "unexpected KeyError: 'stage'; use --debug for the traceback" in fails(capsys, *words, code=1)
    fail(ModuleNotFoundError("No module named 'PIL'", name="PIL"))
    assert "pip install 'kdlib-torch[faces" in fails(capsys, *words)
    fail(ValueError("two\nlines"))
    assert fails(capsys, *words).endswith("two lines")
    with pytest.raises(ValueError, match="two"):
        run(*words, "--debug")


def test_wrong_arguments_are_reported_in_one_line(capsys):
    for words in (["dance"], ["evaluate", "--seed", "x"], ["report"]):
        assert fails(capsys, *words).endswith("--help")
