"""The report: report.json is read strictly, pages escape all text, and headlines and figures agree with the numbers."""

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kdlib_faces._checks import InputError
from kdlib_faces.evaluation.summary import Difference, Measure, MeasuredValue, ModelSummary, ProtocolSummary
from kdlib_faces.report import ModelEntry, Picture, Report, SeedEntry, attention_picture, pairs_picture, render, write
from kdlib_faces.report.curves import RUN_PLOTS
from kdlib_faces.report.findings import finding, key_figures, remarks
from kdlib_faces.report.numbers import amount, count, interval, isolate, seconds
from kdlib_faces.report.pages import html_page, markdown_page
from kdlib_faces.report.plots import PLOTS, rate_limits
from kdlib_faces.report.reader import to_json
from kdlib_faces.report.tables import bins_table, differences_table, measures_table, seeds_table
from kdlib_faces.report.theme import PAGE, PALETTE, inline_svg, looks, to_svg
from tests.faces.report_sample import SKILL, rate, sample_report
from tests.faces.set_files import face

FIGURES = {"cost", "training", *(f"lfw-{name}" for name in ("errors", "bins", "scores", "differences"))}
FIGURES |= {"ijbc-ranks", "ijbc-bins"}
NASTY = "<script>alert(1)</script> & \"'|`*_[x](javascript:1) $\\frac{1}{0}$\n# high"


def bare_report() -> Report:
    return Report("Bare", {"m": ModelEntry("student")})


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on an end tag that does not match."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)


def pages(report: Report) -> tuple[str, str]:
    """The text of both documents, without figures."""
    markdown = markdown_page(report, [], []).replace("\\", "").replace("\u00a0", " ")
    return Page(html_page(report, {}, [])).text, markdown


def draw(report: Report, name: str, plot: str) -> Figure:
    figure = PLOTS[plot].draw(report, next(each for each in report.evaluations if each.name == name))
    assert figure is not None
    return figure


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report = sample_report()
    report.evaluations[0].pictures = ["lfw_0_rejects"]
    pixels = np.full((12, 12, 3), 90, np.uint8)
    write(folder, report, pictures=[Picture(name, name, "c", pixels) for name in ("lfw_0_rejects", "free")])
    return folder


