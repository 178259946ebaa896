"""The part of a report that shows protocols: tables, figures, words, and the shape that is checked."""

from __future__ import annotations

import copy
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from kdlib_faces._checks import InputError
from kdlib_faces.report import Picture, check_run, html, markdown, plots, to_json, write
from kdlib_faces.report.evaluation_tables import (
    bins_table,
    differences_table,
    measured_words,
    measures_table,
    overview_table,
    spread_words,
)
from kdlib_faces.report.evaluations import Measured
from kdlib_faces.report.plots import PLOTS
from kdlib_faces.report.summary import evaluations_finding
from kdlib_faces.report.theme import DARK, LIGHT, lay_out_like, looks, to_png
from kdlib_faces.report.view import View
from tests.faces.report_sample import a_run_of_protocols


@pytest.fixture
def run() -> Any:
    return to_json(a_run_of_protocols())


def drawn(view: View, name: str, plot: str, *, narrow: bool = False) -> Any:
    evaluation = next(each for each in view.evaluations if each.name == name)
    return PLOTS[plot][2](view, evaluation, LIGHT, narrow)


def pages(run: Any) -> tuple[str, str]:
    view = View(run)
    text = unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", html.page(view, {}, [], []))).replace("\u00a0", " ")
    return re.sub(r" +", " ", text), markdown.page(view, [], {}, []).replace("\\", "").replace("\u00a0", " ")


def test_a_report_of_protocols_has_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = to_png(drawn(View(a_run_of_protocols()), "ijbc", "bins"))
    monkeypatch.setattr("kdlib_faces.report.files._both", lambda light, dark: (png, png))
    face = np.full((12, 12, 3), 90, np.uint8)
    sample = a_run_of_protocols()
    sample["evaluations"][0]["pictures"] = ["lfw_0_rejects"]
    write(
        tmp_path,
        sample,
        pictures=[Picture("lfw_0_rejects", "Least alike", "c", face), Picture("other", "o", "c", face)],
    )
    made = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert made == {
        *("lfw-errors", "lfw-bins", "lfw-scores", "lfw-differences", "ijbc-ranks", "ijbc-bins"),
        *("lfw_0_rejects", "other"),
    }  # fmt: skip
    page, written = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    sections = re.findall(r'<section id="([\w-]+)">(.*?)</section>', page, re.DOTALL)
    assert [name for name, _ in sections] == [
        *("overview", "p-lfw", "p-ijbc", "models", "pictures", "reproduce", "limits")
    ]  # fmt: skip
    inside = dict(sections)
    assert "Least alike" in inside["p-lfw"]
    assert "Least alike" not in inside["pictures"]
    assert page.count("<picture>") == 6
    linked = set(re.findall(r"\]\((figures/[\w-]+)\.png\)", written))
    assert linked == {f"figures/{name}" for name in made}
    assert (
        json.loads((tmp_path / "report.json").read_text())["evaluations"][0]["measures"]["accuracy"]["unit"] == "rate"
    )


def test_pages_name_the_convention_and_flag_what_cannot_be_resolved(run: Any) -> None:
    for text in pages(run):
        assert "grid of squared distances, chosen on the other nine folds" in text
        assert "mean of a medium, sum over media" in text
        assert re.search(r"TAR, FAR 0\.1 %\W+\d+\.\d\d % †", text)
        assert "† Not resolvable" in text
        assert "19,593" in text
        assert "395 pairs left out" in text
        assert "scores/lfw-general.csv" in text
    for text in pages(run):
        assert "Ten-fold accuracy picks the threshold" in text
        assert "Wilson's take pairs or probes as independent" in text


