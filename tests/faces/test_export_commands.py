"""The commands export, embed and compare."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from kdlib_faces.backbones import MobileFaceNet, save_backbone
from kdlib_faces.cli import main
from kdlib_faces.commands.thresholds import read_evaluation
from kdlib_faces.export.accuracy import check_loss, sample_pairs
from tests.faces.cache_files import fails
from tests.faces.detector_graph import detector, put_photograph
from tests.faces.exported import scramble

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of six identities, a student, and its evaluation."""
    from PIL import Image

    from kdlib_faces.data import SyntheticFaces

    made = tmp_path_factory.mktemp("deploy")
    faces = SyntheticFaces(6, 5, SIZE, seed=1)
    for row in range(len(faces)):
        path = made / "faces" / f"id{row // 5}" / f"{row % 5}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = ((faces[row].image.numpy().transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(pixels).save(path)
    save_backbone(scramble(MobileFaceNet(embedding_dim=16, width=0.25, input_size=SIZE)), made / "student.safetensors")
    names = [f"id{number}" for number in range(6)]
    lines = ["2\t5"]
    for fold in range(2):
        lines += [f"{name}\t{1 + fold}\t{2 + fold}" for name in names[:5]]
        lines += [f"{name}\t{1 + fold}\t{other}\t1" for name, other in pairwise(names)]
    (made / "pairs.txt").write_text("\n".join(lines) + "\n")
    return made


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Path:
    """A report whose student has thresholds at FAR 0.01, set into it by hand: the set has too few pairs for others."""
    output = folder / "evaluation"
    protocol = ("--protocol", f"age_group={folder / 'faces.csv'}")
    rows = ["path,identity,age_group"]
    rows += [f"faces/id{k}/{n}.png,id{k},{'adult' if n else 'young'}" for k in range(6) for n in range(5)]
    (folder / "faces.csv").write_text("\n".join(rows) + "\n")
    words = ["evaluate", "--quiet", "--model", folder / "student.safetensors", *protocol, "--output", output]
    assert run(*words, "--set", "replicates=0", "--set", "num_failures=0") == 0
    return output / "report.json"


def test_an_evaluation_states_thresholds_and_the_rates_that_it_cannot_support(evaluated: Path) -> None:
    found = read_evaluation(str(evaluated), Path("student.safetensors"))
    thresholds = found.thresholds
    assert thresholds["protocol"] == "age_group"
    assert thresholds["impostors"] == 375
    assert thresholds["left_out"]["0.001"] == "needs at least 3,688 impostor pairs, got 375"  # type: ignore[index]
    assert thresholds["fars"]["0.01"]["false_accepts"] == 3  # type: ignore[index]
    assert found.summaries[0].title == "By age groups"


