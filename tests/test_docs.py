"""The documentation builds without warnings, is complete and offline, and shows the stored figures."""

import argparse
import doctest
import hashlib
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import kdlib
import kdlib.functional
import kdlib.losses
import kdlib.schedules
from tests.faces.browser import CHROMIUM, Browser, chromium

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_a_page_of_a_loss_has_formula_arguments_example_source_and_links(built: Path) -> None:
    for name in (name for name in kdlib.losses.__all__ if name.endswith("Loss")):
        page = (built / "api" / "generated" / f"kdlib.losses.{name}.html").read_text("utf-8")
        assert {
            part for part in ("&gt;&gt;&gt; ", "Parameters", '<details class="source">', "seealso") if part not in page
        } == set(), name
        if "_function" in vars(getattr(kdlib.losses, name)):
            assert "<math" in page, name
            assert "kdlib.functional." in page, name


EXAMPLES = [package for package in PACKAGES if package.split(".")[0] == "kdlib"] + [
    "kdlib.types",
    "kdlib.schedules",
    "kdlib.online",
]


@pytest.mark.parametrize("package", EXAMPLES)
def test_every_class_and_function_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    lacking = {
        name for name, value in values.items()
        if isinstance(value, (type, types.FunctionType)) and ">>> " not in (value.__doc__ or "")
    }  # fmt: skip
    # Errors without attributes, and the dictionaries of a checkpoint.
    assert lacking <= {"CacheError", "CheckpointError", "CheckpointState", "StepValues", "StreamState"}


FACES_EXAMPLES = [
    f"kdlib_faces.{name}"
    for name in (
        "alignment", "backbones", "config", "data", "demo", "evaluation", "export", "heads", "losses", "recipes", "report",
        "teachers", "training",
    )
]  # fmt: skip
WITHOUT_EXAMPLE = {
    "Configuration", "FaceDataWarning", "IdentityOverlapWarning", "ProtocolResult", "Result",
    "AlignResult", "align_photos",  # need a detector
    "run",  # takes minutes
    "read_agedb_pairs",  # needs a MATLAB file
    "shard_head",  # needs several processes
    "convert_float16", "export_onnx", "export_program", "quantize_onnx",  # take seconds, or need the onnx extra
}  # fmt: skip


def has_example(value: object) -> bool:
    return ">>> " in (value.__doc__ or "")


def returned_names(values: dict[str, object]) -> set[str]:
    """Names of the classes that functions and methods with an example return, and of the classes of their fields."""
    functions = [value for value in values.values() if isinstance(value, types.FunctionType) and has_example(value)]
    for owner in values.values():
        if isinstance(owner, type):
            methods = [each for each in vars(owner).values() if isinstance(each, types.FunctionType)]
            functions += [each for each in methods if has_example(owner) or has_example(each)]
    open_: list[object] = [function.__annotations__.get("return") for function in functions]
    found: set[str] = set()
    while open_:
        for name in set(re.findall(r"\w+", str(open_.pop()))) - found:
            if isinstance(value := values.get(name), type):
                found.add(name)
                open_ += vars(value).get("__annotations__", {}).values()
    return found


def test_every_class_and_function_of_the_faces_package_has_an_example_or_is_the_result_of_one() -> None:
    modules = [importlib.import_module(package) for package in FACES_EXAMPLES]
    values = {name: getattr(module, name) for module in modules for name in module.__all__}
    shown = returned_names(values)
    lacking = {
        name for name, value in values.items()
        if isinstance(value, (type, types.FunctionType)) and not has_example(value) and name not in shown
    }  # fmt: skip
    assert lacking == WITHOUT_EXAMPLE