def test_a_report_has_all_files_sections_and_figures(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["figures", "report.html", "report.json", "report.md"]
    names = {path.name for path in (written / "figures").iterdir()}
    assert names == {f"{name}.svg" for name in FIGURES} | {"lfw_0_rejects.png", "free.png"}
    source = (written / "report.html").read_text("utf-8")
    page, markdown = Page(source), (written / "report.md").read_text("utf-8")
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["overview", "p-lfw", "p-ijbc", "models", "training", "pictures", "setup", "limits"]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{name}" for name in sections]
    assert sum(tag == "svg" for tag, _ in page.tags) == len(FIGURES)
    assert set(re.findall(r"\]\(figures/([\w.-]+)\)", markdown)) == names
    inside = dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', source, re.DOTALL))
    assert "<h3>lfw_0_rejects" in inside["p-lfw"]
    assert "<h3>lfw_0_rejects" not in inside["pictures"]


def test_the_page_loads_nothing_and_runs_nothing(written: Path) -> None:
    source = (written / "report.html").read_text("utf-8")
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attrs in page.tags:
        assert (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attrs.get("xlink:href") or "#").startswith("#")
        assert not [key for key in attrs if key.startswith("on")]
    assert not re.search(r"https?://", source)
    assert not re.search(r"url\((?!#)", source)
    assert "default-src 'none'" in source
    names = re.findall(r'\bid="([^"]+)"', source)
    assert len(names) == len(set(names))


def test_figures_follow_the_colors_of_the_page_and_are_files_of_their_own(written: Path) -> None:
    source = (written / "report.html").read_text("utf-8")
    inline = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert not re.search(r": #[0-9a-f]{6}[;\"]", inline)
    used = set(re.findall(r"var\(--(\w+)\)", inline))
    defined = re.findall(r"--(\w+):#", source)
    assert used <= {name for name in defined if defined.count(name) == 2}  # in the light and in the dark theme
    file = (written / "figures" / "lfw-errors.svg").read_text("utf-8")
    assert file.startswith("<?xml")
    assert PALETTE[0] in file
    assert "var(" not in file


def test_rendering_again_gives_the_same_bytes(written: Path) -> None:
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    (written / "report.md").unlink()
    (written / "figures" / "cost.svg").write_bytes(b"damaged")
    (written / "figures" / "old-bins.svg").write_bytes(b"of a protocol that is gone")
    (written / "figures" / "mine.svg").write_bytes(b"not of the report")
    assert render(written) == written / "report.html"
    after = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    assert after.pop(written / "figures" / "mine.svg")
    assert after == before
    (written / "figures" / "mine.svg").unlink()


def test_a_report_without_results_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", bare_report())
    folder = tmp_path / "new" / "folder"
    assert json.loads((folder / "report.json").read_text()) == {
        "format": 1, "title": "Bare", "models": {"m": {"role": "student"}},
    }  # fmt: skip
    assert "One model, nothing measured." in Page((folder / "report.html").read_text("utf-8")).text
    assert (folder / "report.md").read_text("utf-8").startswith("# Bare\n")
    assert list((folder / "figures").iterdir()) == []
    empty = ProtocolSummary("x", "Empty", models={"m": ModelSummary()})
    report = replace(bare_report(), evaluations=[empty])
    assert all(plot.draw(report, empty) is None for plot in PLOTS.values())
    assert all(plot.draw(report) is None for plot in RUN_PLOTS.values())
    assert all("Empty" in text for text in pages(report))


def test_values_that_are_not_finite_or_missing_are_shown_as_missing(tmp_path: Path) -> None:
    report = sample_report()
    for result in report.evaluations[0].models.values():
        result.measures = {key: MeasuredValue(float("nan")) for key in result.measures}
    write(tmp_path, report)
    text = Page((tmp_path / "report.html").read_text("utf-8")).text
    assert "nan" not in text.lower()
    assert "None" not in text


def test_both_documents_state_conventions_counts_and_limits() -> None:
    for text in pages(sample_report()):
        for part in (
            "grid of squared distances, chosen on the other nine folds", "mean of a medium, sum over media", "19,593",
            "395 pairs left out", "scores/lfw-distilled.csv", "† Not resolvable", "The faces are synthetic",
            "One seed was trained", "standard deviation over folds", "TAR is the share", "AUC is the probability",
        ):  # fmt: skip
            assert part in text
    plain = replace(sample_report(), evaluations=[], training={}, data=replace(sample_report().data, synthetic=False))
    starts = ["12 pairs left", "The numbers describe", "Intervals are", "The picture 'lost'"]
    assert [line.startswith(start) for line, start in zip(remarks(plain, ["lost"]), starts, strict=True)] == [True] * 4


def test_tables_contain_the_measured_values() -> None:
    report = sample_report()
    lfw, ijbc = report.evaluations
    table = measures_table(report, lfw)
    assert table.columns == ["", *(f"{name}.onnx" for name in SKILL)]
    value = lfw.models["distilled"].measures["accuracy"].value
    assert table.rows[0][1].text == f"{100 * value:.2f}\u00a0%"
    assert table.rows[0][1].note.endswith("; ± 0.61 over folds")
    assert [row[1].text.endswith("†") for row in table.rows] == [False, False, True, False]
    bins = bins_table(report, lfw, "fnmr")
    assert [row[0].text for row in bins.rows] == ["0–4", "5–9", "10–19", "20–29", "30+"]
    assert [cell.text for cell in bins.rows[3]] == ["20–29", "0", "–", "–", "–"]
    differences = differences_table(report, lfw)
    assert [row[1].text for row in differences.rows[:3]] == ["Accuracy"] * 3
    assert [row[3].text for row in differences.rows[:3]] == ["above zero", "includes zero", "below zero"]
    assert differences.rows[0][2].text == "+6.00"
    lfw.differences = [row for row in lfw.differences if (row.a, row.b) == ("distilled", "alone")]
    single = differences_table(report, lfw)
    assert single.columns == ["distilled.onnx − alone.onnx", "Difference, points", "Its interval"]
    assert measures_table(report, ijbc).rows[2][1].text == "−0.007"


def test_several_seeds_are_shown_as_mean_and_range() -> None:
    report = sample_report()
    assert seeds_table(report) is None
    report.per_seed = [SeedEntry(seed, {"alone": {"lfw": {"auc": value}}}) for seed, value in ((0, 0.9), (1, 0.8))]
    table = seeds_table(report)
    assert table is not None
    assert [[cell.text for cell in row] for row in table.rows] == [["LFW pairs: AUC", "–", "0.8500", "–"]]
    assert table.rows[0][2].note == "0.8000 to 0.9000; 2 seeds"
    assert all("0.8000 to 0.9000; 2 seeds" in text and "One seed" not in text for text in pages(report))


@pytest.mark.parametrize(
    ("value", "unit", "text", "spread"),
    [
        (MeasuredValue(0.99184, 0.99, 0.994), "rate", "99.18 %", "99.00 to 99.40"),
        (MeasuredValue(0.99984, 0.9997, 0.9999), "auc", "0.9998", "0.9997 to 0.9999"),
        (MeasuredValue(-0.0123, -0.02, 0.001), "score", "−0.012", "−0.020 to 0.001"),
        (MeasuredValue(1234.5), "number", "1234", ""),
        (MeasuredValue(0.5, resolvable=False), "rate", "50.00 % †", ""),
        (MeasuredValue(None, 0.1, 0.2), "rate", "–", ""),
    ],
)
def test_values_have_the_form_of_their_unit(value: MeasuredValue, unit: Any, text: str, spread: str) -> None:
    assert amount(value, unit).replace("\u00a0", " ") == text
    assert interval(value, unit) == spread


def test_counts_and_durations_have_units() -> None:
    counts = {None: "–", 900: "900", 12_345: "12.3 k", 1_003_136: "1.00 M", 22_600_000: "22.6 M", 2.61e9: "2.61 G"}
    assert {each: count(each).replace("\u00a0", " ") for each in counts} == counts
    durations = {None: "–", 3.21: "3.2 s", 52.3: "52 s", 130: "2 min 10 s", 9000: "2 h 30 min"}
    assert {each: seconds(each) for each in durations} == durations


def with_first_difference(report: Report, low: float | None, high: float | None, better: Any = "high") -> Report:
    lfw = report.evaluations[0]
    lfw.measures = {"accuracy": Measure("Accuracy", note="ten folds", better=better)}
    for result in lfw.models.values():
        result.measures = {"accuracy": result.measures["accuracy"]}
    value = None if low is None or high is None else (low + high) / 2
    lfw.differences = [Difference("distilled", "alone", "accuracy", MeasuredValue(value, low, high))]
    return report


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict", "end"),
    [
        (0.02, 0.2, "high", "gain", "is better than the student trained alone."),
        (0.02, 0.2, "low", "loss", "is worse than the student trained alone."),
        (-0.2, -0.02, "high", "loss", "is worse than the student trained alone."),
        (-0.02, 0.2, "high", "unclear", "without a clear gain over the student trained alone."),
        (None, None, "high", "none", "Accuracy (ten folds)."),
    ],
)
def test_the_headline_claims_a_gain_only_if_its_interval_excludes_zero(
    low: float | None, high: float | None, better: str, verdict: str, end: str
) -> None:
    report = with_first_difference(sample_report(), low, high, better)
    result = finding(report)
    assert result.verdict == verdict
    assert result.headline.endswith(end)
    values = {name: each.measures["accuracy"].value for name, each in report.evaluations[0].models.items()}
    share = f"{100 * values['distilled'] / values['teacher']:.0f} % of the best teacher's Accuracy"
    assert (share in result.headline.replace("\u00a0", " ")) == (better == "high")
    assert ("does not show an effect" in " ".join(result.sentences)) == (verdict == "unclear")
    del report.models["teacher"]
    assert finding(report).headline.startswith("The distilled student reaches 5")


