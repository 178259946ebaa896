"""Exported students: `python benchmarks/bench_export.py [--weights NET] [--data LIST] [--pairs TXT] [--rounds 60]`.

One thread, batch 1, in alternation, with the median of the paired ratios: the exported float graph against eager torch, and the int8
graph against the float graph. File sizes, the cosine of the int8 embeddings, and the time of the example without torch from its start to
its result. With `--pairs`, the ten-fold accuracy and the TAR at FAR 1e-2 of both graphs on the images of `--data`. Without `--weights`,
an untrained network of the size of a light student; `--weights` takes a checkpoint, or an ONNX network of a known family, which
`--keep` makes narrower as `kdlib-faces train --start shrink:` does. Writes `results/export.json`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from kdlib_faces.backbones import Backbone, count_parameters, mbf
from kdlib_faces.data.image_pairs import ImagePairs
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.sets.lfw import read_lfw_pairs
from kdlib_faces.evaluation import PairProtocol, embed_images
from kdlib_faces.export import export_onnx, quantize_onnx, save_student
from kdlib_faces.export.float_graph import sample_faces
from kdlib_faces.harness.image_sets import images_of_source
from kdlib_faces.progress import progress
from kdlib_faces.recipes.start import StartConfig, shrink_teacher
from kdlib_faces.teachers import OnnxTeacher
from kdlib_faces.teachers.open import load_pretrained

ROOT = Path(__file__).parents[1]
FAR = 1e-2


def student(options: argparse.Namespace, images: torch.Tensor) -> Backbone:
    """The network to export."""
    if options.weights is None:
        torch.manual_seed(0)
        return mbf(embedding_dim=256, scale=1).eval()
    network = load_pretrained(options.weights)
    assert isinstance(network, Backbone)
    if options.keep < 1:
        config = StartConfig(keep=options.keep, last_grid=32, images=options.shrink_images)
        network = shrink_teacher(network, images, config, seed=0, on_step=lambda step: print(f"  {step}", flush=True))
    return network.eval()


def pixels_of(faces: FaceList) -> torch.Tensor:
    """All images of a list, 112 x 112, uint8."""
    return images_of_source("faces", faces.images).decode(range(len(faces)), 112)


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A graph on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda images: opened.run(None, {name: images})[0]


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for number in progress(range(rounds), "rounds"):
        for name in [*runs][:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - began)
    return times


def started(detector: Path, model: Path, photo: Path) -> dict[str, float]:
    """Seconds of the example from the start of the process to its result; the fastest of five."""
    script = ROOT / "docs" / "runtime" / "runtime_face.py"
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, script, detector, model, photo, photo], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return {"start_to_score_seconds": round(min(seconds), 3)}


def accuracy(path: Path, faces: FaceList, pairs: ImagePairs, images: torch.Tensor) -> dict[str, float]:
    """Ten-fold accuracy and TAR at FAR 1e-2 of a graph."""
    located = pairs.locate(faces)
    protocol = PairProtocol(located.left, located.right, located.same, located.fold_ids, fars=(FAR,))
    result = protocol.evaluate(embed_images(OnnxTeacher(path), images, progress=True))
    return {"accuracy": result.accuracy, "tar": float(result.tar[FAR]), "pairs": result.pairs}


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description="Exported students against eager torch, and int8 against float32.")
    parser.add_argument("--weights", help="a checkpoint, or an ONNX network of a known family")
    parser.add_argument("--keep", type=float, default=1.0, help="part of the channels of --weights that stays")
    parser.add_argument("--shrink-images", type=int, default=2000)
    parser.add_argument("--data", action="append", default=[], help="list or folder of crops; repeatable")
    parser.add_argument("--pairs", help="pairs in LFW's format on --data")
    parser.add_argument("--calibrate", action="append", default=[], help="crops for int8 and --keep; by default --data")
    parser.add_argument("--detector", type=Path, help="YuNet, to time the example without torch")
    parser.add_argument("--photo", type=Path, help="photograph for --detector")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lists = options.calibrate or options.data
    if lists:
        calibration = pixels_of(read_faces(lists, unlabeled=True))
    else:
        calibration = ((sample_faces(112, 64) + 1) * 127.5).round().to(torch.uint8)
    network = student(options, calibration)
    figures: dict[str, object] = {"network": type(network).__name__, "parameters": count_parameters(network)}
    with tempfile.TemporaryDirectory() as folder:
        save_student(network, Path(folder) / "student.safetensors")
        graph = export_onnx(network, Path(folder) / "student.onnx")
        small = quantize_onnx(graph, calibration, Path(folder) / "int8.onnx", min_cosine=0.9)
        floats, integers = session(graph), session(small)
        images = np.random.default_rng(0).uniform(-1, 1, (1, 3, *[network.input_size] * 2)).astype(np.float32)
        tensor = torch.from_numpy(images)
        with torch.inference_mode():
            times = alternating(
                {"eager": lambda: network(tensor), "float": lambda: floats(images), "int8": lambda: integers(images)},
                options.rounds,
            )
        ratio = {
            f"{name}_over_{other}": statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for name, other in (("float", "eager"), ("int8", "float"))
        }
        figures |= {f"{name}_ms": round(1000 * statistics.median(each), 3) for name, each in times.items()}
        figures |= {f"{name}_fastest_ms": round(1000 * min(each), 3) for name, each in times.items()}
        figures |= {name: round(value, 4) for name, value in ratio.items()}
        figures |= {"float_bytes": graph.stat().st_size, "int8_bytes": small.stat().st_size}
        figures["int8_size_ratio"] = round(small.stat().st_size / graph.stat().st_size, 4)
        if options.pairs:
            faces, pairs = read_faces(options.data), read_lfw_pairs(options.pairs)
            pixels = pixels_of(faces)
            found = {name: accuracy(path, faces, pairs, pixels) for name, path in (("float", graph), ("int8", small))}
            figures |= {name: {key: round(value, 5) for key, value in each.items()} for name, each in found.items()}
            figures["accuracy_loss"] = round(found["float"]["accuracy"] - found["int8"]["accuracy"], 5)
            figures["tar_loss"] = round(found["float"]["tar"] - found["int8"]["tar"], 5)
        if options.detector and options.photo:
            figures |= started(options.detector, graph, options.photo)
    for name, value in figures.items():
        print(f"{name:24}{value}")
    setup = {"torch": torch.__version__, "threads": 1, "vnni": _vnni(), "platform": platform.machine()}
    path = Path(__file__).parent / "results" / "export.json"
    path.write_text(json.dumps(setup | figures, indent=1) + "\n", encoding="utf-8")


def _vnni() -> bool | None:
    """Whether the processor has int8 dot products (VNNI); None if the system does not state it."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None


if __name__ == "__main__":
    main()
