"""The tutorials of `docs/learn` run, and their pages and figures show the stored results."""

import hashlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "learn"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index")
NEEDS = {"text": ("transformers",), "photographs": ("onnx", "onnxruntime")} | dict.fromkeys(
    ("cached", "digits", "own_loss", "several_gpus", "shrink", "vit", "weightings"), ("sklearn",)
)
# What already holds after the few steps of `--quick`: the first model is better than the second.
QUICK = {
    "digits": [("student distilled, no labels", "student alone, 50 labels")],
    "shrink": [("shrunken, rate 0.001, before training", "random weights, after 20 steps")],
    "weightings": [("student: confidence", "student: uniform"), ("student: confidence", "student: entropy")],
    "age_gap": [("discriminant", "eigenfaces")],
}
# What the pages say about the stored results.
STORED = QUICK | {
    "digits": [("student distilled, no labels", "student alone, 200 labels")],
    "cached": [("student, 16 views", "student, 4 views"), ("student, 4 views", "student, the images alone")],
    "language": [("student alone", "student distilled")],  # the perplexity is lower
    "vit": [("student, soft targets", "student, 100 labels")],
    "own_loss": [("student, hellinger", "student alone, 100 labels")],
    "weightings": [
        ("teacher: good", "student: confidence"),
        ("student: confidence", "student: entropy"),
        ("student: entropy", "student: uniform"),
        ("student: uniform", "student: gradient"),
    ],
}
# Learning rates, the level of intervals, chance, and the end of an axis.
SETTINGS = {"0.01", "0.001", "95", "50", "60"}


def skip_without(name: str) -> None:
    for package in ("matplotlib", "PIL", *NEEDS.get(name, ())):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (the dev, faces, onnx and trainers extras have it)")


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    skip_without("")
    spec = importlib.util.spec_from_file_location("tutorial", FOLDER / "tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tutorial"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def means(path: Path) -> dict[str, float]:
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {row["model"]: statistics.fmean(row["values"]) for row in rows}


@pytest.mark.parametrize("name", PAGES)
def test_a_tutorial_runs(name: str, tmp_path: Path) -> None:
    skip_without(name)
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    found, stored = means(tmp_path / "results" / f"{name}.json"), means(FOLDER / "results" / f"{name}.json")
    steps = re.compile(r"after \d+ steps")
    assert {steps.sub("", model) for model in found} <= {steps.sub("", model) for model in stored}
    for better, worse in QUICK.get(name, ()):
        assert found[better] > found[worse]
    assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_stored_results(name: str, tutorial: ModuleType) -> None:
    text = (FOLDER / "results" / f"{name}.json").read_bytes()
    page = (FOLDER / f"{name}.md").read_text("utf-8")
    lesson = tutorial.read(FOLDER / "results" / f"{name}.json")
    assert tutorial.table(lesson) in page, f"run python docs/learn/{name}.py --output docs/learn"
    assert f"](figures/{name}.png)" in page
    for better, worse in STORED.get(name, ()):
        assert lesson.mean(better) > lesson.mean(worse)
    # Every other percentage and decimal number outside of code is a stored one.
    prose = re.sub(
        r"^```.*?^```$|`[^`]*`", "", page.replace(tutorial.table(lesson), ""), flags=re.MULTILINE | re.DOTALL
    )
    shown = set(re.findall(r"\d[\d,]*\.\d+|\d+(?= %)", prose))
    known = [*lesson.numbers.values(), *(statistics.fmean(row.values) for row in lesson.rows)]
    formatted = {format(value, f".{digits}f") for value in known for digits in range(4)}
    assert shown - SETTINGS <= formatted

    Image = pytest.importorskip("PIL.Image", reason="the faces extra is not installed")
    with Image.open(FOLDER / "figures" / f"{name}.png") as picture:
        assert picture.text["source"] == hashlib.sha256(text).hexdigest()


def test_every_tutorial_is_listed() -> None:
    index = (FOLDER / "index.md").read_text("utf-8")
    assert len(PAGES) == 12
    for name in PAGES:
        assert f"]({name}.md)" in index
        assert f"\n{name}\n" in index