@pytest.mark.parametrize(
    ("student", "teacher", "tiles"),
    [
        ((1e6, 2e8, 8.42), (2.9e6, 4e8, 4.68), {"Parameters": "2.9 × fewer", "Time for one image": "1.8 × slower"}),
        ((1e6, 2e8, 4.0), (1e6, 4e8, 60.0), {"Parameters": "the same", "Time for one image": "15 × faster"}),
        ((3e6, 2e8, None), (1e6, 4e8, 4.0), {"Parameters": "3.0 × more", "Multiply-adds": "2.0 × fewer"}),
        ((None, None, None), (1e6, 4e8, 4.0), {}),
    ],
)
def test_key_figures_compare_size_and_speed_with_the_teacher(student: Any, teacher: Any, tiles: dict[str, str]) -> None:
    report = sample_report()
    for name, costs in (("distilled", student), ("teacher", teacher)):
        entry = report.models[name]
        entry.parameters, entry.macs, entry.latency_ms = costs
    shown = {each.name: each.value for each in key_figures(report)}
    assert {name: value for name, value in shown.items() if "against" in name} == {
        f"{name}, against the teacher": value for name, value in tiles.items()
    }


def test_overlapping_intervals_of_the_students_are_stated() -> None:
    report = with_first_difference(sample_report(), 0.02, 0.2)
    assert "own intervals do not overlap" in " ".join(finding(report).sentences)
    for result in report.evaluations[0].models.values():
        result.measures = {"accuracy": rate(0.5, 100)}
    assert "own intervals overlap" in " ".join(finding(report).sentences)