def test_examples_of_the_published_networks_run() -> None:
    """The constructors are made in another module than the one that holds them, so pytest finds no example there."""
    from kdlib_faces import backbones

    made = [getattr(backbones, name) for name in backbones.__all__]
    made = [
        value for value in made if isinstance(value, types.FunctionType) and value.__name__ != value.__code__.co_name
    ]
    assert len(made) == 14
    runner = doctest.DocTestRunner()
    for function in made:
        for case in doctest.DocTestFinder().find(function, module=False, globs={}):
            assert case.examples, function.__name__
            runner.run(case)
    assert runner.summarize(verbose=False).failed == 0


def test_the_sidebar_lists_the_names_of_one_topic(built: Path) -> None:
    page = (built / "api" / "generated" / "kdlib.losses.HintLoss.html").read_text("utf-8")
    tree = page[page.index('class="sidebar-tree"') : page.index("</aside>")]
    assert 'href="kdlib.losses.PKTLoss.html"' in tree
    assert "kdlib.weighting." not in tree
    assert re.search(r'class="[^"]*current-page[^"]*"><a class="reference internal" href="#">HintLoss<', tree)


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


class Pictures(HTMLParser):
    """Collects the pictures of a page with their alternative texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            values = dict(attrs)
            self.found.append((str(values.get("src")), values.get("alt") or ""))


def test_every_picture_has_an_alternative_text(built: Path) -> None:
    pages = [page for page in built.rglob("*.html") if page.name not in ("py-modindex.html", "genindex.html")]
    texts = [text for page in pages if "<img" in (text := page.read_text("utf-8"))]
    pictures = [picture for text in texts for picture in Pictures(text).found]
    assert len(pictures) >= 2
    # Sphinx gives a picture without one the name of its file.
    assert [src for src, alt in pictures if len(alt.split()) < 5 or Path(src).name in alt] == []


FOUND = {
    "export onnx": {"how_do_i/faces", "deployment"},
    "lightning": {"how_do_i/training", "trainers", "examples"},
    "CLS token": {"how_do_i/data"},
    "resume": {"how_do_i/training", "training"},
}


@pytest.mark.parametrize("query", FOUND)
def test_the_search_finds(built: Path, query: str) -> None:
    from sphinx.search.en import SearchEnglish

    text = (built / "searchindex.js").read_text("utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    stem = SearchEnglish({}).stem

    def pages(word: str) -> set[str]:
        numbers: set[int] = set()
        for table in ("terms", "titleterms"):
            entry = index[table].get(stem(word.lower()), [])
            numbers |= {entry} if isinstance(entry, int) else set(entry)
        return {index["docnames"][number] for number in numbers}

    assert FOUND[query] <= set.intersection(*(pages(word) for word in query.split()))


def commands(page: Path) -> list[str]:
    """The commands `kdlib-faces` in the blocks of a page, without those with placeholders."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    blocks = [text for language, text in fences if not language]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    found = [re.search(r"(?:kdlib-faces|-m kdlib_faces) (?=[a-z])(.*)", line.partition("#")[0]) for line in lines]
    return [match[1].removesuffix("...").strip() for match in found if match and "DIR" not in match[1]]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_on_the_pages_have_known_options(page: Path) -> None:
    from kdlib_faces.cli import make_parser
    from kdlib_faces.commands.train import CONFIGS
    from kdlib_faces.config import load_config

    for command in commands(page):
        options = make_parser().parse_args(shlex.split(command))
        if options.command == "train":
            load_config(CONFIGS[options.recipe or "liaad"], overrides=options.settings)


def test_the_pages_contain_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 50


def test_the_tables_of_options_contain_every_setting(built: Path) -> None:
    from kdlib_faces.commands.train import CONFIGS
    from kdlib_faces.config import walk_settings

    page = (built / "options.html").read_text("utf-8")
    shown = set(re.findall(r'<span class="pre">([\w.-]+)</span>', page))
    assert {key for cls in CONFIGS.values() for key, _ in walk_settings(cls())} <= shown
    assert {"--detector", "--recipe", "--protocol", "--max-loss", "--no-flip", "--debug", "num_failures"} <= shown


