"""Interruptions of every job at random times, a full disk and a folder that is not writable; `make fuzz` is the long form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork, which this system does not have")
def test_interrupted_jobs_give_the_same_result() -> None:
    """In a process of its own: a process that runs threads must not fork."""
    command = [sys.executable, "-m", "tests.fuzz.kills", "--kills", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, timeout=600, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 interruptions, 0 faults") == 5
