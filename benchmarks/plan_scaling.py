"""Disk, memory and hours of the recipe on a large face set, from the figures of `results/` and measured speeds, as a table.

    python benchmarks/plan_scaling.py --gpus 8 --images-per-second 3000 --teacher-images-per-second 3000

`--images-per-second` is the speed of one GPU that `kdlib-faces train` prints at the end of a short run, and `--teacher-images-per-second` that of
`kdlib-faces cache build`. Without them, hours are those of the machine that made `results/`: the student of `cache.json`, the first graph of
`onnx.json`. The defaults are a set as large as MS1MV3 and 20 epochs. Without options, the table is that of `docs/scaling.md`.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
MAP = 128 * 14 * 14
"""Values of a teacher's map."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Size of the set and of the training; speeds in images per second of one GPU, or None for those of `results/`."""

    images: int = 5_800_000
    identities: int = 93_000
    epochs: int = 20
    gpus: int = 8
    batch: int = 1024
    dim: int = 512
    views: int = 2
    images_per_second: float | None = None
    teacher_images_per_second: float | None = None


def read(name: str) -> dict[str, Any]:
    """Read a file of `results/`."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def plan(setup: Setup) -> dict[str, str]:
    """Return the rows of the table: what, and how much."""
    data = read("data.json")
    embeddings = setup.images * setup.views * setup.dim * 2 / GIB
    maps = setup.images * setup.views * MAP * 2 / GIB
    head = setup.identities * setup.dim * 4 / GIB
    logits = setup.batch // setup.gpus * setup.identities * 4 / GIB
    decoding = data["decoding"]
    rows = {
        f"images of {decoding['bytes_per_image']:,} bytes, as the synthetic JPEG files of `data.json`":
            f"{setup.images * decoding['bytes_per_image'] / GIB:.1f} GiB",
        f"cached embeddings of a teacher, {setup.dim} values, float16, plain and mirrored": f"{embeddings:.1f} GiB",
        "cached maps of a teacher, 128 x 14 x 14, float16, plain and mirrored": f"{maps:.0f} GiB",
        "margin head on each GPU: weights, gradient and momentum": f"{3 * head:.2f} GiB",
        f"logits of {setup.batch // setup.gpus} images on each GPU: cosines, margins and gradient": f"{3 * logits:.2f} GiB",
        "a checkpoint: head and momentum": f"{2 * head:.2f} GiB",
        f"steps of {setup.batch:,} images in {setup.epochs} epochs": f"{setup.images // setup.batch * setup.epochs:,}",
    }  # fmt: skip
    index = data["index"]
    if (index["images"], index["identities"]) == (setup.images, setup.identities):
        rows["start of a process: until the list is open, until the first batch"] = (
            f"{index['list_s']:.1f} s, {index['first_batch_s']:.1f} s"
        )
        rows["memory that the list and the first batch add to a process"] = f"{index['added_peak_mb']:.0f} MiB"
    per_worker = 64 / decoding["ms_per_batch"]["augmented"] * 1000
    how = ", with OpenCV" if decoding["opencv"] else ""
    rows[f"images per second of processor time that one worker decodes and augments{how}"] = f"{per_worker:,.0f}"
    return rows | hours(setup)


def hours(setup: Setup) -> dict[str, str]:
    """Return the rows for the time of the teachers and of the training."""
    cache, onnx = read("cache.json"), read("onnx.json")
    row = next(iter(onnx["rows"].values()))
    teacher, where = row["batch"] / row["milliseconds"] * 1000, f"{onnx['threads']} CPU core, the graph of `onnx.json`"
    if setup.teacher_images_per_second is not None:
        teacher, where = setup.teacher_images_per_second * setup.gpus, f"{setup.gpus} GPUs"
    student = cache["batch"] / cache["training step"]["two cached, embeddings"]["milliseconds"] * 1000
    place = f"{cache['threads']} CPU cores, the student of `cache.json`"
    if setup.images_per_second is not None:
        student, place = setup.images_per_second * setup.gpus, f"{setup.gpus} GPUs"
    total = setup.images * setup.epochs
    return {
        f"hours to cache a teacher at {teacher:,.0f} images per second ({where})":
            f"{setup.images * setup.views / teacher / 3600:,.1f}",
        f"hours of {setup.epochs} epochs at {student:,.0f} images per second ({place})": f"{total / student / 3600:,.1f}",
    }  # fmt: skip


def table(setup: Setup) -> str:
    """Return the plan as a table in Markdown."""
    head = ["", f"for {setup.images:,} images, {setup.identities:,} identities"]
    lines = [head, ["---", "---"], *plan(setup).items()]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def main() -> None:
    """Print the table for the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Setup()
    for name, default in vars(defaults).items():
        kind, text = (float, "of one GPU, measured") if default is None else (int, f"({default:,})")
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    print(table(Setup(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