def test_the_table_of_hardware_options_is_that_of_the_parsers() -> None:
    from kdlib_faces.cli import make_parser

    page = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    table = page.partition("| command | `--device` |")[2].partition("\n\n")[0].splitlines()
    shown = {
        cells[1].strip(" `"): [cell.strip() != "-" for cell in cells[2:6]]
        for line in table[2:]
        if (cells := line.split("|"))
    }
    found: dict[str, list[bool]] = {}
    parsers: list[tuple[str, argparse.ArgumentParser]] = [("", make_parser())]
    while parsers:
        name, parser = parsers.pop()
        groups = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        parsers += [(f"{name} {key}".strip(), each) for group in groups for key, each in group.choices.items()]
        if not groups:
            flags = {flag for action in parser._actions for flag in action.option_strings}
            found[name] = [option in flags for option in ("--device", "--amp", "--compile", "--workers")]
    assert shown == found


WIDTHS = (390, 768, 1280, 1440, 1920)
# The text column and everything in it that has no scroll bar of its own.
CUT = """(() => {
    const column = document.querySelector('.content').getBoundingClientRect();
    const outside = [...document.querySelectorAll('article *')].filter((each) => {
        if (each.closest('pre, .table-wrapper, .math-wrapper, .wide-formula, .headerlink')) return false;
        const box = each.getBoundingClientRect();
        return box.width > 0 && (box.right > column.right + 1 || box.left < column.left - 1);
    });
    return JSON.stringify([column.left >= 0 && column.right <= innerWidth, outside.map((each) => each.outerHTML.slice(0, 80))]);
})()"""


SHOWN = (
    "index", "learn/weightings", "concepts", "how_do_i/faces", "troubleshooting", "options", "comparison", "glossary", "api/kdlib",
    "api/losses", "api/faces_heads", "api/generated/kdlib.losses.SoftTargetLoss", "api/generated/kdlib.functional.angular_distill",
    "api/generated/kdlib.losses.ContrastiveRepresentationLoss", "api/generated/kdlib_faces.evaluation.identify_with_distractors",
)  # fmt: skip
HITS = "[...document.querySelectorAll('#search-results li a')].map((each) => each.getAttribute('href').split(/[.]html/)[0])"
# The results are complete when their summary says so.
SEARCH = f"""new Promise((resolve) => {{
    const wait = () => /finished|did not match/.test(document.querySelector('#search-results')?.textContent)
        ? resolve({HITS}) : setTimeout(wait, 20);
    wait();
}})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is absent")
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", SHOWN)
def test_pages_fit_the_window_in_a_browser(built: Path, browser: Browser, name: str) -> None:
    browser.open(built / f"{name}.html", WIDTHS[0])
    for dark in (False, True):
        for width in WIDTHS:
            result = browser.show(width, dark=dark)
            assert result["scroll"] == result["width"] == width
            inside, cut = json.loads(browser.evaluate(CUT))
            assert inside, width
            assert cut == [], width
            assert all(min(picture["natural"]) > 0 for picture in result["pictures"]), width
            color = [int(part) for part in re.findall(r"\d+", result["background"])[:3]]
            assert (max(color) < 64) if dark else (min(color) > 192), (width, color)
    assert browser.errors() == []
    assert all(address.startswith("file:") for address in browser.requests())


@pytest.mark.parametrize("query", FOUND)
def test_the_search_page_finds_without_a_server(built: Path, browser: Browser, query: str) -> None:
    browser.go(f"{(built / 'search.html').as_uri()}?q={query.replace(' ', '+')}")
    assert FOUND[query] <= set(browser.evaluate(SEARCH))


def test_the_version_is_the_same_everywhere() -> None:
    import tomllib

    import kdlib_faces

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert kdlib.__version__ == declared == kdlib_faces.__version__
    assert declared in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_picture_shows_the_stored_figures() -> None:
    Image = pytest.importorskip("PIL.Image", reason="the faces extra is not installed")
    digest = hashlib.sha256((ROOT / "benchmarks" / "results" / "synthetic.json").read_bytes()).hexdigest()
    with Image.open(ROOT / "docs" / "_static" / "by_age_gap.png") as picture:
        assert picture.text["source"] == digest, "run python benchmarks/draw_figures.py"


def benchmark(name: str) -> Any:
    """A script of `benchmarks` as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "benchmarks" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_shows_the_stored_figures() -> None:
    pytest.importorskip("matplotlib", reason="the faces extra is not installed")
    show = benchmark("study/show.py")
    page = (ROOT / "docs" / "study.md").read_text("utf-8")
    assert show.table(*show.read("choose")) in page
    assert show.compared("choose") in page


