"""The recipe on a `.rec` file: `torchrun` starts it, it loses a process, and it goes on in one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdlib.training import read_log
from kdlib_faces.cli import main
from kdlib_faces.data import save_records
from tests.faces.cache_files import COUNT, SIZE, make_faces, settings, wait_until


def test_a_run_of_torchrun_goes_on_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces, output, errors = make_faces(tmp_path), tmp_path / "run", tmp_path / "errors.txt"
    images = [(faces / f"{row}.png").read_bytes() for row in range(COUNT)]
    save_records(faces / "train.rec", images, [row // 2 for row in range(COUNT)], size=(SIZE, SIZE))
    small = ("training.batch_size=4", "training.checkpoint_seconds=1e-6", "recipe.input_size=32", "recipe.width=0.25")
    words = [
        "train",
        "--data",
        str(faces / "train.rec"),
        "--teacher",
        str(faces / "general.pt"),
        "--teacher",
        str(faces / "age.pt"),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    words += settings(*small, "recipe.embedding_dim=16", "training.steps=60")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        errors.open("w") as stream,
        subprocess.Popen(
            [*command, "-m", "kdlib_faces", *words], stderr=stream, stdout=stream, env=environment
        ) as agent,
    ):
        assert wait_until(lambda: bool([*output.glob("checkpoints/step-*.pt")]) or agent.poll() is not None, 300)
        assert agent.poll() is None, errors.read_text()
        os.kill(int((output / ".lock").read_text().split()[1]), signal.SIGKILL)  # the first process
        assert agent.wait(120) != 0
    assert errors.read_text().count("device: cpu, 1 thread, float32, 2 processes") == 1
    assert not (output / "student.safetensors").exists()
    capsys.readouterr()
    assert main([*words]) == 0
    rows = read_log(output / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert (output / "student.safetensors").exists()
