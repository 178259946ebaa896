"""The demo on image files and ONNX teachers: disjoint identities, gray and color lists, teacher outputs cached once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from kdlib_faces.backbones import load_backbone
from kdlib_faces.cli import main
from kdlib_faces.demo.real_faces import _for_students, _mixes_gray_and_color
from tests.faces.cache_files import settings
from tests.faces.tiny_graph import tiny_graph

SETTINGS = ["student_steps=6", "batch_size=8", "replicates=20", "size=32", "lr=0.05"]
STUDENT = ["student.width=0.25", "student.embedding_dim=16"]


def _faces(folder: Path) -> tuple[Path, Path]:
    """A color list with two age groups per identity, and a gray list of identities of unknown age."""
    rng = np.random.default_rng(0)
    aged, plain = ["path,identity,age_group"], ["path,identity"]
    for identity in range(8):
        for number in range(4):
            group = "young" if number < 2 else "adult"
            name = f"a{identity}_{number}.png"
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(folder / name)
            aged.append(f"{name},aged {identity},{group}")
    for identity in range(12):
        Image.fromarray(rng.integers(0, 255, (48, 48), dtype=np.uint8)).save(folder / f"g{identity}.png")
        plain.append(f"g{identity}.png,plain {identity}")
    (folder / "aged.csv").write_text("\n".join(aged) + "\n")
    (folder / "plain.csv").write_text("\n".join(plain) + "\n")
    return folder / "aged.csv", folder / "plain.csv"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("real")
    lists = _faces(folder)
    teachers = [tiny_graph(folder / f"teacher{seed}.onnx", seed=seed) for seed in (0, 1)]
    command = ["demo", "--quiet", "--output", str(folder / "out")]
    for flag, paths in (("--faces", lists), ("--teacher", teachers)):
        for path in paths:
            command += [flag, str(path)]
    command += settings(*SETTINGS, *STUDENT)
    assert main(command) == 0
    return folder, command


def test_the_report_of_real_faces_holds_four_models_and_their_age_groups(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    report = json.loads((folder / "out" / "report.json").read_text())
    assert list(report["models"]) == ["student_distilled", "student_alone", "general_teacher", "age_teacher"]
    for model in report["models"].values():
        names = [entry["name"] for entry in model["protocols"]["age_gap"]["bins"]]
        assert sorted(names) == ["adult-adult", "adult-young", "young-young"]
    assert report["models"]["age_teacher"]["backbone"] == "teacher1 + age map"
    data = report["data"]
    assert data["test_identities"] == 4
    assert data["test_images"] == 16
    assert data["train_images"] == 16 + 12
    assert any("luminance" in note for note in data["notes"])
    assert (folder / "out" / "report.html").stat().st_size > 50_000


def test_a_second_run_uses_the_cached_outputs_and_keeps_the_students(
    finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, command = finished
    before = load_backbone(folder / "out" / "student.safetensors").state_dict()
    first = json.loads((folder / "out" / "report.json").read_text())
    monkeypatch.setattr("kdlib_faces.demo.real_faces._StudentTargets.forward", lambda *_: pytest.fail("not cached"))
    assert main(command) == 0
    second = json.loads((folder / "out" / "report.json").read_text())
    assert [m["protocols"] for m in first["models"].values()] == [m["protocols"] for m in second["models"].values()]
    after = load_backbone(folder / "out" / "student.safetensors").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_cached_outputs_of_other_lists_are_refused(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, command = finished
    at = next(number for number, word in enumerate(command) if word.endswith("plain.csv"))
    assert main(command[: at - 1] + command[at + 1 :]) == 2
    assert "another teacher, preprocessing or data" in capsys.readouterr().err


def test_students_see_luminance_where_gray_and_color_are_mixed() -> None:
    color = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gray = color[:, :1].expand(-1, 3, -1, -1)
    assert _mixes_gray_and_color(torch.cat([color, gray]))
    assert not _mixes_gray_and_color(color)
    assert not _mixes_gray_and_color(gray)
    seen = _for_students(color, 8, luminance=True)
    expected = 0.299 * color[:, 0].float() + 0.587 * color[:, 1].float() + 0.114 * color[:, 2].float()
    for channel in range(3):
        assert (seen[:, channel].float() - expected).abs().max() <= 0.5
    assert torch.equal(_for_students(color, 8, luminance=False), color)
    assert torch.equal(_for_students(gray, 8, luminance=True), gray)
