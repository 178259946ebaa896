"""Cost and savings of a teacher cache: `python benchmarks/bench_cache.py [--threads 2] [--folder DIR]`.

Measures a training step with two cached teachers against the student alone, building a cache against the forward pass of
the teacher on the same images, and random reads from a warm cache. The sides alternate, and the median ratio of the rounds
is reported. Writes `results/cache.json`.
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

import torch
from PIL import Image
from torch import Tensor, nn

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    AttentionTransferLoss,
    Distiller,
    HintLoss,
    Objective,
    StudentAdapter,
    TeacherAdapter,
    Term,
)
from kdlib.cache import CachedTeacher, TeacherCache
from kdlib_faces.backbones import MobileFaceNet, mbf
from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.images import to_float
from kdlib_faces.heads import ArcFaceHead

BATCH, SIZE, IDENTITIES = 64, 112, 1000


class NoiseTeacher(nn.Module):
    """A teacher without computation: noise in the shapes of an IResNet's or a large MBF's outputs."""

    fingerprint = "noise"

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, samples: Tensor) -> dict[str, Tensor]:
        """Noise that depends on the first sample."""
        generator = torch.Generator().manual_seed(int(samples[0]))
        return {name: torch.randn(len(samples), *shape, generator=generator) for name, shape in self.shapes.items()}


def alternated(sides: dict[str, Callable[[], object]], base: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median time of each side and the median ratio to `base`, in wall-clock and in processor time.

    Processor time varies less if other programs use the cores, but does not include waiting for the disk.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # so that none is always first
            began = time.perf_counter(), time.process_time()
            sides[name]()
            if number:  # the first round is a warm-up
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))

    def ratio(found: list[tuple[float, float]], at: int) -> float:
        return round(statistics.median(a[at] / b[at] for a, b in zip(found, times[base], strict=True)), 4)

    return {
        name: {
            "milliseconds": round(1000 * statistics.median(wall for wall, _ in found), 2),
            "ratio": ratio(found, 0),
            "processor_ratio": ratio(found, 1),
        }
        for name, found in times.items()
    }


def steps(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Time a training step of a light student: alone, with two cached teachers, and with their feature maps too."""
    samples = 2048
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "general": {"embedding": (512,), "map": (512, 7, 7)},
        "age": {"embedding": (512,), "map": (256, 14, 14)},
    }
    caches = {
        name: TeacherCache.build(
            folder / name, NoiseTeacher(**shape), lambda ids, view: ids, samples=samples, batch_size=256
        )
        for name, shape in shapes.items()
    }
    draws = torch.Generator().manual_seed(0)

    def targets() -> dict[str, Tensor]:
        ids = torch.randint(samples, (BATCH,), generator=draws)
        return {"identity": ids % IDENTITIES, "sample": ids, "view": torch.zeros_like(ids)}

    def made(terms: dict[str, Term], teachers: dict[str, nn.Module]) -> Callable[[], None]:
        torch.manual_seed(0)
        net = MobileFaceNet(width=0.5)
        student = StudentAdapter(net, {"embedding": OUTPUT, "late": net.stages[-1], "middle": net.stages[-2]})
        head = ArcFaceHead(512, IDENTITIES)
        distiller = Distiller(student, teachers, Objective({"identity": Term(head, student="embedding", target="identity"), **terms}))  # fmt: skip
        distiller.infer(images, targets())
        optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            distiller(images, targets()).total.backward()
            optimizer.step()

        return step

    embedding = {"embedding": Term(AngularDistillLoss(), student="embedding", teacher="embedding")}
    maps = {
        "map": Term(HintLoss(), student="late", teacher="map", teachers=["general"], project="auto"),
        "attention": Term(AttentionTransferLoss(), student="middle", teacher="map", teachers=["age"]),
    }
    online = TeacherAdapter(mbf(), {"embedding": OUTPUT})
    return alternated(
        {
            "student alone": made({}, {}),
            "two cached, embeddings": made(
                embedding, {name: CachedTeacher(each, features=["embedding"]) for name, each in caches.items()}
            ),
            "two cached, embeddings and maps": made(
                embedding | maps, {name: CachedTeacher(each) for name, each in caches.items()}
            ),
            "one MBF online, embeddings": made(embedding, {"general": online}),
        },
        "student alone",
        rounds,
    )