def test_tables_hold_what_was_measured(run: Any) -> None:
    view = View(run)
    lfw, ijbc = view.evaluations
    table = measures_table(view, lfw)
    assert table.columns == ["", "general.onnx", "second.onnx", "student.onnx"]
    assert [row[0].text.replace("\u00a0", " ") for row in table.rows] == [
        "Accuracy",
        "TAR, FAR 1 %",
        "TAR, FAR 0.1 %",
        "AUC",
    ]
    value = run["evaluations"][0]["models"]["general"]["measures"]["accuracy"]["value"]
    assert table.rows[0][1].text == f"{100 * value:.2f}\u00a0%"
    assert table.rows[0][1].note.endswith("; ± 0.61 over folds")
    assert table.rows[2][1].text.endswith("†")
    assert not table.rows[1][1].text.endswith("†")
    bins = bins_table(view, lfw, lfw.bins[0])
    assert [row[0].text for row in bins.rows] == ["0–4", "5–9", "10–19", "20–29", "30+"]
    assert [cell.text for cell in bins.rows[3]] == ["20–29", "0", "–", "–", "–"]
    different = differences_table(view, lfw)
    assert [row[1].text for row in different.rows[:3]] == ["Accuracy"] * 3
    assert [row[3].text for row in different.rows[:3]] == ["includes zero", "above zero", "above zero"]
    assert different.rows[0][2].text == "+1.00"
    only = run["evaluations"][0]["differences"]
    only[:] = [row for row in only if (row["a"], row["b"]) == ("general", "student")]
    alone = differences_table(View(run), View(run).evaluations[0])
    assert alone.columns == ["general.onnx − student.onnx", "Difference, points", "Its interval"]
    assert [row[0].text.replace("\u00a0", " ") for row in alone.rows] == ["Accuracy", "TAR, FAR 1 %", "AUC"]
    overview = overview_table(view)
    assert [row[0].text for row in overview.rows] == ["LFW pairs", "IJB-C 1:N"]
    assert measures_table(view, ijbc).rows[2][1].text == "−0.007"


@pytest.mark.parametrize(
    ("found", "unit", "value", "spread"),
    [
        (Measured(0.99184, 0.99, 0.994), "rate", "99.18 %", "99.00–99.40"),
        (Measured(0.99984, 0.9997, 0.9999), "auc", "0.9998", "0.9997–0.9999"),
        (Measured(-0.0123, -0.02, 0.001), "score", "−0.012", "−0.020 to 0.001"),
        (Measured(1234567.0), "number", "1.235e+06", ""),
        (Measured(0.5, resolvable=False), "rate", "50.00 % †", ""),
        (Measured(None, 0.1, 0.2), "rate", "–", ""),
    ],
)
def test_numbers_in_words(found: Measured, unit: str, value: str, spread: str) -> None:
    assert measured_words(found, unit).replace("\u00a0", " ") == value
    assert spread_words(found, unit) == spread


def test_the_headline_says_who_is_ahead_and_how_surely(run: Any) -> None:
    assert evaluations_finding(View(run)).headline == (
        "general.onnx is ahead on 1 of 2 protocols; "
        "1 of 2 paired differences of the first measures leave zero out in its favor."
    )
    accuracy = {
        name: run["evaluations"][0]["models"][name]["measures"]["accuracy"] for name in ("general", "second", "student")
    }
    for name, value in (("general", 0.9), ("second", 0.8), ("student", 0.7)):
        accuracy[name]["value"] = value
    assert "ahead on 2 of 2 protocols" in evaluations_finding(View(run)).headline
    del run["evaluations"][1]
    for row in run["evaluations"][0]["differences"]:
        row["difference"]["low"] = 0.001
    finding = evaluations_finding(View(run))
    assert finding.headline == (
        "general.onnx has the best Accuracy on LFW pairs, and every paired interval of that measure leaves zero out."
    )
    assert finding.sentences == [
        "LFW pairs, Accuracy: general.onnx 90.00\u00a0%; second.onnx 80.00\u00a0%; student.onnx 70.00\u00a0%."
    ]
    run["evaluations"][0]["measures"]["accuracy"]["better"] = "low"
    assert evaluations_finding(View(run)).headline.startswith("student.onnx has the best")
    run["evaluations"][0]["measures"] = {}
    for model in run["evaluations"][0]["models"].values():
        model["measures"] = {}
    run["evaluations"][0]["differences"] = []
    assert evaluations_finding(View(run)).headline == "3 models, without a number."