@pytest.mark.parametrize(
    ("first", "second", "better", "headline"),
    [
        ((0.9, 0.8, 0.7), None, "high", "distilled.onnx has the best Accuracy (ten folds) on LFW pairs."),
        ((0.9, 0.8, 0.7), None, "low", "teacher.onnx has the best Accuracy (ten folds) on LFW pairs."),
        ((0.9, 0.95, 0.95), None, "high", "alone.onnx and teacher.onnx share the best Accuracy (ten folds) on LFW pairs."),
        ((0.9, 0.95003, 0.95004), None, "high", "alone.onnx and teacher.onnx share the best Accuracy (ten folds) on LFW pairs."),
        ((0.5, 0.5, 0.5), None, "high", "No model is ahead of the others."),
        ((0.9, None, None), None, "high", "No model is ahead of the others."),
        ((0.9, 0.8, 0.7), None, "none", "No model is ahead of the others."),
        ((0.9, 0.8, 0.7), (0.9, 0.9, 0.7), "high", "distilled.onnx is ahead on 1 of 2 protocols."),
        ((0.9, 0.9, 0.7), (0.9, 0.9, 0.7), "high", "No model is ahead of the others."),
        ((0.9, 0.8, 0.7), (0.7, 0.8, 0.9), "high", "distilled.onnx and teacher.onnx are each ahead on 1 of 2 protocols."),
    ],
)  # fmt: skip
def test_the_headline_names_the_leading_models(first: Any, second: Any, better: Any, headline: str) -> None:
    report = replace(with_first_difference(sample_report(), None, None, better), pair=None)
    report.evaluations[0].differences = []
    report.evaluations = report.evaluations[: 1 if second is None else 2]
    for summary, key, values in zip(report.evaluations, ("accuracy", "rank1"), (first, second), strict=False):
        for result, value in zip(summary.models.values(), values, strict=True):
            result.measures[key] = MeasuredValue(value)
    assert finding(report).headline == headline
    assert key_figures(report) == []


def test_the_headline_counts_clear_differences_and_describes_a_single_model() -> None:
    report = replace(sample_report(), pair=None)
    text = "teacher.onnx is ahead on 2 of 2 protocols; 1 of 2 paired differences are clearly in its favor."
    assert finding(report).headline == text
    one = replace(with_first_difference(report, -0.2, -0.1, "low"), evaluations=report.evaluations[:1])
    for place, result in enumerate(one.evaluations[0].models.values()):
        result.measures["accuracy"] = rate(0.1 + 0.1 * place, 100)
    assert finding(one).headline.endswith("LFW pairs, and the interval of every paired difference excludes zero.")
    one.models = {"distilled": one.models["distilled"]}
    assert finding(one).headline.replace("\u00a0", " ") == "distilled.onnx: Accuracy (ten folds) 10.00 % on LFW pairs."


