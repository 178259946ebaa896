"""Commands in several processes, as `torchrun` starts them."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.training import load_checkpoint, read_log
from kdlib_faces.backbones import load_backbone
from tests.processes import read_outcomes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of the processes of `command_processes`, and the folder of their files."""
    folder = tmp_path_factory.mktemp("processes")
    return {"folder": folder, **read_outcomes("tests.faces.command_processes", folder, warnings="default")}


def largest_difference(a: Path, b: Path) -> float:
    first, second = (load_backbone(path / "student.safetensors").state_dict() for path in (a, b))
    assert first.keys() == second.keys()
    return max(
        float((x.double() - second[name].double()).abs().max() / (1 + x.abs().max())) for name, x in first.items()
    )


def test_two_processes_train_the_network_of_one(processes: dict[str, Any]) -> None:
    """The whole recipe: both teachers, margins, maps with BatchNorm, weights by centers, and the student's BatchNorm."""
    folder = processes["folder"]
    assert (processes["one"], processes["two"]) == ([0], [0, 0]), (folder / "two.txt").read_text()
    rows = [read_log(folder / name / "log.jsonl") for name in ("one", "two")]
    for one, two in list(zip(*rows, strict=True))[:2]:  # the second loss contains the gradient of the first step
        assert two["terms"] == pytest.approx(one["terms"], rel=1e-5)
    # Noise images and BatchNorm of 8 samples amplify the rounding of float32 in each later step; see the test in float64.
    assert largest_difference(folder / "one", folder / "two") < 1e-2
    (last,) = (folder / "two" / "checkpoints").glob("*-000000006.pt")
    assert sorted(load_checkpoint(last)["last"]["terms"]) == ["attention", "embedding", "identity", "map"]
    text = (folder / "two.txt").read_text()
    assert text.count("device: cpu, 1 thread, float32, 2 processes") == 1
    assert text.count("weights: ") == 1


def test_a_killed_process_ends_the_run_and_one_process_resumes_it(processes: dict[str, Any]) -> None:
    folder = processes["folder"]
    code, killed = processes["killed"]
    assert killed == -signal.SIGKILL
    assert code == 2
    assert processes["seconds"] < 60
    lines = (folder / "killed.txt").read_text().splitlines()
    assert sum(line.startswith("kdlib-faces: error: ") for line in lines) == 1
    assert processes["resumed"] == [0], (folder / "resumed.txt").read_text()
    assert largest_difference(folder / "one", folder / "killed") < 1e-2


def test_two_processes_in_float64_differ_by_rounding(processes: dict[str, Any]) -> None:
    """All that is trained after six steps of the recipe: weights, class centers, projections and statistics."""
    folder = processes["folder"]
    assert (processes["wide_one"], processes["wide_two"]) == ([0], [0, 0]), (folder / "wide_two.txt").read_text()
    start, one, two = (torch.load(folder / f"{name}.pt") for name in ("wide_start", "wide_one/wide", "wide_two/wide"))
    for name, value in one.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(two[name], value, rtol=1e-12, atol=1e-12, msg=name)
    moved = [bool((one[name] - value).abs().max() > 1e-5) for name, value in start.items()]
    assert sum(moved) > len(moved) / 2


def test_one_two_three_and_one_processes_end_where_one_does(processes: dict[str, Any]) -> None:
    """Each number of processes resumes from the checkpoint of the one before, in float64 and with sharded class centers."""
    folder = processes["folder"]
    text = (folder / "chain.txt").read_text()
    assert processes["chain_one"] == [0], text
    assert processes["chain"] == [[-signal.SIGTERM] * count for count in (1, 2, 3)] + [[0]], text
    ways = (folder / "chain_one", folder / "chain")
    one, chain = (read_log(way / "log.jsonl") for way in ways)
    assert [row["step"] for row in chain] == [1, 2, 3, 4, 5, 6]
    for first, second in zip(one, chain, strict=True):
        assert sorted(second["terms"]) == ["attention", "embedding", "identity", "map"]
        assert second["terms"] == pytest.approx(first["terms"], rel=1e-11, abs=1e-13)
    steps = [int(path.stem.split("-")[1]) for path in (folder / "chain" / "checkpoints").glob("step-*.pt")]
    assert max(steps) == 6
    weights, others = (torch.load(way / "wide.pt") for way in ways)
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(others[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_class_centers_in_chunks_over_two_processes_train_as_in_one(processes: dict[str, Any]) -> None:
    folder = processes["folder"]
    assert (processes["sharded_one"], processes["sharded_two"]) == ([0], [0, 0]), (
        folder / "sharded_two.txt"
    ).read_text()
    rows = [read_log(folder / name / "log.jsonl") for name in ("sharded_one", "sharded_two")]
    assert len(rows[0]) == 2
    for one, two in zip(*rows, strict=True):  # the second loss contains the gradient of the first step
        assert two["terms"] == pytest.approx(one["terms"], rel=1e-5)
    parts = list((folder / "sharded_two" / "checkpoints").glob("shards-000000002-*/*.distcp"))
    assert len(parts) == 2


def test_sampled_centers_of_two_processes_are_resumed_in_one(processes: dict[str, Any]) -> None:
    folder = processes["folder"]
    killed, resumed = processes["sampled"]
    assert killed == [2, -signal.SIGKILL]
    assert resumed == [0], (folder / "sampled.txt").read_text()
    rows = read_log(folder / "sampled" / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_batch_that_cannot_be_parted_is_an_error(processes: dict[str, Any]) -> None:
    assert processes["wrong"] == [2, 2]
    text = (processes["folder"] / "wrong.txt").read_text()
    assert "batch_size must be a multiple of 2 for 2 processes, got 7" in text


def test_two_processes_build_the_cache_of_one(processes: dict[str, Any]) -> None:
    folder = processes["folder"]
    assert (processes["cache_one"], processes["cache_two"]) == ([0], [0, 0])
    one, two = ((folder / name / "shard-00000.bin") for name in ("cache_one", "cache_two"))
    assert one.read_bytes() == two.read_bytes()
    assert (folder / "cache_two.txt").read_text().count("complete, 32 rows") == 1


def test_two_processes_evaluate_as_one(processes: dict[str, Any]) -> None:
    folder = processes["folder"]
    assert (processes["report_one"], processes["report_two"]) == ([0], [0, 0]), (folder / "report_two.txt").read_text()
    one, two = (json.loads((folder / name / "report.json").read_text()) for name in ("report_one", "report_two"))
    assert one["evaluations"] == two["evaluations"]
    assert sorted(path.suffix for path in (folder / "report_two" / "work").iterdir()) == [".npy"]
    assert not (folder / "report_two" / ".lock").exists()


def test_torch_uses_gloo_on_the_cpu() -> None:
    assert torch.distributed.Backend.default_device_backend_map["cpu"] == "gloo"
