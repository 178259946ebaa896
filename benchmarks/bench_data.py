"""Training data: `python benchmarks/bench_data.py [--records 5800000]`.

Decoding: one worker from a `.rec` file to batches (uint8, mirrored, and with the default augmentation, by OpenCV and by
torch), against Pillow
decoding the same bytes, in processor time of one thread, four batches at a time. Index: opening a `.rec` file of 5.8 million records and 93,000
identities in a new process, up to the first batch. Wait: the share of a training step of a MobileFaceNet that waits for the
batch of two workers. Sides run alternately, ratios are of medians. Writes `results/data.json`.
"""

import argparse
import io
import json
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from kdlib_faces.backbones import MobileFaceNet
from kdlib_faces.data import RecordReader, SyntheticFaces, save_records, views
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.formats.record_format import MAGIC
from kdlib_faces.data.sources.records import RecordImages
from kdlib_faces.data.views import AugmentConfig

BATCH = 64
GROUP = 4
BLOCK = 100_000
FIRST_BATCH = """
import json, sys, time
import torch
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.lists import read_faces

def memory():
    rows = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return {name: int(rows[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS", "RssAnon")}

before, began, used = memory(), time.perf_counter(), time.process_time()
faces = read_faces(sys.argv[1])
opened = time.perf_counter()
batches = FaceBatches(FaceImages(faces.images, 112), faces.identities, batch_size=64, seed=0)
inputs, targets = next(iter(batches))
ended, after = time.perf_counter(), memory()
print(json.dumps({
    "images": len(faces), "identities": faces.num_identities, "list_s": opened - began, "first_batch_s": ended - began,
    "processor_s": time.process_time() - used,
    "imports_mb": before["VmRSS"], "peak_mb": after["VmHWM"], "added_peak_mb": after["VmHWM"] - before["VmRSS"],
    "private_mb": after["RssAnon"],
}))
"""


