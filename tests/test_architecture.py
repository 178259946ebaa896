"""The house order: rooms import only rooms to their left, and little from outside."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms from left to right; those of one line do not see each other.
CORE = [
    {"adapters"},
    {"cache"},
    {"projections", "losses"},
    {"weighting"},
    {"influence"},
    {"objective"},
    {"distiller"},
    {"training"},
    {"evaluation"},
    {"testing"},
]
CORE_SHARED = {"types", "_checks"}
FACES = [
    {"data", "backbones", "heads"},
    {"losses"},
    {"teachers"},
    {"evaluation"},
    {"report"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
FACES_SHARED = {"_checks", "_output", "_safetensors", "_weights", "config", "progress"}
# Imports against the order, each with its reason.
ALLOWED = {
    # `python -m kdlib_faces.recipes.liaad` is the command line's `train` under another name.
    ("kdlib_faces.recipes.liaad", "kdlib_faces.cli"),
    # The weighting and the heads compute in full precision exactly as losses do.
    ("kdlib.weighting.center_confidence", "kdlib._maths"),
}
# Errors that the core words where they are raised.
WORDED = {
    # A failed contract is what the room is for, and each check words its own.
    ("kdlib.testing._loss_case", "AssertionError"),
    ("kdlib.testing._run", "AssertionError"),
    ("kdlib.testing.projection", "AssertionError"),
    # What Python itself says of a name that a module has not.
    ("kdlib", "AttributeError"),
}
OUTSIDE = {
    "kdlib": {"torch", "einops", "numpy", "typing_extensions"},
    "kdlib_faces": {"torch", "einops", "numpy", "typing_extensions", "PIL", "matplotlib", "tqdm", "kdlib"},
}
LAZY = {"onnx", "onnxruntime"}
TOP_LEVEL = {
    "kdlib", "kdlib_faces", "docs", "benchmarks", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
    "CONTRIBUTING.md", "Makefile", "constraints.txt",
}  # fmt: skip


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


def room(name: str) -> str:
    return [*name.split("."), ""][1]


def violations(package: str, order: list[set[str]], shared: set[str]) -> list[str]:
    place = {name: number for number, rooms in enumerate(order) for name in rooms}
    found = []
    for name in modules(package):
        own = room(name)
        if own not in place:
            continue
        for target, _ in imports(name):
            other = room(target)
            if target.split(".")[0] != package or other in shared or other == own or (name, target) in ALLOWED:
                continue
            if other == "" and "__version__" in EVERY[name].read_text():
                continue  # the package's version only
            if other not in place or place[other] >= place[own]:
                found.append(f"{name} imports {target}")
    return found


def test_the_rooms_of_the_core_import_only_to_their_left() -> None:
    assert violations("kdlib", CORE, CORE_SHARED) == []


def test_the_rooms_of_the_faces_side_import_only_to_their_left() -> None:
    assert violations("kdlib_faces", FACES, FACES_SHARED) == []


@pytest.mark.parametrize(
    ("package", "order", "shared"), [("kdlib", CORE, CORE_SHARED), ("kdlib_faces", FACES, FACES_SHARED)]
)
def test_every_room_has_its_place(package: str, order: list[set[str]], shared: set[str]) -> None:
    known = set().union(*order) | shared | {""} | ({"functional"} if package == "kdlib" else set())
    assert {room(name) for name in modules(package)} - known == set()


def test_allowances_are_in_use() -> None:
    for name, target in ALLOWED:
        assert target in {each for each, _ in imports(name)}, f"{name} no longer imports {target}"


def test_shared_modules_import_no_room() -> None:
    for name in CORE_SHARED:
        reached = {target for target, _ in imports(f"kdlib.{name}") if target.startswith("kdlib")}
        assert {room(target) for target in reached} <= CORE_SHARED
    for name in FACES_SHARED:
        reached = {target for target, at_top in imports(f"kdlib_faces.{name}") if target.startswith("kdlib_faces")}
        assert {room(target) for target in reached} <= FACES_SHARED


def test_functional_reads_losses_alone() -> None:
    assert {room(target) for target, _ in imports("kdlib.functional")} == {"losses"}


def test_the_core_never_imports_the_faces_side() -> None:
    assert [name for name in modules("kdlib") for target, _ in imports(name) if target.startswith("kdlib_faces")] == []


@pytest.mark.parametrize("package", ["kdlib", "kdlib_faces"])
def test_packages_import_nothing_else_from_outside(package: str) -> None:
    allowed = OUTSIDE[package] | {package, "__future__"} | set(sys.stdlib_module_names)
    allowed |= LAZY if package == "kdlib_faces" else set()
    strange = {
        (name, target)
        for name in modules(package)
        for target, _ in imports(name)
        if target.split(".")[0] not in allowed
    }
    assert strange == set()


def test_onnx_waits_until_a_teacher_needs_it() -> None:
    at_top = {(name, target) for name in EVERY for target, top in imports(name) if top and target.split(".")[0] in LAZY}
    assert at_top == set()
    # A module imported by a name in a variable would escape this test, so there is one such place.
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
    # The contract checks send a component through bytes of their own making.
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
    assert loads >= 3


def worded(name: str) -> list[tuple[int, str]]:
    """Where a module raises other than an error that a `_checks.py` made, or one it has caught: line and error."""
    checks = {
        alias.asname or alias.name
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("_checks")
        for alias in node.names
        if alias.name.islower()  # a function; an error's class could be given any words
    }
    caught = {node.name for node in ast.walk(tree(name)) if isinstance(node, ast.ExceptHandler)}
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(error) not in (checks if isinstance(node.exc, ast.Call) else caught):
                found.append((node.lineno, ast.unparse(error)))
    return found


def test_the_core_words_errors_in_checks_alone() -> None:
    found = {(name, error) for name in modules("kdlib") if not name.endswith("_checks") for _, error in worded(name)}
    assert found == WORDED
    # One for all rooms, one a room, and one for what may be hostile: no other file may call itself so.
    places = {room(name): name for name in modules("kdlib") if name.endswith("._checks")}
    assert set(places) == {"_checks", "adapters", "cache", "losses", "projections", "testing", "training", "weighting"}
    assert {name for name in modules("kdlib") if name.endswith("_checks")} - set(places.values()) == {
        "kdlib.cache._header_checks"
    }


def test_a_worded_raise_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert worded("any") == [(5, "ValueError"), (6, "TypeError"), (7, "KeyError"), (8, "message"), (9, "CacheError")]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_module_says_what_it_is(name: str) -> None:
    text = ast.get_docstring(tree(name))
    assert text, f"{name} has no docstring"


def test_the_top_level_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = listed.stdout.splitlines() if listed.returncode == 0 else []
    tops = {file.split("/")[0] for file in files if not file.startswith(".")}
    assert tops <= TOP_LEVEL
    assert all((ROOT / name).exists() for name in ("kdlib", "kdlib_faces", "pyproject.toml", "README.md"))


def test_the_core_loads_no_picture_plot_bar_or_runtime() -> None:
    heavy = ["PIL", "matplotlib", "tqdm", "onnx", "onnxruntime", "torchvision", "kdlib_faces"]
    # torch itself takes tqdm where it finds it; what counts is what kdlib adds.
    code = f"""
import sys, torch, torch.distributed, torch.nn.parallel, einops, numpy
before = set(sys.modules)
import kdlib
print([name for name in {heavy} if name in set(sys.modules) - before])
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
