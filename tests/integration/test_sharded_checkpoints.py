"""`kdlib.train` with sharded heads and students: the weights of one process, also after a change of their number."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import read_outcomes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

KINDS = {"head": 1, "fsdp": 5}
"""Sharded parameters of each kind of distiller."""


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the processes of each phase of `sharded_processes` returned."""
    found: dict[str, Any] = read_outcomes("tests.integration.sharded_processes", tmp_path_factory.mktemp("sharded"))
    return found


def check_same_weights(phases: dict[str, Any], name: str, *, resumed_from: int | None) -> None:
    """Every process has the weights and averages of one process without shards, which started at step 0."""
    plain = phases["plain"][0]
    for found in phases[name]:
        assert not isinstance(found, str), found
        assert found["resumed_from"] == resumed_from
        np.testing.assert_allclose(found["weights"], plain["weights"], atol=1e-5)
        np.testing.assert_allclose(found["averages"], plain["averages"], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_like_one(phases: dict[str, Any], kind: str) -> None:
    check_same_weights(phases, f"{kind}_straight", resumed_from=None)
    assert {found["sharded"] for found in phases[f"{kind}_straight"]} == {KINDS[kind]}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_in_another_number_of_processes(phases: dict[str, Any], kind: str, world: int) -> None:
    assert len(phases[f"{kind}_resumed_{world}"]) == world
    check_same_weights(phases, f"{kind}_resumed_{world}", resumed_from=4)


def test_the_last_checkpoints_and_their_shards_are_kept(phases: dict[str, Any]) -> None:
    for name in ("head_saved", "fsdp_saved"):
        assert phases[name][0]["files"] == [
            *("shards-000000003-0", "shards-000000004-0", "step-000000003.pt", "step-000000004.pt"),
        ]


def test_a_damaged_shard_is_skipped_by_all_processes(phases: dict[str, Any]) -> None:
    check_same_weights(phases, "damaged", resumed_from=3)


def test_the_index_lists_the_head_and_its_optimizer_state(phases: dict[str, Any]) -> None:
    assert phases["index"] == [
        ["distiller", "objective.losses.identity.weight", 7, 5],
        ["optimizer", "state", 4, "exp_avg", 7, 5],
        ["optimizer", "state", 4, "exp_avg_sq", 7, 5],
    ]


def test_the_best_weights_are_read_from_shards(phases: dict[str, Any]) -> None:
    check_same_weights(phases, "best", resumed_from=None)
    first, second = phases["best"]
    assert "best-000000002.pt" in first["files"]
    assert "shards-000000002-0" in first["files"]
    assert first["best"] == second["best"]
    assert len(first["best"]) == len(first["weights"]) + 1  # and the step
    assert not np.allclose(first["best"][: len(first["weights"])], first["weights"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_settings", "ValueError: train: checkpoint_dir .* different lr .checkpoint 0.02, now 0.03."),
        (
            "nan",
            "TrainingDiverged: train: weights must be finite at step 2, got NaN or infinity in objective.losses.id",
        ),
        ("float16", "ValueError: train: amp must be None or 'bfloat16' for sharded parameters, got 'float16'"),
        ("hostile", "CheckpointError: train: none of the 2 checkpoints .* it names the file '../../secret'"),
    ],
)
def test_errors(phases: dict[str, Any], name: str, message: str) -> None:
    assert len(phases[name]) == 2
    for error in phases[name]:
        assert re.match(message, error), error
