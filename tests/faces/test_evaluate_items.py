"""Hard pairs, files of scores and intervals beside the figures of a protocol."""

from dataclasses import replace

import numpy as np
import pytest

from kdlib_faces.commands import evaluate
from kdlib_faces.evaluation import (
    CrossGroupProtocol,
    LeaveOneOutProtocol,
    PairProtocol,
    Sampling,
    TemplateVerificationProtocol,
    identify_with_distractors,
    pool_templates,
)
from kdlib_faces.evaluation.summary import ModelEntry
from kdlib_faces.harness.evaluate import EvaluatedModel, evaluate_models
from kdlib_faces.harness.image_sets import rows_only
from kdlib_faces.harness.tasks import task_of_protocol
from tests.faces import set_files
from tests.faces.evaluation_calls import unit as unit_rows
from tests.faces.set_files import FAST, network, run_evaluate

pytestmark = pytest.mark.usefixtures("no_figures")


def test_missed_probes_are_those_furthest_behind():
    rng = np.random.default_rng(1)
    identities, distractors = np.repeat(np.arange(9), 4), rng.normal(size=(60, 8))
    array = rng.normal(size=(36, 8)) + 0.9 * rng.normal(size=(9, 8))[identities]
    unit, other = unit_rows(array), unit_rows(distractors)
    result = identify_with_distractors(array, identities, distractors, fars=(0.1,), replicates=5)
    table, hardest = result.score_table(str, str), result.hardest(3)
    assert table.total == len(list(table.rows)) == 9 * 4 * 3
    nearest = (unit @ other.T).max(axis=1)
    same = (identities[:, None] == identities) & ~np.eye(36, dtype=bool)
    behind = np.where(same, nearest[:, None] - unit @ unit.T, -np.inf)
    mates, taken = hardest[:3], hardest[3:]
    assert (mates[0].left, mates[0].right) == np.unravel_index(behind.argmax(), behind.shape)
    assert len({identities[pair.left] for pair in mates}) == 3
    for mate, impostor in zip(mates, taken, strict=True):
        assert (mate.same, impostor.same, mate.right_set, impostor.right_set) == (True, False, 0, 1)
        assert mate.left == impostor.left
        assert impostor.right == (unit[mate.left] @ other.T).argmax()
        assert impostor.score == pytest.approx(nearest[mate.left])
        assert mate.score == pytest.approx(unit[mate.left] @ unit[mate.right])
        assert mate.score < impostor.score
    hardest = LeaveOneOutProtocol(identities, replicates=5).evaluate(array).hardest(2)
    cosine = unit @ unit.T
    mate, impostor = np.where(same, cosine, -2), np.where(same | np.eye(36, dtype=bool), -2, cosine)
    margin = impostor.max(1) - mate.max(1)
    assert hardest[0].left == margin.argmax()
    assert hardest[2].right == impostor[margin.argmax()].argmax()


def test_score_table_and_hardest_pairs_of_templates(monkeypatch):
    monkeypatch.setattr("kdlib_faces.evaluation.hardest.MANY", 20)
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(30) * 3 + 1, 2)
    array = rng.normal(size=(60, 8))
    left, right = (ids[::2][rows] for rows in np.triu_indices(30, 1))
    same = rng.random(left.size) < 0.2
    result = TemplateVerificationProtocol(ids, np.arange(60), left, right, same).evaluate(array)
    assert list(result.describe().measures)[:3] == ["tar_0.0001", "tar_0.1", "tar_0.01"]
    table = result.score_table(str, str)
    rows = list(table.rows)
    assert table.total == len(rows) == left.size
    pooled = pool_templates(array, ids, np.arange(60))
    unit = dict(zip(pooled.ids.tolist(), pooled.features, strict=True))
    for k, (a, b, kind, score) in enumerate(rows):
        assert (a, b, kind) == (left[k], right[k], int(same[k]))
        assert float(score) == pytest.approx(unit[a] @ unit[b], abs=1e-6)
    scores = np.array([float(row[3]) for row in rows])
    hardest = result.hardest(2)
    assert hardest[0].score == pytest.approx(scores[same].min(), abs=1e-7)
    assert hardest[2].score == pytest.approx(scores[~same].max(), abs=1e-7)
    k = np.flatnonzero(~same)[scores[~same].argmax()]
    assert (ids[hardest[2].left], ids[hardest[2].right]) == (left[k], right[k])
    assert hardest[2].note == f"templates {left[k]}, {right[k]}"