def test_det_axes_are_normal_deviates_labeled_with_rates() -> None:
    report = sample_report()
    figure = draw(report, "lfw", "errors")
    figure.draw_without_rendering()
    roc, det = figure.axes
    assert [axes.get_title(loc="left") for axes in (roc, det)] == ["ROC", "DET"]
    assert [label.get_text() for label in det.get_xticklabels()][-3:] == ["5 %", "20 %", "40 %"]
    np.testing.assert_allclose(det.get_xticks()[-3:], [-1.6448536, -0.8416212, -0.2533471], atol=1e-6)
    curve = report.evaluations[0].models["distilled"].roc
    assert curve is not None
    inside = [far for far, tar in zip(curve.far, curve.tar, strict=True) if far < 1 and 0 < tar < 1]
    assert len(det.lines[-1].get_xdata()) == len(inside)
    assert det.lines[-1].get_color() == looks(report)["distilled"].color


def test_bands_are_interrupted_at_empty_bins() -> None:
    figure = draw(sample_report(), "lfw", "bins")
    (axes,) = figure.axes
    values = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    assert all(np.isnan(value[3]) and np.isfinite(value[[0, 1, 2, 4]]).all() for value in values)
    assert len(axes.collections) == 6  # a band, and the interval of the last bin, for each model
    assert [label.get_text() for label in axes.get_xticklabels()][3] == "20–29\nn 0"


