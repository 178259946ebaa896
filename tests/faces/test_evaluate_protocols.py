"""`evaluate --protocol`: every set in its published layout, several models at once, runs that are killed, bad input."""

import csv
import json
import re
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdlib_faces import cli
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MobileFaceNet, save_backbone
from kdlib_faces.evaluation import CrossGroupProtocol, PairProtocol, leave_one_out, pool_templates, tar_at_far
from kdlib_faces.recipes import embedding, evaluate, panels_templates
from kdlib_faces.recipes.image_sets import ImageSet, images_of_files
from kdlib_faces.recipes.panels_distractors import DistractorsPanel
from kdlib_faces.recipes.panels_groups import CrossGroupPanel
from kdlib_faces.recipes.panels_pairs import PairsPanel
from kdlib_faces.recipes.panels_ranks import LeaveOneOutPanel
from kdlib_faces.recipes.panels_templates import TemplatesPanel
from kdlib_faces.recipes.protocol_names import PROTOCOLS, listing
from kdlib_faces.recipes.tasks import parse_protocol
from tests.faces import set_files

FAST = evaluate.EvaluateConfig(replicates=30, worst=2, batch_size=16, fars=(0.1, 0.001))


def network(path, seed):
    torch.manual_seed(seed)
    save_backbone(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32).eval(), path)
    return path


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing is tested elsewhere, and takes most of the time."""
    monkeypatch.setattr("kdlib_faces.report.files._jobs", lambda view: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two models by every protocol at once."""
    root = tmp_path_factory.mktemp("sets")
    models = [network(root / name, seed) for seed, name in enumerate(("one.pt", "two.pt"))]
    protocols = set_files.every_protocol(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdlib_faces.report.files._jobs", lambda view: {})
        evaluate.run(FAST, output=root / "out", models=models, protocols=protocols, scores=True)
    return root, protocols, json.loads((root / "out/report.json").read_text())


def test_every_protocol_gives_numbers_of_both_models(whole):
    _, protocols, told = whole
    names = [each.split("=")[0] for each in protocols]
    assert set(names) | {"pairs", "ijbb"} == set(PROTOCOLS)
    found = {entry["name"]: entry for entry in told["evaluations"]}
    assert list(found) == [name for each in names for name in ([each, "ijbc_1n"] if each == "ijbc" else [each])]
    for name, entry in found.items():
        assert list(entry["models"]) == ["one", "two"], name
        assert {"Score", "Flip", "Intervals"} <= set(entry["convention"]), name
        for model in entry["models"].values():
            assert model["measures"].keys() == entry["measures"].keys(), name
            first = model["measures"][next(iter(entry["measures"]))]
            assert first["value"] is not None, name
        assert told["models"]["one"]["protocols"][name], name
    assert {measure["better"] for measure in found["age_errors"]["measures"].values()} == {"low", "none"}


def test_what_a_number_means_is_named(whole):
    _, _, told = whole
    found = {entry["name"]: entry for entry in told["evaluations"]}
    assert "squared distance, as insightface" in found["lfw"]["convention"]["Accuracy"]
    assert found["lfw"]["notes"][0] == "1 of 12 pairs left out, their images are not there"
    assert found["lfw"]["counts"] == {"genuine pairs": 5, "impostor pairs": 6, "images": 17}
    assert "mirrored image added" in found["calfw"]["convention"]["Flip"]
    assert found["calfw"]["convention"]["List"].startswith("calfw.txt, SHA-256 ")
    assert found["calfw"]["convention"]["Folds"].startswith("dealt")
    assert "mean over the images of a medium, sum over media" in found["ijbc"]["convention"]["Pooling"]
    assert "times the detector score" in found["ijbc"]["convention"]["Pooling"]
    assert found["ijbc"]["convention"]["Alignment"] == "by the list's five points"
    assert "galleries searched separately" in found["ijbc_1n"]["convention"]["Definition"]
    assert "25 distractors" in found["megaface_fgnet"]["convention"]["Definition"]
    assert found["megaface_fgnet"]["convention"]["Distractors"] == "25 images of strangers"
    assert found["fgnet"]["convention"]["Alignment"] == "by five points from the .pts files"
    assert "longitudinal protocol of this project" in found["longitudinal"]["convention"]["Definition"]
    assert "names and ages are not in a .bin" in found["bin"]["notes"][0]
    assert found["lfw"]["models"]["one"]["measures"]["tar_0.001"]["resolvable"] is False
    assert "resolvable" not in found["between_groups"]["models"]["one"]["measures"]["tar_0.1"]


def test_numbers_are_those_of_the_protocols_on_the_same_embeddings(whole):
    root, _, told = whole
    found = {entry["name"]: entry for entry in told["evaluations"]}
    kept = next((root / "out/work").glob("one-grouped-*.npy"))
    array = np.load(kept)
    people = np.repeat(np.arange(5), 3)
    rank1 = found["leave_one_out"]["models"]["one"]["measures"]["rank1"]["value"]
    assert rank1 == leave_one_out(array, people)[0]
    groups = found["between_groups"]["models"]["one"]
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    young = np.arange(15) % 3 == 2
    cosine = unit[young] @ unit[~young].T
    nearest = people[~young][cosine.argmax(1)]
    assert groups["measures"]["rank1"]["value"] == (nearest == people[young]).mean() == groups["cmc"]["rate"][0]
    pairs = np.load(next((root / "out/work").glob("one-small-*.npy")))
    expected = PairProtocol.interleaved(np.arange(20) % 2 == 0).evaluate(pairs).accuracy
    assert found["bin"]["models"]["one"]["measures"]["accuracy"]["value"] == expected


def test_two_models_are_compared_on_the_same_pairs(whole):
    _, _, told = whole
    first = {"ijbc_1n": "rank1"}
    for entry in told["evaluations"]:
        key = first.get(entry["name"], next(iter(entry["measures"])))
        row = next(row for row in entry["differences"] if row["measure"] == key)
        one, two = (entry["models"][name]["measures"][key]["value"] for name in ("one", "two"))
        assert row["difference"]["value"] == pytest.approx(one - two, abs=0.02), entry["name"]
        assert "resample" in entry["difference_rule"]


def test_curves_are_curves(whole):
    _, _, told = whole
    seen = set()
    for entry in told["evaluations"]:
        for model in entry["models"].values():
            for kind, (x, y) in {"roc": ("far", "tar"), "cmc": ("rank", "rate"), "search": ("fpir", "tpir")}.items():
                if kind in model:
                    seen.add(kind)
                    assert (np.diff(model[kind][x]) >= 0).all()
                    assert (np.diff(model[kind][y]) >= 0).all()
            if "histogram" in model and entry["name"] == "lfw":
                assert sum(model["histogram"]["genuine"]) == 5
    assert seen == {"roc", "cmc", "search"}


def test_worst_pairs_are_shown_and_scores_written(whole):
    root, _, told = whole
    found = {entry["name"]: entry for entry in told["evaluations"]}
    for name in ("lfw", "bin", "cacd_vs", "fgnet", "age_gap", "between_groups"):
        assert f"{name}_0_rejects" in found[name]["pictures"] or name == "fgnet"
        assert all((root / f"out/figures/{picture}.png").is_file() for picture in found[name]["pictures"])
    page = (root / "out/report.html").read_text()
    assert page.count("Different people, most alike: two") >= 5
    rows = (root / "out/scores/lfw-one.csv").read_text().splitlines()
    assert rows[0] == "left,right,same,score"
    assert len(rows) == 12
    assert re.fullmatch(r"P0/P0_0001\.jpg,P0/P0_0002\.jpg,1,-?\d\.\d{8}", rows[1])
    assert found["lfw"]["scores"] == {"one": "scores/lfw-one.csv", "two": "scores/lfw-two.csv"}
    between = (root / "out/scores/between_groups-one.csv").read_text().splitlines()
    lines = [line.split(",") for line in between[1:]]
    assert len(lines) == 5 * 10
    assert sum(line[2] == "1" for line in lines) == 10
    assert len((root / "out/scores/age_gap-one.csv").read_text().splitlines()) == 1 + 20 * 19 // 2


def table(root, name, model="one"):
    with (root / f"out/scores/{name}-{model}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def told_of(whole, name, model="one"):
    return next(entry for entry in whole[2]["evaluations"] if entry["name"] == name)["models"][model]["measures"]


def test_every_protocol_has_a_file_of_scores(whole):
    root, _, told = whole
    for entry in told["evaluations"]:
        assert entry["scores"] == {each: f"scores/{entry['name']}-{each}.csv" for each in ("one", "two")}
        assert all((root / "out" / path).stat().st_size > 50 for path in entry["scores"].values())


@pytest.mark.parametrize("model", ["one", "two"])
def test_files_of_scores_hold_what_the_rates_are_made_of(whole, model):
    root = whole[0]
    for name in ("fgnet", "leave_one_out"):
        rows = table(root, name, model)
        assert told_of(whole, name, model)["rank1"]["value"] == np.mean([row["place of mate"] == "1" for row in rows])
        for row in rows:
            ahead = float(row["stranger score"]) >= float(row["mate score"])
            assert (row["place of mate"] == "1") != ahead
            assert row["probe"] not in (row["mate"], row["stranger"])
    rows = table(root, "megaface_fgnet", model)
    assert len(rows) == 3 * 4 * 3
    assert told_of(whole, "megaface_fgnet", model)["rank1"]["value"] == np.mean([row["place"] == "1" for row in rows])
    assert {row["place"] for row in rows} <= {"1", "2", "3", "4", "5", ">5"}
    assert all(
        (row["place"] == "1") == (row["score"] >= row["distractor score"]) for row in rows if row["score"][0] == "0"
    )
    assert all(re.fullmatch(r"0\d\d\.png", row["distractor"]) for row in rows)
    rows = table(root, "ijbc", model)
    assert len(rows) == 28
    genuine, impostor = ([float(row["score"]) for row in rows if row["same"] == kind] for kind in "10")
    told = told_of(whole, "ijbc", model)["tar_0.1"]["value"]
    assert told == pytest.approx(tar_at_far(genuine, impostor, 0.1).tar)
    rows = table(root, "ijbc_1n", model)
    assert len(rows) == 2 * 4
    mated = [row for row in rows if row["place of mate"]]
    assert len(mated) == 4
    assert told_of(whole, "ijbc_1n", model)["rank1"]["value"] == np.mean([row["place of mate"] == "1" for row in mated])
    assert all((row["best subject"] == row["probe subject"]) == (row["place of mate"] == "1") for row in mated)
    rows = table(root, "longitudinal", model)
    assert len(rows) == 5 * 3
    assert {float(row["years"]) for row in rows} == {6, 20, 37}
    told = whole[2]["models"][model]["protocols"]
    point = told["longitudinal"]["operating_points"]["0.1"]
    kept = [float(row["score"]) > point["threshold"] for row in rows]
    assert point["value"] == pytest.approx(np.mean(kept))
    rows = table(root, "age_errors", model)
    point = told["age_errors"]["operating_points"]["0.1"]
    genuine = [row for row in rows if row["same"] == "1"]
    assert len(genuine) == 5 * 6
    assert len(rows) - len(genuine) == point["false_accepts"]
    assert point["value"] == pytest.approx(np.mean([float(row["score"]) > point["threshold"] for row in genuine]))
    gaps = [abs(float(row["left age"]) - float(row["right age"])) for row in genuine]
    assert sum(gap >= 30 for gap in gaps) == told["age_errors"]["fnmr_by_gap"][-1]["pairs"]


def test_missed_probes_and_old_pairs_are_shown(whole):
    root, _, told = whole
    found = {entry["name"]: entry for entry in told["evaluations"]}
    page = (root / "out/report.html").read_text()
    for name, shown in (
        ("megaface_fgnet", ("rejects", "accepts")), ("longitudinal", ("rejects",)),
        ("age_errors", ("rejects", "accepts")), ("ijbc", ("rejects", "accepts")),
    ):  # fmt: skip
        assert found[name]["pictures"] == [f"{name}_{model}_{kind}" for model in (0, 1) for kind in shown], name
        for picture in found[name]["pictures"]:
            assert (root / f"out/figures/{picture}.png").stat().st_size > 500
    for number, model in enumerate(("one", "two")):
        missed = told_of(whole, "fgnet", model)["rank1"]["value"] < 1
        assert [f"fgnet_{number}_{kind}" in found["fgnet"]["pictures"] for kind in ("rejects", "accepts")] == [
            missed
        ] * 2
    assert "Missed, each beside its mate: one" in page
    assert "Missed, each beside who was ahead: two" in page
    assert told["pictures"]["fgnet_0_rejects"]["caption"].startswith(
        "As one sees them, the probes whose mate is furthest"
    )
    assert "the first to be rejected" in told["pictures"]["longitudinal_0_rejects"]["caption"]


def judged(panel, *arrays):
    found = panel.judge(*({"m": array} for array in arrays))
    return found, list(found.scores.rows("m"))


def test_missed_probes_are_those_furthest_behind():
    rng = np.random.default_rng(1)
    people, strangers = np.repeat(np.arange(9), 4), rng.normal(size=(60, 8))
    array = rng.normal(size=(36, 8)) + 0.9 * rng.normal(size=(9, 8))[people]
    unit, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (array, strangers))
    panel = DistractorsPanel("x", "x", people, None, {}, (0.1,), (1,), replicates=5, worst=3)
    found, rows = judged(panel, array, strangers)
    assert found.scores.total == len(rows) == 9 * 4 * 3
    nearest = (unit @ other.T).max(axis=1)
    behind = {
        (i, j): nearest[i] - unit[i] @ unit[j]
        for i in range(36) for j in range(36) if i != j and people[i] == people[j]
    }  # fmt: skip
    mates, taken = found.worst["m"][:3], found.worst["m"][3:]
    assert (mates[0].left, mates[0].right) == max(behind, key=behind.get)
    assert len({people[pair.left] for pair in mates}) == 3
    for mate, stranger in zip(mates, taken, strict=True):
        assert (mate.same, stranger.same, mate.other, stranger.other) == (True, False, 0, 1)
        assert mate.left == stranger.left
        assert stranger.right == (unit[mate.left] @ other.T).argmax()
        assert stranger.score == pytest.approx(nearest[mate.left])
        assert mate.score == pytest.approx(unit[mate.left] @ unit[mate.right])
        assert mate.score < stranger.score
    one_out, _ = judged(LeaveOneOutPanel("x", "x", people, str, {}, replicates=5, worst=2), array)
    cosine = np.where(np.eye(36, dtype=bool), -2, unit @ unit.T)
    same = people[:, None] == people
    margin = np.where(same, -2, cosine).max(1) - np.where(same, cosine, -2).max(1)
    assert one_out.worst["m"][0].left == margin.argmax()
    assert one_out.worst["m"][2].right == np.where(same, -2, cosine)[margin.argmax()].argmax()


def test_scores_of_templates_are_streamed_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(30) * 3 + 1, 2)
    array = rng.normal(size=(60, 8))
    left, right = (ids[::2][rows] for rows in np.triu_indices(30, 1))
    same = rng.random(left.size) < 0.2
    panel = TemplatesPanel("x", "x", ids, np.arange(60), {}, (left, right, same), replicates=5, worst=2, fars=(0.1,))
    found = panel.verify({"m": array})
    sizes, real = [], panels_templates.pair_cosines
    monkeypatch.setattr(panels_templates, "BLOCK", 64)
    monkeypatch.setattr(
        panels_templates, "pair_cosines", lambda unit, i, j: (sizes.append(i.size), real(unit, i, j))[1]
    )
    rows = list(found.scores.rows("m"))
    assert found.scores.total == len(rows) == left.size == sum(sizes)
    assert max(sizes) == 64
    pooled = pool_templates(array, ids, np.arange(60))
    unit = dict(zip(pooled.ids.tolist(), pooled.features, strict=True))
    for k, (a, b, kind, score) in enumerate(rows):
        assert (a, b, kind) == (left[k], right[k], int(same[k]))
        assert float(score) == pytest.approx(unit[a] @ unit[b], abs=1e-6)
    scores = np.array([float(row[3]) for row in rows])
    least, most = found.worst["m"][0], found.worst["m"][2]
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


