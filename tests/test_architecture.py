"""The import graph, the outside dependencies and the safety rules of both packages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Shared private modules of the core: every package of kdlib and of kdlib_faces may import them.
SHARED_BY_BOTH = {"_atomic", "_checks", "_gather", "_maths", "_modes"}
CORE_SHARED = SHARED_BY_BOTH | {"_arguments", "_averaging", "_held", "_layouts", "_repr", "types"}
FACES_SHARED = {
    "_checks", "_hardware", "_output", "_processes", "_tensor_pickle", "_weights", "config", "progress",
}  # fmt: skip

# Each package and the packages that it may import, besides the shared modules.
CORE = {
    "adapters": set(),
    "cache": set(),
    "projections": set(),
    "losses": set(),
    "functional": {"losses"},
    "weighting": set(),
    "schedules": set(),
    "influence": set(),
    "objective": {"influence", "losses", "projections", "weighting"},
    "distiller": {"influence", "objective"},
    "online": {"adapters", "distiller", "influence", "objective"},
    "training": {"adapters", "distiller", "objective", "schedules"},
    "evaluation": set(),
    "compression": set(),
    "testing": {"adapters"},
}
FACES = {
    "data": set(),
    "backbones": set(),
    "heads": set(),
    "evaluation": set(),
    "losses": {"heads"},
    "teachers": {"data", "backbones", "heads"},
    "training": {"data", "teachers"},
    "caching": {"data", "teachers"},
    "alignment": {"data", "teachers"},
    "harness": {"data", "evaluation", "teachers"},
    "report": {"evaluation"},
    "recipes": {"backbones", "heads", "teachers", "data", "training", "caching"},
    "demo": {
        "data",
        "backbones",
        "heads",
        "teachers",
        "evaluation",
        "recipes",
        "training",
        "harness",
        "report",
        "export",
    },
    "export": {"data", "backbones", "teachers", "evaluation"},
    "commands": {
        "alignment",
        "data",
        "backbones",
        "evaluation",
        "export",
        "teachers",
        "recipes",
        "training",
        "caching",
        "harness",
        "report",
        "demo",
    },
    "cli": {"commands", "harness"},
    "__main__": {"cli"},
}
TABLES = {"kdlib": (CORE, CORE_SHARED), "kdlib_faces": (FACES, FACES_SHARED)}
# Errors that the core raises outside of a `_checks.py`.
RAISED_ELSEWHERE = {
    # A failed contract check describes its own failure.
    ("kdlib.testing._loss_case", "AssertionError"),
    ("kdlib.testing._meta", "AssertionError"),
    ("kdlib.testing._run", "AssertionError"),
    ("kdlib.testing.projection", "AssertionError"),
    # The standard message of a module's `__getattr__`.
    ("kdlib", "AttributeError"),
}
OUTSIDE = {
    "kdlib": {"torch", "einops", "numpy", "typing_extensions"},
    "kdlib_faces": {
        "torch", "einops", "numpy", "typing_extensions", "PIL", "matplotlib", "tqdm", "safetensors", "tomli_w", "jinja2",
        "markupsafe", "kdlib",
    },
}  # fmt: skip
LAZY = {"cv2", "onnx", "onnxruntime", "simplejpeg"}
TOP_LEVEL = {
    "kdlib", "kdlib_faces", "docs", "benchmarks", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
    "CONTRIBUTING.md", "Makefile", "constraints.txt", "CITATION.cff",
}  # fmt: skip
MAX_LINES = 350
MAX_FILES = 15


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


EVERY = modules("kdlib") | modules("kdlib_faces")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(EVERY[name].read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """Each module that `name` imports, and whether at its top level."""
    source = tree(name)
    lazy = {
        id(node)
        for function in ast.walk(source)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for branch in ast.walk(source)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
        for node in ast.walk(branch)
    }
    for node in ast.walk(source):
        at_top = id(node) not in lazy | typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), at_top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            target = node.module or ""
            for alias in node.names:
                deeper = f"{target}.{alias.name}"
                yield (deeper if deeper in EVERY else target), at_top


def part(name: str) -> str:
    """The package or module directly below the top-level package."""
    return [*name.split("."), ""][1]


@pytest.mark.parametrize("package", TABLES)
def test_packages_import_only_what_the_table_allows(package: str) -> None:
    table, shared = TABLES[package]
    found, used = [], set()
    for name in modules(package):
        own = part(name)
        if own not in table:
            continue
        for target, _ in imports(name):
            other = part(target)
            if target.split(".")[0] != package or other in shared | {own, ""}:
                continue
            used.add((own, other))
            if other not in table[own]:
                found.append(f"{name} imports {target}")
    assert found == []
    assert {(own, other) for own in table for other in table[own]} - used == set(), "the table allows unused imports"


@pytest.mark.parametrize("package", TABLES)
def test_the_table_lists_every_package(package: str) -> None:
    table, shared = TABLES[package]
    assert {part(name) for name in modules(package)} - {""} == set(table) | shared


def test_no_module_takes_part_in_an_import_cycle() -> None:
    graph = {name: {target for target, _ in imports(name) if target in EVERY and target != name} for name in EVERY}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_shared_modules_import_only_shared_modules() -> None:
    for package, (_, shared) in TABLES.items():
        for name in shared:
            reached = {part(target) for target, _ in imports(f"{package}.{name}") if target.split(".")[0] == package}
            assert reached <= shared, f"{package}.{name} imports {reached - shared}"


def test_only_declared_private_modules_of_the_core_are_shared_with_the_faces() -> None:
    crossing = {
        target
        for name in modules("kdlib_faces")
        for target, _ in imports(name)
        if target.startswith("kdlib.") and any(step.startswith("_") for step in target.split("."))
    }
    assert crossing == {f"kdlib.{name}" for name in SHARED_BY_BOTH}


def test_files_and_packages_stay_small() -> None:
    for name, path in EVERY.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{name} has {lines} lines"
    for folder in {path.parent for path in EVERY.values()}:
        files = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(files) <= MAX_FILES, f"{folder.relative_to(ROOT)} has {len(files)} modules"


def test_the_core_never_imports_the_faces_side() -> None:
    assert [name for name in modules("kdlib") for target, _ in imports(name) if target.startswith("kdlib_faces")] == []


@pytest.mark.parametrize("package", ["kdlib", "kdlib_faces"])
def test_packages_import_nothing_else_from_outside(package: str) -> None:
    allowed = OUTSIDE[package] | {package, "__future__"} | set(sys.stdlib_module_names)
    allowed |= LAZY if package == "kdlib_faces" else set()
    unexpected = {
        (name, target)
        for name in modules(package)
        for target, _ in imports(name)
        if target.split(".")[0] not in allowed
    }
    assert unexpected == set()


def test_onnx_is_imported_lazily() -> None:
    at_top = {(name, target) for name in EVERY for target, top in imports(name) if top and target.split(".")[0] in LAZY}
    assert at_top == set()
    # A module imported by a computed name would escape this test: only one such place is allowed.
    dynamic = {
        (name, node.lineno)
        for name in EVERY
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
    }
    assert {name for name, _ in dynamic} == {"kdlib_faces.teachers.onnx.graph"}
    assert len(dynamic) == 1
    code = (
        "import kdlib_faces.teachers, kdlib_faces.cli, sys; print('onnx' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False False"


def test_nothing_unpickles() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    found = [(name, target) for name in EVERY for target, _ in imports(name) if target.split(".")[0] in unsafe]
    # The contract checks pickle and unpickle components themselves.
    assert found == [("kdlib.testing._run", "pickle")]


def test_files_are_read_without_running_code() -> None:
    loads = 0
    for name in EVERY:
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                loads += 1
                assert given.get("weights_only") == "True", (
                    f"{name}:{node.lineno}: torch.load without weights_only=True"
                )
            if called in ("np.load", "numpy.load"):
                loads += 1
                assert given.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}: np.load with pickle"
            assert called not in ("eval", "exec"), f"{name}:{node.lineno}: {called}"
    assert loads >= 2


def raised_directly(name: str) -> list[tuple[int, str]]:
    """Line and error of each `raise` whose error neither comes from a `_checks.py` nor was caught before."""
    checks = {
        alias.asname or alias.name
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("_checks")
        for alias in node.names
        if alias.name.islower()  # functions only: an error class could be raised with any message
    }
    caught = {node.name for node in ast.walk(tree(name)) if isinstance(node, ast.ExceptHandler)}
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(error) not in (checks if isinstance(node.exc, ast.Call) else caught):
                found.append((node.lineno, ast.unparse(error)))
    return found


def test_the_core_raises_errors_through_its_checks() -> None:
    found = {
        (name, error) for name in modules("kdlib") if not name.endswith("_checks") for _, error in raised_directly(name)
    }
    assert found == RAISED_ELSEWHERE
    places = {part(name): name for name in modules("kdlib") if name.endswith("._checks")}
    assert set(places) == {
        "_checks",
        "adapters",
        "cache",
        "compression",
        "losses",
        "objective",
        "online",
        "projections",
        "schedules",
        "training",
        "weighting",
    }
    assert {name for name in modules("kdlib") if name.endswith("_checks")} == set(places.values())


def test_a_direct_raise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
from kdlib._checks import CacheError, check_name, fault
def raises(x):
    message = f"{x}"
    if x == 1: raise ValueError("words")
    if x == 2: raise TypeError(f"words {x}")
    if x == 3: raise KeyError(message)
    if x == 4: raise message
    if x == 5: raise CacheError("words")
    if x == 6: raise fault(x)
    try:
        check_name(x)
    except OSError as error:
        if x: raise
        raise error
"""
    monkeypatch.setattr(f"{__name__}.tree", lambda name: ast.parse(code))
    assert raised_directly("any") == [
        (5, "ValueError"),
        (6, "TypeError"),
        (7, "KeyError"),
        (8, "message"),
        (9, "CacheError"),
    ]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_module_has_a_docstring(name: str) -> None:
    text = ast.get_docstring(tree(name))
    assert text, f"{name} has no docstring"


def test_the_top_level_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = listed.stdout.splitlines() if listed.returncode == 0 else []
    tops = {file.split("/")[0] for file in files if not file.startswith(".")}
    assert tops <= TOP_LEVEL
    assert all((ROOT / name).exists() for name in ("kdlib", "kdlib_faces", "pyproject.toml", "README.md"))


def test_the_core_loads_no_heavy_package() -> None:
    heavy = ["PIL", "matplotlib", "tqdm", "onnx", "onnxruntime", "torchvision", "kdlib_faces"]
    # torch itself imports tqdm if it is installed: only imports that kdlib adds count.
    code = f"""
import sys, torch, torch.distributed, torch.nn.parallel, einops, numpy
before = set(sys.modules)
import kdlib
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
