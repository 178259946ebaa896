"""Runs scripts in processes that one process forks after importing kdlib and torch, since the import takes seconds.

The process reads a JSON list per script from its standard input and writes the exit code to its standard output.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Outcome", "ScriptRunner", "script_runner"]

ROOT = Path(__file__).parents[1]
SECONDS = 300
STREAMS = ("stdout", "stderr")


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a script."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class ScriptRunner:
    """Runs scripts in forks of a process; see `script_runner`."""

    process: subprocess.Popen[str]
    folder: Path

    def __call__(self, script: Path, cwd: Path, *arguments: str) -> Outcome:
        """Run a script in the folder `cwd`, for at most five minutes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(script), str(cwd), *arguments]), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        return Outcome(code, *((self.folder / name).read_text("utf-8") for name in STREAMS))


@contextmanager
def script_runner(folder: Path, *, warnings: Literal["default", "error"] = "error") -> Iterator[ScriptRunner]:
    """Start the process, with a folder for the output of the scripts and the treatment of their warnings."""
    command = [sys.executable, "-W", warnings, "-m", "tests.script_runner", str(folder)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        yield ScriptRunner(process, folder)


def run(folder: Path, script: str, cwd: str, *arguments: str) -> None:
    """Run a script as `python script` does."""
    signal.alarm(SECONDS)
    for descriptor, name in enumerate(STREAMS, 1):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def main(folder: Path) -> None:
    """Run the scripts that the standard input names."""
    import kdlib.training  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(folder, *json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
