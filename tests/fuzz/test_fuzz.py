"""A short run of the fuzz campaign; `make fuzz` is the long one."""

import os
import random

import pytest

from tests.fuzz.campaign import fault_of, put, run
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import TARGETS

CASES = 10
"""Cases for each reader; fewer for slow ones."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_gives_a_result_or_a_documented_error(tmp_path, name):
    put(tmp_path / "valid", TARGETS[name].files())
    TARGETS[name].read(tmp_path / "valid")
    cases = round(CASES * min(1, TARGETS[name].share))
    faults = {seed: fault for seed in range(cases) if (fault := fault_of(tmp_path / "case", name, seed))}
    assert faults == {}


def test_mutations_change_files_and_are_the_same_for_a_seed():
    blob = b"path,identity\n1.jpg,7\n" * 3
    made = [mutate(blob, random.Random(seed)) for seed in range(300)]
    assert made == [mutate(blob, random.Random(seed)) for seed in range(300)]
    assert len(set(made)) > 200
    assert mutate(b"", random.Random(0)) is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork, which this system does not have")
def test_the_campaign_reports_errors_crashes_and_allocations(monkeypatch):
    from dataclasses import replace

    def broken(folder):
        seed = int(folder.joinpath("seed").read_text()) if (folder / "seed").exists() else 0
        raise AssertionError(f"read {seed}")

    def crash(folder):
        os.kill(os.getpid(), 9)

    def allocate(folder):
        bytearray(1 << 31)

    for read, expected in (
        (broken, "AssertionError: read 0"),
        (crash, "ended with code -9"),
        (allocate, "MemoryError"),
    ):
        monkeypatch.setitem(TARGETS, "LFW", replace(TARGETS["LFW"], read=read))
        found = run(2, target="LFW", show=False)
        assert len(found) == 2
        assert all(expected in line for line in found)
        assert found[1].startswith("--target 'LFW' --seed 1: ")
