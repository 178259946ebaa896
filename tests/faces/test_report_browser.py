"""Reports in a real browser: no errors, no requests, nothing overflows, figures in the colors of the page."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdlib_faces.report import Picture, pairs_picture, write
from tests.faces.browser import CHROMIUM, Browser, chromium
from tests.faces.report_sample import sample_report
from tests.faces.set_files import face

pytestmark = pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"{CHROMIUM} is absent")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    report = sample_report()
    pairs = [(face(at, 0), face(at, 1), f"−0.1{at} · Somebody_{at}\nSomebody_else") for at in range(6)]
    report.evaluations[0].pictures = ["rejects"]
    report.data.notes.append("long_word_" * 30)
    report.command = "kdlib-faces evaluate " + "--model a_model_with_a_rather_long_name.onnx " * 6
    pictures = [Picture(name, "Pairs", "Pairs.", pairs_picture(pairs)) for name in ("rejects", "accepts")]
    return write(tmp_path_factory.mktemp("report"), report, pictures=pictures)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 768, 1280, 1440, 1920])
@pytest.mark.parametrize("dark", [False, True])
def test_a_report_is_complete_in_a_browser(
    browser: Browser, page: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    result = browser.open(page, width, dark=dark)
    assert browser.errors() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert result["width"] == result["scroll"] == width
    assert result["background"] == ("rgb(15, 19, 25)" if dark else "rgb(244, 246, 249)")
    assert result["sections"] == 8
    assert len(result["figures"]) == 8
    for figure in result["figures"]:
        assert 400 <= figure["shown"][0] <= 1104, figure
        assert figure["shown"][1] >= 150, figure
        assert figure["ink"] == ("rgb(231, 234, 240)" if dark else "rgb(27, 35, 48)"), figure
    assert len(result["pictures"]) == 2
    for picture in result["pictures"]:
        assert min(picture["natural"]) >= 200, picture
        assert picture["levels"] > 8, picture  # more than one color
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        mean = np.asarray(image.convert("L")).mean()
    assert mean < 70 if dark else mean > 200


def test_broken_pages_are_noticed(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        '<body style="width:2000px"><img src="data:image/png;base64,AAAA"><img src="missing.png">'
        '<script>console.error("no"); throw new Error("also no")</script>'
    )
    result = browser.open(tmp_path / "bad.html", 390)
    assert result["scroll"] >= 2000
    assert [picture["natural"] for picture in result["pictures"]] == [[0, 0], [0, 0]]
    assert len(browser.errors()) >= 2
    assert any(address.endswith("missing.png") for address in browser.requests())
