"""Readers of lists and sets of face evaluation: `python benchmarks/bench_readers.py [--rows 15658489]`.

A pair list of IJB-C's size by `read_ijb_pairs` and by `numpy.loadtxt`, as text converted to numbers (as in published
evaluations of IJB) and as numbers directly; a `.bin` set of LFW's size by `load_bin` and by `pickle.load`; a RecordIO file
read by key in random order. Both sides run alternately, ratios are of medians, peak memory is that of tracemalloc. Writes
`results/readers.json`.
"""

import argparse
import json
import pickle
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdlib_faces.data import RecordReader, load_bin, read_ijb_pairs, save_bin, save_records


def pair_file(path: Path, rows: int) -> None:
    """Write a list of pairs of templates with lines as long as those of IJB-C."""
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        for start in range(0, rows, 500_000):
            count = min(500_000, rows - start)
            ids = rng.integers(1, 190_000, (count, 2))
            same = rng.random(count) < 0.00125
            stream.write("".join(f"{a} {b} {c:d}\n" for (a, b), c in zip(ids.tolist(), same.tolist(), strict=True)))


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; each round starts with another side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds(sides[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def peak(call: Callable[[], Any]) -> int:
    """Peak of the megabytes allocated by a call, including its result."""
    tracemalloc.start()
    kept = call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return round(found / 2**20)


def pairs(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """The pair list by our reader and by loadtxt as numbers; by loadtxt as text on a tenth, because of its memory."""
    path, part = folder / "pairs.txt", folder / "part.txt"
    pair_file(path, rows)
    pair_file(part, max(1, rows // 10))
    whole = in_turn({"ours": lambda: read_ijb_pairs(path), "loadtxt": lambda: np.loadtxt(path, dtype=np.int64)}, rounds)
    tenth = in_turn(
        {"ours": lambda: read_ijb_pairs(part), "published": lambda: np.loadtxt(part, dtype=str).astype(np.int64)},
        rounds,
    )
    return {
        "rows": rows,
        "seconds": round(whole["ours"], 3),
        "loadtxt_as_numbers_ratio": round(whole["loadtxt"] / whole["ours"], 2),
        "published_way_ratio": round(tenth["published"] / tenth["ours"], 2),
        "megabytes": peak(lambda: read_ijb_pairs(path)),
        "loadtxt_as_numbers_megabytes": peak(lambda: np.loadtxt(path, dtype=np.int64)),
        "published_way_megabytes_a_tenth": peak(lambda: np.loadtxt(part, dtype=str).astype(np.int64)),
        "result_megabytes": round(17 * rows / 2**20),
    }


def bins(folder: Path, rounds: int) -> dict[str, Any]:
    """6,000 pairs of 5 kB images."""
    rng = np.random.default_rng(0)
    path = folder / "set.bin"
    save_bin(path, [rng.bytes(5000) for _ in range(12_000)], [True, False] * 3000)

    def unrestricted() -> Any:
        with path.open("rb") as stream:
            return pickle.load(stream)

    medians = in_turn({"ours": lambda: load_bin(path), "pickle": unrestricted}, rounds)
    return {"seconds": round(medians["ours"], 4), "over_pickle": round(medians["ours"] / medians["pickle"], 2)}


def records(folder: Path, rounds: int) -> dict[str, Any]:
    """Random access to 20,000 images of 5 kB."""
    rng = np.random.default_rng(0)
    path = folder / "train.rec"
    count = 20_000
    save_records(path, (rng.bytes(5000) for _ in range(count)), (at // 10 for at in range(count)))
    reader = RecordReader(path)
    order = rng.permutation(count).tolist()
    medians = in_turn(
        {
            "read": lambda: [reader[at].image for at in order],
            "open": lambda: RecordReader(path),
            "labels": reader.labels,
        },
        rounds,
    )
    path.with_suffix(".idx").unlink()
    return {
        "images_per_second": round(count / medians["read"]),
        "open_seconds": round(medians["open"], 4),
        "labels_seconds": round(medians["labels"], 4),
        "records_per_second_without_index": round(22_001 / seconds(lambda: RecordReader(path))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=15_658_489, help="rows of the pair list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "readers.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "pairs": pairs(folder, options.rows, options.rounds),
            "bin": bins(folder, max(5, options.rounds)),
            "record": records(folder, options.rounds),
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
