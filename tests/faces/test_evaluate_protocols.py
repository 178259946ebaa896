"""`evaluate --protocol`: every set in its published layout, two models at once, bad input."""

import csv
import json
import re

import numpy as np
import pytest

from kdlib_faces import cli
from kdlib_faces._checks import InputError
from kdlib_faces.commands import evaluate
from kdlib_faces.evaluation import PairProtocol, leave_one_out, tar_at_far
from kdlib_faces.harness import embeddings as embedding
from kdlib_faces.harness.registry import PROTOCOLS, listing
from kdlib_faces.harness.tasks import parse_protocol
from tests.faces import set_files
from tests.faces.set_files import FAST, network, run_evaluate


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two models by every protocol at once."""
    root = tmp_path_factory.mktemp("sets")
    models = [network(root / name, seed) for seed, name in enumerate(("one.pt", "two.pt"))]
    protocols = set_files.every_protocol(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdlib_faces.report.files._jobs", lambda view: {})
        run_evaluate(FAST, output=root / "out", models=models, protocols=protocols, scores=True)
    report = json.loads((root / "out/report.json").read_text())
    return root, protocols, report, {entry["name"]: entry for entry in report["evaluations"]}


def test_every_protocol_has_figures_of_both_models(whole):
    root, protocols, report, found = whole
    names = [each.split("=")[0] for each in protocols]
    assert set(names) | {"pairs", "ijbb"} == set(PROTOCOLS)
    assert list(found) == [name for each in names for name in ([each, "ijbc_1n"] if each == "ijbc" else [each])]
    for name, entry in found.items():
        assert list(entry["models"]) == ["one", "two"], name
        assert {"Score", "Alignment", "Flip", "Intervals"} <= set(entry["convention"]), name
        for model in entry["models"].values():
            assert model["measures"].keys() == entry["measures"].keys(), name
            first = model["measures"][next(iter(entry["measures"]))]
            assert first["value"] is not None, name
        assert report["models"]["one"]["protocols"][name], name
        assert entry["scores"] == {each: f"scores/{entry['name']}-{each}.csv" for each in ("one", "two")}
        assert all((root / "out" / path).stat().st_size > 50 for path in entry["scores"].values())
    assert {measure["better"] for measure in found["age_errors"]["measures"].values()} == {"low", "none"}


def test_conventions_and_counts_are_reported(whole):
    _, _, _, found = whole
    assert "squared distance, as insightface" in found["lfw"]["convention"]["Accuracy"]
    assert found["lfw"]["notes"][0] == "1 of 12 pairs left out, their images are not there"
    assert "lfw: skipped files that are not images: 1 (.raw 1, such as " in found["lfw"]["notes"][1]
    assert "others: skipped files that are not images: 1 (.json 1, such as " in found["megaface_fgnet"]["notes"][0]
    assert not any("skipped" in str(found[name]) for name in ("fgnet", "cfp"))
    assert found["lfw"]["counts"] == {"genuine pairs": 5, "impostor pairs": 6, "images": 17}
    assert "mirrored image added" in found["calfw"]["convention"]["Flip"]
    assert found["calfw"]["convention"]["List"].startswith("calfw.txt, SHA-256 ")
    assert found["calfw"]["convention"]["Folds"].startswith("assigned")
    assert "mean over the images of a medium, sum over media" in found["ijbc"]["convention"]["Pooling"]
    assert "times the detector score" in found["ijbc"]["convention"]["Pooling"]
    for name, alignment in {
        "lfw": "none: images as they are", "cfp": "none: images as they are", "age_gap": "none: images as they are",
        "bin": "that of the file: its images as they are", "fgnet": "by five points from the .pts files",
        "megaface_fgnet": "by five points from the .pts files; distractors: none: images as they are",
        "ijbc": "by five points from the list", "ijbc_1n": "by five points from the list",
    }.items():  # fmt: skip
        assert found[name]["convention"]["Alignment"] == alignment
    assert "galleries searched separately" in found["ijbc_1n"]["convention"]["Definition"]
    assert "25 distractors" in found["megaface_fgnet"]["convention"]["Definition"]
    assert found["megaface_fgnet"]["convention"]["Distractors"] == "25 images of others"
    assert "longitudinal protocol of this project" in found["longitudinal"]["convention"]["Definition"]
    assert "names and ages are not in a .bin" in found["bin"]["notes"][0]
    assert found["lfw"]["models"]["one"]["measures"]["tar_0.001"]["resolvable"] is False
    assert "resolvable" not in found["between_groups"]["models"]["one"]["measures"]["tar_0.1"]


def test_figures_equal_those_of_direct_computation(whole):
    root, _, _, found = whole
    kept = next((root / "out/work").glob("one-grouped-*.npy"))
    array = np.load(kept)
    identities = np.repeat(np.arange(5), 3)
    rank1 = found["leave_one_out"]["models"]["one"]["measures"]["rank1"]["value"]
    assert rank1 == leave_one_out(array, identities)[0]
    groups = found["between_groups"]["models"]["one"]
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    young = np.arange(15) % 3 == 2
    cosine = unit[young] @ unit[~young].T
    nearest = identities[~young][cosine.argmax(1)]
    assert groups["measures"]["rank1"]["value"] == (nearest == identities[young]).mean() == groups["cmc"]["rate"][0]
    pairs = np.load(next((root / "out/work").glob("one-small-*.npy")))
    expected = PairProtocol.interleaved(np.arange(20) % 2 == 0).evaluate(pairs).accuracy
    assert found["bin"]["models"]["one"]["measures"]["accuracy"]["value"] == expected


def test_two_models_are_compared_on_the_same_pairs(whole):
    for entry in whole[2]["evaluations"]:
        key = next(iter(entry["measures"]))
        row = next(row for row in entry["differences"] if row["measure"] == key)
        one, two = (entry["models"][name]["measures"][key]["value"] for name in ("one", "two"))
        assert row["difference"]["value"] == pytest.approx(one - two, abs=0.02), entry["name"]
        assert "resample" in entry["difference_rule"]


def test_curves_are_curves(whole):
    _, _, report, _ = whole
    seen = set()
    for entry in report["evaluations"]:
        for model in entry["models"].values():
            for kind, (x, y) in {"roc": ("far", "tar"), "cmc": ("rank", "rate"), "search": ("fpir", "tpir")}.items():
                if kind in model:
                    seen.add(kind)
                    assert (np.diff(model[kind][x]) >= 0).all()
                    assert (np.diff(model[kind][y]) >= 0).all()
            if "histogram" in model and entry["name"] == "lfw":
                assert sum(model["histogram"]["genuine"]) == 5
    assert seen == {"roc", "cmc", "search"}


def test_hardest_pairs_are_shown_and_scores_written(whole):
    root, _, _, found = whole
    for name in ("lfw", "bin", "cacd_vs", "fgnet", "age_gap", "between_groups"):
        assert f"{name}_0_rejects" in found[name]["pictures"] or name == "fgnet"
        assert all((root / f"out/figures/{picture}.png").is_file() for picture in found[name]["pictures"])
    page = (root / "out/report.html").read_text()
    assert page.count("Impostor pairs of highest score: two") >= 5
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


def measures_of(whole, name, model="one"):
    return whole[3][name]["models"][model]["measures"]


@pytest.mark.parametrize("model", ["one", "two"])
def test_rates_follow_from_the_files_of_scores(whole, model):
    root = whole[0]
    for name in ("fgnet", "leave_one_out"):
        rows = table(root, name, model)
        first = [row["rank of mate"] == "1" for row in rows]
        assert measures_of(whole, name, model)["rank1"]["value"] == np.mean(first)
        for row in rows:
            ahead = float(row["impostor score"]) >= float(row["mate score"])
            assert (row["rank of mate"] == "1") != ahead
            assert row["probe"] not in (row["mate"], row["impostor"])
    rows = table(root, "megaface_fgnet", model)
    assert len(rows) == 3 * 4 * 3
    assert measures_of(whole, "megaface_fgnet", model)["rank1"]["value"] == np.mean(
        [row["rank"] == "1" for row in rows]
    )
    assert {row["rank"] for row in rows} <= {"1", "2", "3", "4", "5", ">5"}
    positive = [row for row in rows if row["score"][0] == "0"]
    assert all((row["rank"] == "1") == (row["score"] >= row["distractor score"]) for row in positive)
    assert all(re.fullmatch(r"0\d\d\.png", row["distractor"]) for row in rows)
    rows = table(root, "ijbc", model)
    assert len(rows) == 28
    genuine, impostor = ([float(row["score"]) for row in rows if row["same"] == kind] for kind in "10")
    value = measures_of(whole, "ijbc", model)["tar_0.1"]["value"]
    assert value == pytest.approx(tar_at_far(genuine, impostor, 0.1).tar)
    rows = table(root, "ijbc_1n", model)
    assert len(rows) == 2 * 4
    mated = [row for row in rows if row["rank of mate"]]
    assert len(mated) == 4
    first = [row["rank of mate"] == "1" for row in mated]
    assert measures_of(whole, "ijbc_1n", model)["rank1"]["value"] == np.mean(first)
    assert all((row["best subject"] == row["probe subject"]) == (row["rank of mate"] == "1") for row in mated)
    rows = table(root, "longitudinal", model)
    assert len(rows) == 5 * 3
    assert {float(row["years"]) for row in rows} == {6, 20, 37}
    results = whole[2]["models"][model]["protocols"]
    point = results["longitudinal"]["operating_points"]["0.1"]
    kept = [float(row["score"]) > point["threshold"] for row in rows]
    assert point["value"] == pytest.approx(np.mean(kept))
    rows = table(root, "age_errors", model)
    point = results["age_errors"]["operating_points"]["0.1"]
    genuine = [row for row in rows if row["same"] == "1"]
    assert len(genuine) == 5 * 6
    assert len(rows) - len(genuine) == point["false_accepts"]
    assert point["value"] == pytest.approx(np.mean([float(row["score"]) > point["threshold"] for row in genuine]))
    gaps = [abs(float(row["left age"]) - float(row["right age"])) for row in genuine]
    assert sum(gap >= 30 for gap in gaps) == results["age_errors"]["fnmr_by_gap"][-1]["pairs"]


def test_missed_probes_are_shown(whole):
    root, _, report, found = whole
    page = (root / "out/report.html").read_text()
    for name, shown in (
        ("megaface_fgnet", ("rejects", "accepts")), ("longitudinal", ("rejects",)),
        ("age_errors", ("rejects", "accepts")), ("ijbc", ("rejects", "accepts")),
    ):  # fmt: skip
        assert found[name]["pictures"] == [f"{name}_{model}_{kind}" for model in (0, 1) for kind in shown], name
        for picture in found[name]["pictures"]:
            assert (root / f"out/figures/{picture}.png").stat().st_size > 500
    for number, model in enumerate(("one", "two")):
        missed = measures_of(whole, "fgnet", model)["rank1"]["value"] < 1
        assert [f"fgnet_{number}_{kind}" in found["fgnet"]["pictures"] for kind in ("rejects", "accepts")] == [
            missed
        ] * 2
    assert "Missed probes with their mates: one" in page
    assert "Missed probes with the impostors ahead: two" in page
    assert report["pictures"]["fgnet_0_rejects"]["caption"].startswith(
        "The probes whose mate is furthest behind an impostor"
    )
    assert "The first pairs to be rejected" in report["pictures"]["longitudinal_0_rejects"]["caption"]


def test_embeddings_are_computed_once_per_set_and_reused(whole, monkeypatch, no_figures):
    root, protocols, report, _ = whole
    kept = sorted(path.name for path in (root / "out/work").iterdir())
    sets = {"lfw", "small", "agedb", "calfw", "cplfw", "cfp", "cacd_vs", "fgnet"}
    sets |= {"distractors", "ijbc", "dated", "grouped"}
    assert {name.split("-")[1] for name in kept if name.startswith("one-")} == sets
    assert len(kept) == 2 * len(sets)
    monkeypatch.setattr(embedding, "_embed_to", lambda *_: pytest.fail("made again"))
    models = [root / "one.pt", root / "two.pt"]
    again = run_evaluate(FAST, output=root / "out", models=models, protocols=protocols)
    assert again["evaluations"][0]["models"] == report["evaluations"][0]["models"]


def test_lists_are_shared_by_protocols_and_names_are_unique(tmp_path, no_figures):
    (tmp_path / "b").mkdir()
    first, second = set_files.grouped(tmp_path), set_files.grouped(tmp_path / "b")
    protocols = [f"leave_one_out={first}", f"age_group={first}", f"leave_one_out={second}"]
    report = run_evaluate(FAST, output=tmp_path / "out", models=[network(tmp_path / "m.pt", 0)], protocols=protocols)
    assert [entry["name"] for entry in report["evaluations"]] == ["leave_one_out", "age_group", "leave_one_out_2"]
    assert len({path.name.split("-")[1] for path in (tmp_path / "out/work").iterdir()}) == 2


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("lwf=x", "--protocol lwf=x: no protocol named 'lwf'; the nearest are 'lfw'"),
        ("lfw", "--protocol lfw: needs a pairs file, as lfw=PATH"),
        ("lfw=", "--protocol lfw=: lfw= must be followed by a path"),
        ("lfw={root}/no.txt", "not found: {root}/no.txt"),
        ("bin={root}/pairs.txt", "pairs.txt"),
        ("bin={root}/small.bin,images=x", "unknown option images=, bin takes no options"),
        ("calfw={root}/calfw.txt,images={root}/none,published=no", "folder of images not found: {root}/none"),
        ("calfw={root}/calfw.txt,images={root}/lfw,published=no", "no pair has both its images in the face list"),
        ("calfw={root}/calfw.txt,images={root}/calfw", "published=no"),
        ("calfw={root}/calfw.txt,published=perhaps", "published must be yes or no, got 'perhaps'"),
        ("ijbc={root}/ijbc,published=no,norm=half", "norm must be keep or unit, got 'half'"),
        ("ijbc={root}/lfw,published=no", "template list not found"),
        ("fgnet={root}/fgnet", "the published FG-NET has 1,002 images"),
        ("megaface_fgnet={root}/fgnet,published=no,far=2", "far must be a rate above 0, got '2'"),
        ("age_gap={root}/grouped.csv", "has an age"),
        ("longitudinal={root}/grouped.csv", "one of the columns 'age' and 'date' is needed"),
        ("between_groups={root}/dated.csv", "images of two age groups are needed"),
        ("leave_one_out", "needs faces: give --data LIST, or leave_one_out=LIST"),
    ],
)
def test_bad_input_is_reported_in_one_line(whole, capsys, tmp_path, protocol, message):
    root = whole[0]
    words = ["evaluate", "--model", root / "one.pt", "--protocol", protocol.format(root=root)]
    assert cli.main([str(word) for word in [*words, "--output", tmp_path / "o"]]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message.format(root=root) in lines[0]
    assert not (tmp_path / "o").exists()


def test_a_model_needs_images(tmp_path, capsys):
    text = set_files.two_lines(tmp_path, "calfw").replace(f",images={tmp_path / 'calfw'}", "")
    model = network(tmp_path / "m.pt", 0)
    assert cli.main(["evaluate", "--model", str(model), "--protocol", text, "--output", str(tmp_path / "o")]) == 2
    assert "calfw: no images are known, only embeddings can be evaluated; give images=FOLDER" in capsys.readouterr().err


def test_paths_with_commas_and_keys():
    spec = parse_protocol("calfw=a,b.txt,images=c,d,published=no", PROTOCOLS)
    assert (spec.name, str(spec.path), dict(spec.options)) == (
        "calfw", "a,b.txt", {"images": "c,d", "published": "no"}
    )  # fmt: skip
    with pytest.raises(InputError, match="images= must be given once"):
        parse_protocol("lfw=a,images=b,images=c", PROTOCOLS)


def test_help_lists_every_protocol(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert listing() in text
    assert all(f"  {name}" in text for name in PROTOCOLS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"level": 1.0}, "level must be below 1, got 1.0"),
        ({"level": 0.0}, "level must be"),
        ({"fars": (2.0,)}, "fars must be .* <= 1, got 2.0"),
        ({"bins": (5, 1)}, r"bins must rise from the first, got \(5, 1\)"),
        ({"bins": ()}, "bins must have 1 to 100 entries, got 0"),
        ({"fars": (0.1,) * 101}, "fars must have 0 to 100 entries, got 101"),
        ({"batch_size": 10**6}, "batch_size must be .* <= 65536"),
        ({"ranks": (0,)}, "ranks must be"),
        ({"replicates": -1}, "replicates must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"EvaluateConfig: {message}"):
        evaluate.EvaluateConfig(**wrong)


def test_a_rank_beyond_a_small_list_is_left_out_and_noted(tmp_path, no_figures):
    rows = ["path,identity"]
    for identity in range(2):
        for shot in range(2):
            set_files.put_face(tmp_path / f"{identity}_{shot}.png", identity, shot)
            rows.append(f"{identity}_{shot}.png,p{identity}")
    faces = set_files.put_text(tmp_path / "f.csv", rows)
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(4, 8)))
    config = evaluate.EvaluateConfig(replicates=10, num_failures=0)
    report = run_evaluate(config, output=tmp_path / "out", embeddings=[tmp_path / "e.npy"], data=[faces])
    (entry,) = report["evaluations"]
    assert list(entry["measures"]) == ["rank1"]
    assert "no rank 5: the gallery has 3 images" in entry["notes"]
