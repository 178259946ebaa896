"""Time and memory of model files, each measured in a process of its own: `measure`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib_faces._checks import InputError

__all__ = ["Measurement", "measure", "table"]

ENGINES = ("eager", "compiled", "onnxruntime")
TIMEOUT = 300


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one model file in one setting.

    Attributes:
        model: Name of the file.
        engine: `"eager"` or `"compiled"` for a checkpoint in torch, `"onnxruntime"` for an ONNX graph.
        threads: Threads.
        batch: Images in one forward.
        milliseconds: Median time of a forward; None if it could not be run.
        images_per_second: Images in a second at that time.
        peak_mib: Largest memory of the process, with the runtime itself, in MiB.
        file_mib: Size of the file in MiB.
        note: Why it could not be run, or that a graph for one image runs one after another.
    """

    model: str
    engine: str
    threads: int
    batch: int
    milliseconds: float | None
    images_per_second: float | None
    peak_mib: float | None
    file_mib: float
    note: str = ""


def measure(
    files: Iterable[str | os.PathLike[str]],
    *,
    threads: Sequence[int] = (1, 2),
    batches: Sequence[int] = (1, 32),
    seconds: float = 0.5,
    engines: Sequence[str] = ENGINES,
) -> list[Measurement]:
    """Measure model files: ONNX graphs in onnxruntime, checkpoints in torch, eager and compiled.

    Args:
        files: The files.
        threads: Numbers of threads.
        batches: Numbers of images in one forward.
        seconds: Time for the repetitions of one setting; at least five are run.
        engines: Those of `"eager"`, `"compiled"` and `"onnxruntime"` that are measured.

    Returns:
        One measurement for each file, engine, number of threads and batch, in this order.

    Raises:
        InputError: A file does not exist.
    """
    rows = []
    for path in map(Path, files):
        if not path.is_file():
            raise InputError(f"measure: {path} is not a file")
        possible = ("onnxruntime",) if path.suffix.lower() == ".onnx" else ("eager", "compiled")
        for engine in (each for each in possible if each in engines):
            # A session and a compiled network keep the number of threads that they were made with.
            groups = [tuple(threads)] if engine == "eager" else [(count,) for count in threads]
            for group in groups:
                rows += _measured(path, engine, group, batches, seconds)
    return rows


def table(rows: Sequence[Measurement]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| model | engine | threads | batch | ms | images/s | peak memory, MiB | file, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = [row.model.replace("|", "\\|"), row.engine, str(row.threads), str(row.batch)]
        values = (row.milliseconds, row.images_per_second, row.peak_mib, row.file_mib)
        shown += ["" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {' | '.join(shown)} |{f' {row.note}' if row.note else ''}")
    return "\n".join(lines)


def _measured(
    path: Path, engine: str, threads: Sequence[int], batches: Sequence[int], seconds: float
) -> list[Measurement]:
    """One process for all batches: the smallest comes first, as the memory is the largest so far."""
    settings = {"threads": threads, "batches": sorted(batches), "seconds": seconds}
    given = json.dumps({"path": str(path), "engine": engine, **settings})
    # As a script without its package, so that the memory of a session does not include torch.
    script = Path(__file__).with_name("measured_process.py")
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(threads)), "PYTHONPATH": paths}
    command = [sys.executable, "-P", str(script), given]
    size = path.stat().st_size / 2**20
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, check=False)
        note = (done.stderr.strip().splitlines() or ["no output"])[-1][:120] if done.returncode else ""
    except subprocess.TimeoutExpired:
        done, note = None, f"stopped after {TIMEOUT} s"
    if note or done is None:
        rows = [(count, batch) for count in threads for batch in sorted(batches)]
        return [Measurement(path.name, engine, count, batch, None, None, None, size, note) for count, batch in rows]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        Measurement(
            path.name, engine, each["threads"], each["batch"], each["milliseconds"],
            1000 * each["batch"] / each["milliseconds"], each["peak_mib"], size, each["note"],
        )
        for each in sorted(found, key=lambda each: (each["threads"], each["batch"]))
    ]  # fmt: skip
