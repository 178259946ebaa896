"""The process in which `kdlib_faces.export.measure` measures one model file: prints JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np

__all__ = ["main"]


def main(given: str) -> None:
    """Measure as the JSON text `given` states, and print one JSON list."""
    options = json.loads(given)
    path, rows = Path(options["path"]), []
    make = _onnx if options["engine"] == "onnxruntime" else _torch
    forward, one_by_one, set_threads, (height, width) = make(path, options["threads"][0], options["engine"])
    note = ""
    for batch in options["batches"]:
        images = np.random.default_rng(0).uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)
        for threads in options["threads"]:
            set_threads(threads)
            try:
                forward(images)
            except Exception:  # onnxruntime raises many types; what cannot run one image either fails again below
                forward, note = one_by_one, "one image after another"
            milliseconds = 1000 * _median_time(forward, images, options["seconds"])
            row = {
                "threads": threads, "batch": batch, "milliseconds": milliseconds, "peak_mib": _peak_mib(), "note": note
            }  # fmt: skip
            rows.append(row)
    print(json.dumps(rows))


def _median_time(forward: Callable[[np.ndarray], object], images: np.ndarray, seconds: float) -> float:
    forward(images)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
        began = time.perf_counter()
        forward(images)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


_Forward: TypeAlias = Callable[[np.ndarray], object]
_Opened: TypeAlias = tuple[_Forward, _Forward, Callable[[int], None], tuple[int, int]]
"""The forward, that of one image after another, what sets their threads, and the height and width of the images."""


def _onnx(path: Path, threads: int, engine: str) -> _Opened:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    height, width = (side if isinstance(side, int) else 112 for side in source.shape[2:])

    def forward(images: np.ndarray) -> object:
        return session.run(None, {source.name: images})

    def one_by_one(images: np.ndarray) -> object:
        return [session.run(None, {source.name: image[None]}) for image in images]

    return forward, one_by_one, lambda _: None, (height, width)  # the session keeps its threads


def _torch(path: Path, threads: int, engine: str) -> _Opened:
    import torch

    from kdlib_faces.backbones.input_spec import height_width
    from kdlib_faces.teachers import load_teacher

    torch.set_num_threads(threads)
    network = load_teacher(path)
    module = torch.compile(network, dynamic=False) if engine == "compiled" else network

    def forward(images: np.ndarray) -> object:
        with torch.inference_mode():
            return module(torch.from_numpy(images))

    return forward, forward, torch.set_num_threads, height_width("measure", network.input_size)


def _peak_mib() -> float | None:
    """The largest resident memory of this process so far; None where the system does not state it."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would include the process that started this one
        peak = next((line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM")), None)
        return None if peak is None else int(peak.split()[1]) / 1024
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main(sys.argv[1])