def building(folder: Path, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Time an MBF, the fastest teacher, on `count` images: its forward pass alone, and building its cache."""
    torch.manual_seed(0)
    net = mbf().eval()
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8)
    (folder / "images").mkdir()
    files = [folder / "images" / f"{number}.jpg" for number in range(count)]
    for pixels, path in zip(images, files, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)
    narrow = TeacherAdapter(net, {"embedding": OUTPUT})
    wide = TeacherAdapter(net, {"embedding": OUTPUT, "map": net.stages[-1]})
    number = iter(range(10**6))

    @torch.no_grad()
    def bare() -> None:
        for part in images.split(BATCH):
            net(to_float(part))

    def held(samples: Tensor, view: int) -> Tensor:
        return to_float(images[samples])

    def decoded(samples: Tensor, view: int) -> Tensor:
        return to_float(load_images([files[row] for row in samples.tolist()], SIZE))

    def cached(teacher: TeacherAdapter, fetch: Callable[[Tensor, int], Tensor], **options: Any) -> Callable[[], None]:
        def build() -> None:
            path = folder / f"built{next(number)}"
            TeacherCache.build(path, teacher, fetch, samples=count, fingerprint="x", batch_size=BATCH, **options)

        return build

    return alternated(
        {
            "bare forward": bare,
            "cache, embeddings float16": cached(narrow, held),
            "cache, embeddings int8": cached(narrow, held, dtype="int8"),
            "cache, embeddings and maps float16": cached(wide, held),
            "cache, embeddings float16, from JPEG files": cached(narrow, decoded, prefetch=2),
        },
        "bare forward",
        rounds,
    )


def reads(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Measure embeddings per second at random ids of a warm cache, and from one file per sample."""
    count = 200_000
    cache = TeacherCache.build(
        folder / "embeddings", NoiseTeacher(embedding=(512,)), lambda ids, view: ids, samples=count, batch_size=1000
    )
    whole = torch.arange(count)
    for part in whole.split(1000):  # reads every page into memory
        cache.read(part)
    (folder / "single").mkdir()
    few = 2000
    for row in range(few):
        torch.save(cache.read([row])["embedding"][0].half(), folder / "single" / f"{row}.pt")
    draws = torch.Generator().manual_seed(0)

    def batch() -> int:
        return len(cache.read(torch.randint(count, (BATCH,), generator=draws))["embedding"])

    def one() -> int:
        return len(cache.read([int(torch.randint(count, (), generator=draws))])["embedding"])

    def file() -> int:
        row = int(torch.randint(few, (), generator=draws))
        return torch.load(folder / "single" / f"{row}.pt", weights_only=True).float().dim()

    rates = {}
    for name, call in {f"batches of {BATCH}": batch, "one by one": one, "one .pt file a sample": file}.items():
        done, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            done += call()
        rates[name] = {"embeddings_per_second": round(done / passed)}
    return rates


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description="What a teacher cache costs and saves.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="folder for the temporary caches")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tables["reads"] = reads(folder, 3.0)
        tables["training step"] = steps(folder, options.rounds)
        tables["building"] = building(folder, max(1, options.rounds // 2), 256)
    for title, rows in tables.items():
        print(f"{title}, batch {BATCH}, {SIZE} pixels" if title != "reads" else "random reads, 512-d float16, warm")
        for row, values in rows.items():
            print(f"  {row:44}" + "  ".join(f"{key} {value:g}" for key, value in values.items()))
    print(f"{time.perf_counter() - began:.0f} s in all")
    kept = {
        "torch": torch.__version__, "threads": options.threads, "cores": os.cpu_count(),
        "platform": platform.machine(), "batch": BATCH, "pixels": SIZE, "rounds": options.rounds,
    }  # fmt: skip
    (Path(__file__).parent / "results" / "cache.json").write_text(json.dumps(kept | tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
