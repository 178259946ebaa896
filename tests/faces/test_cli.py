"""The command line: every user error is one line and exit code 2."""

import errno
import time
from pathlib import Path

import pytest

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import build_backbone
from kdlib_faces.cli import main
from tests.faces.cache_files import fails, noise, put_list, run, settings


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    rows = ((noise(identity), f"p{identity},{group}") for identity in range(6) for group in ("young", "adult"))
    return put_list(tmp_path, "identity,age_group", rows)


def _train(faces: object, output: Path, *more: str) -> list[object]:
    sizes = ["training.steps=2", "training.batch_size=4", "recipe.input_size=32", "recipe.width=0.25"]
    words = ["train", "--recipe", "student", "--quiet", "--data", faces, "--output", output]
    return [*words, *settings(*sizes, "recipe.embedding_dim=16"), *more]


def test_a_student_trains_and_its_file_is_inspected_and_evaluated(faces: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    assert run(*_train(faces, output)) == 0
    assert main(["inspect", str(output / "student.safetensors")]) == 0
    assert "MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)" in capsys.readouterr().out
    report = tmp_path / "report"
    words = ["evaluate", "--quiet", "--model", output / "student.safetensors", "--data", faces, "--output", report]
    assert run(*words) == 0
    assert (report / "report.html").exists()
    (report / "report.md").unlink()
    assert main(["report", str(report)]) == 0
    assert (report / "report.md").exists()


def test_an_age_teacher_trains_from_groups(faces: Path, tmp_path: Path) -> None:
    words = _train(faces, tmp_path / "run")
    words[words.index("student")] = "age_teacher"
    assert main([str(word).replace("recipe.", "network.") for word in words]) == 0
    assert (tmp_path / "run" / "teacher.safetensors").exists()


def test_inspect_prints_published_counts_and_describes_a_list(faces: Path, capsys) -> None:
    assert main(["inspect", str(faces)]) == 0
    assert "adult 6, young 6" in capsys.readouterr().out
    assert main(["inspect"]) == 0
    table = capsys.readouterr().out
    for count in ("1,003,136", "1,200,512", "2,059,520", "24,025,600", "34,139,328", "43,590,848", "65,156,160"):
        assert count in table


def test_missing_files(tmp_path: Path, faces: Path, capsys) -> None:
    assert "no.csv" in fails(capsys, *_train(tmp_path / "no.csv", tmp_path / "o"))
    (tmp_path / "0.png").unlink()
    assert "0.png" in fails(capsys, *_train(faces, tmp_path / "o"))
    assert "no.pt: file not found" in fails(capsys, "inspect", tmp_path / "no.pt")
    assert not (tmp_path / "o").exists()


def test_an_unreadable_image_is_named(tmp_path: Path, faces: Path, capsys) -> None:
    (tmp_path / "7.png").write_bytes(b"not an image")
    assert "7.png: not a readable image" in fails(capsys, *_train(faces, tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,person\n0.png,a\n", "identity"),
        ("path,identity,age\n0.png,a,old\n2.png,b,3\n", "old"),
        ("path,identity\n0.png,a\n1.png,a\n", "at least two identities"),
        ("", "empty"),
    ],
)
def test_broken_lists(tmp_path: Path, faces: Path, capsys, content: str, message: str) -> None:
    broken = tmp_path / "broken.csv"
    broken.write_text(content)
    line = fails(capsys, *_train(broken, tmp_path / "o"))
    assert "broken.csv" in line
    assert message in line


def test_a_corrupt_onnx_file(tmp_path: Path, faces: Path, capsys) -> None:
    pytest.importorskip("onnxruntime")
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"<html>404</html>")
    line = fails(capsys, "demo", "--faces", faces, "--teacher", bad, "--teacher", bad, "--output", tmp_path / "o")
    assert "bad.onnx" in line
    assert "bad.onnx" in fails(capsys, "inspect", bad)