def test_the_plan_for_a_large_set_shows_the_stored_figures() -> None:
    script = benchmark("plan_scaling.py")
    assert script.table(script.Setup()) in (ROOT / "docs" / "scaling.md").read_text("utf-8")
    # Twice the GPUs, each at half of the speed, need the same hours; 36 million images at 1,000 per second need ten.
    fast, slow = (script.hours(script.Setup(images_per_second=speed, gpus=gpus)) for speed, gpus in ((100, 4), (50, 8)))
    assert list(fast.values()) == list(slow.values())
    even = script.Setup(
        images=36_000_000, epochs=1, gpus=1, images_per_second=1000, teacher_images_per_second=2000, views=2
    )
    assert list(script.hours(even).values()) == ["10.0", "10.0"]


def test_names_in_the_text_are_linked(built: Path) -> None:
    loss = (built / "api" / "generated" / "kdlib.losses.HintLoss.html").read_text("utf-8")
    assert re.search(r'href="kdlib.functional.hint.html#kdlib[.a-z_]*hint"[^>]*><code', loss)
    concepts = (built / "concepts.html").read_text("utf-8")
    assert re.search(r'href="api/generated/[.A-Za-z]*.html#kdlib[.a-z_]*TeacherAdapter"[^>]*><code', concepts)


@pytest.mark.parametrize("file", ["losses", "margin_heads"])
def test_the_tables_of_speed_show_the_stored_figures(file: str) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text("utf-8"))["rows"]
    lines = (ROOT / "docs" / "comparison.md").read_text("utf-8").splitlines()
    shown = {cells[1].replace("`", "").strip(): cells[3:8] for line in lines if len(cells := line.split("|")) == 9}
    keys = ("milliseconds", "peer_milliseconds", "extra_mib", "peer_extra_mib")
    for name, row in rows.items():
        if "peer_milliseconds" in row:
            stored = [*(format(row[key], ".1f") for key in keys), row["peer"]]
            assert [cell.strip() for cell in shown[name]] == stored, name


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


def test_the_table_of_exports_shows_the_stored_figures() -> None:
    stored: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "export.json").read_text("utf-8"))
    page = (ROOT / "docs" / "deployment.md").read_text("utf-8")
    shown = {cells[1].strip(): cells[2:4] for line in page.splitlines() if len(cells := line.split("|")) == 5}
    expected = {
        "file, kB": [f"{stored[f'{form}_bytes'] / 1000:,.0f}" for form in ("float", "int8")],
        "batch of one, ms": [f"{stored[f'{form}_ms']:.2f}" for form in ("float", "int8")],
        "LFW, ten-fold accuracy, %": [f"{100 * stored[form]['accuracy']:.2f}" for form in ("float", "int8")],
        "LFW, TAR at FAR 1 %, %": [f"{100 * stored[form]['tar']:.2f}" for form in ("float", "int8")],
        "young against adult, TAR at FAR 1 %, %": [
            f"{100 * stored[f'groups_{form}_tar']:.2f}" for form in ("float", "int8")
        ],
    }
    for row, values in expected.items():
        assert [cell.strip() for cell in shown[row]] == values, row
    assert f"{stored['float_over_eager']:.2f} of eager torch" in page
    assert f"{stored['int8_over_float']:.2f} of the float graph" in page
