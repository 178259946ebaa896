"""The documentation builds without warnings, is complete and offline, and shows the stored figures."""

import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import kdlib
import kdlib.functional
import kdlib.schedules

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    target = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "-b", "html", "-d", str(target / ".trees")]
    done = subprocess.run([*command, "docs", str(target)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def documented_names(html: Path) -> list[str]:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((html / "objects.inv").read_bytes(), uri="")
    return [name for kind in inventory.data if kind.startswith("py:") for name in inventory.data[kind]]


def resolve(name: str) -> object:
    parts = name.split(".")
    # Skip the module of that name: a function may have the name of its file.
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part, None)
        return value
    return None


PACKAGES = [
    "kdlib", "kdlib.adapters", "kdlib.cache", "kdlib.functional", "kdlib.influence", "kdlib.losses", "kdlib.objective",
    "kdlib.projections", "kdlib.testing", "kdlib.training", "kdlib.weighting", "kdlib_faces.alignment", "kdlib_faces.data", "kdlib_faces.evaluation",
    "kdlib_faces.export", "kdlib_faces.heads", "kdlib_faces.losses", "kdlib_faces.teachers",
]  # fmt: skip


def test_every_public_name_is_documented(built: Path) -> None:
    found = {id(resolve(entry)) for entry in documented_names(built)}
    for package in PACKAGES:
        module = importlib.import_module(package)
        public = {name: getattr(module, name) for name in module.__all__}
        names = {name for name, value in public.items() if isinstance(value, (type, types.FunctionType))}
        assert {name for name in names if id(public[name]) not in found} == set(), package


def test_the_first_api_page_lists_every_public_name() -> None:
    page = (ROOT / "docs/api/kdlib.rst").read_text("utf-8")
    listed = re.findall(r"^   ~(\S+)$", page, re.MULTILINE)
    functions = {name.removeprefix("functional.") for name in listed if name.startswith("functional.")}
    assert functions == set(kdlib.functional.__all__)
    schedules = {name.removeprefix("schedules.") for name in listed if name.startswith("schedules.")}
    assert schedules == set(kdlib.schedules.__all__)
    others = {name.rsplit(".", 1)[-1] for name in listed if not name.startswith(("functional.", "schedules."))}
    assert others == set(kdlib.__all__) - {"__version__"}


def test_pages_load_nothing_from_outside(built: Path) -> None:
    loads = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?stylesheet[^>]*//""")
    pages = sorted(built.rglob("*.html"))
    assert len(pages) > 20
    assert [page.name for page in pages if loads.search(page.read_text("utf-8"))] == []
    assert any("<math" in page.read_text("utf-8") for page in pages)


def test_the_version_is_the_same_everywhere() -> None:
    import tomllib

    import kdlib_faces

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert kdlib.__version__ == declared == kdlib_faces.__version__
    assert declared in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_picture_shows_the_stored_figures() -> None:
    Image = pytest.importorskip("PIL.Image", reason="the faces extra is not installed")
    digest = hashlib.sha256((ROOT / "benchmarks" / "results" / "synthetic.json").read_bytes()).hexdigest()
    with Image.open(ROOT / "docs" / "_static" / "by_age_gap.png") as picture:
        assert picture.text["source"] == digest, "run python benchmarks/draw_figures.py"


def test_the_study_shows_the_stored_figures() -> None:
    pytest.importorskip("matplotlib", reason="the faces extra is not installed")
    folder = ROOT / "benchmarks" / "study"
    spec = importlib.util.spec_from_file_location("study_show", folder / "show.py")
    assert spec is not None
    assert spec.loader is not None
    show = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(show)
    assert show.table(*show.read("choose")) in (ROOT / "docs" / "study.md").read_text("utf-8")


def test_names_in_the_text_are_linked(built: Path) -> None:
    losses = (built / "api" / "losses.html").read_text("utf-8")
    assert re.search(r'href="functional.html#kdlib[.a-z_]*hint"[^>]*><code', losses)
    concepts = (built / "concepts.html").read_text("utf-8")
    assert re.search(r'href="api/[a-z]*.html#kdlib[.a-z_]*TeacherAdapter"[^>]*><code', concepts)


def test_the_table_of_losses_shows_the_stored_figures() -> None:
    stored = (ROOT / "benchmarks" / "results" / "losses_synthetic.json").read_text("utf-8")
    rows: dict[str, Any] = json.loads(stored)["runs"][0]["rows"]
    page = (ROOT / "docs" / "which_loss.md").read_text("utf-8")
    shown = {cells[1].strip("` "): cells[3:7] for line in page.splitlines() if len(cells := line.split("|")) == 8}
    helpers = {"attention_map", "channel_attention_map", "linear_soft_target", "overhaul_margin"}
    for name in {*kdlib.functional.__all__, *rows} - helpers - {"alone", "general teacher"}:
        row = rows[name]
        for at, (kind, gap, sign) in enumerate(
            [("tar", "all", ""), ("over_alone", "all", "+"), ("tar", "30+", ""), ("over_alone", "30+", "+")]
        ):
            value, low, high = (format(100 * row[kind][gap][key], f"{sign}.1f") for key in ("value", "low", "high"))
            assert shown[name][at].strip() == f"{value} ({low} to {high})", (name, kind, gap)
