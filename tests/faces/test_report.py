"""The report room: the run's shape is checked, files are whole and safe, and the words say what the numbers say."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdlib_faces._checks import InputError
from kdlib_faces.report import (
    Picture,
    attention_picture,
    check_run,
    html,
    markdown,
    pairs_picture,
    render,
    to_json,
    write,
)
from kdlib_faces.report.figures import FIGURES
from kdlib_faces.report.tables import seeds_table
from kdlib_faces.report.theme import DARK, LIGHT, looks, to_png
from kdlib_faces.report.view import View
from kdlib_faces.report.words import finding

_BINS = ("0-4", "5-9", "10-19", "20-29", "30+")
_PAIRS = (812, 640, 903, 410, 236)
_SKILL = {"general_teacher": 2.5, "age_teacher": 2.75, "student_alone": 1.75, "student_distilled": 2.35}
_FADE = {"general_teacher": 0.32, "age_teacher": 0.16, "student_alone": 0.34, "student_distilled": 0.22}


def _estimate(value: float, spread: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - spread), "high": min(1.0, value + 0.8 * spread), "n": n}


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _bin(name: str, pairs: int, distance: float) -> dict[str, Any]:
    """Rates of two unit normals `distance` apart, with an interval that shrinks with the pairs."""
    spread = 1.6 / math.sqrt(pairs)
    tar = {far: _estimate(_phi(distance - z), spread, pairs) for far, z in (("0.01", 2.326), ("0.001", 3.09))}
    own = {far: _estimate(_phi(distance - z - 0.2), spread, pairs) for far, z in (("0.01", 2.326), ("0.001", 3.09))}
    auc, own_auc = _phi(distance / math.sqrt(2)), _phi((distance - 0.2) / math.sqrt(2))
    return {
        "name": name,
        "genuine": pairs,
        "impostor": 40 * pairs,
        "auc": _estimate(auc, 0.3 * spread, pairs),
        "tar": tar,
        "own_auc": _estimate(own_auc, 0.35 * spread, pairs),
        "own_tar": own,
    }


def _age_gap(model: str, bins: tuple[str, ...], kind: str) -> dict[str, Any]:
    distance = [1.4 * (_SKILL[model] - _FADE[model] * order) for order in range(len(bins))]
    far = [0.0, *np.logspace(-4, 0, 80)]
    edges = np.linspace(-1, 1, 61)
    centers = (edges[1:] + edges[:-1]) / 2
    rng = np.random.default_rng(7)
    genuine = {
        name: rng.poisson(pairs * 0.05 * np.exp(-(((centers - 0.17 * d) / 0.17) ** 2))).tolist()
        for name, pairs, d in zip(bins, _PAIRS, distance, strict=False)
    }

    def curve(d: float) -> dict[str, Any]:
        return {"far": far, "tar": [1 - (1 - f**0.5) ** d if f < 1 else 1.0 for f in far]}

    return {
        "kind": kind,
        "bins": [_bin(name, pairs, d) for name, pairs, d in zip(bins, _PAIRS, distance, strict=False)],
        "all": _bin("all", 3001, float(np.mean(distance))),
        "roc": {"all": curve(3 * float(np.mean(distance))), bins[-1]: curve(3 * distance[-1])},
        "histogram": {
            "edges": edges.tolist(),
            "genuine": genuine,
            "impostor": rng.poisson(9e3 * np.exp(-((centers / 0.2) ** 2))).tolist(),
        },
    }


def _model(name: str, bins: tuple[str, ...], kind: str) -> dict[str, Any]:
    teacher = name.endswith("teacher")
    gap = _age_gap(name, bins, kind)
    return {
        "role": "teacher" if teacher else "student",
        "label": name.replace("_", " ").capitalize(),
        "backbone": "IResNet-18" if teacher else "MobileFaceNet",
        "parameters": 24_025_600 if teacher else 1_003_136,
        "macs": 2_610_000_000 if teacher else 221_000_000,
        "latency_ms": 61.3 if teacher else 8.42,
        "input_size": 112,
        "train_seconds": 118.0 if teacher else 47.2,
        "train_steps": 900 if teacher else 600,
        "protocols": {
            "age_gap": gap,
            "verification": {
                "accuracy": gap["all"]["auc"]["value"] - 0.05,
                "std": 0.012,
                "folds": [0.9] * 10,
                "threshold_rule": "grid",
                "pairs": 3000,
            },
            "leave_one_out": {
                "rank1": _estimate(0.4 + 0.15 * _SKILL[name], 0.03, 600),
                "rank5": _estimate(0.5 + 0.16 * _SKILL[name], 0.03, 600),
                "probes": 600,
            },
        },
    }


def _comparisons(models: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    pair = [models[name]["protocols"]["age_gap"] for name in ("student_distilled", "student_alone")]
    for mine, other in zip(*([*gap["bins"], gap["all"]] for gap in pair), strict=True):
        values = [
            ("auc", mine["auc"], other["auc"]),
            ("own_auc", mine["own_auc"], other["own_auc"]),
            *((f"tar@{far}", mine["tar"][far], other["tar"][far]) for far in mine["tar"]),
        ]
        for metric, a, b in values:
            difference, spread = a["value"] - b["value"], 0.6 * (a["high"] - a["low"])
            rows.append(
                {
                    "a": "student_distilled",
                    "b": "student_alone",
                    "protocol": "age_gap",
                    "bin": mine["name"],
                    "metric": metric,
                    "difference": {
                        "value": difference,
                        "low": difference - spread,
                        "high": difference + spread,
                        "n": a["n"],
                    },
                    "separate": a["low"] > b["high"],
                }
            )
    return rows


def a_run(bins: tuple[str, ...] = _BINS, kind: str = "gap") -> dict[str, Any]:
    """A run as the demo makes it, with made-up numbers that hang together."""
    models = {name: _model(name, bins, kind) for name in _SKILL}
    steps = list(range(0, 600, 5))
    rng = np.random.default_rng(1)

    def losses(start: float, end: float) -> list[float]:
        fall = end + (start - end) * np.exp(-np.array(steps) / 140)
        return (fall * (1 + 0.08 * rng.standard_normal(len(steps)))).tolist()

    terms = {"identity": losses(21, 4), "angular": losses(0.9, 0.12), "attention": losses(0.4, 0.05)}
    return {
        "format": 1,
        "title": "Two teachers, one light student: drawn faces that age",
        "command": "kdlib-faces demo --output runs/demo --seeds 0",
        "created": "2026-03-01T12:00:00Z",
        "version": "0.1.0",
        "seeds": [0],
        "config": {"student": {"backbone": "mobilefacenet", "lr": 0.05, "fars": [0.01, 0.001]}, "size": 64},
        "environment": {"torch": "2.6.0", "python": "3.11.9", "threads": 2, "platform": "x86_64"},
        "data": {
            "name": "synthetic faces",
            "train_images": 6000,
            "train_identities": 500,
            "test_images": 600,
            "test_identities": 60,
            "notes": ["Test identities are in no training set."],
        },
        "models": models,
        "comparisons": _comparisons(models),
        "weights": {
            "angular": {"general_teacher": 0.41, "age_teacher": 0.59},
            "attention": {"general_teacher": 0.0, "age_teacher": 1.0},
        },
        "training": {
            "general_teacher": {"step": steps, "loss": losses(20, 1.5)},
            "age_teacher": {"step": steps, "loss": losses(22, 1.9)},
            "student_alone": {"step": steps, "loss": losses(21, 4.4)},
            "student_distilled": {"step": steps, "loss": losses(24, 5), "terms": terms},
        },
    }


def _face(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    base = rng.integers(90, 220, 3)
    face = np.where(((x / 0.66) ** 2 + (y / 0.86) ** 2 < 1)[..., None], base, 40)
    for eye in (-0.28, 0.28):
        face[(x - eye) ** 2 + (y + 0.2) ** 2 < 0.012] = 20
    return face.astype(np.uint8)


def some_pictures() -> list[Picture]:
    """The pictures that the demo adds."""
    faces = [_face(seed) for seed in range(8)]
    pairs = [(faces[i], faces[i + 1], f"{3 + i} and {34 + i} years\ncosine 0.{i + 1}2") for i in range(6)]
    y, x = np.mgrid[-1:1:7j, -1:1:7j]
    maps = {name: np.stack([np.exp(-((x - 0.1 * i) ** 2 + y**2)) for i in range(8)]) for name in _SKILL}
    return [
        Picture("pairs_missed", "Same person, least alike", "As the student sees them.", pairs_picture(pairs)),
        Picture("attention", "Where each model looks", "Middle stage.", attention_picture(faces, maps)),
    ]


def a_bare_run() -> dict[str, Any]:
    """The least that is a run."""
    return {"format": 1, "title": "Bare", "models": {"m": {"role": "student", "protocols": {}}}}


class _Page(HTMLParser):
    """Collects tags, attributes and visible text; fails on an end tag that does not match."""

    void: frozenset[str] = frozenset({"meta", "img", "source", "br", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def _read(folder: Path) -> tuple[_Page, str, dict[str, Any]]:
    page = _Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page, (folder / "report.md").read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text())


def _pages(run: dict[str, Any]) -> tuple[str, str]:
    """The visible text of the page, and the Markdown, without drawing: plain spaces, no escapes."""
    view, page = View(to_json(run)), _Page()
    page.feed(html.page(view, {}, [], []))
    assert page.open == []
    return "".join(page.text).replace("\u00a0", " "), markdown.page(view, [], {}, []).replace("\\", "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder, a_run(), pictures=some_pictures())
    return folder


def test_a_whole_report_has_every_part_and_no_half_file(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == ["figures", "report.html", "report.json", "report.md"]
    expected = {f"{plot.name}.png" for plot in FIGURES} | {"attention.png", "pairs_missed.png"}
    assert {p.name for p in (whole / "figures").iterdir()} == expected
    page, written, data = _read(whole)
    assert data["models"] == to_json(a_run()["models"])
    assert data["figures"]["attention"] == "figures/attention.png"
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert sections == {
        *("ages", "differences", "models", "roc", "scores", "training", "pictures", "reproduce", "limits")
    }  # fmt: skip
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in sections}
    linked = set(re.findall(r"\]\((figures/[\w-]+\.png)\)", written))
    assert linked == {f"figures/{name}" for name in expected}


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(whole: Path) -> None:
    page, _, _ = _read(whole)
    source = (whole / "report.html").read_text(encoding="utf-8")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attrs in page.tags:
        assert all(
            (attrs.get(key) or "data:").startswith("data:image/png;base64,")
            for key in ("src", "srcset")
            if key in attrs
        )
        assert not [key for key in attrs if key.startswith("on")]
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    assert "default-src 'none'" in source
    # Four images to a figure: two themes, two widths; one to a picture.
    assert source.count("data:image/png;base64,") == 4 * len(FIGURES) + 2


def test_the_words_say_what_the_numbers_say(whole: Path) -> None:
    page, written, data = _read(whole)
    bins = {name: m["protocols"]["age_gap"]["bins"][-1] for name, m in data["models"].items()}
    rate = {name: record["tar"]["0.01"]["value"] for name, record in bins.items()}
    kept = rate["student_distilled"] / max(rate["general_teacher"], rate["age_teacher"])
    text = "".join(page.text).replace("\u00a0", " ")
    for said in (text, written.replace("\u00a0", " ").replace("\\", "")):
        assert f"keeps {100 * kept:.0f} % of its best teacher's true matches" in said
        assert f"Distilled minus alone: +{100 * (rate['student_distilled'] - rate['student_alone']):.1f} points" in said
        assert "intervals do not overlap" in said
        assert "no claim about people" in said
        assert f"{100 * rate['age_teacher']:.1f} %" in said
        assert f"{bins['student_alone']['own_auc']['value']:.3f}" in said
        assert "One seed was trained" in said


@pytest.mark.parametrize(
    ("low", "high", "separate", "verdict", "words"),
    [
        (0.02, 0.2, True, "gain", "do not overlap"),
        (0.02, 0.2, False, "gain", "stays above zero"),
        (-0.02, 0.2, False, "unclear", "does not show"),
        (-0.2, -0.02, False, "loss", "stays below zero"),
        (None, None, None, "none", "Distilled minus alone"),
    ],
)
def test_a_gain_is_claimed_only_when_its_interval_leaves_zero_out(
    low: float | None, high: float | None, separate: bool | None, verdict: str, words: str
) -> None:
    run = a_run()
    for row in run["comparisons"]:
        row["difference"] |= {"low": low, "high": high}
        row["separate"] = separate
    found = finding(View(run))
    assert found.verdict == verdict
    ends = {"gain": "more than the student alone.", "loss": "fewer than the student alone."}
    ends |= {"unclear": "without a clear gain over the student alone.", "none": "30+ years."}
    assert found.headline.endswith(ends[verdict])
    assert words in " ".join(found.sentences)


def test_a_gain_in_auc_alone_is_not_told_as_one_in_matches() -> None:
    run = a_run()
    run["comparisons"] = [row for row in run["comparisons"] if row["metric"] == "own_auc"]
    found = finding(View(run))
    assert found.headline.endswith("30+ years; its AUC is above the student alone's.")
    assert "hundredths of AUC" in " ".join(found.sentences)


def test_a_student_better_than_its_teachers_is_said_so() -> None:
    run = a_run()
    run["teachers_kept"] = {"30+": 1.25}
    assert finding(View(run)).headline.startswith("The distilled student finds 1.25 times its best teacher's")


def test_models_that_are_only_measured_are_ranked() -> None:
    run = a_run()
    for name in ("student_alone", "student_distilled"):
        del run["models"][name]
    run |= {"comparisons": [], "training": {}, "level": 0.9}
    found = finding(View(run))
    best = run["models"]["age_teacher"]["protocols"]["age_gap"]["bins"][-1]["tar"]["0.01"]["value"]
    start = f"Age teacher finds {100 * best:.1f} % of the genuine pairs with an age gap of 30+ years."
    assert found.headline.replace("\u00a0", " ") == start
    assert found.sentences[0].index("Age teacher") < found.sentences[0].index("General teacher")
    assert "90 % intervals" in found.sentences[0].replace("\u00a0", " ")
    assert looks(View(run), LIGHT)["age_teacher"].strong


def test_the_headline_bin_is_the_one_with_its_own_roc() -> None:
    run = a_run()
    assert View(run).large == "30+"
    for model in run["models"].values():
        model["protocols"]["age_gap"]["roc"] = {"20-29": model["protocols"]["age_gap"]["roc"]["all"]}
    assert View(run).large == "20-29"
    for model in run["models"].values():
        del model["protocols"]["age_gap"]["roc"]
        model["protocols"]["age_gap"]["bins"][-1] |= {"genuine": 0}
    run["comparisons"] = []
    assert View(run).large == "20-29"


def test_rendering_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlib_faces.report.files.FIGURES", FIGURES[1:2])
    write(tmp_path, a_run(), pictures=some_pictures())
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "report.md").unlink()
    (tmp_path / "figures" / "differences.png").write_bytes(b"spoilt")
    assert render(tmp_path) == tmp_path / "report.html"
    after = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) == 6
    assert after == before


def test_a_bare_run_is_a_report(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", a_bare_run())
    page, written, data = _read(tmp_path / "new" / "folder")
    assert data == a_bare_run()
    assert "One model, without an age-gap result." in "".join(page.text)
    assert "# Bare" in written
    assert list((tmp_path / "new" / "folder" / "figures").iterdir()) == []


def _drop(run: dict[str, Any], *path: str) -> None:
    for key in path[:-1]:
        run = run[key]
    del run[path[-1]]


@pytest.mark.parametrize(
    "gone",
    [
        *[(key,) for key in ("command", "created", "version", "seeds", "config", "environment", "data", "weights")],
        ("training",),
        ("comparisons",),
        *[
            ("models", "student_alone", "protocols", name)
            for name in ("age_gap", "verification", "leave_one_out")
        ],
        *[("models", "age_teacher", "protocols", "age_gap", name) for name in ("all", "roc", "histogram")],
        *[("models", "age_teacher", name) for name in ("label", "backbone", "parameters", "macs", "latency_ms")],
        ("models", "student_distilled"),
    ],
    ids=".".join,
)  # fmt: skip
def test_any_optional_part_may_be_missing(gone: tuple[str, ...]) -> None:
    run = a_run()
    _drop(run, *gone)
    if gone == ("models", "student_distilled"):
        run["comparisons"] = []
    check_run(run)
    view = View(run)
    drawn = [plot.draw(view, LIGHT, False) for plot in FIGURES]
    assert sum(figure is not None for figure in drawn) >= 4
    headline = finding(view).headline.replace("\u00a0", " ")
    assert all(headline in text for text in _pages(run))


def test_nothing_measured_is_shown_as_nothing(tmp_path: Path) -> None:
    run = a_run()

    def empty(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: None if k in ("value", "low", "high") else empty(v) for k, v in value.items()}
        return [empty(item) for item in value] if isinstance(value, list) else value

    run["models"] = empty(run["models"])
    run["comparisons"] = empty(run["comparisons"])
    run["models"]["student_alone"]["protocols"]["verification"]["accuracy"] = float("nan")
    write(tmp_path, run)
    page, _, data = _read(tmp_path)
    assert data["models"]["student_alone"]["protocols"]["verification"]["accuracy"] is None
    text = "".join(page.text)
    assert "nan" not in text.lower()
    assert "None" not in text
    assert not (tmp_path / "figures" / "ages.png").exists()


def test_age_groups_lie_down_and_have_no_years() -> None:
    run = a_run(("adult-adult", "adult-senior", "young-young"), "group")
    text, written = _pages(run)
    assert "on young-young pairs" in text
    assert "years" not in finding(View(run)).headline
    assert "Accuracy between age groups" in text
    assert "Accuracy between age groups" in written
    figure = FIGURES[0].draw(View(run), LIGHT, False)
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["adult-adult\nn 812", "adult-senior\nn 640", "young-young\nn 903"]
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]


def test_seeds_are_shown_as_mean_and_range() -> None:
    run, other = a_run(), a_run()
    for model in other["models"].values():
        model["protocols"]["verification"]["accuracy"] -= 0.02
    run["per_seed"] = [{"seed": 0, "models": run["models"]}, {"seed": 1, "models": other["models"]}]
    run["seeds"] = [0, 1]
    check_run(run)
    text, written = _pages(run)
    accuracy = run["models"]["student_alone"]["protocols"]["verification"]["accuracy"]
    mean, low, high = (f"{100 * (accuracy - lost):.1f} %" for lost in (0.01, 0.02, 0.0))
    assert f"{mean}{low} to {high}, 2 seeds" in text
    assert f"{mean} ({low} to {high}, 2 seeds)" in written
    assert "One seed was trained" not in text


def test_flat_numbers_by_seed_are_read_too() -> None:
    run = a_bare_run()
    run["per_seed"] = [{"seed": seed, "models": {"m": {"score": value}}} for seed, value in ((0, 2.0), (1, 4.0))]
    table = seeds_table(View(run))
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == ["score", "3"]
    assert table.rows[0][1].note == "2 to 4, 2 seeds"


_NASTY = "<script>alert(1)</script> & \"'|`*_[x](javascript:1) $\\frac{1}{0}$\n# high"


def test_names_from_outside_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run()
    run["title"] = run["command"] = run["data"]["name"] = _NASTY
    run["data"]["notes"] = [_NASTY]
    run["config"] = {_NASTY: {_NASTY: _NASTY}}
    run["weights"] = {_NASTY: {_NASTY: 1.0}}
    run["training"][_NASTY] = {"step": [1, 2], "loss": [1.0, None], "terms": {_NASTY: [1.0, 2.0], "_x": [1.0, 1.0]}}
    for model in run["models"].values():
        model["label"] = model["backbone"] = "_" + _NASTY
        for record in model["protocols"]["age_gap"]["bins"]:
            record["name"] += _NASTY
    for row in run["comparisons"]:
        row["bin"] += _NASTY if row["bin"] != "all" else ""
        row["metric"] = row["metric"].replace("own_auc", _NASTY)
    for plot in FIGURES:
        figure = plot.draw(View(run), LIGHT, True)
        assert figure is not None
        assert to_png(figure).startswith(b"\x89PNG")
    monkeypatch.setattr("kdlib_faces.report.files.FIGURES", ())
    write(tmp_path, run, pictures=[Picture("x", _NASTY, _NASTY, np.zeros((4, 4, 3), np.uint8))])
    page, written, data = _read(tmp_path)
    assert data["title"] == _NASTY
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert _NASTY in "".join(page.text)
    outside_code = re.sub(r"(?ms)^(`{3,})\n.*?^\1\n", "", written)
    assert "<script" not in outside_code
    assert not re.search(r"(?<!\\)\[x\]", outside_code)
    assert not re.search(r"(?m)^# high", outside_code)
    assert not re.search(r"(?<!\\)\|`", outside_code)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("title",), None, "run.title must be text"),
        (("format",), 2, "run.format must be 1"),
        (("models",), {}, "run.models must be at least one model"),
        (("models", "student_alone", "role"), "judge", "run.models['student_alone'].role must be one of"),
        (("models", "student_alone", "macs"), "many", "run.models['student_alone'].macs must be a number"),
        (("models", "student_alone", "parameters"), True, ".parameters must be a whole number"),
        (("models", "student_alone", "protocols", "age_gap", "kind"), "era", ".age_gap.kind must be one of"),
        (("models", "student_alone", "protocols", "age_gap", "bins", 2, "auc", "value"), "x", ".bins[2].auc.value must be"),
        (("models", "student_alone", "protocols", "age_gap", "bins", 2, "tar"), {"often": None}, "keyed by a false accept"),
        (("models", "student_alone", "protocols", "age_gap", "roc", "all", "tar"), [1], "['all'].tar must be 81 long"),
        (("models", "student_alone", "protocols", "age_gap", "histogram", "impostor"), [1], ".histogram.impostor must be 60"),
        (("training", "student_alone", "loss"), [1.0], "run.training['student_alone'].loss must be 120 long"),
        (("training", "student_distilled", "terms", "angular"), [1.0], ".terms['angular'] must be 120 long"),
        (("comparisons", 3, "a"), "nobody", "run.comparisons[3].a must be a name under models"),
        (("weights",), [1], "run.weights must be a mapping"),
        (("seeds",), 0, "run.seeds must be a list"),
        (("config",), {"when": {1, 2}}, "run['config']['when'] must be"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(tmp_path: Path, path: tuple[Any, ...], value: Any, said: str) -> None:
    run: Any = a_run()
    place = run
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError) as error:
        write(tmp_path / "out", run)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [("title",), ("models",), ("models", "age_teacher", "protocols"), ("format",)])
def test_a_missing_key_is_named(path: tuple[str, ...]) -> None:
    run = a_run()
    _drop(run, *path)
    with pytest.raises(InputError, match=rf"{path[-1]} is missing"):
        check_run(run)


def test_numbers_that_are_no_json_become_null_and_the_run_is_left_alone() -> None:
    run = {"a": (np.float32(1.5), np.int64(2), float("inf")), 0.01: np.array([[1.0, np.nan]]), "p": Path("x/y")}
    before = copy.copy(run)
    assert to_json(run) == {"a": [1.5, 2, None], "0.01": [[1.0, None]], "p": str(Path("x/y"))}
    assert run.keys() == before.keys()
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InputError, match="nested"):
        to_json(deep)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"\xff\xfe", b"[" * 100_000, b"3", b'{"format": 1}'])
def test_a_broken_report_json_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(InputError, match="report: "):
        render(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        render(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="directory must be a folder"):
        write(tmp_path / "file", a_bare_run())


def test_a_record_cannot_pull_in_a_file_from_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (3, 3), "red").save(secret)
    inside = tmp_path / "out" / "figures"
    inside.mkdir(parents=True)
    (inside / "text.png").write_text("no picture")
    (inside / "link.png").symlink_to(secret)
    run = a_bare_run() | {
        "figures": {
            "up": "figures/../../secret.png", "root": str(secret), "text": "figures/text.png", "link": "figures/link.png",
            "gone": "figures/gone.png", "nul": "a\0b",
        }
    }  # fmt: skip
    write(tmp_path / "out", run)
    page, written, _ = _read(tmp_path / "out")
    assert not [tag for tag, _ in page.tags if tag == "img"]
    for name in run["figures"]:
        assert f"The picture '{name}' was recorded" in "".join(page.text)
    assert "secret" not in written


def test_a_failed_write_leaves_the_old_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a_bare_run())
    before = (tmp_path / "report.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, a_bare_run() | {"title": "New"})
    assert (tmp_path / "report.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_figure_that_no_longer_applies_goes(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "roc.png").write_bytes(b"old")
    (tmp_path / "figures" / "mine.png").write_bytes(b"kept")
    write(tmp_path, a_bare_run())
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["mine.png"]


def test_models_look_alike_in_every_figure_and_unlike_each_other() -> None:
    view = View(a_run())
    assert view.names[:2] == ["student_alone", "student_distilled"]
    for theme in (LIGHT, DARK):
        style = looks(view, theme)
        assert style["student_alone"].color == theme.alone
        assert style["student_distilled"].color == theme.distilled
        assert len({look.color for look in style.values()}) == len(style)
        assert len({look.mark for look in style.values()}) == len(style)
    many = {"format": 1, "title": "t", "models": {f"m{i}": {"role": "student", "protocols": {}} for i in range(9)}}
    assert len(looks(View(many), LIGHT)) == 9


def test_intervals_of_one_bin_never_cover_each_other() -> None:
    figure = FIGURES[0].draw(View(a_run()), LIGHT, False)
    assert figure is not None
    axes = figure.axes[0]
    places = [round(float(line.get_xdata()[-1]), 3) for line in axes.lines if line.get_linestyle() == "None"]
    last = [place for place in places if 3.5 < place < 4.5]
    assert len(set(last)) >= len(_SKILL)
    gaps = np.diff(sorted(set(last)))
    assert gaps.min() > 0.1


def test_a_figure_has_the_color_of_the_page() -> None:
    for theme in (LIGHT, DARK):
        figure = FIGURES[1].draw(View(a_run()), theme, True)
        assert figure is not None
        with Image.open(io.BytesIO(to_png(figure))) as image:
            assert image.convert("RGB").getpixel((1, 1)) == tuple(bytes.fromhex(theme.page[1:]))


def test_pictures_are_checked() -> None:
    face = _face(0)
    assert Picture("a-b_1", "t", "c", Image.fromarray(face)).pixels.size == (96, 96)
    for name in ("", "../x", "a b", "a.png", "x" * 65, 3):
        with pytest.raises(InputError, match=r"Picture\.name"):
            Picture(name, "t", "c", face)  # type: ignore[arg-type]  # a wrong kind on purpose
    for image in (face / 255.0, face[..., 0], np.zeros((0, 4, 3), np.uint8), "face.png"):
        with pytest.raises(InputError, match="image"):
            Picture("x", "t", "c", image)


def test_pictures_need_names_of_their_own(tmp_path: Path) -> None:
    face = _face(0)
    with pytest.raises(InputError, match=r"pictures\[0\]\.name"):
        write(tmp_path, a_bare_run(), pictures=[Picture("roc", "t", "c", face)])
    with pytest.raises(InputError, match=r"pictures\[1\]\.name"):
        write(tmp_path, a_bare_run(), pictures=[Picture("x", "t", "c", face)] * 2)


def test_pairs_are_laid_out_in_rows() -> None:
    faces = [_face(seed) for seed in range(2)]
    one, three, four = (pairs_picture([(*faces, "a\n" + "long words " * 40)] * n) for n in (1, 3, 4))
    assert one.height == three.height
    assert three.width == four.width > one.width
    assert four.height > three.height
    assert one.getpixel((40, 40)) == tuple(faces[0][0, 0])
    with pytest.raises(InputError, match="pairs_picture"):
        pairs_picture([])


def test_attention_is_warm_where_the_map_is_high() -> None:
    face = np.full((112, 112, 3), 100, np.uint8)
    maps = np.zeros((1, 8, 8))
    maps[0, :, 4:] = 1.0
    page = np.asarray(attention_picture([face], {"flat": np.ones((1, 2, 2)), "student": maps})).astype(int)
    row = page[-120, :, :]
    left, right = row[240], row[-40]
    assert right.sum() > left.sum() + 100
    assert right[0] > right[2] + 20
    for bad in (np.ones((2, 8, 8)), np.ones((1, 8)), np.full((1, 2, 2), np.nan)):
        with pytest.raises(InputError, match=r"maps\['bad'\]"):
            attention_picture([face], {"bad": bad})
    with pytest.raises(InputError, match="at least one image"):
        attention_picture([], {})
