"""Reports looked at in a real browser: nothing complains, every picture is one, nothing overflows, nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdlib_faces.report import Picture, pairs_picture, write
from tests.faces.browser import CHROMIUM, Browser, chromium
from tests.faces.report_sample import a_run_of_protocols
from tests.faces.set_files import face

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is absent")

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = a_run_of_protocols()
    pairs = [
        (face(number, 0), face(number, 1), f"−0.1{number} · Somebody_{number}\nSomebody_else") for number in range(6)
    ]
    run["evaluations"][0]["pictures"] = ["lfw_0_rejects", "lfw_0_accepts"]
    run["data"]["notes"].append("long_word_" * 30)
    run["command"] = "kdlib-faces evaluate " + "--model a_model_with_a_rather_long_name.onnx " * 6
    pictures = [
        Picture(name, "Pairs", "The worst.", pairs_picture(pairs)) for name in run["evaluations"][0]["pictures"]
    ]
    return write(tmp_path_factory.mktemp("report"), run, pictures=pictures)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_is_whole_in_a_browser(browser: Browser, report: Path, width: int, dark: bool) -> None:
    found = browser.open(report, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [report.resolve().as_uri()]
    assert found["width"] == width
    assert found["scroll"] == width
    assert found["background"] == ("rgb(15, 19, 25)" if dark else "rgb(244, 246, 249)")
    assert found["sections"] == 6
    assert len(found["pictures"]) == 8
    for picture in found["pictures"]:
        assert picture["complete"], picture
        assert min(picture["natural"]) >= 200, picture
        assert min(picture["shown"]) >= 90, picture
        assert picture["levels"] > 8, picture  # not one color
        assert width < 600 or picture["shown"][0] <= 1104


def test_the_dark_page_shows_the_dark_figures(browser: Browser, report: Path, tmp_path: Path) -> None:
    means: dict[bool, Any] = {}
    for dark in (False, True):
        browser.open(report, 1280, dark=dark)
        browser.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as image:
            assert image.width == 1280
            assert image.height > 3000
            means[dark] = np.asarray(image.convert("L")).mean()
    assert means[True] < 60
    assert means[False] > 200


def test_the_browser_test_sees_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        '<body style="width:2000px"><img src="data:image/png;base64,AAAA"><img src="missing.png">'
        '<script>console.error("no"); throw new Error("also no")</script>'
    )
    found = browser.open(tmp_path / "bad.html", 390)
    assert found["scroll"] >= 2000
    assert [picture["natural"] for picture in found["pictures"]] == [[0, 0], [0, 0]]
    assert len(browser.complaints()) >= 2
    assert any(address.endswith("missing.png") for address in browser.requests())
