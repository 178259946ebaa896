"""The scripts of `docs/examples` run, and what they train improves."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: path for path in sorted((ROOT / "docs" / "examples").glob("*.py"))}
NEEDS = {
    "accelerate_loop": "accelerate",
    "bert_classifiers": "transformers",
    "causal_language_models": "transformers",
    "hugging_face_trainer": "transformers",
    "lightning_module": "lightning",
}
RESULT = re.compile(r"^(.+): ([\d.]+) -> ([\d.]+)$", re.MULTILINE)


def run(name: str, folder: Path) -> str:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed (the trainers extra)")
    command = [sys.executable, *([] if name in NEEDS else ["-W", "error"]), str(SCRIPTS[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_student_of_an_example_improves(name: str, tmp_path: Path) -> None:
    shown = run(name, tmp_path)
    what, before, after = RESULT.findall(shown)[-1]
    if "loss" in what:
        assert float(after) < 0.6 * float(before)
    else:
        assert float(after) > float(before) + 0.3
    assert list(tmp_path.iterdir()) == [], "an example leaves no files"


def test_there_are_ten_short_examples() -> None:
    assert len(SCRIPTS) == 10
    assert NEEDS.keys() <= SCRIPTS.keys()
    page = (ROOT / "docs" / "trainers.md").read_text("utf-8") + (ROOT / "docs" / "examples.md").read_text("utf-8")
    for name, path in SCRIPTS.items():
        assert 40 <= len(path.read_text("utf-8").splitlines()) <= 100, name
        assert f"examples/{name}.py" in page, name
