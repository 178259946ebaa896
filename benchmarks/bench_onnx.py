"""Overhead of `OnnxTeacher` over bare onnxruntime: `python benchmarks/bench_onnx.py [--onnx FILE ...] [--threads 1]`.

`teacher(images)`, from a tensor to a tensor, and `session.run`, from an array to an array, alternate on the same images with the same
number of threads; the result is the median of the paired ratios. Without `--onnx`, a network of the size of a light face backbone
is generated. Bare sessions use onnxruntime's defaults except for the number of threads. Writes `results/onnx.json`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper, save

from kdlib_faces.progress import progress
from kdlib_faces.teachers import OnnxTeacher


def generate(folder: Path) -> Path:
    """Write a network of a stem, 3 x 4 residual bottlenecks on three grids and an embedding: 0.3 billion multiply-adds."""
    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def weight(*shape: int) -> str:
        array = (rng.normal(0, 1, shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{len(weights)}"))
        return weights[-1].name

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"t{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def conv(x: str, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> str:
        kinds = {"strides": [stride, stride], "pads": [kernel // 2] * 4, "group": groups}
        return node("Conv", x, weight(c_out, c_in // groups, kernel, kernel), kernel_shape=[kernel, kernel], **kinds)

    x = node("Relu", conv("images", 3, 64, 3, 2))
    for stage, c in enumerate((64, 128, 256)):
        x = node("Relu", conv(x, 64 if stage == 0 else c // 2, c, 3, 2))
        for _ in range(4):
            y = node("Relu", conv(x, c, 2 * c))
            y = node("Relu", conv(y, 2 * c, 2 * c, 3, 1, 2 * c))
            x = node("Add", x, conv(y, 2 * c, c))
    out = node("MatMul", node("Flatten", x, axis=1), weight(256 * 49, 512))
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", 512])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    save(model, str(folder / "made.onnx"))
    return folder / "made.onnx"


def paired(ours: Callable[[], object], bare: Callable[[], object], rounds: int, label: str) -> dict[str, float]:
    """Median milliseconds of both, median and quartiles of the paired ratios, and the ratio of processor time."""
    ours(), bare()
    times, spent = [], [0.0, 0.0]
    for number in progress(range(rounds), label):
        pair = [0.0, 0.0]
        for at in (0, 1) if number % 2 else (1, 0):  # alternate the order
            began, used = time.perf_counter(), time.process_time()
            (ours, bare)[at]()
            pair[at] = time.perf_counter() - began
            spent[at] += time.process_time() - used
        times.append(pair)
    ratios = sorted(a / b for a, b in times)
    low, middle, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
    a, b = (1000 * statistics.median(pair[at] for pair in times) for at in (0, 1))
    row = {"milliseconds": a, "bare_milliseconds": b, "ratio": middle, "ratio_low": low, "ratio_high": high}
    row["processor_ratio"] = spent[0] / spent[1]
    return {name: round(value, 4) for name, value in row.items()}


def measured(path: Path, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """Measure one file: the teacher, and an onnxruntime session with the same images per run."""
    import onnxruntime

    teacher = OnnxTeacher(path, threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    images = torch.rand(batch, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    array = images.numpy()
    step = teacher.run_batch or batch

    def bare() -> Any:
        return [session.run(None, {name: array[start : start + step]}) for start in range(0, batch, step)]

    expected = np.concatenate([each[0] for each in bare()])
    assert np.allclose(teacher(images)["embedding"].numpy(), expected, atol=1e-4)
    row = paired(lambda: teacher(images), bare, rounds, f"{path.stem}, {batch} images")
    return {"batch": batch, "images_in_one_run": step, **row}


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description="Overhead of OnnxTeacher over bare onnxruntime.")
    parser.add_argument("--onnx", action="append", default=[], type=Path, help="a face network; repeatable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = options.onnx or [generate(Path(folder))]
        rows = {path.stem: measured(path, options.batch, options.threads, options.rounds) for path in files}
    for name, row in rows.items():
        print(f"{name:28}" + "  ".join(f"{key} {value:g}" for key, value in row.items()))
    setup = {
        "torch": torch.__version__,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "platform": platform.machine(),
    }
    (Path(__file__).parent / "results" / "onnx.json").write_text(json.dumps(setup | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