def test_differences_have_the_color_of_the_better_model() -> None:
    report = sample_report()
    styles = looks(report)

    def faces() -> dict[str, set[Any]]:
        figure = draw(report, "lfw", "differences")
        return {
            axes.get_title(loc="left"): {line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"}
            for axes in figure.axes
        }

    assert faces() == {
        "distilled.onnx minus alone.onnx": {styles["distilled"].color},
        "distilled.onnx minus teacher.onnx": {PAGE},
        "alone.onnx minus teacher.onnx": {styles["teacher"].color},
    }
    report.evaluations[0].measures = {
        key: replace(measure, better="low", title="Rate") for key, measure in report.evaluations[0].measures.items()
    }
    assert faces()["distilled.onnx minus alone.onnx"] == {styles["alone"].color}
    figure = draw(report, "lfw", "differences")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "Rate\nten folds"


def test_models_differ_in_color_and_mark() -> None:
    styles = looks(sample_report())
    assert len({style.color for style in styles.values()}) == len({style.mark for style in styles.values()}) == 3
    assert [style.dash == "-" for style in styles.values()] == [True, True, False]
    assert len(looks(Report("t", {f"m{i}": ModelEntry("student") for i in range(12)}))) == 12


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_rates_have_an_axis(value: float) -> None:
    axes = Figure().add_subplot()
    for which, limits in (("x", axes.get_xlim), ("y", axes.get_ylim)):
        rate_limits(axes, value, value, which=which)
        low, high = limits()
        assert 0 <= low <= value <= high
        assert high - low > 1e-4


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    report = sample_report()
    report.title = report.command = report.data.name = NASTY
    report.data.notes, report.config, report.weights = [NASTY], {NASTY: {NASTY: NASTY}}, {NASTY: {NASTY: 1.0}}
    report.training["distilled"].terms = {NASTY: report.training["distilled"].loss, "_x": report.training["alone"].loss}
    for model in report.models.values():
        model.label = model.backbone = "_" + NASTY
    for summary in report.evaluations:
        summary.title = summary.question = summary.difference_rule = NASTY
        summary.convention, summary.notes, summary.counts = {NASTY: NASTY}, [NASTY], {NASTY: 1}
        summary.scores = {"distilled": NASTY}
        summary.measures = {key: replace(each, title=NASTY, note=NASTY) for key, each in summary.measures.items()}
        for key, each in summary.bins.items():
            summary.bins[key] = replace(each, title=NASTY, axis="axis", labels=[NASTY] * len(each.labels))
    write(tmp_path, report, pictures=[Picture("x", NASTY, NASTY, np.zeros((4, 4, 3), np.uint8))])
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert " ".join(NASTY.split()) in page.text
    assert json.loads((tmp_path / "report.json").read_text())["title"] == NASTY
    outside_code = re.sub(r"(?ms)^(`{3,})\n.*?^\1\n", "", (tmp_path / "report.md").read_text("utf-8"))
    assert "<script" not in outside_code
    assert not re.search(r"(?<!\\)\[x\]", outside_code)
    assert not re.search(r"(?m)^# high", outside_code)
    assert not re.search(r"(?<!\\)\|`", outside_code)


GONE = object()


def place(content: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set a value of nested mappings and lists, or delete its key."""
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value
    if value is GONE:
        del content[path[-1]]


LFW, RESULT = ("evaluations", 0), ("evaluations", 0, "models", "distilled")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), GONE, "run.format is missing"),
        (("title",), GONE, "run.title is missing"),
        (("models", "teacher", "role"), GONE, "run.models['teacher'].role is missing"),
        (("format",), 2, "run.format must be 1"),
        (("title",), None, "run.title must be text"),
        (("models",), {}, "run.models must be 1 to 100 entries, got 0"),
        (("evaluations",), [None] * 201, "run.evaluations[0] must be a mapping"),
        ((*LFW, "counts", "images"), -1, "run.evaluations[0].counts must be >= 0, got -1"),
        ((*RESULT, "roc"), {"far": [0.5] * 200_000, "tar": []}, ".roc.far must be at most 100,000 entries, got 200000"),
        (("models", "alone", "role"), "judge", "run.models['alone'].role must be one of 'teacher', 'student', got 'judge'"),
        (("models", "alone", "macs"), "many", "run.models['alone'].macs must be a number"),
        (("models", "alone", "macs"), 10**400, "['macs'] must be at most 1.8e+308 in magnitude"),
        (("models", "alone", "macs"), -1.0, "run.models['alone'].macs must be a number >= 0"),
        (("models", "alone", "train_seconds"), -5, "run.models['alone'].train_seconds must be a number >= 0"),
        (("models", "alone", "parameters"), True, ".parameters must be a whole number >= 0"),
        (("models", "alone", "color"), 1, "run.models['alone'] must be a mapping with keys among role"),
        (("pair",), {"distilled": "alone", "alone": "nobody"}, "run.pair.alone must be among distilled"),
        (("seeds",), 0, "run.seeds must be a list"),
        (("weights",), [1], "run.weights must be a mapping"),
        (("data", "synthetic"), "no", "run.data.synthetic must be true or false"),
        (("level",), float("nan"), "run.level must be a number, got None"),
        (("level",), 95, "run.level must be above 0 and below 1, got 95"),
        (("weights", "embedding", "age"), 59.0, "run.weights['embedding'] must be from 0 to 1, got 59.0"),
        (("training",), {"nobody": {"step": [], "loss": []}}, "run.training must be among distilled"),
        (("per_seed",), [{"seed": 0, "models": {"nobody": {}}}], "run.per_seed[0].models must be among distilled"),
        (("per_seed",), [{"seed": 0, "models": {"alone": {"x": {}}}}], "per_seed[0].models['alone'] must be among lfw"),
        (("per_seed",), [{"seed": 0, "models": {"alone": {"lfw": {"x": 1}}}}], "['alone']['lfw'] must be among accuracy"),
        (("pictures",), {"../x": {"title": "t"}}, "run.pictures must be keyed by names"),
        (("training", "alone", "loss"), [1.0], "run.training['alone'].loss must be 120 long to fit step"),
        (("training", "distilled", "terms", "identity"), [1.0], ".terms['identity'] must be 120 long"),
        ((*LFW, "name"), "a b", "run.evaluations[0].name must be 1 to 48 letters, digits or _, used once"),
        (("evaluations", 1, "name"), "LFW", "run.evaluations[1].name must be"),
        ((*LFW, "measures", "auc", "unit"), "furlong", ".measures['auc'].unit must be one of"),
        ((*LFW, "bins", "fnmr", "counts"), [1], ".bins['fnmr'].counts must be 5 long to fit labels"),
        ((*LFW, "models", "impostor"), {}, "run.evaluations[0].models must be among distilled, alone, teacher"),
        ((*LFW, "scores"), ["x"], "run.evaluations[0].scores must be a mapping"),
        ((*LFW, "scores"), {"nobody": "x"}, "run.evaluations[0].scores must be among distilled"),
        ((*LFW, "measures"), None, "run.evaluations[0].measures must be a mapping, got None"),
        ((*LFW, "pictures"), ["gone"], "run.evaluations[0].pictures must be among lfw_0_rejects, free, got 'gone'"),
        ((*LFW, "differences", 0, "difference", "value"), -1.5, ".differences[0].difference must be from -1 to 1"),
        ((*LFW, "differences", 2, "a"), "nobody", "run.evaluations[0].differences[2].a must be among"),
        ((*LFW, "differences", 0, "measure"), "speed", "run.evaluations[0].differences[0].measure must be among"),
        ((*RESULT, "measures", "speed"), {"value": 1}, ".measures must be among accuracy, tar_0.01"),
        ((*RESULT, "measures", "auc", "value"), 10**400, "['auc']['value'] must be at most"),
        ((*RESULT, "measures", "auc", "value"), "x", ".measures['auc'].value must be a number"),
        ((*RESULT, "measures", "auc", "high"), 1.01, ".measures['auc'] must be from 0 to 1, got 1.01"),
        ((*RESULT, "measures", "auc", "low"), 0.995, ".measures['auc'].low must be at most the high end, got 0.995"),
        ((*RESULT, "measures"), None, ".models['distilled'].measures must be a mapping, got None"),
        ((*RESULT, "bins", "fnmr", 0, "value"), 1.5, ".bins['fnmr'][0] must be from 0 to 1, got 1.5"),
        ((*RESULT, "bins", "fnmr"), [{}], ".bins['fnmr'] must be 5 long to fit labels"),
        ((*RESULT, "roc", "tar", 0), 1.5, ".roc.tar must be from 0 to 1, got 1.5"),
        ((*RESULT, "roc", "far", 0), -0.5, ".roc.far must be from 0 to 1, got -0.5"),
        ((*RESULT, "histogram", "edges", 1), -1.0, ".histogram.edges must be at least two numbers that rise"),
        ((*RESULT, "histogram", "edges"), [], ".histogram.edges must be at least two numbers that rise"),
        ((*RESULT, "histogram", "genuine", 0), -3, ".histogram.genuine must be >= 0, got -3"),
        ((*RESULT, "roc", "tar"), [0.5], ".roc.tar must be 60 long to fit far"),
        ((*RESULT, "histogram", "genuine"), [1], ".histogram.genuine must be 80 long to fit edges"),
        (("evaluations", 1, "models", "alone", "cmc", "rate"), [], ".cmc.rate must be 20 long to fit rank"),
        (("evaluations", 1, "models", "alone", "search", "tpir"), [], ".search.tpir must be 40 long to fit fpir"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_report_json_is_named_with_its_path(
    written: Path, tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    content = json.loads((written / "report.json").read_text("utf-8"))
    place(content, path, value)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        render(tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"report: {tmp_path / 'report.json'}: ")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3", b"[1]", b'{"format": 1}', b'{"a": 1, "a": 2}', b"9" * 5000],
)
def test_a_broken_report_json_is_an_input_error(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(InputError, match="report: "):
        render(tmp_path)
    monkeypatch.setattr("kdlib_faces.report.files._MAX_BYTES", 2)
    (tmp_path / "report.json").write_bytes(b"   ")
    with pytest.raises(InputError, match="larger than"):
        render(tmp_path)


def test_folders_that_cannot_be_used_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        render(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="the output must be a folder"):
        write(tmp_path / "file", bare_report())


def test_a_link_in_place_of_the_figures_folder_is_not_followed(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("cost.svg", "lfw-bins.svg", "x-bins.svg"):
        (other / name).write_text("kept")
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_bytes((written / "report.json").read_bytes())
    (report / "figures").symlink_to(other)
    with pytest.raises(InputError, match="figures must be a folder and no link"):
        render(report)
    with pytest.raises(InputError, match="figures must be a folder and no link"):
        write(report, bare_report())
    assert {file.read_text() for file in other.iterdir()} == {"kept"}
    assert len(list(other.iterdir())) == 3


def test_json_has_only_plain_finite_shallow_values() -> None:
    values = {"a": (np.float32(1.5), np.int64(2), float("inf")), 0.01: np.array([[1.0, np.nan]]), "p": Path("x/y")}
    assert to_json(values) == {"a": [1.5, 2, None], "0.01": [[1.0, None]], "p": str(Path("x/y"))}
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InputError, match="nested at most"):
        to_json(deep)
    with pytest.raises(InputError, match=r"run\['when'\] must be text"):
        to_json({"when": {1, 2}})


def test_only_png_files_inside_the_report_are_shown(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (3, 3), "red").save(secret)
    figures = tmp_path / "out" / "figures"
    write(tmp_path / "out", bare_report(), pictures=[Picture(n, n, "", face(0, 0)) for n in ("text", "link", "gone")])
    (figures / "text.png").write_text("no picture")
    (figures / "link.png").unlink()
    (figures / "link.png").symlink_to(secret)
    (figures / "gone.png").unlink()
    page = Page(render(tmp_path / "out").read_text("utf-8"))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    for name in ("text", "link", "gone"):
        assert f"The picture '{name}' is listed in report.json but missing on disk." in page.text


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, bare_report())
    before = (tmp_path / "report.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, replace(bare_report(), title="New"))
    assert (tmp_path / "report.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pictures_need_valid_names_and_images(tmp_path: Path) -> None:
    pixels = np.asarray(face(0, 0))
    assert Picture("a-b_1", "t", "c", Image.fromarray(pixels)).pixels.size == (32, 32)
    for name in ("", "../x", "a b", "a.png", "x" * 65, 3):
        with pytest.raises(InputError, match=r"Picture\.name"):
            Picture(name, "t", "c", pixels)  # type: ignore[arg-type]  # a wrong type on purpose
    for image in (pixels / 255.0, pixels[..., 0], np.zeros((0, 4, 3), np.uint8), "face.png"):
        with pytest.raises(InputError, match="image"):
            Picture("x", "t", "c", image)  # type: ignore[arg-type]  # a wrong type on purpose
    with pytest.raises(InputError, match=r"pictures\[1\]\.name must be used once"):
        write(tmp_path, bare_report(), pictures=[Picture("x", "t", "c", pixels)] * 2)


def test_pairs_are_laid_out_in_rows() -> None:
    faces = [face(seed, 0) for seed in range(2)]
    one, three, four = (pairs_picture([(*faces, "a\n" + "long words " * 40)] * n) for n in (1, 3, 4))
    assert one.height == three.height < four.height
    assert three.width == four.width > one.width
    with pytest.raises(InputError, match="pairs_picture"):
        pairs_picture([])


def test_attention_is_warm_where_the_map_is_high() -> None:
    pixels, maps = np.full((112, 112, 3), 100, np.uint8), np.zeros((1, 8, 8))
    maps[0, :, 4:] = 1.0
    page = np.asarray(attention_picture([pixels], {"flat": np.ones((1, 2, 2)), "student": maps})).astype(int)
    left, right = page[-120, 240], page[-120, -40]
    assert right.sum() > left.sum() + 100
    assert right[0] > right[2] + 20
    for bad in (np.ones((2, 8, 8)), np.ones((1, 8)), np.full((1, 2, 2), np.nan)):
        with pytest.raises(InputError, match=r"maps\['bad'\]"):
            attention_picture([pixels], {"bad": bad})
    with pytest.raises(InputError, match="at least one image"):
        attention_picture([], {})


def test_names_cannot_change_the_text_around_them(tmp_path: Path) -> None:
    report = sample_report()
    names = {
        "distilled": "\u202ereversed",
        "alone": "\u05e9\u05dc\u05d5\u05dd",
        "teacher": "a\u2069b\x1b[31m\x00\ud800c",
    }
    for name, label in names.items():
        report.models[name].label = report.models[name].backbone = label
    report.title, report.evaluations[0].title, report.command = "t\x07\u202e", "\u2067x", "run \x1b"
    write(tmp_path, report)
    for file in tmp_path.rglob("*"):
        text = file.read_text("utf-8") if file.suffix in (".html", ".md", ".svg") else ""
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), file
    documents = pages(report)
    for shown in ("\u2068\u202ereversed\u2069", "\u2068\u05e9\u05dc\u05d5\u05dd\u2069"):
        for text in documents:
            assert shown in text
            assert text.count(shown[1:-1]) == text.count(shown)
    assert "\u2068ab\\x1b[31m\\x00\\ud800c\u2069" in documents[0]
    assert isolate("\u2067x") == "\u2068\u2067x\u2069\u2069"
    assert isolate("Zoë") == "Zoë"


def test_equal_figures_give_equal_svg_and_titles_are_escaped() -> None:
    first, second = (to_svg(draw(copy.deepcopy(sample_report()), "ijbc", "bins"), "x") for _ in range(2))
    assert first == second
    assert 'aria-label="&lt;b&gt; &quot;"' in inline_svg(first, '<b> "')
