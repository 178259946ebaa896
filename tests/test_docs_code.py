"""The code on the pages of the documentation runs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.script_runner import ScriptRunner, script_runner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    f"{page.relative_to(ROOT).with_suffix('')}-{number}": code
    for page in PAGES
    for number, code in enumerate(BLOCK.findall(page.read_text("utf-8")))
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptRunner]:
    with script_runner(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


@pytest.mark.skipif(not hasattr(os, "fork"), reason="scripts run in forks, which this system does not have")
@pytest.mark.parametrize("name", BLOCKS)
def test_code_on_the_pages_runs(run: ScriptRunner, name: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[name], encoding="utf-8")
    done = run(script, ROOT)
    assert done.code == 0, done.stderr


def test_the_pages_contain_code() -> None:
    assert len(BLOCKS) >= 8
    assert sum(name.startswith("README-") for name in BLOCKS) >= 2
