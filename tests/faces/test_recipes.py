"""The recipes, and the demo that runs all of them: terms, reports and interruption."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import BACKBONES, load_backbone
from kdlib_faces.config import dump_toml, load_config
from kdlib_faces.demo.run import DemoConfig, run
from kdlib_faces.recipes import LIAADConfig, build, liaad
from kdlib_faces.recipes.student import HEADS, StudentConfig, StudentRunConfig, build_student
from tests.faces.cache_files import settings, wait_until

SMALL = [
    "general_identities=12", "age_identities=12", "general_images=4", "age_images=4", "test_identities=14", "test_images=6",
    "general_steps=8", "age_steps=8", "student_steps=24", "batch_size=24", "replicates=20", "size=32", "student.width=0.25",
    "student.embedding_dim=32", "deployment=none",
]  # fmt: skip


class _Fixed(torch.nn.Module):
    """A teacher with random features that do not depend on the images."""

    inputs = None

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(4, 16, generator=generator)
        self.features = {"embedding": embedding, "map": torch.randn(4, 6, 5, 5, generator=generator)}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.features


TEACHERS = {"general": _Fixed(0), "age": _Fixed(1)}


def _config(**changes: object) -> LIAADConfig:
    return LIAADConfig(**{"num_identities": 5, "embedding_dim": 16, "width": 0.25, "input_size": 32, **changes})


def test_each_term_reads_its_teachers_and_none_reads_ages() -> None:
    distiller = build(_config(), teachers=TEACHERS)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = distiller(images, {"identity": torch.tensor([0, 1, 2, 2])})
    assert list(output.terms) == ["identity", "embedding", "map", "attention"]
    assert output.weights["embedding"].shape == (2, 4)
    assert output.weights["map"].shape == output.weights["attention"].shape == (1, 4)
    output.total.backward()
    assert all(p.grad is not None for p in distiller.student.parameters())
    assert {term.target for term in distiller.objective.terms.values()} == {None, "identity"}


def test_the_same_seed_builds_the_same_student_with_and_without_teachers() -> None:
    alone = build(_config(), teachers={}).student.state_dict()
    distilled = build(_config(), teachers=TEACHERS).student.state_dict()
    assert all(torch.equal(value, distilled[name]) for name, value in alone.items())


def test_every_backbone_can_be_the_student() -> None:
    with torch.device("meta"):
        for name in sorted(set(BACKBONES) - {"iresnet", "ir"}):  # these two require their depth
            distiller = build(LIAADConfig(num_identities=4, backbone=name, embedding_dim=64), teachers={})
            assert distiller.student.model.embedding_dim == 64, name
    with pytest.raises(ValueError, match="no argument of mbf named 'width'"):
        build(LIAADConfig(num_identities=4, backbone="mbf", width=0.5), teachers={})


@pytest.mark.parametrize("name", HEADS)
def test_every_head_trains_a_student(name: str) -> None:
    """The setting `none` stands for the default of the head."""
    settings = [f"recipe.head={name}", "recipe.head_scale=none", "recipe.head_margin=none", "recipe.embedding_dim=16"]
    config = load_config(StudentRunConfig, None, [*settings, "recipe.width=0.25", "recipe.input_size=32"])
    assert tomllib.loads(dump_toml(config))["recipe"]["head_margin"] == "none"
    distiller = build_student(config.recipe, config.recipe.build(seed=0), num_identities=3)
    head = distiller.objective.terms["identity"].loss
    plain = HEADS[name](16, 3)
    assert (type(head), head.scale, head.margin) == (type(plain), 64.0, plain.margin)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distiller(images, {"identity": torch.tensor([0, 1, 2, 2])}).total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in distiller.student.parameters())
    given = StudentConfig(head=name, embedding_dim=16).identity_term(3).loss
    assert (given.scale, given.margin) == (32.0, 0.2)


def test_unknown_heads_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"StudentConfig: head must be one of 'cosface', 'arcface', .*, got 'sphereface'"
    ):
        StudentConfig(head="sphereface")


def test_one_teacher_alone_and_wrong_values() -> None:
    alone = build(_config(), teachers={"age": TEACHERS["age"]})
    assert sorted(alone.objective.terms) == ["attention", "embedding", "identity"]
    with pytest.raises(InputError, match="must be named 'general', 'age' or 'joint', got 'other'"):
        build(_config(), teachers={"other": _Fixed(0)})
    with pytest.raises(ValueError, match="weighting must be one of 'uniform', 'center'"):
        _config(weighting="best")


def test_the_recipe_runs_as_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = ["--data", str(tmp_path / "no.csv"), "--output", str(tmp_path / "out")]
    two = ["--teacher", "iresnet18", "--teacher", "iresnet18"]
    for arguments, message in (
        (faces, "takes two teachers, the general one first, got 0"),
        ([*faces, *two], "no.csv"),
        ([*faces, *two, "--set", "recipe.widths=1"], "no setting named 'recipe.widths'"),
    ):
        with pytest.raises(SystemExit) as caught:
            liaad.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, threads = tmp_path_factory.mktemp("demo") / "out", torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and so weights, depend on the number of threads
    run(load_config(DemoConfig, None, SMALL), output=output, progress=False)
    torch.set_num_threads(threads)
    return output


def test_the_report_holds_all_four_models_and_their_protocols(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert list(report["models"]) == ["student_distilled", "student_alone", "general_teacher", "age_teacher"]
    for row in report["models"].values():
        assert set(row["protocols"]) == {"age_gap", "leave_one_out", "verification"}
        assert [entry["name"] for entry in row["protocols"]["age_gap"]["bins"]][-1] == "30+"
        assert row["parameters"] > 0
        assert row["macs"] > 0
    assert [entry["name"] for entry in report["evaluations"]] == ["age_gap", "leave_one_out", "verification"]
    first = report["evaluations"][0]["differences"][0]
    assert (first["a"], first["b"], first["measure"]) == ("student_distilled", "student_alone", "large_tar_0.01")
    assert first["difference"].keys() >= {"value", "low", "high"}
    assert report["weights"]["embedding"].keys() == {"general", "age"}
    assert sum(report["weights"]["embedding"].values()) == pytest.approx(1.0, abs=1e-4)
    page = (finished / "report.html").read_text()
    assert "student distilled" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (finished / "report.md").exists()


def test_no_file_but_the_checkpoints_of_the_training_contains_a_pickle(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parent.name != "checkpoints"]
    kinds = {".safetensors", ".onnx", ".json", ".jsonl", ".md", ".html", ".svg", ".png", ".bin", ".i64"}
    assert {"student.safetensors", "teacher.safetensors", "report.json"} <= {path.name for path in kept}
    for path in kept:
        content = path.read_bytes()
        assert not content.startswith(b"PK"), path  # the archives of torch.save
        assert path.suffix in kinds, path


def test_a_second_run_trains_nothing_and_reports_the_same(finished: Path) -> None:
    before = json.loads((finished / "report.json").read_text())
    log = finished / "work" / "seed0" / "student_distilled" / "log.jsonl"
    rows = log.read_bytes()
    run(load_config(DemoConfig, None, SMALL), output=finished, progress=False, seeds=(0, 1))
    after = json.loads((finished / "report.json").read_text())
    assert log.read_bytes() == rows
    assert (after["weights"], after["training"]) == (before["weights"], before["training"])
    for name, row in before["models"].items():
        assert after["models"][name]["protocols"] == row["protocols"]
    assert [entry["seed"] for entry in after["per_seed"]] == [0, 1]
    rank1 = before["evaluations"][1]["models"]["student_alone"]["measures"]["rank1"]["value"]
    assert after["per_seed"][0]["models"]["student_alone"]["leave_one_out"]["rank1"] == rank1


def test_interruptions_at_any_moment_leave_the_same_final_weights(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "interrupted"
    command = [sys.executable, "-m", "kdlib_faces", "demo", "--quiet", "--threads", "1", "--output", str(output)]
    command += settings(*SMALL)
    for mark in ("general_teacher/log.jsonl", "age_teacher/log.jsonl", "student_distilled/log.jsonl"):
        process = subprocess.Popen(command, env=os.environ.copy(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        watched = output / "work" / "seed0" / mark
        assert wait_until(lambda watched=watched: watched.exists() and watched.stat().st_size > 0, 120)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (output / "report.json").exists()
    subprocess.run(command, check=True, timeout=300)
    for name in ("student_alone", "student_distilled"):
        ours, theirs = (
            load_backbone(each / "work" / "seed0" / name / "student.safetensors").state_dict()
            for each in (output, finished)
        )
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