def encoded(pixels: np.ndarray[Any, Any], codec: str = "JPEG", **options: int) -> bytes:
    """An encoded image of pixels (h, w, 3)."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, codec, **options)
    return stream.getvalue()


def large_set(path: Path, count: int, identities: int) -> None:
    """Write a set of tiny images with header and identity records, as insightface does, in blocks of equal records."""
    image = encoded(np.full((8, 8, 3), 90, np.uint8), "PNG")
    data = 24 + len(image)
    length = 8 + data + -data % 4
    record = np.zeros(length, np.uint8)
    record[:8] = np.frombuffer(struct.pack("<II", MAGIC, data), np.uint8)
    record[32 : 8 + data] = np.frombuffer(image, np.uint8)
    labels = np.arange(count) * identities // count
    starts = np.searchsorted(labels, np.arange(identities + 1)) + 1
    with path.open("wb") as stream, path.with_suffix(".idx").open("w") as index:
        for first in range(0, count, BLOCK):
            rows = np.arange(first, min(first + BLOCK, count))
            block = np.repeat(record[None], len(rows), axis=0)
            block[:, 12:16] = labels[rows].astype("<f4").view(np.uint8).reshape(-1, 4)
            index.write("".join(f"{row + 1}\t{stream.tell() + at * length}\n" for at, row in enumerate(rows.tolist())))
            stream.write(block.tobytes())
        ranges = [(2, *span) for span in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
        for at, (flag, low, high) in enumerate([*ranges, (2, count + 1, count + 1 + identities)]):
            key = count + 1 + at if at < identities else 0
            index.write(f"{key}\t{stream.tell()}\n")
            stream.write(struct.pack("<IIIfQQff", MAGIC, 32, flag, 0.0, key, 0, low, high))


def index(count: int, identities: int, rounds: int) -> dict[str, Any]:
    """Open a large set and take the first batch in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.rec")
        large_set(path, count, identities)
        command = [sys.executable, "-c", FIRST_BATCH, str(path)]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(rounds)
        ]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of one call, which other programs disturb less than the time that passes."""
    began = time.process_time()
    call()
    return time.process_time() - began


def faces_record(folder: str, count: int) -> tuple[RecordImages, list[bytes]]:
    """A `.rec` file of synthetic faces, JPEG of quality 95, and its encoded images."""
    faces = SyntheticFaces(count // 8, 8, 112, seed=0)
    noise = torch.randint(-6, 7, (count, 3, 112, 112), generator=torch.Generator().manual_seed(0))
    pixels = (faces.images().int() + noise).clamp(0, 255).to(torch.uint8)  # the texture of a photograph
    images = [encoded(each.permute(1, 2, 0).numpy(), quality=95) for each in pixels]
    path = Path(folder, "train.rec")
    save_records(path, images, [row // 8 for row in range(count)])
    return RecordImages(RecordReader(path)), images


def decoding(rounds: int) -> dict[str, Any]:
    """Milliseconds for a batch of 64, and ratios to Pillow."""
    mirror = AugmentConfig(**{**vars(AugmentConfig.none()), "mirror": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        source, images = faces_record(folder, BATCH * GROUP)
        decoded, labels = FaceImages(source, 112), [row // 8 for row in range(BATCH * GROUP)]

        def made(augment: AugmentConfig | None, *, opencv: bool = True) -> Callable[[], Any]:
            batches = FaceBatches(decoded, labels, batch_size=BATCH, seed=0, augment=augment)

            def call() -> None:
                with patch.object(views, "find_opencv", views.find_opencv if opencv else lambda: None):
                    for _ in batches:
                        pass

            return call

        def pillow() -> None:
            for data in images:
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

        def pixels() -> None:
            for start in range(0, BATCH * GROUP, BATCH):
                decoded.read(range(start, start + BATCH))

        sides: dict[str, Callable[[], Any]] = {
            "pillow": pillow, "uint8": pixels, "plain": made(None), "mirrored": made(mirror),
            "augmented": made(AugmentConfig()), "augmented_by_torch": made(AugmentConfig(), opencv=False),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, call in sides.items() if number % 2 else reversed(sides.items()):
                times[name].append(seconds(call))
        median = {name: statistics.median(values[1:]) for name, values in times.items()}
        ratio = {
            name: statistics.median(a / b for a, b in zip(values[1:], times["pillow"][1:], strict=True))
            for name, values in times.items()
        }
    return {
        "bytes_per_image": round(sum(map(len, images)) / len(images)),
        "ms_per_batch": {name: round(1e3 * value / GROUP, 2) for name, value in median.items()},
        "opencv": views.find_opencv() is not None,
        "ratio_to_pillow": {name: round(value, 3) for name, value in ratio.items() if name != "pillow"},
    }


def waiting(steps: int, workers: int) -> dict[str, float]:
    """Share of the step of a student that waits for data."""
    student = MobileFaceNet(embedding_dim=128).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    waits, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        source, _ = faces_record(folder, 512)
        labels = [row // 8 for row in range(512)]
        batches = FaceBatches(
            FaceImages(source, 112), labels, batch_size=BATCH, seed=0, augment=AugmentConfig(), workers=workers
        )
        epoch, iterator = 0, iter(batches)
        for _ in range(steps + 2):
            began = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                epoch += 1
                batches.set_epoch(epoch)
                iterator = iter(batches)
                batch = next(iterator)
            taken = time.perf_counter()
            optimizer.zero_grad()
            student(batch[0]).square().mean().backward()
            optimizer.step()
            ended = time.perf_counter()
            waits.append(taken - began)
            whole.append(ended - began)
        batches.close()
    return {
        "workers": workers,
        "step_ms": round(1e3 * statistics.median(whole[2:]), 1),
        "wait_share": round(sum(waits[2:]) / sum(whole[2:]), 4),
        "median_wait_share": round(statistics.median(a / b for a, b in zip(waits[2:], whole[2:], strict=True)), 4),
    }


def main() -> None:
    """Run all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=5_800_000, help="records of the large set (5,800,000)")
    parser.add_argument("--identities", type=int, default=93_000, help="its identities (93,000)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of decoding (15)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (30)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data.json")
    given = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    if (opencv := views.find_opencv()) is not None:
        opencv.setNumThreads(0)
    results: dict[str, Any] = {"decoding": decoding(given.rounds)}
    print(json.dumps(results["decoding"], indent=1))
    torch.set_num_threads(threads)
    results["index"] = index(given.records, given.identities, 3)
    print(json.dumps(results["index"], indent=1))
    results["waiting"] = [waiting(given.steps, workers) for workers in (0, 2)]
    print(json.dumps(results["waiting"], indent=1))
    results["machine"] = {"python": platform.python_version(), "torch": str(torch.__version__), "threads": threads}
    given.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
