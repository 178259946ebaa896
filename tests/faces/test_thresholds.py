"""Thresholds of evaluations, and measurements of model files."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from kdlib_faces._checks import InputError
from kdlib_faces.evaluation import AgeGapProtocol, CrossGroupProtocol, PairProtocol, tar_at_far
from kdlib_faces.evaluation.thresholds import DEPLOYED_FARS, operating_thresholds
from kdlib_faces.export.measure import measure, table
from tests.faces.test_runtime_example import write_model


def test_the_interval_covers_the_true_threshold_as_often_as_it_states() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        point = operating_thresholds(random.random(2000), fars=(0.01,))["fars"]["0.01"]
        assert point["low"] <= point["threshold"] <= point["high"]
        covered += point["low"] <= 0.99 <= point["high"]
    assert 0.93 <= covered / 400 <= 0.995


def test_thresholds_are_those_of_the_exact_rule_and_rates_without_support_are_left_out() -> None:
    scores = np.random.default_rng(1).normal(size=50_000)
    found = operating_thresholds(scores)
    assert [*found["fars"], *found["left_out"]] == [f"{far:g}" for far in DEPLOYED_FARS]
    assert list(found["fars"]) == ["0.01", "0.001", "0.0001"]
    for name, point in found["fars"].items():
        exact = tar_at_far([0.0], scores, float(name))
        assert point["threshold"] == exact.threshold
        assert point["false_accepts"] == exact.false_accepts
    assert found["left_out"]["1e-06"] == "needs at least 3,688,878 impostor pairs, got 50,000"
    with pytest.raises(ValueError, match="impostor"):
        operating_thresholds([])


def test_a_rate_that_few_scores_reach_has_an_interval_within_them() -> None:
    point = operating_thresholds(np.arange(12.0), fars=(0.9,))["fars"]["0.9"]
    assert (point["low"], point["threshold"], point["false_accepts"]) == (0.0, 1.0, 10)


def test_every_verification_states_its_thresholds() -> None:
    random = np.random.default_rng(2)
    identities = np.repeat(np.arange(40), 2)
    embeddings = random.normal(size=(80, 4))
    pairs = PairProtocol(random.integers(0, 80, 60), random.integers(0, 80, 60), np.arange(60) % 2 == 0)
    groups = np.tile(["adult", "young"], 40)
    results = [
        pairs.evaluate(embeddings),
        AgeGapProtocol(identities, age_groups=groups, replicates=0).evaluate(embeddings),
        CrossGroupProtocol(identities, groups, probe="young", gallery="adult", replicates=0).evaluate(embeddings),
    ]
    counts = [result.to_dict()["thresholds"]["impostors"] for result in results]
    assert counts == [30, 80 * 79 // 2 - 40, 40 * 39]


def test_a_graph_is_measured_in_a_process_without_torch(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx")
    rows = measure([model], threads=(1,), batches=(2, 1), seconds=0.01)
    assert [(row.engine, row.threads, row.batch, row.note) for row in rows] == [
        ("onnxruntime", 1, 1, ""),
        ("onnxruntime", 1, 2, ""),
    ]
    assert all(row.milliseconds is not None and row.milliseconds > 0 for row in rows)
    assert all(row.peak_mib is not None and 10 < row.peak_mib < 200 for row in rows)
    assert len(table(rows).splitlines()) == 4


def test_a_graph_that_holds_the_shape_of_one_image_runs_one_after_another(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["images", "shape"], ["embedding"])],
        "one",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 48])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [1, 48])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, tmp_path / "one.onnx")
    rows = measure([tmp_path / "one.onnx"], threads=(1,), batches=(1, 4), seconds=0.01)
    assert [(row.batch, row.note) for row in rows] == [(1, ""), (4, "one image after another")]
    assert all(row.milliseconds is not None for row in rows)
    assert "(one image after another) |" in table(rows).splitlines()[3]


def test_a_file_that_does_not_run_is_noted_and_a_missing_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    (row,) = measure([tmp_path / "bad.onnx"], threads=(1,), batches=(1,))
    assert row.milliseconds is None
    assert row.note
    with pytest.raises(InputError, match=r"none\.onnx is not a file"):
        measure([tmp_path / "none.onnx"])
