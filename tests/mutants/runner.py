"""Run the tests of each mutant in a fork of one process that has imported and collected them."""

import gc
import io
import json
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType

import coverage
import pytest
import torch
from _pytest.runner import runtestprotocol

from tests.mutants.mutations import Mutant, function_code

FOLDERS = ("kdlib/losses", "kdlib/weighting", "kdlib/evaluation", "kdlib/compression", "kdlib_faces/evaluation")
"""Folders whose code is changed."""

SLOW = 3.0
"""A test that takes longer, in seconds, does not run for mutants."""
TESTS_SECONDS = 12.0
"""The tests of a mutant are as many of the shortest as take this long on the original code."""
FACTOR, CONSTANT = 5.0, 5.0
"""Computing time of a mutant: so many times the time of its tests, and so many seconds more."""
MEMORY = 4 << 30
"""Bytes that a mutant may allocate beyond those of the parent."""

SIGNATURES = "test_public_names_and_signatures"
"""The test that compares the defaults of public functions."""

KILLED, SURVIVED, TIMEOUT, FAULT = "killed", "survived", "timeout", "fault"
PASSED, FAILED, BROKEN = 0, 1, 3
"""Exit codes of the process of a mutant."""
Place = tuple[str, str, int]
"""File, qualified name and first line of a function."""
Functions = dict[Place, list[FunctionType]]


@dataclass
class Clean:
    """Run of the tests on the original code.

    Args:
        seconds: time of each test that passed.
        tests: tests that execute a line, by file and line.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that execute a mutant, the shortest first."""
        lines = self.tests.get(mutant.path, {})
        first, last = mutant.body if mutant.default else (mutant.line, mutant.last_line)
        names = {name for line in range(first, last + 1) for name in lines.get(line, ())}
        if mutant.default:  # the test of all signatures calls no function
            names |= {name for name in self.seconds if SIGNATURES in name}
        chosen, total = [], 0.0
        for name in sorted(names, key=lambda each: (self.seconds[each], each)):
            total += self.seconds[name]
            if total > TESTS_SECONDS and chosen:
                break
            chosen.append(name)
        return chosen