def test_a_lower_error_rate_is_a_lead_and_a_higher_one_is_none(run: Any) -> None:
    del run["evaluations"][1]
    (entry,) = run["evaluations"]
    entry["measures"]["accuracy"]["better"] = "low"
    measured = {name: entry["models"][name]["measures"]["accuracy"] for name in entry["models"]}
    for rank, name in enumerate(("second", "general", "student")):
        measured[name]["value"] = 0.1 + 0.1 * rank
    row = entry["differences"][0]
    entry["differences"] = [row | {"a": "second", "b": "general", "measure": "accuracy"}]
    for low, high, said in (
        (-0.12, -0.08, "and every paired interval of that measure leaves zero out."),
        (0.08, 0.12, "0 of 1 paired differences of that measure leave zero out in its favor."),
        (-0.12, 0.01, "0 of 1 paired differences of that measure leave zero out in its favor."),
    ):
        entry["differences"][0]["difference"] = {"value": (low + high) / 2, "low": low, "high": high, "n": 100}
        headline = evaluations_finding(View(run)).headline
        assert headline.startswith("second.onnx has the best Accuracy")
        assert headline.endswith(said)


def test_det_axes_are_normal_deviates_with_rates_for_labels(run: Any) -> None:
    figure = drawn(View(run), "lfw", "errors")
    figure.draw_without_rendering()
    roc, det = figure.axes
    assert [axes.get_title(loc="left") for axes in (roc, det)] == ["ROC", "DET"]
    labels = [label.get_text() for label in det.get_xticklabels()]
    assert labels[-3:] == ["5 %", "20 %", "40 %"]
    places = det.get_xticks()[-3:]
    np.testing.assert_allclose(places, [-1.6448536, -0.8416212, -0.2533471], atol=1e-6)
    line = det.lines[-1]
    curve = run["evaluations"][0]["models"]["general"]["roc"]
    inside = [(f, t) for f, t in zip(curve["far"], curve["tar"], strict=True) if f < 1 and 0 < t < 1]
    assert len(line.get_xdata()) == len(inside)
    assert line.get_color() == looks(View(run), LIGHT)["general"].color


def test_bands_leave_out_empty_bins_and_break_there(run: Any) -> None:
    figure = drawn(View(run), "lfw", "bins")
    (axes,) = figure.axes
    values = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    assert all(np.isnan(value[3]) and np.isfinite(value[[0, 1, 2, 4]]).all() for value in values)
    assert len(axes.collections) == 6  # a band and the interval of the lone last bin, for each model
    assert [label.get_text() for label in axes.get_xticklabels()][3] == "20–29\nn 0"
    for model in run["evaluations"][0]["models"].values():
        model["bins"]["fnmr"] = [None] * 5
    assert drawn(View(run), "lfw", "bins") is None


def test_differences_take_the_color_of_the_better_model(run: Any) -> None:
    view = View(run)
    style = looks(view, LIGHT)
    figure = drawn(view, "lfw", "differences")
    faces = {}
    for axes in figure.axes:
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        faces[axes.get_title(loc="left")] = {mark.get_markerfacecolor() for mark in marks}
    assert faces == {
        "general.onnx minus second.onnx": {LIGHT.page},
        "general.onnx minus student.onnx": {style["general"].color},
        "second.onnx minus student.onnx": {style["second"].color},
    }
    run["evaluations"][0]["measures"]["accuracy"]["better"] = "low"
    first = drawn(View(run), "lfw", "differences").axes[1].lines
    assert next(line for line in first if line.get_marker() == "o").get_color() == style["student"].color


def test_rows_of_one_title_are_told_apart(run: Any) -> None:
    run["evaluations"][0]["measures"]["tar_0.01"] = {"title": "Accuracy", "note": "of the hard ones"}
    labels = [label.get_text() for label in drawn(View(run), "lfw", "differences").axes[0].get_yticklabels()]
    assert labels == ["Accuracy\nten folds", "Accuracy\nof the hard ones", "AUC"]


def test_every_plot_is_a_picture_at_both_widths_and_nothing_without_data(run: Any) -> None:
    view = View(run)
    for evaluation in view.evaluations:
        for name in PLOTS:
            wide, narrow = (drawn(view, evaluation.name, name, narrow=each) for each in (False, True))
            assert (wide is None) == (narrow is None)
            if wide is not None:
                assert narrow.get_size_inches()[0] == 5.0
    bare: dict[str, Any] = {**run, "evaluations": [{"name": "x", "title": "x", "models": {"general": {}}}]}
    check_run(bare)
    for name in PLOTS:
        assert drawn(View(bare), "x", name) is None
    assert all("x" in text for text in pages(bare))