def test_the_worst_pairs_are_the_worst():
    rng = np.random.default_rng(3)
    people = np.repeat(np.arange(8), 3)
    array = rng.normal(size=(24, 6)) + 0.8 * rng.normal(size=(8, 6))[people]
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    cosine = unit @ unit.T
    groups = np.array(["adult", "adult", "young"] * 8)
    crossed = CrossGroupPanel("x", "x", CrossGroupProtocol(people, groups, replicates=5), str, {}, 5, worst=3)
    i, j = (rows.reshape(-1) for rows in np.meshgrid(np.arange(24), np.arange(24), indexing="ij"))
    across = (groups[i] == "young") & (groups[j] == "adult")
    given = PairProtocol(i[across], j[across], people[i[across]] == people[j[across]], two_folds(across))
    paired = PairsPanel("x", "x", given, str, {}, replicates=5, worst=3)
    for panel in (crossed, paired):
        found = panel.judge({"m": array}).worst["m"]
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


def test_embeddings_of_one_set_are_made_once_and_found_again(whole, monkeypatch, no_figures):
    root, protocols, told = whole
    kept = sorted(path.name for path in (root / "out/work").iterdir())
    sets = {
        "lfw",
        "small",
        "agedb",
        "calfw",
        "cplfw",
        "cfp",
        "cacd_vs",
        "fgnet",
        "distractors",
        "ijbc",
        "dated",
        "grouped",
    }
    assert {name.split("-")[1] for name in kept if name.startswith("one-")} == sets
    assert len(kept) == 2 * len(sets)
    monkeypatch.setattr(embedding, "_embed_to", lambda *_: pytest.fail("made again"))
    models = [root / "one.pt", root / "two.pt"]
    again = evaluate.run(FAST, output=root / "out", models=models, protocols=protocols)
    assert again["evaluations"][0]["models"] == told["evaluations"][0]["models"]


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, no_figures):
    model, text = network(tmp_path / "m.pt", 0), f"leave_one_out={set_files.grouped(tmp_path)}"
    config = evaluate.EvaluateConfig(replicates=10, worst=0, batch_size=4)
    monkeypatch.setattr(embedding, "KEPT_EVERY", 4)
    real, counts = embedding.embed_batch, []

    def stops(module, images, **options):
        if len(counts) == 2:
            raise KeyboardInterrupt
        counts.append(len(images))
        return real(module, images, **options)

    monkeypatch.setattr(embedding, "embed_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, output=tmp_path / "out", models=[model], protocols=[text])
    assert sorted(path.suffix for path in (tmp_path / "out/work").iterdir()) == [".json", ".part"]
    assert not (tmp_path / "out/report.json").exists()
    counts.clear()
    monkeypatch.setattr(
        embedding,
        "embed_batch",
        lambda module, images, **more: (counts.append(len(images)), real(module, images, **more))[1],
    )
    evaluate.run(config, output=tmp_path / "out", models=[model], protocols=[text])
    assert counts == [4, 3]
    (made,) = (tmp_path / "out/work").iterdir()
    evaluate.run(config, output=tmp_path / "whole", models=[model], protocols=[text])
    (straight,) = (tmp_path / "whole/work").iterdir()
    assert made.read_bytes() == straight.read_bytes()
    assert made.name == straight.name


_SLOW = """
import sys, time
from kdlib_faces import cli
from kdlib_faces.recipes import embedding
real = embedding.embed_batch
def slow(*given, **more):
    time.sleep(0.2)
    return real(*given, **more)
embedding.embed_batch, embedding.KEPT_EVERY = slow, 4
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_run_that_the_system_killed_goes_on(tmp_path, monkeypatch, no_figures):
    model, text = network(tmp_path / "m.pt", 0), f"leave_one_out={set_files.grouped(tmp_path)}"
    words = ["evaluate", "--model", model, "--protocol", text, "--set", "batch_size=4", "--set", "replicates=10"]
    words = [str(word) for word in [*words, "--quiet", "--output", tmp_path / "out"]]
    process = subprocess.Popen([sys.executable, "-c", _SLOW, *words], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not list((tmp_path / "out/work").glob("*.json")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    assert process.wait(20) == -9, process.stderr.read()
    process.stderr.close()
    assert not (tmp_path / "out/report.json").exists()
    counts, real = [], embedding.embed_batch
    monkeypatch.setattr(
        embedding,
        "embed_batch",
        lambda module, images, **more: (counts.append(len(images)), real(module, images, **more))[1],
    )
    assert cli.main(words) == 0
    assert 0 < sum(counts) < 15
    (made,) = (tmp_path / "out/work").iterdir()
    assert cli.main([*words[:-1], str(tmp_path / "whole")]) == 0
    (straight,) = (tmp_path / "whole/work").iterdir()
    np.testing.assert_allclose(np.load(made), np.load(straight), atol=1e-6)


def test_a_part_that_is_damaged_is_made_anew(tmp_path, monkeypatch):
    files = [set_files.put_face(tmp_path / f"{number}.png", number, 0) for number in range(6)]
    images, model = images_of_files("six", files), embedding.open_model(network(tmp_path / "m.pt", 0))
    whole = np.array(embedding.embed_set(model, images, tmp_path / "a"))
    (name,) = (path.name for path in (tmp_path / "a").iterdir())
    notes = ("", "{", '{"format": 1, "done": 4, "width": 16}', '{"format": 9, "done": 1, "width": 16}', "[1]")
    for number, note in enumerate(notes):
        folder = tmp_path / f"b{number}"
        folder.mkdir()
        (folder / f"{name}.part").write_bytes(b"\x93NUMPY short")
        (folder / f"{name}.json").write_text(note)
        np.testing.assert_array_equal(embedding.embed_set(model, images, folder), whole)
        assert [path.name for path in folder.iterdir()] == [name]


def test_what_the_embeddings_depend_on_changes_their_name(tmp_path):
    files = [set_files.put_face(tmp_path / f"{number}.png", number, 0) for number in range(3)]
    models = [embedding.open_model(network(tmp_path / f"{seed}.pt", seed)) for seed in (0, 1)]
    folder = tmp_path / "work"
    embedding.embed_set(models[0], images_of_files("x", files), folder)
    embedding.embed_set(models[0], images_of_files("x", files), folder, batch_size=2)
    assert len(list(folder.iterdir())) == 1
    embedding.embed_set(models[0], images_of_files("x", files), folder, flip=False)
    embedding.embed_set(models[1], images_of_files("x", files), folder)
    set_files.put_face(files[2], 7, 7)
    embedding.embed_set(models[0], images_of_files("x", files), folder)
    embedding.embed_set(models[0], images_of_files("x", files[:2]), folder)
    assert len(list(folder.iterdir())) == 5


def test_templates_get_embeddings_whose_length_is_kept(tmp_path):
    files = [set_files.put_face(tmp_path / f"{number}.png", number, 0) for number in range(3)]
    model = embedding.open_model(network(tmp_path / "m.pt", 0))
    kept = embedding.embed_set(model, images_of_files("x", files), tmp_path)
    assert not np.allclose(np.linalg.norm(kept, axis=1), 1, atol=1e-3)
    unit = embedding.embed(model.module, images_of_files("x", files).decode(range(3), 32)).numpy()
    np.testing.assert_allclose(kept / np.linalg.norm(kept, axis=1, keepdims=True), unit, atol=1e-6)


def test_the_input_spec_of_a_model_is_respected():
    spec_calls = []

    class Model(torch.nn.Module):
        def input_spec(self, images):
            spec_calls.append(images.shape)
            return images.flip(1) * 2

        def forward(self, images):
            return images.flatten(1)

    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = embedding.embed(Model(), pixels, batch_size=2, flip=False, normalise=False)
    torch.testing.assert_close(found, ((pixels.float() / 127.5 - 1).flip(1) * 2).flatten(1))
    assert len(spec_calls) == 3


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN or infinity"), (0.0, "zero")])
def test_a_model_that_gives_no_direction_is_named_with_its_image(tmp_path, monkeypatch, value, what):
    model = network(tmp_path / "m.pt", 0)

    def third(module, images, **_):
        rows = np.ones((len(images), 4), np.float32)
        rows[2] = value
        return rows

    monkeypatch.setattr(embedding, "embed_batch", third)
    with pytest.raises(InputError, match=rf"m\.pt: the model gives {what} for 0_2\.png of grouped"):
        evaluate.run(
            FAST, output=tmp_path / "out", models=[model], protocols=[f"leave_one_out={set_files.grouped(tmp_path)}"]
        )
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize(("value", "what"), [(np.nan, "finite"), (0.0, "non-zero in every row")])
def test_a_row_without_direction_names_its_file(tmp_path, value, what):
    rows = np.ones((15, 4))
    rows[11] = value
    np.save(tmp_path / "good.npy", np.ones((15, 4)))
    np.save(tmp_path / "bad.npy", rows)
    with pytest.raises(InputError, match=rf"bad\.npy: embeddings must be {what}, row 11 is not"):
        evaluate.run(
            FAST, output=tmp_path / "out", embeddings=[tmp_path / "good.npy", tmp_path / "bad.npy"],
            protocols=[f"leave_one_out={set_files.grouped(tmp_path)}"],
        )  # fmt: skip


def test_memory_of_the_command_does_not_grow_with_the_set(tmp_path):
    model = embedding.open_model(network(tmp_path / "m.pt", 0))

    def peak(count):
        def read(row, size):
            return np.random.default_rng(row).integers(0, 256, (3, size, size), dtype=np.uint8)

        images = ImageSet(f"n{count}", count, f"n{count}", read, str)
        tracemalloc.start()
        try:
            embedding.embed_set(model, images, tmp_path / "work", batch_size=8)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)  # what the first forward takes once
    small, large = peak(64), peak(640)
    assert large < small + 60_000 < 640 * 3 * 32 * 32


def test_embeddings_of_several_sets_lie_in_a_folder(tmp_path, no_figures):
    given, rng = tmp_path / "mine", np.random.default_rng(0)
    given.mkdir()
    people = np.repeat(rng.normal(size=(5, 8)), 3, axis=0)
    np.save(given / "grouped.npy", people + 0.01 * rng.normal(size=people.shape))
    np.save(given / "calfw.npy", rng.normal(size=(8, 8)).astype(np.float16))
    text = set_files.two_lines(tmp_path, "calfw").replace(f",images={tmp_path / 'calfw'}", "")
    protocols = [f"leave_one_out={set_files.grouped(tmp_path)}", text]
    told = evaluate.run(FAST, output=tmp_path / "out", embeddings=[given], protocols=protocols)
    entries = {entry["name"]: entry for entry in told["evaluations"]}
    assert entries["leave_one_out"]["models"]["mine"]["measures"]["rank1"]["value"] == 1.0
    assert entries["calfw"]["counts"]["images"] == 8
    assert entries["calfw"]["pictures"] == []
    assert not (tmp_path / "out/work").exists()


def test_files_of_one_name_are_told_apart(tmp_path, no_figures):
    rng = np.random.default_rng(0)
    files = [tmp_path / folder / "same.npy" for folder in ("a", "b", "b")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        np.save(file, rng.normal(size=(15, 4)))
    told = evaluate.run(
        FAST, output=tmp_path / "out", embeddings=files, protocols=[f"leave_one_out={set_files.grouped(tmp_path)}"]
    )
    assert {name: model["label"] for name, model in told["models"].items()} == {
        name: name for name in ("same", "b/same", "same (3)")
    }
    assert len(told["evaluations"][0]["differences"]) == 6


def test_two_sets_of_one_name_never_share_embeddings(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    protocols = [set_files.fgnet(first), set_files.fgnet(second)]
    set_files.put_face(second / "fgnet/001A03.JPG", 9, 9)
    with pytest.raises(InputError, match="two sets of different images are called 'fgnet'"):
        evaluate.run(FAST, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], protocols=protocols)
    assert not (tmp_path / "out").exists()


def test_one_list_serves_several_protocols_and_two_lists_of_one_name_do_not_mix(tmp_path, no_figures):
    (tmp_path / "b").mkdir()
    first, second = set_files.grouped(tmp_path), set_files.grouped(tmp_path / "b")
    protocols = [f"leave_one_out={first}", f"age_group={first}", f"leave_one_out={second}"]
    told = evaluate.run(FAST, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], protocols=protocols)
    assert [entry["name"] for entry in told["evaluations"]] == ["leave_one_out", "age_group", "leave_one_out_2"]
    assert len({path.name.split("-")[1] for path in (tmp_path / "out/work").iterdir()}) == 2


@pytest.mark.parametrize(
    ("protocol", "said"),
    [
        ("lwf=x", "--protocol lwf=x: no protocol named 'lwf'; the nearest are 'lfw'"),
        ("lfw", "--protocol lfw: needs a pairs file, as lfw=PATH"),
        ("lfw=", "--protocol lfw=: lfw= must be followed by a path"),
        ("lfw={root}/no.txt", "not found: {root}/no.txt"),
        ("bin={root}/pairs.txt", "pairs.txt"),
        ("bin={root}/small.bin,images=x", "no images= here, it takes none"),
        ("calfw={root}/calfw.txt,images={root}/none,published=no", "folder of images not found: {root}/none"),
        ("calfw={root}/calfw.txt,images={root}/lfw,published=no", "no pair has both its images in the face list"),
        (
            "calfw={root}/calfw.txt,images={root}/calfw",
            "here are 4 pairs of one person, 4 pairs of two people. The file is cut or another version; published=no",
        ),
        ("calfw={root}/calfw.txt,published=perhaps", "published must be yes or no, got 'perhaps'"),
        ("ijbc={root}/ijbc,published=no,norm=half", "norm must be keep or unit, got 'half'"),
        ("ijbc={root}/lfw,published=no", "template list not found"),
        ("fgnet={root}/fgnet", "the published FG-NET has 1,002 images"),
        ("megaface_fgnet={root}/fgnet,published=no,far=2", "far must be a rate above 0, got '2'"),
        ("age_gap={root}/grouped.csv", "has an age"),
        ("longitudinal={root}/grouped.csv", "one of the columns 'age' and 'date' is needed"),
        ("between_groups={root}/dated.csv", "images of two age groups are needed"),
        ("leave_one_out", "needs faces: give --faces LIST, or leave_one_out=LIST"),
    ],
)
def test_bad_input_is_one_line(whole, capsys, tmp_path, protocol, said):
    root = whole[0]
    words = [
        "evaluate",
        "--model",
        root / "one.pt",
        "--protocol",
        protocol.format(root=root),
        "--output",
        tmp_path / "o",
    ]
    assert cli.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said.format(root=root) in lines[0]
    assert not (tmp_path / "o").exists()


def test_models_of_sets_without_images_are_an_error(tmp_path, capsys):
    text = set_files.two_lines(tmp_path, "calfw").replace(f",images={tmp_path / 'calfw'}", "")
    model = network(tmp_path / "m.pt", 0)
    assert cli.main(["evaluate", "--model", str(model), "--protocol", text, "--output", str(tmp_path / "o")]) == 2
    assert "calfw: no images are known, only embeddings can be judged; give images=FOLDER" in capsys.readouterr().err


def test_cells_that_a_spreadsheet_would_run_are_quoted_and_files_of_scores_end(tmp_path, no_figures):
    rows = ["path,identity,age"]
    for person in range(3):
        for shot in range(2):
            name = f"=cmd{person}{shot}.png"
            set_files.put_face(tmp_path / name, person, shot)
            rows.append(f"{name},p{person},{10 * shot}")
    set_files.put_text(tmp_path / "f.csv", rows)
    config = evaluate.EvaluateConfig(replicates=10, worst=0, score_rows=5)
    told = evaluate.run(
        config, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], faces=[tmp_path / "f.csv"], scores=True
    )
    lines = (tmp_path / "out/scores/age_gap-m.csv").read_text().splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("'=cmd00.png,'=cmd01.png,1,")
    assert "files of scores hold the first 5 of 15 rows" in " ".join(told["data"]["notes"])


def test_paths_with_commas_and_keys():
    asked = parse_protocol("calfw=a,b.txt,images=c,d,published=no", PROTOCOLS)
    assert (asked.name, str(asked.path), dict(asked.more)) == (
        "calfw", "a,b.txt", {"images": "c,d", "published": "no"}
    )  # fmt: skip
    with pytest.raises(InputError, match="images= must be given once"):
        parse_protocol("lfw=a,images=b,images=c", PROTOCOLS)


def test_help_lists_every_protocol(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert listing() in said
    assert all(f"  {name}" in said for name in PROTOCOLS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"level": 1.0}, "level must be below 1, got 1.0"),
        ({"level": 0.0}, "level must be"),
        ({"fars": (2.0,)}, "fars must be .* <= 1, got 2.0"),
        ({"bins": (5, 1)}, r"bins must rise from the first, got \(5, 1\)"),
        ({"bins": ()}, "bins must not be empty"),
        ({"ranks": ()}, "ranks must not be empty"),
        ({"ranks": (0,)}, "ranks must be"),
        ({"replicates": -1}, "replicates must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_are_refused_before_anything_runs(wrong, said):
    with pytest.raises(ValueError, match=f"EvaluateConfig: {said}"):
        evaluate.EvaluateConfig(**wrong)


def test_a_rank_beyond_a_small_list_is_left_out_and_said(tmp_path, no_figures):
    rows = ["path,identity"]
    for person in range(2):
        for shot in range(2):
            set_files.put_face(tmp_path / f"{person}_{shot}.png", person, shot)
            rows.append(f"{person}_{shot}.png,p{person}")
    faces = set_files.put_text(tmp_path / "f.csv", rows)
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(4, 8)))
    config = evaluate.EvaluateConfig(replicates=10, worst=0)
    told = evaluate.run(config, output=tmp_path / "out", embeddings=[tmp_path / "e.npy"], faces=[faces])
    (entry,) = told["evaluations"]
    assert list(entry["measures"]) == ["rank1"]
    assert "no rank 5: the gallery has 3 images" in entry["notes"]


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
