"""What `evaluate` shows beside its numbers: the worst cases, files of scores, intervals."""

from dataclasses import replace

import numpy as np
import pytest

from kdlib_faces.commands import evaluate
from kdlib_faces.evaluation import CrossGroupProtocol, PairProtocol, pool_templates
from kdlib_faces.harness import panels_templates
from kdlib_faces.harness.panels_distractors import DistractorsPanel
from kdlib_faces.harness.panels_groups import CrossGroupPanel
from kdlib_faces.harness.panels_pairs import PairsPanel
from kdlib_faces.harness.panels_ranks import LeaveOneOutPanel
from kdlib_faces.harness.panels_templates import TemplatesPanel
from tests.faces import set_files
from tests.faces.set_files import network

FAST = evaluate.EvaluateConfig(replicates=30, num_failures=2, batch_size=16, fars=(0.1, 0.001))


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing is tested elsewhere, and takes most of the time."""
    monkeypatch.setattr("kdlib_faces.report.files._jobs", lambda view: {})


def judged(panel, *arrays):
    found = panel.judge(*({"m": array} for array in arrays))
    return found, list(found.scores.rows("m"))


def test_missed_probes_are_those_furthest_behind():
    rng = np.random.default_rng(1)
    people, strangers = np.repeat(np.arange(9), 4), rng.normal(size=(60, 8))
    array = rng.normal(size=(36, 8)) + 0.9 * rng.normal(size=(9, 8))[people]
    unit, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (array, strangers))
    panel = DistractorsPanel("x", "x", people, None, {}, (0.1,), (1,), replicates=5, num_failures=3)
    found, rows = judged(panel, array, strangers)
    assert found.scores.total == len(rows) == 9 * 4 * 3
    nearest = (unit @ other.T).max(axis=1)
    behind = {
        (i, j): nearest[i] - unit[i] @ unit[j]
        for i in range(36) for j in range(36) if i != j and people[i] == people[j]
    }  # fmt: skip
    mates, taken = found.num_failures["m"][:3], found.num_failures["m"][3:]
    assert (mates[0].left, mates[0].right) == max(behind, key=behind.get)
    assert len({people[pair.left] for pair in mates}) == 3
    for mate, stranger in zip(mates, taken, strict=True):
        assert (mate.same, stranger.same, mate.other, stranger.other) == (True, False, 0, 1)
        assert mate.left == stranger.left
        assert stranger.right == (unit[mate.left] @ other.T).argmax()
        assert stranger.score == pytest.approx(nearest[mate.left])
        assert mate.score == pytest.approx(unit[mate.left] @ unit[mate.right])
        assert mate.score < stranger.score
    one_out, _ = judged(LeaveOneOutPanel("x", "x", people, str, {}, replicates=5, num_failures=2), array)
    cosine = np.where(np.eye(36, dtype=bool), -2, unit @ unit.T)
    same = people[:, None] == people
    margin = np.where(same, -2, cosine).max(1) - np.where(same, cosine, -2).max(1)
    assert one_out.num_failures["m"][0].left == margin.argmax()
    assert one_out.num_failures["m"][2].right == np.where(same, -2, cosine)[margin.argmax()].argmax()


def test_scores_of_templates_are_streamed_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(30) * 3 + 1, 2)
    array = rng.normal(size=(60, 8))
    left, right = (ids[::2][rows] for rows in np.triu_indices(30, 1))
    same = rng.random(left.size) < 0.2
    panel = TemplatesPanel("x", "x", ids, np.arange(60), {}, (left, right, same), replicates=5, num_failures=2, fars=(0.1,))
    found = panel.verify({"m": array})
    sizes, real = [], panels_templates.pair_cosines
    monkeypatch.setattr(panels_templates, "BLOCK", 64)
    monkeypatch.setattr(
        panels_templates, "pair_cosines", lambda unit, i, j: (sizes.append(i.size), real(unit, i, j))[1]
    )
    rows = list(found.scores.rows("m"))
    assert found.scores.total == len(rows) == left.size == sum(sizes)
    assert max(sizes) == 64
    default = TemplatesPanel("x", "x", ids, np.arange(60), {}, (left, right, same), replicates=5, num_failures=0)
    assert list(default.verify({"m": array}).entry["measures"])[:3] == ["tar_0.0001", "tar_0.1", "tar_0.01"]
    pooled = pool_templates(array, ids, np.arange(60))
    unit = dict(zip(pooled.ids.tolist(), pooled.features, strict=True))
    for k, (a, b, kind, score) in enumerate(rows):
        assert (a, b, kind) == (left[k], right[k], int(same[k]))
        assert float(score) == pytest.approx(unit[a] @ unit[b], abs=1e-6)
    scores = np.array([float(row[3]) for row in rows])
    least, most = found.num_failures["m"][0], found.num_failures["m"][2]
    assert least.score == pytest.approx(scores[same].min(), abs=1e-7)
    assert most.score == pytest.approx(scores[~same].max(), abs=1e-7)
    k = np.flatnonzero(~same)[scores[~same].argmax()]
    assert (ids[most.left], ids[most.right]) == (left[k], right[k])
    assert most.note == f"templates {left[k]}, {right[k]}"


def test_the_confidence_asked_for_is_that_of_every_interval(tmp_path, no_figures):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "e.npy", rng.normal(size=(40, 4)))
    wide, narrow = (
        evaluate.run(
            replace(FAST, level=level), output=tmp_path / f"{level}", embeddings=[tmp_path / "e.npy"],
            protocols=[set_files.bin_set(tmp_path)],
        )["evaluations"][0]["models"]["e"]["measures"]
        for level in (0.99, 0.5)
    )  # fmt: skip
    for key in ("accuracy", "tar_0.1"):
        assert wide[key]["high"] - wide[key]["low"] > narrow[key]["high"] - narrow[key]["low"] > 0


def test_the_worst_pairs_are_the_hardest():
    rng = np.random.default_rng(3)
    people = np.repeat(np.arange(8), 3)
    array = rng.normal(size=(24, 6)) + 0.8 * rng.normal(size=(8, 6))[people]
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    cosine = unit @ unit.T
    groups = np.array(["adult", "adult", "young"] * 8)
    crossed = CrossGroupPanel("x", "x", CrossGroupProtocol(people, groups, replicates=5), str, {}, 5, num_failures=3)
    i, j = (rows.reshape(-1) for rows in np.meshgrid(np.arange(24), np.arange(24), indexing="ij"))
    across = (groups[i] == "young") & (groups[j] == "adult")
    given = PairProtocol(i[across], j[across], people[i[across]] == people[j[across]], two_folds(across))
    paired = PairsPanel("x", "x", given, str, {}, replicates=5, num_failures=3)
    for panel in (crossed, paired):
        found = panel.judge({"m": array}).num_failures["m"]
        assert [pair.same for pair in found] == [True] * 3 + [False] * 3
        for same, best in ((True, min), (False, max)):
            mine = [pair.score for pair in found if pair.same is same]
            wanted = cosine[i, j][across & ((people[i] == people[j]) == same)]
            assert mine[0] == pytest.approx(best(wanted))
            assert mine == sorted(mine, reverse=not same)
        for pair in found:
            assert pair.score == pytest.approx(cosine[pair.left, pair.right])
            assert (people[pair.left] == people[pair.right]) == pair.same


def two_folds(chosen):
    """Two folds of both kinds."""
    return np.arange(int(chosen.sum())) % 2


def test_cells_that_a_spreadsheet_would_run_are_quoted_and_files_of_scores_end(tmp_path, no_figures):
    rows = ["path,identity,age"]
    for person in range(3):
        for shot in range(2):
            name = f"=cmd{person}{shot}.png"
            set_files.put_face(tmp_path / name, person, shot)
            rows.append(f"{name},p{person},{10 * shot}")
    set_files.put_text(tmp_path / "f.csv", rows)
    config = evaluate.EvaluateConfig(replicates=10, num_failures=0, score_rows=5)
    told = evaluate.run(
        config, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], faces=[tmp_path / "f.csv"], scores=True
    )
    lines = (tmp_path / "out/scores/age_gap-m.csv").read_text().splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("'=cmd00.png,'=cmd01.png,1,")
    assert "files of scores hold the first 5 of 15 rows" in " ".join(told["data"]["notes"])


def test_pairs_of_known_people_have_intervals_over_people():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(10), 6)
    array = rng.normal(size=(60, 6)) + 1.5 * rng.normal(size=(10, 6))[people]
    left, right = np.triu_indices(60, 1)
    same = people[left] == people[right]
    folds = np.where(same, np.cumsum(same), np.cumsum(~same)) % 2
    known, unknown = (
        PairsPanel(
            "x", "x", PairProtocol(left, right, same, folds, fars=(0.1,), identities=who), str, {}, replicates=200
        )
        .judge({"m": array})
        .entry
        for who in (people, None)
    )
    by_people, by_pairs = (entry["models"]["m"]["measures"]["tar_0.1"] for entry in (known, unknown))
    assert by_people["value"] == by_pairs["value"]
    assert by_people["n"] == by_pairs["n"] == same.sum()
    assert by_people["high"] - by_people["low"] > 1.3 * (by_pairs["high"] - by_pairs["low"])
    assert known["convention"]["Intervals"].startswith("bootstrap over identities")
    assert "Wilson's, over genuine pairs" in unknown["convention"]["Intervals"]
