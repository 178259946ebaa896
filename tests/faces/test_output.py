"""Output folders: complete or absent, never outside of themselves, and cleaned of what interrupted processes left."""

import subprocess
import sys
from pathlib import Path

import pytest

from kdlib_faces import cli
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output, remove_empty_on_error, staged


def test_a_stage_is_moved_completely_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    for source in (tmp_path / "no such file", tmp_path):
        with pytest.raises(OSError, match=str(source)), staged(output) as stage:
            (stage / "x").write_text(source.read_text())
    assert list(tmp_path.iterdir()) == []
    for text in ("1", "2"):
        with staged(output) as stage:
            (stage / "deep").mkdir()
            (stage / "deep" / "x").write_text(text)
        (output / "mine").write_text("kept")
    assert (output / "deep" / "x").read_text() == "2"
    assert sorted(path.name for path in output.iterdir()) == ["deep", "mine"]
    assert [path.name for path in output.parent.iterdir()] == ["b"]


_WAIT = """
import sys, time
from pathlib import Path
from kdlib_faces._output import staged
with staged(Path(sys.argv[1])) as stage:
    (stage / "report.json").write_text("{")
    print(stage, flush=True)
    time.sleep(600)
"""


def test_stages_of_killed_processes_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    output = tmp_path / ("long" * 60)
    command = [sys.executable, "-c", _WAIT, str(output)]
    first, second = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    stages = [Path((process.stdout or sys.stdin).readline().strip()) for process in (first, second)]
    first.kill()
    first.communicate()
    (tmp_path / f"{stages[0].name[:-13]}12345678.part").symlink_to(stages[1])
    (tmp_path / ".other.12345678.part").mkdir()
    with staged(output) as stage:
        (stage / "x").write_text("1")
        assert (stages[0].exists(), stages[1].exists()) == (False, True)
    second.kill()
    second.communicate()
    with staged(output) as stage:
        (stage / "x").write_text("2")
    assert (output / "x").read_text() == "2"
    left = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
    assert left == {output.name, ".other.12345678.part"}


def _work(output: Path, content: str) -> None:
    (output / "work" / "seed0").mkdir(parents=True)
    if content:
        (output / "work" / "done").write_text(content)
    output.mkdir()


def test_an_error_removes_the_empty_folders_of_a_new_output_only(tmp_path: Path) -> None:
    for name, content in (("new", ""), ("half", "x")):
        output = tmp_path / name
        with pytest.raises(FileExistsError), remove_empty_on_error(output):
            _work(output, content)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"half", "half/work", "half/work/done"}


def test_an_output_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for output, message in (
        (tmp_path / "file", "the output must be a folder, .*file is a file"),
        (tmp_path / "file" / "x", "is no folder"),
        (tmp_path / ("n" * 256) / "x", r"names of at most 255 bytes, n{40}\.\.\. has 256"),
        (tmp_path / ("é" * 128), "names of at most 255 bytes, é{40}... has 256"),
        (tmp_path / "link", "is a link to a folder that does not exist"),
    ):
        with pytest.raises(InputError, match=message), staged(output):
            pytest.fail("not checked")
    assert check_output(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["evaluate", "--data", "f.csv", "--embeddings", "e.npy"], ["figures", "scores", "work", "work/e.npy.part"]),
        (["demo"], ["figures", "work", "work/seed0/student_alone"]),
        (["train", "--recipe", "student", "--data", "f.csv"], ["checkpoints", "checkpoints/1.pt", "log.jsonl", "run.toml"]),
    ],
)  # fmt: skip
def test_links_in_an_output_are_refused(tmp_path: Path, capsys, words: list[str], parts: list[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number, part in enumerate(parts):
        output = tmp_path / f"out{number}"
        (output / part).parent.mkdir(parents=True)
        (output / part).symlink_to(other)
        assert cli.main([*words, "--output", str(output), "--quiet"]) == 2
        assert f"links that lead elsewhere, {output / part} is one; remove it" in capsys.readouterr().err
    assert list(other.iterdir()) == []


def _write_and_link(file: Path, link: Path, other: Path) -> None:
    file.parent.mkdir()
    file.write_text("")
    link.symlink_to(other)


def test_a_link_that_appears_during_the_work_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="links that lead elsewhere"), staged(tmp_path / "out") as stage:
        _write_and_link(stage / "figures" / "cost.svg", tmp_path / "out" / "figures", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
