"""The demo on image files and ONNX teachers: disjoint identities, gray and color lists, students that start from a teacher."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MBFFlat, count_parameters, load_backbone
from kdlib_faces.cli import main
from kdlib_faces.demo.real_faces import _for_students, _mixes_gray_and_color
from kdlib_faces.demo.start import choose_start
from kdlib_faces.teachers import import_onnx
from kdlib_faces.teachers.input_options import InputOptions
from tests.faces.cache_files import fails, settings
from tests.faces.exported import scramble, write
from tests.faces.tiny_graph import tiny_graph

SETTINGS = ["student_steps=6", "batch_size=8", "replicates=20", "size=32", "lr=0.05", "deployment=none"]
STUDENT = ["student.width=0.25", "student.embedding_dim=16"]
START = [
    "student_steps=6",
    "batch_size=8",
    "replicates=20",
    "lr=0.001",
    "compile=false",
    "deployment=none",
    "start.images=16",
    "start.last_grid=0",
]
JOINT = ["student.joint_dim=8"]


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


# --- students that start from a teacher -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run in which nothing selects the start: the general teacher can be made narrower."""
    folder = tmp_path_factory.mktemp("start")
    aged, _ = _faces(folder)
    general = MBFFlat(16, scale=1, blocks=(1, 1, 1, 1), input_size=32, tail_channels=8)
    write(scramble(general), folder / "general.onnx", fold=True)
    tiny_graph(folder / "second.onnx", seed=1)
    command = ["demo", "--quiet", "--faces", str(aged), "--output", str(folder / "out")]
    for name in ("general.onnx", "second.onnx"):
        command += ["--teacher", str(folder / name)]
    assert main([*command, *settings(*START, *JOINT)]) == 0
    return folder, command


def test_students_start_from_the_general_teacher(started: tuple[Path, list[str]]) -> None:
    folder, _ = started
    report = json.loads((folder / "out" / "report.json").read_text())
    names = ["student_distilled", "student_alone", "student_start", "general_teacher", "age_teacher", "joint_target"]
    assert list(report["models"]) == names
    work = folder / "out" / "work" / "seed0"
    (file,) = work.glob("start-*.safetensors")
    start, full = load_backbone(file), import_onnx(folder / "general.onnx")
    counts = {name: report["models"][name]["parameters"] for name in names}
    assert counts["student_distilled"] == counts["student_alone"] == counts["student_start"] == count_parameters(start)
    assert count_parameters(full) > 1.5 * count_parameters(start)
    assert report["models"]["joint_target"]["backbone"] == "both teachers"
    for name, terms in (("student_distilled", {"embedding"}), ("student_alone", {"identity"})):
        assert set(report["training"][name]["terms"]) == terms
        student = load_backbone(work / name / "student.safetensors")
        assert student(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
        same = {key for key, value in student.state_dict().items() if torch.equal(value, start.state_dict()[key])}
        assert not same & {key for key, _ in student.named_parameters()}
    assert (folder / "out" / "report.html").stat().st_size > 50_000


def test_the_report_describes_the_start(started: tuple[Path, list[str]]) -> None:
    folder, _ = started
    report = json.loads((folder / "out" / "report.json").read_text())
    text = " ".join(report["data"]["notes"])
    assert "a narrower copy of general.onnx with 50 % of the channels" in text
    full = import_onnx(folder / "general.onnx")
    assert f"{count_parameters(full):,} parameters" in text
    assert f"{report['models']['student_start']['parameters']:,} parameters" in text
    assert "by the identity loss without the teachers" in text
    before, after = map(float, re.findall(r"(?:untrained|distilled) (-?[0-9.]+[0-9])", text))
    assert -1 <= before <= 1
    assert -1 <= after <= 1
    assert "narrower copy of general.onnx" in (folder / "out" / "report.md").read_text()


def test_a_second_run_reads_the_start_and_the_cached_outputs(
    started: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, command = started
    first = json.loads((folder / "out" / "report.json").read_text())
    monkeypatch.setattr("kdlib_faces.demo.real_faces._StudentTargets.forward", lambda *_: pytest.fail("not cached"))
    monkeypatch.setattr("kdlib_faces.recipes.start.shrink_teacher", lambda *_, **__: pytest.fail("not read"))
    assert main([*command, *settings(*START, *JOINT)]) == 0
    second = json.loads((folder / "out" / "report.json").read_text())
    assert [m["protocols"] for m in first["models"].values()] == [m["protocols"] for m in second["models"].values()]
    assert first["data"] == second["data"]


def test_maps_are_distilled_where_their_weights_are_set(started: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, command = started
    more = settings(*START, *JOINT, "student.map_weight=1", "student.attention_weight=1", "student_steps=1")
    assert main([*command, "--output", str(tmp_path / "out"), *more]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["training"]["student_distilled"]["terms"]) == {"embedding", "map", "attention"}


def test_a_teacher_that_is_unknown_or_too_large_means_scratch(
    started: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = started
    general, other = str(folder / "general.onnx"), str(folder / "second.onnx")
    plain = InputOptions()
    for teacher, stated, reason in ((other, plain, "second.onnx"), (general, InputOptions(color="bgr"), "take RGB")):
        assert choose_start(None, [teacher, other], [stated, plain], quiet=False) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("the students start from scratch: ")
        assert reason in line
        with pytest.raises(InputError, match=reason):
            choose_start(f"shrink:{teacher}", [teacher, other], [stated, plain], quiet=False)
    assert choose_start("scratch", [general, other], [plain, plain], quiet=False) is None
    assert capsys.readouterr().err == ""
    start = choose_start(f"shrink:{general}", [other, other], [plain, plain], quiet=False)
    assert start is not None
    assert (start.path, start.size) == (general, 32)
    monkeypatch.setattr("kdlib_faces.demo.start.MAX_MACS", 1e6)
    assert choose_start(None, [general, other], [plain, plain], quiet=False) is None
    assert f"--start shrink:{general} starts from it nevertheless" in capsys.readouterr().err
    assert choose_start(f"shrink:{general}", [general, other], [plain, plain], quiet=False) is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (settings("student.width=0.5"), "demo: student.width=0.5 has no effect: the student is a narrower copy"),
        (settings("student.target=each"), "student.target=each has no effect"),
        (settings("general_steps=3"), "general_steps=3 has no effect: the teachers are those of --teacher"),
        (settings("student.seed=3"), "student.seed=3 has no effect: the seed is that of --seed"),
        (
            settings("size=48"),
            "size=48 has no effect: the students take the images of the teacher that they start from",
        ),
        (["--start", "scratch", *settings("start.keep=0.3")], "start.keep=0.3 has no effect"),
        (["--start", "scratch", *settings("student.joint_dim=3")], "student.joint_dim=3 has no effect"),
        (["--start", "prune"], "--start must be 'scratch' or 'shrink:FILE', got 'prune'"),
    ],
)
def test_settings_without_effect_are_refused(
    started: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    _, command = started
    assert message in fails(capsys, *command, "--output", tmp_path / "out", *words)


def test_synthetic_faces_have_no_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--quiet", "--output", tmp_path / "out"]
    assert "--start shrink:x.onnx applies to real faces only" in fails(capsys, *command, "--start", "shrink:x.onnx")
    assert "test_fraction=0.2 has no effect" in fails(capsys, *command, *settings("test_fraction=0.2"))