def test_a_wrong_tap_is_named_with_the_nearest(tmp_path: Path, faces: Path, graph: Path, capsys) -> None:
    command = ["demo", "--faces", faces, "--teacher", graph, "--teacher", graph, "--output", tmp_path / "o"]
    line = fails(capsys, *command, "--tap", "middle", "--tap", "midle")
    assert "midle" in line
    assert "the nearest are 'middle'" in line
    assert "once for each teacher (2)" in fails(capsys, *command, "--tap", "middle")
    assert not (tmp_path / "o").exists()


def test_wrong_settings_and_flags(tmp_path: Path, faces: Path, capsys) -> None:
    assert "no setting named 'student_step'" in fails(capsys, "demo", "--set", "student_step=3")
    assert "the nearest are 'student_steps'" in fails(capsys, "demo", "--set", "student_step=3")
    assert "size" in fails(capsys, "demo", "--set", "size=3")
    assert "must be given together" in fails(capsys, "demo", "--faces", faces, "--output", tmp_path / "o")
    assert "--steps must be" in fails(capsys, "demo", "--steps", "some")
    for flag, value in (
        ("--threads", "0"),
        ("--threads", "9" * 9),
        ("--seed", "9" * 5000),
        ("--seed", "-1"),
        ("--seed", "1.5"),
    ):
        assert f"{flag}: must be a whole number from" in fails(capsys, "demo", flag, value)
    assert "recipe must be one of" in fails(capsys, "train", "--recipe", "best", "--data", faces)
    assert "two teachers" in fails(capsys, "train", "--data", faces)
    assert "invalid choice: 'dance'" in fails(capsys, "dance")
    assert "no option named '--dtaa'; the nearest are '--data'" in fails(capsys, "train", "--dtaa", "x")
    assert "no option named '--techer'; the nearest are '--teacher'" in fails(capsys, "cache", "build", "--techer=x")
    assert "the nearest are 'recipe.width'" in fails(capsys, "train", "--recipe", "student", "--set", "width=0.5")
    assert r"no\x1b.csv" in fails(capsys, "train", "--recipe", "student", "--data", "no\x1b.csv")
    assert len(fails(capsys, "demo", "--set", f"{'a' * 9000}=1")) < 2100


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (["train", "--recipe", "age_teacher", "--data", "x"], "network.input_size=100000"),
        (["train", "--recipe", "age_teacher", "--data", "x"], "network.width=1e+300"),
        (["train", "--recipe", "student", "--data", "x"], "recipe.input_size=100000"),
        (["train", "--recipe", "student", "--data", "x"], "recipe.embedding_dim=1000000000"),
        (["demo"], "student.input_size=100000"), (["demo"], "general_images=9999"), (["demo"], "batch_size=1000000000"),
        (["evaluate", "--data", "x", "--model", "x"], "input_size=100000"),
        (["evaluate", "--data", "x", "--model", "x"], "replicates=9223372036854775807"),
    ],
)  # fmt: skip
def test_sizes_beyond_reason_are_refused_at_once(words: list[str], setting: str, tmp_path: Path, capsys) -> None:
    start = time.monotonic()
    line = fails(capsys, *words, "--set", setting, "--output", tmp_path / "o")
    assert f"{setting}: " in line
    assert "<=" in line
    assert time.monotonic() - start < 20


def test_a_network_of_too_many_parameters_is_refused_at_once() -> None:
    for arguments in ({"input_size": 4096}, {"embedding_dim": 10**9}, {"width": 1e6}, {"width": 1e300}):
        with pytest.raises(InputError, match=r"parameters, more than 500,000,000|[Oo]verflow"):
            build_backbone("iresnet18", seed=0, **arguments)


def test_a_full_disk_is_one_line_and_leaves_no_model(tmp_path: Path, faces: Path, capsys, monkeypatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    assert "space" in fails(capsys, *_train(faces, tmp_path / "o"))
    assert not list(tmp_path.rglob("student.safetensors"))


def test_help_and_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kdlib-faces 0.")
    assert main([]) == 2
