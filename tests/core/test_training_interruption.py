"""Training that is interrupted, and training in two processes."""

import signal
from typing import Any

import pytest
import torch

from kdlib.training import load_checkpoint, read_log
from tests.processes import read_outcomes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of the processes in each scenario of `training_processes`, and the folder of their files."""
    folder = tmp_path_factory.mktemp("processes")
    return {"folder": folder, **read_outcomes("tests.core.training_processes", folder)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_repeated_interruption_gives_the_same_weights(processes: dict[str, Any]) -> None:
    assert processes["interruptions"] >= 3
    places = [processes["folder"] / "one process" / name for name in ("interrupted", "straight")]
    end, wanted = (torch.load(place / "end.pt", weights_only=True) for place in places)
    checkpoint, other = (load_checkpoint(place / "run" / "step-000000120.pt") for place in places)
    for weights, ema in ((end["weights"], end["ema"]), (checkpoint["distiller"], checkpoint["ema"])):
        assert same(weights, wanted["weights"])
        assert same(ema, wanted["ema"])
    assert checkpoint["last"] == other["last"]
    rows, expected = ([{**row, "seconds": 0, "speed": 0} for row in read_log(place / "log.jsonl")] for place in places)
    assert rows == expected
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert len(list((places[0] / "run").glob("step-*.pt"))) == 2


def test_two_processes_give_the_weights_of_one(processes: dict[str, Any]) -> None:
    two, one = processes["halves"]["outcomes"], processes["whole"]["outcomes"]
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one[0], rel=1e-5)


def test_processes_that_share_batches_give_the_weights_of_one(processes: dict[str, Any]) -> None:
    """BatchNorm uses the statistics of both, and one process may go on where two were stopped."""
    two, (one,) = processes["shared"]["outcomes"], processes["shared_whole"]["outcomes"]
    assert two[0] == two[1] == pytest.approx(one, rel=1e-4)
    alone = processes["handed_over"]["outcomes"][0]
    assert alone[:2] == [one[0], 5]
    assert alone[2:] == pytest.approx(one[2:], rel=1e-4)


def test_two_processes_resume_bit_for_bit_with_dropout(processes: dict[str, Any]) -> None:
    """The random state and the position in the loader of both processes are restored."""
    ((step, start_step, *wanted), other), resumed = processes["straight"]["outcomes"], processes["resumed"]["outcomes"]
    assert (step, start_step) == (12, 0)
    assert other[2:] == wanted
    assert resumed == [[12, 5, *wanted]] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lengths",
            "ValueError: train: loader must have the same number of batches in every process, got [6, 5]; use a",
        ),
        ("wrong_length", "ValueError: train: loader must yield len(loader) = 6 batches in every process, got 5"),
        ("settings", "train: all processes must train with the same settings, got epochs [4, 3], total_steps [12, 9]"),
        (
            "unsized",
            "ValueError: train: loader must have the same number of batches in every process, got an epoch that ends",
        ),
        ("broken_batch", "OSError: cannot read image 7 of process 1"),
        ("bad_shape", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x7 and 6x16)"),
        ("batch_of_one", "but batch 5 of epoch 0 of process 1 has 1 sample; use DataLoader(drop_last=True) or another"),
        ("hook", "RuntimeError: Unportable: the disk is full"),
        ("unwritable", "CheckpointError: train: checkpoint_dir must be a writable directory, got "),
        ("full_disk", "No space left on device; {run}/step-000000001.pt is kept"),
        (
            "nan",
            "got nan at step 2, epoch 0, batches 2 to 3 of the epoch of process 1 (samples 104, 105, 106, 107); terms",
        ),
        ("nan", "; the last good checkpoint is {run}/step-000000001.pt"),
    ],
)
def test_an_error_of_one_process_ends_both(processes: dict[str, Any], name: str, message: str) -> None:
    for rank, outcome in enumerate(processes[name]["outcomes"]):
        if name != "hook" or rank == 1:
            assert message.format(run=processes[name]["run"]) in outcome


def test_two_processes_evaluate_the_same_weights(processes: dict[str, Any]) -> None:
    """Also after an error in one process, and after a signal to it, which waits for the end of the evaluation."""
    first, second = processes["evaluation"]["outcomes"]
    assert first == second
    assert first["metrics"] == [5, 4, 3, 6, 2, 1]
    assert first["digest"] == [*processes["straight"]["outcomes"][0]]
    assert processes["evaluation"]["left"] == ["best-000000008.pt", "step-000000012.pt"]
    for name, resumed_from in (("evaluation_error", 6), ("evaluation_signal", 6)):
        resumed = processes[name]["outcomes"]
        assert resumed[0] == resumed[1]
        assert resumed[0]["digest"][1] == resumed_from
        first["digest"][1] = resumed_from
        assert resumed[0] == first


@pytest.mark.parametrize("name", ["term_one", "term_zero", "term_both", "term_repeated", "term_waiting", "int_both"])
def test_a_signal_to_any_process_leaves_a_checkpoint(processes: dict[str, Any], name: str) -> None:
    """In the middle of a step or while waiting for a batch; `torchrun` may forward a signal that was received already."""
    found = processes[name]
    if name.startswith("int"):
        assert found["outcomes"] == ["KeyboardInterrupt"] * 2
    else:
        assert found["codes"] == [-signal.SIGTERM] * 2
    assert found["left"] == [f"step-{1 if name == 'term_waiting' else 3:09d}.pt"]
