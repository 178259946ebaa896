"""Distillation in two processes under DDP and FSDP2: the same losses as one process with the whole batch."""

from typing import Any

import pytest
import torch

from tests.processes import read_outcomes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both processes returned in each scenario of `trainer_processes`."""
    found: dict[str, Any] = read_outcomes("tests.integration.trainer_processes", tmp_path_factory.mktemp("trainers"))
    return found


def agreed(processes: dict[str, Any], name: str) -> Any:
    """The result of a scenario, which is the same in both processes."""
    first, second = processes[name]
    assert first == second
    assert not isinstance(first, str), first
    return first


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_activation_checkpointing", "fsdp_offloaded_teacher"])
def test_two_processes_have_the_losses_of_one(processes: dict[str, Any], name: str) -> None:
    found = agreed(processes, name)
    assert found["losses"] == pytest.approx(found["alone"], rel=1e-4)
    assert found["losses"][-1] < 0.7 * found["losses"][0]


@pytest.mark.parametrize("name", ["fsdp", "fsdp_activation_checkpointing", "fsdp_offloaded_teacher"])
def test_student_projections_weighting_and_a_teacher_are_sharded(processes: dict[str, Any], name: str) -> None:
    found = agreed(processes, name)
    assert found["trained_sharded"]
    assert found["teacher_sharded"]
    assert found["teacher_gradients"] == 0


def test_mixed_precision_of_a_sharded_student_leaves_other_teachers_alone(processes: dict[str, Any]) -> None:
    found = agreed(processes, "fsdp_mixed_precision")
    assert found["losses"] == pytest.approx(found["alone"], rel=1e-2)
    student, sharded_teacher, other_teacher, *weights = found["kinds"]
    assert (student, sharded_teacher, other_teacher) == ("torch.bfloat16", "torch.bfloat16", "torch.float32")
    assert set(weights) == {"torch.float32"}


def test_features_and_report_of_a_sharded_distiller(processes: dict[str, Any]) -> None:
    found = agreed(processes, "fsdp_features")
    assert found["shapes"] == [[8, 4], [8, 4]]
    assert found["report"] == ["hint", "middle"]
    assert found["losses"] == sorted(found["losses"], reverse=True)


def test_the_whole_weights_of_a_sharded_distiller_fit_one_process(processes: dict[str, Any]) -> None:
    first, _ = processes["fsdp_full_weights"]
    assert first["expected"] == pytest.approx(first["next"], rel=1e-5)
    assert {name.split(".")[0] for name in first["names"]} == {"student", "objective"}


def test_a_distributed_checkpoint_resumes(processes: dict[str, Any]) -> None:
    found = agreed(processes, "fsdp_checkpoint")
    assert found["resumed"] == found["straight"]


def test_train_accepts_a_sharded_teacher(processes: dict[str, Any]) -> None:
    found = agreed(processes, "train_with_sharded_teacher")
    assert found["sharded"]
    assert found["losses"][1] < found["losses"][0]


def test_train_accepts_a_sharded_student(processes: dict[str, Any]) -> None:
    found = agreed(processes, "train_sharded")
    assert found["total"] == pytest.approx(found["expected"], rel=1e-5)