def test_hardest_pairs_of_given_pairs_and_across_groups():
    rng = np.random.default_rng(3)
    identities = np.repeat(np.arange(8), 3)
    array = rng.normal(size=(24, 6)) + 0.8 * rng.normal(size=(8, 6))[identities]
    cosine = unit_rows(array) @ unit_rows(array).T
    groups = np.array(["adult", "adult", "young"] * 8)
    i, j = (rows.reshape(-1) for rows in np.meshgrid(np.arange(24), np.arange(24), indexing="ij"))
    across = (groups[i] == "young") & (groups[j] == "adult")
    i, j = i[across], j[across]
    same = identities[i] == identities[j]
    for protocol in (
        CrossGroupProtocol(identities, groups, replicates=5),
        PairProtocol(i, j, same, np.arange(i.size) % 2),
    ):
        pairs = protocol.evaluate(array).hardest(3)
        assert [pair.same for pair in pairs] == [True] * 3 + [False] * 3
        for kind, best in ((True, min), (False, max)):
            scores = [pair.score for pair in pairs if pair.same is kind]
            assert scores[0] == pytest.approx(best(cosine[i, j][same == kind]))
            assert scores == sorted(scores, reverse=not kind)
        for pair in pairs:
            assert pair.score == pytest.approx(cosine[pair.left, pair.right])
            assert (identities[pair.left] == identities[pair.right]) == pair.same


def test_every_interval_has_the_requested_confidence(tmp_path):
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(40, 4)))
    wide, narrow = (
        run_evaluate(
            replace(FAST, level=level), output=tmp_path / f"{level}", embeddings=[tmp_path / "e.npy"],
            protocols=[set_files.bin_set(tmp_path)],
        )["evaluations"][0]["models"]["e"]["measures"]
        for level in (0.99, 0.5)
    )  # fmt: skip
    for key in ("accuracy", "tar_0.1"):
        assert wide[key]["high"] - wide[key]["low"] > narrow[key]["high"] - narrow[key]["low"] > 0


def test_formulas_in_score_files_are_escaped_and_files_are_limited(tmp_path):
    rows = ["path,identity,age"]
    for identity in range(3):
        for shot in range(2):
            name = f"=cmd{identity}{shot}.png"
            set_files.put_face(tmp_path / name, identity, shot)
            rows.append(f"{name},p{identity},{10 * shot}")
    set_files.put_text(tmp_path / "f.csv", rows)
    config = evaluate.EvaluateConfig(replicates=10, num_failures=0, score_rows=5)
    report = run_evaluate(
        config, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], data=[tmp_path / "f.csv"], scores=True
    )
    lines = (tmp_path / "out/scores/age_gap-m.csv").read_text().splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("'=cmd00.png,'=cmd01.png,1,")
    assert "files of scores hold the first 5 of 15 rows" in " ".join(report["data"]["notes"])


def test_a_p_value_near_zero_has_a_bound():
    rng, same = np.random.default_rng(0), np.arange(1200) % 2 == 0
    left, right = np.arange(1200) * 2, np.arange(1200) * 2 + 1
    chance = rng.normal(size=(2400, 16))
    right_always = chance.copy()
    right_always[right[same]] = right_always[left[same]]
    protocol = PairProtocol(left, right, same, np.arange(1200) // 2 % 10, replicates=5, threshold="exact")
    task = task_of_protocol("pairs", "Pairs", protocol, rows_only("x", 2400))
    entry = ModelEntry("student")
    models = [EvaluatedModel(name, entry, {"x": rows}) for name, rows in (("a", right_always), ("b", chance))]
    output = evaluate_models([task], models, sampling=Sampling(replicates=5), num_failures=0)
    assert output.summaries[0].differences[0].difference.note.endswith("McNemar p < 0.0001")
    assert output.summaries[0].convention["Alignment"] == "that of the embeddings"


def test_intervals_are_over_identities_if_they_are_known():
    rng = np.random.default_rng(0)
    identities = np.repeat(np.arange(10), 6)
    array = rng.normal(size=(60, 6)) + 1.5 * rng.normal(size=(10, 6))[identities]
    left, right = np.triu_indices(60, 1)
    same = identities[left] == identities[right]
    folds = np.where(same, np.cumsum(same), np.cumsum(~same)) % 2
    known, unknown = (
        PairProtocol(left, right, same, folds, fars=(0.1,), identities=each, replicates=200).evaluate(array)
        for each in (identities, None)
    )
    clustered, single = (result.summary().measures["tar_0.1"] for result in (known, unknown))
    assert clustered.value == single.value
    assert clustered.n == single.n == same.sum()
    assert clustered.high - clustered.low > 1.3 * (single.high - single.low)
    assert known.describe().intervals.startswith("bootstrap over identities")
    assert "Wilson's, over genuine pairs" in unknown.describe().intervals