class Runner:
    """Plugin of pytest: instead of the loop over the tests, one over mutants.

    Args:
        root: folder of the repository.
        mutants: the mutants to run.
        results: file of JSON lines to which verdicts are appended.
        stored: file of the clean run, used if it exists.
        workers: mutants at a time.
    """

    def __init__(self, root: Path, mutants: list[Mutant], results: Path, stored: Path, workers: int) -> None:
        self.root, self.mutants, self.results, self.stored, self.workers = root, mutants, results, stored, workers
        self.failed: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """Let hypothesis draw the same examples each time, without a search for the smallest that fails."""
        from hypothesis import Phase, settings  # pytest refuses an earlier import of its plugin

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", deadline=None, database=None, derandomize=True, phases=phases)
        settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the tests once on the original code, then on each mutant."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        torch.set_num_threads(1)
        session.config._tmp_path_factory.getbasetemp()  # one folder for all processes
        items = {item.nodeid: item for item in session.items}
        if not self.stored.exists():
            self.run_clean(list(items.values()))
        clean: Clean = pickle.loads(self.stored.read_bytes())
        self.failed = [name for name in items if name not in clean.seconds]
        functions = find_functions({self.root / mutant.path for mutant in self.mutants})
        gc.freeze()
        self.run_all(items, clean, functions)
        return True

    def run_clean(self, items: list[pytest.Item]) -> None:
        """Run the tests in a fork and store which of them execute which lines."""
        if pid := os.fork():
            os.waitpid(pid, 0)
            return
        folders = [str(self.root / folder) for folder in FOLDERS]
        measure = coverage.Coverage(data_file=None, source=folders, config_file=False)
        clean = Clean()
        measure.start()
        for item, following in zip(items, [*items[1:], None], strict=True):
            measure.switch_context(item.nodeid)
            started = time.process_time()
            reports = run_quietly(item, following)
            seconds = time.process_time() - started
            if seconds <= SLOW and all(report.passed for report in reports):
                clean.seconds[item.nodeid] = seconds
        measure.stop()
        data = measure.get_data()
        for file in data.measured_files():
            lines = {
                line: [n for n in names if n in clean.seconds] for line, names in data.contexts_by_lineno(file).items()
            }
            clean.tests[Path(file).relative_to(self.root).as_posix()] = lines
        part = self.stored.with_suffix(".part")
        part.write_bytes(pickle.dumps(clean))
        part.replace(self.stored)
        os._exit(0)

    def run_all(self, items: dict[str, pytest.Item], clean: Clean, functions: Functions) -> None:
        """Run the mutants, several at a time."""
        running: dict[int, tuple[Mutant, int, float]] = {}
        with self.results.open("a") as file:

            def write(mutant: Mutant, verdict: str, tests: int, seconds: float) -> None:
                file.write(
                    json.dumps({"key": mutant.key, "verdict": verdict, "tests": tests, "seconds": round(seconds, 2)})
                    + "\n"
                )
                file.flush()

            def wait() -> None:
                pid, status = os.wait()
                mutant, tests, started = running.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                timeouts = (-signal.SIGPROF, -signal.SIGALRM)
                verdict = TIMEOUT if code in timeouts else {PASSED: SURVIVED, BROKEN: FAULT}.get(code, KILLED)
                write(mutant, verdict, tests, time.monotonic() - started)

            for number, mutant in enumerate(self.mutants):
                tests = [name for name in clean.of(mutant) if name in items]
                if not tests:
                    write(mutant, SURVIVED, 0, 0.0)
                    continue
                if len(running) >= self.workers:
                    wait()
                started = time.monotonic()
                if not (pid := os.fork()):
                    os._exit(self.run_one(mutant, [items[name] for name in tests], clean, functions))
                running[pid] = mutant, len(tests), started
                if number % 50 == 0:
                    print(f"{number} of {len(self.mutants)}", flush=True)
            while running:
                wait()

    def run_one(self, mutant: Mutant, items: list[pytest.Item], clean: Clean, functions: Functions) -> int:
        """Run the tests of a mutant in this process until one fails; return the exit code."""
        try:
            apply(mutant, self.root / mutant.path, functions)
        except Exception:
            traceback.print_exc()
            return BROKEN
        limit(FACTOR * sum(clean.seconds[item.nodeid] for item in items) + CONSTANT)
        try:
            for item, following in zip(items, [*items[1:], None], strict=True):
                if any(report.failed for report in run_quietly(item, following)):
                    return FAILED
        except BaseException:
            return FAILED
        return PASSED


def limit(seconds: float) -> None:
    """Limit the computing time and the memory of this process."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


@contextmanager
def silence() -> Iterator[None]:
    """Discard what tests print."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def run_quietly(item: pytest.Item, following: pytest.Item | None) -> list[pytest.TestReport]:
    """Run a test without a report."""
    with silence():
        return runtestprotocol(item, log=False, nextitem=following)


def find_functions(paths: Iterable[Path]) -> Functions:
    """Return the functions of files that exist in this process, by their code."""
    names = {str(path) for path in paths}
    found: Functions = {}
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename in names:
            found.setdefault(place_of(each.__code__), []).append(each)
    return found


def place_of(code: CodeType) -> Place:
    """Return what identifies a function."""
    return code.co_filename, code.co_qualname, code.co_firstlineno


def apply(mutant: Mutant, path: Path, functions: Functions) -> None:
    """Give the function of a mutant the changed code, wherever the function is referred to."""
    text = path.read_text(encoding="utf-8")
    old, new = function_code(text, path, mutant), function_code(mutant.mutate(text), path, mutant)
    for function in functions[place_of(old)]:
        function.__code__ = new
        if mutant.default:
            value = eval(mutant.after, function.__globals__)
            if mutant.default in (function.__kwdefaults__ or {}):
                function.__kwdefaults__[mutant.default] = value
            else:
                names = new.co_varnames[: new.co_argcount][-len(function.__defaults__ or ()) :]
                pairs = zip(names, function.__defaults__ or (), strict=True)
                function.__defaults__ = tuple(value if name == mutant.default else given for name, given in pairs)