def test_export_writes_the_graph_with_thresholds_and_a_card(
    folder: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student.onnx"
    words = [
        "export",
        folder / "student.safetensors",
        "--output",
        output,
        "--data",
        folder / "faces",
        "--evaluation",
        evaluated,
    ]
    assert run(*words, "--pairs", folder / "pairs.txt") == 0, capsys.readouterr().err
    (entry,) = (json.loads(each.value) for each in onnx.load(output).metadata_props if each.key == "kdlib_faces")
    assert entry["thresholds"]["protocol"] == "age_group"
    card = (tmp_path / "student.onnx.md").read_text("utf-8")
    for words_ in ("Biometric data", "## Licenses", "adult-young", "30 images, 6 identities", "accuracy", "FAR 0.01:"):
        assert words_ in card
    capsys.readouterr()

    first, second = folder / "faces/id0/0.png", folder / "faces/id0/1.png"
    assert run("compare", first, second, "--model", output, "--far", "0.01") == 0
    shown = capsys.readouterr().out
    threshold = entry["thresholds"]["fars"]["0.01"]["threshold"]
    score = float(shown.split()[1])
    assert f"threshold  {threshold:.4f} at FAR 0.01, from the protocol age_group" in shown
    assert ("same identity" if score > threshold else "different identities") in shown
    message = fails(capsys, "compare", first, second, "--model", output, "--far", "0.0001")
    assert "no threshold for FAR 0.0001 (needs at least 36,887 impostor pairs, got 375); there are 0.01" in message

    assert run("compare", first, first, "--model", folder / "student.safetensors") == 0
    shown = capsys.readouterr().out
    assert "score      1.0000" in shown
    assert "no thresholds are known" in shown
    model = folder / "student.safetensors"
    assert run("compare", first, second, "--model", model, "--far", "0.01", "--evaluation", evaluated) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(score, abs=2e-4)


def test_int8_and_float16_are_kept_only_if_they_lose_little(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, model = tmp_path / "int8.onnx", folder / "student.safetensors"
    data = ("--data", folder / "faces")
    assert run("export", model, "--format", "int8", "--output", output, *data, "--max-loss", "1") == 0, (
        capsys.readouterr()
    )
    assert "mean cosine" in (tmp_path / "int8.onnx.md").read_text("utf-8")
    assert run("inspect", output) == 0
    words = ["evaluate", "--quiet", "--model", output, "--data", folder / "faces", "--output", tmp_path / "report"]
    assert run(*words, "--set", "replicates=0", "--protocol", "leave_one_out") == 0
    assert run("export", output, "--format", "float16", "--output", tmp_path / "x.onnx", *data) in (0, 2)
    capsys.readouterr()
    assert "--data must be given" in fails(capsys, "export", model, "--format", "int8", "--output", output)
    message = fails(capsys, "export", model, "--format", "torch", "--output", output)
    assert "--output must end in .pt2 for --format torch" in message


def test_a_loss_above_the_limit_is_refused() -> None:
    random = np.random.default_rng(0)
    identities = np.repeat(np.arange(20), 6)
    protocol = sample_pairs(identities)
    centers = random.normal(size=(20, 8))
    good = protocol.evaluate(centers[identities] + 0.1 * random.normal(size=(120, 8)))
    bad = protocol.evaluate(random.normal(size=(120, 8)))
    loss = check_loss(good, good, 0.0)
    assert (loss.accuracy_loss, loss.tar_loss, loss.pairs) == (0, 0, protocol.same.size)
    with pytest.raises(ValueError, match=r"loses 0\.\d+ of accuracy, more than --max-loss 0\.005"):
        check_loss(good, bad, 0.005)
    with pytest.raises(ValueError, match="at least 20 genuine pairs"):
        sample_pairs([0, 0, 1, 1])


def test_embeddings_of_images_and_lists_are_written_in_order(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single, model = folder / "faces/id3/2.png", folder / "student.safetensors"
    assert run("embed", single, folder / "faces", "--model", model, "--output", tmp_path) == 0, capsys.readouterr().err
    rows = np.load(tmp_path / "embeddings.npy")
    with (tmp_path / "images.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert rows.shape == (31, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert [row["identity"] for row in table[:2]] == ["", "id0"]
    again = next(int(row["row"]) for row in table[1:] if row["path"] == str(single))
    np.testing.assert_allclose(rows[again], rows[0], atol=1e-6)
    capsys.readouterr()
    assert run("compare", single, folder / "faces/id0/0.png", "--model", model) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(float(rows[0] @ rows[1]), abs=1e-4)
    assert "not found" in fails(capsys, "embed", tmp_path / "none", "--model", model, "--output", tmp_path / "o")


def test_photographs_are_aligned_by_a_detector(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, model = detector(tmp_path / "detector.onnx"), folder / "student.safetensors"
    one, two = {(2, 2): 250}, {(1, 1): 250, (3, 3): 200}
    for seed, (name, cells) in enumerate({"a": one, "b": one, "none": {}, "two": two}.items()):
        put_photograph(tmp_path / f"{name}.png", cells, seed=seed)
    words = ("--model", model, "--detector", net)
    assert run("compare", tmp_path / "a.png", tmp_path / "b.png", *words) == 0, capsys.readouterr().err
    score = float(capsys.readouterr().out.split()[1])
    assert run("embed", tmp_path / "a.png", tmp_path / "b.png", *words, "--quiet", "--output", tmp_path / "o") == 0
    rows = np.load(tmp_path / "o" / "embeddings.npy")
    assert float(rows[0] @ rows[1]) == pytest.approx(score, abs=1e-4)
    message = fails(capsys, "compare", tmp_path / "a.png", tmp_path / "none.png", *words)
    assert "none.png: no face found with a score of at least 0.6 and 16 pixels; give a photograph" in message
    message = fails(capsys, "compare", tmp_path / "a.png", tmp_path / "two.png", *words)
    assert "two.png: 2 faces found, expected one; cut the photograph" in message
    assert run("compare", tmp_path / "a.png", tmp_path / "two.png", *words, "--several", "largest") == 0
    capsys.readouterr()
    message = fails(capsys, "embed", folder / "faces", *words, "--output", tmp_path / "o")
    assert "make crops of a folder with kdlib-faces align" in message
