"""Disk, memory and hours of the recipe on a large face set, from the figures of `results/` and a measured speed.

    python benchmarks/plan_scaling.py --images 5800000 --identities 93000 --gpus 8 --images-per-second 3000

`--images-per-second` is the speed of one GPU that `kdlib-faces train` prints at the end of a short run, and `--teacher-images-per-second` that of
`kdlib-faces cache build`. Without them, the speeds are those of `results/cache.json` (student, two cores) and `results/onnx.json` (teacher, one
core). The defaults are the size of MS1MV3 and the length of its published trainings, 20 epochs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def plan(options: argparse.Namespace) -> dict[str, float]:
    """The sizes in GiB and the times in hours, by name."""
    cache, onnx = read("cache.json"), read("onnx.json")
    step = cache["training step"]["two cached, embeddings"]["milliseconds"] / 1000
    student = options.images_per_second or cache["batch"] / step
    row = onnx["rows"]["w600k_mbf"]
    teacher = options.teacher_images_per_second or row["batch"] / row["milliseconds"] * 1000
    head = options.identities * options.dim * 4
    logits = options.batch // options.gpus * options.identities * 4
    return {
        "images_per_second": student * options.gpus,
        "teacher_images_per_second": teacher * options.gpus,
        "cache_of_embeddings_gib_each_teacher": options.images * options.views * options.dim * 2 / GIB,
        "cache_of_a_map_gib_each_teacher": options.images * options.views * 128 * 14 * 14 * 2 / GIB,
        "head_gib_each_gpu": 3 * head / GIB,  # weights, gradients, momentum
        "logits_gib_each_gpu": 3 * logits / GIB,  # cosines, margins, gradients
        "checkpoint_gib": 2 * head / GIB,  # weights, momentum
        "cache_hours_each_teacher": options.images * options.views / (teacher * options.gpus) / 3600,
        "training_hours": options.images * options.epochs / (student * options.gpus) / 3600,
        "steps": options.images // options.batch * options.epochs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("images", 5_800_000), ("identities", 93_000), ("epochs", 20), ("gpus", 8), ("batch", 1024), ("dim", 512), ("views", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default:,})")
    for name in ("images-per-second", "teacher-images-per-second"):
        parser.add_argument(f"--{name}", type=float, help="of one GPU, measured")
    for name, value in plan(parser.parse_args()).items():
        print(f"{name.replace('_', ' '):40} {value:12,.2f}")


if __name__ == "__main__":
    main()