def test_a_dark_figure_has_the_layout_of_the_light_one(run: Any) -> None:
    view = View(run)
    light = drawn(view, "ijbc", "bins")
    to_png(light)
    dark = lay_out_like(PLOTS["bins"][2](view, view.evaluations[1], DARK, False), light)
    for one, other in zip(light.axes, dark.axes, strict=True):
        np.testing.assert_allclose(one.get_position().bounds, other.get_position().bounds)
    assert dark.get_layout_engine() is None or not dark.get_layout_engine().adjust_compatible


_NASTY = "<script>alert(1)</script> & \"'|`*_[x](javascript:1) $\\frac{1}{0}$\n# high"


def test_names_from_outside_stay_text(run: Any) -> None:
    for entry in run["evaluations"]:
        entry["title"] = entry["question"] = entry["difference_rule"] = _NASTY
        entry["convention"], entry["notes"], entry["counts"] = {_NASTY: _NASTY}, [_NASTY], {_NASTY: 1}
        entry["scores"] = {"general": _NASTY}
        for measure in entry["measures"].values():
            measure["title"] = measure["note"] = _NASTY
        for bins in (entry.get("bins") or {}).values():
            bins["title"] = bins["axis"] = _NASTY
            bins["labels"] = [_NASTY] * len(bins["labels"])
    view = View(run)
    page, written = html.page(view, {}, [], []), markdown.page(view, ["lfw-bins", "lfw-differences"], {}, [])
    assert "<script" not in page
    outside_code = re.sub(r"`[^`]*`", "", written)
    assert "<script" not in outside_code
    assert not re.search(r"(?<!\\)\[x\]", outside_code)
    for name in ("bins", "differences"):
        assert to_png(drawn(view, "lfw", name)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((0, "name"), "a b", "run.evaluations[0].name must be 1 to 48 letters, digits or _, used once"),
        ((1, "name"), "LFW", "run.evaluations[1].name must be"),
        ((0, "title"), None, "run.evaluations[0].title must be text"),
        ((0, "measures", "auc", "unit"), "furlong", ".measures['auc'].unit must be one of"),
        ((0, "models", "general", "measures", "speed"), {"value": 1}, ".measures must be among accuracy, tar_0.01"),
        ((0, "models", "general", "measures", "auc", "value"), "x", ".measures['auc'].value must be a number"),
        ((0, "models", "general", "bins", "fnmr"), [None], ".bins['fnmr'] must be 5 long to fit labels"),
        ((0, "models", "general", "roc", "tar"), [0.5], ".roc.tar must be 60 long to fit far"),
        ((0, "models", "general", "histogram", "genuine"), [1], ".histogram.genuine must be 80 long to fit edges"),
        ((0, "models", "stranger"), {}, "run.evaluations[0].models must be among general, second, student"),
        ((0, "bins", "fnmr", "counts"), [1], ".bins['fnmr'].counts must be 5 long to fit labels"),
        ((0, "differences", 2, "a"), "nobody", "run.evaluations[0].differences[2].a must be among"),
        ((0, "differences", 0, "measure"), "speed", "run.evaluations[0].differences[0].measure must be among"),
        ((0, "scores"), ["x"], "run.evaluations[0].scores must be a mapping"),
    ],
)
def test_a_wrong_key_is_named(run: Any, path: tuple[Any, ...], value: Any, said: str) -> None:
    place = copy.deepcopy(run)
    wrong = place
    place = place["evaluations"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError) as error:
        check_run(wrong)
    assert said in str(error.value)


def test_pictures_take_no_figures_name(tmp_path: Path) -> None:
    picture = Picture("lfw-errors", "t", "c", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(InputError, match=r"pictures\[0\]\.name"):
        write(tmp_path / "out", a_run_of_protocols(), pictures=[picture])


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_rates_that_are_all_alike_have_an_axis(rate: float) -> None:
    figure = Figure()
    for which in "xy":
        axes = figure.add_subplot()
        plots._rates(axes, rate, rate, which=which)
        low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
        assert 0 <= low <= rate <= high
        assert high - low > 1e-4
