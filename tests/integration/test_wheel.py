"""The wheel in an environment with its declared requirements only: the README example and foreign training loops.

The requirements are linked from this environment, and nothing else, so that an import of anything else fails.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command; an error fails the test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the working tree stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kdlib", "kdlib_faces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def requirements(*names: str) -> set[str]:
    """Return the installed distributions that these need, including themselves."""
    result: set[str] = set()
    wanted = [*names]
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in result:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # needed on other platforms only
            continue
        result.add(name)
        parsed = [Requirement(need) for need in needs]
        wanted += [need.name for need in parsed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return result


def environment(folder: Path, wheel: Path, *more: str) -> Path:
    """Create a Python environment with the wheel, its requirements and those of `more`."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    here = Path(sysconfig.get_path("purelib"))
    (own,) = site.glob("kdlib_torch-*.dist-info")
    needs = [Requirement(need) for need in metadata.Distribution.at(own).requires or []]
    names = [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    for name in requirements(*names, *more):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top != ".." and not (site / top).exists() and (here / top).exists():
                (site / top).symlink_to(here / top)
    return python


def readme_example() -> str:
    """Return the first code block of the README."""
    return (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_the_readme_runs_on_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel)
    example = readme_example()
    assert len(example.strip().splitlines()) <= 12
    report = (
        "\nimport kdlib, sys\nprint(kdlib.__file__, bool(student.weight.grad.any()) and teacher.weight.grad is None)"
        "\nprint(sorted(sys.modules))"
    )
    where, loaded = run(python, "-I", "-c", example + report, cwd=tmp_path).splitlines()
    assert where.startswith(str(tmp_path / "env"))
    assert where.endswith("True")
    assert not any(name in loaded for name in ("'PIL", "'matplotlib", "'tqdm", "'lightning", "'torchvision", "'pytest"))


@pytest.mark.parametrize(
    ("package", "test"), [("lightning", "test_a_lightning_module"), ("accelerate", "test_an_accelerate_loop")]
)
def test_trainers_run_on_the_wheel(package: str, test: str, wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip(package)
    python = environment(tmp_path / "env", wheel, "pytest", package)
    shutil.copy(Path(__file__).with_name("test_trainers.py"), tmp_path)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_trainers.py::{test}"]
    assert "1 passed" in run(*command, cwd=tmp_path)
    where = run(python, "-c", "import kdlib; print(kdlib.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "env"))
