"""Evaluation against published scripts: `python benchmarks/bench_evaluation.py [--only NAME] [--scale 0.1] [--threads 2]`.

Random embeddings in the sizes of FG-NET with MegaFace's million distractors, IJB-C, and LFW. The peers are the loops of
published scripts, with scikit-learn's roc_curve if it is installed (`pip install --no-deps scikit-learn==1.9.1
scipy==1.17.1 joblib==1.5.2 threadpoolctl==3.6.0 narwhals==2.10.0`), else the same curve in NumPy; the output names it.
Every row runs in its own process. Results are compared first, so that both sides compute the same. Memory is the peak of
the process's own pages (without mapped files), read every few milliseconds. Ratios are of one run on one machine. Writes
`results/evaluation.json`.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

MB = 1e6
Array = npt.NDArray[Any]


class Peak:
    """Peak of this process's own memory (bytes) while the block runs, and its memory at the start."""

    def __enter__(self) -> "Peak":
        self.start = self.peak = own_memory()
        self.going = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.going:
            self.peak = max(self.peak, own_memory())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.thread.join()
        self.peak = max(self.peak, own_memory())


def own_memory() -> int:
    """Bytes of the pages of this process alone."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def in_turn(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of each side, run alternately."""
    times = [(timed(ours)[0], timed(peer)[0]) for _ in range(rounds)]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def faces(rng: np.random.Generator, count: int, identities: int, noise: float, width: int = 512) -> tuple[Array, Array]:
    """Embeddings (count, width) float32 and their identities (count,)."""
    codes = np.sort(np.concatenate([np.arange(identities), rng.integers(0, identities, count - identities)]))
    center = rng.standard_normal((identities, width), dtype=np.float32)
    return center[codes] + np.float32(noise) * rng.standard_normal((count, width), dtype=np.float32), codes


# ---- FG-NET among a million -----------------------------------------------------------------------------------------


def distractors(scale: float) -> dict[str, Any]:
    from kdlib_faces.evaluation import identify_with_distractors

    rng = np.random.default_rng(0)
    count, block = max(8192, round(1_000_000 * scale)), 4096
    probes, identities = faces(rng, 1002, 82, 1.9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distractors.f16"
        writing = np.memmap(path, dtype=np.float16, mode="w+", shape=(count, 512))
        for start in range(0, count, 65536):
            writing[start : start + 65536] = rng.standard_normal((min(65536, count - start), 512), dtype=np.float32)
        writing.flush()
        del writing
        mapped = np.memmap(path, dtype=np.float16, mode="r", shape=(count, 512))
        single = (probes / np.linalg.norm(probes, axis=1, keepdims=True)).astype(np.float32)
        bare: list[float] = []

        def products() -> None:
            """The float16 shards as float32, times the probes; `bare` holds the seconds of the products alone."""
            out, spent = np.empty((len(single), block), dtype=np.float32), 0.0
            for start in range(0, count, block):
                shard = mapped[start : start + block].astype(np.float32)
                begin = time.perf_counter()
                np.matmul(single, shard.T, out=out[:, : len(shard)])
                spent += time.perf_counter() - begin
            bare.append(spent)

        def ours() -> Any:
            return identify_with_distractors(probes, identities, mapped, fars=(1e-6,))

        # The same figures from a plain computation on part of the set.
        part = mapped[:8192].astype(np.float64)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
        unit = probes.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        scores, mates = unit @ part.T, unit @ unit.T
        pair = (identities[:, None] == identities) & ~np.eye(len(identities), dtype=bool)
        rank1 = float((mates >= scores.max(axis=1)[:, None])[pair].mean())
        k = int(1e-6 * scores.size)
        tar = float((mates[np.triu(pair)] > np.sort(scores.ravel())[-1 - k]).mean())
        del scores, mates
        small = identify_with_distractors(probes, identities, mapped[:8192], fars=(1e-6,))
        assert (small.rank1, float(small.tar[1e-6])) == (rank1, tar), (small.rank1, rank1, float(small.tar[1e-6]), tar)

        products()
        bare.clear()
        with Peak() as memory:
            result = ours()
        ours_s, cast_s = in_turn(ours, products, 2 if scale > 0.5 else 3)
        bare_s = statistics.median(bare)
    return {
        "distractors": result.distractors,
        "rank1": result.rank1,
        "tar@1e-6": float(result.tar[1e-6]),
        "ours_s": ours_s,
        "products_s": bare_s,
        "products_and_cast_s": cast_s,
        "times_the_products": ours_s / bare_s,
        "times_products_and_cast": ours_s / cast_s,
        "wanted_at_most": 1.5,
        "above_the_map_mb": memory.peak / MB,
        "of_it_before_mb": memory.start / MB,
        "wanted_below_mb": 600,
    }


# ---- IJB-C 1:1 ------------------------------------------------------------------------------------------------------


def roc_of(labels: Array, scores: Array) -> tuple[Array, Array, str]:
    """False and true positive rates of scikit-learn's roc_curve, and the name of the implementation."""
    try:
        metrics = importlib.import_module("sklearn.metrics")
        fpr, tpr, _ = metrics.roc_curve(labels, scores)
        return fpr, tpr, f"scikit-learn {importlib.import_module('sklearn').__version__}"
    except ImportError:
        order = np.argsort(scores, kind="mergesort")[::-1]
        falling, truth = scores[order], labels[order]
        ends = np.r_[np.flatnonzero(np.diff(falling)), truth.size - 1]
        tps = np.cumsum(truth, dtype=np.float64)[ends]
        fps = 1 + ends - tps
        kept = np.r_[True, np.logical_or(np.diff(fps, 2), np.diff(tps, 2)), True]
        fps, tps = np.r_[0, fps[kept]], np.r_[0, tps[kept]]
        return fps / fps[-1], tps / tps[-1], "roc_curve written out (scikit-learn is absent)"


def ijbc_pairs(scale: float) -> tuple[Array, Array, Array, Array, Array]:
    rng = np.random.default_rng(1)
    templates, pairs, genuine = (max(64, round(x * scale)) for x in (23_124, 15_658_489, 19_557))
    features, identities = faces(rng, templates, max(8, round(3531 * scale)), 2.2)
    ids = rng.permutation(templates * 2)[:templates] + 1
    left, right = (rng.integers(0, templates, pairs, dtype=np.int64) for _ in range(2))
    # Genuine pairs: neighboring templates.
    left[:genuine] = rng.integers(0, templates - 1, genuine)
    right[:genuine] = left[:genuine] + 1
    right = np.where(left == right, (right + 1) % templates, right)
    same = identities[left] == identities[right]
    order = rng.permutation(pairs)
    return features, ids, ids[left[order]], ids[right[order]], same[order]


FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def published_pairs(features: Array, ids: Array, left: Array, right: Array, same: Array) -> tuple[list[float], str]:
    """insightface's procedure: a table of ids, products in chunks of 100,000 pairs, roc_curve, the nearest point."""
    table = np.zeros((int(ids.max()) + 1, 1), dtype=int)
    table[ids, 0] = np.arange(len(ids))
    score = np.zeros((len(left),))
    for start in range(0, len(left), 100_000):
        chunk = slice(start, start + 100_000)
        first, second = features[table[left[chunk], 0]], features[table[right[chunk], 0]]
        score[chunk] = np.sum(first * second, -1)
    fpr, tpr, library = roc_of(same.astype(int), score)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)
    return [float(tpr[np.argmin(abs(fpr - far))]) for far in FARS], library


def pairs_ours(scale: float) -> dict[str, Any]:
    from kdlib_faces.evaluation import TemplateVerificationProtocol, pool_templates

    features, ids, left, right, same = ijbc_pairs(scale)
    media = np.arange(len(ids))
    templates = pool_templates(features, ids, media)

    def verify(mode: Literal["exact", "nearest"]) -> Any:
        protocol = TemplateVerificationProtocol(ids, media, left, right, same, fars=FARS, mode=mode)
        return protocol.verify(templates)

    with Peak() as memory:
        seconds, result = timed(lambda: verify("exact"))
    nearest = verify("nearest")
    return {
        "templates": templates.ids.size,
        "pairs": int(left.size),
        "ours_s": seconds,
        "ours_peak_mb": memory.peak / MB,
        "ours_inputs_mb": memory.start / MB,
        "tar": [float(result.tar[far]) for far in FARS],
        "tar_nearest": [float(nearest.tar[far]) for far in FARS],
    }


def pairs_peer(scale: float) -> dict[str, Any]:
    features, ids, left, right, same = ijbc_pairs(scale)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    with Peak() as memory:
        seconds, (tar, library) = timed(lambda: published_pairs(features, ids, left, right, same))
    return {"peer_s": seconds, "peer_peak_mb": memory.peak / MB, "peer_tar": tar, "peer": library}


def pairs(scale: float) -> dict[str, Any]:
    """Each side in its own process, so that memory is measured separately."""
    rounds = [apart("pairs_ours", scale) | apart("pairs_peer", scale) for _ in range(1 if scale > 0.5 else 3)]
    row = rounds[-1]
    for name in ("ours_s", "peer_s"):
        row[name] = statistics.median(each[name] for each in rounds)
    # At 1e-6 the published curve drops collinear points, so only FARs with enough impostors must agree.
    for far, a, b in zip(FARS, row["tar_nearest"], row["peer_tar"], strict=True):
        assert abs(a - b) < 2e-3 or far * row["pairs"] < 20, (far, a, b)
    return row | {"times_faster": row["peer_s"] / row["ours_s"], "wanted_at_least": 3, "wanted_below_mb": 2000}


# ---- Template pooling -----------------------------------------------------------------------------------------------


def published_pooling(features: Array, templates: Array, media: Array) -> tuple[Array, Array]:
    """insightface's image2template_feature."""
    unique = np.unique(templates)
    pooled = np.zeros((len(unique), features.shape[1]))
    for count, template in enumerate(unique):
        (rows,) = np.where(templates == template)
        of_template, of_media = features[rows], media[rows]
        known, counts = np.unique(of_media, return_counts=True)
        parts = []
        for medium, ct in zip(known, counts, strict=True):
            (inside,) = np.where(of_media == medium)
            if ct == 1:
                parts += [of_template[inside]]
            else:
                parts += [np.mean(of_template[inside], axis=0, keepdims=True)]
        pooled[count] = np.sum(np.array([part[0] for part in parts]), axis=0)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True), unique


def pooling(scale: float) -> dict[str, Any]:
    from kdlib_faces.evaluation import pool_templates

    rng = np.random.default_rng(2)
    images, templates = max(512, round(469_375 * scale)), max(32, round(23_124 * scale))
    features = rng.standard_normal((images, 512), dtype=np.float32)
    owner = np.sort(np.concatenate([np.arange(templates), rng.integers(0, templates, images - templates)]))
    # A third of the images are stills, the others frames of a few videos of the template.
    media = np.where(rng.random(images) < 1 / 3, np.arange(images), images + owner * 4 + rng.integers(0, 4, images))
    row: dict[str, Any] = {"images": images, "templates": templates}
    for order, name in ((slice(None), ""), (rng.permutation(images), "_shuffled")):
        given, mine, theirs = features[order], owner[order], media[order]
        first_s, pooled = timed(lambda g=given, o=mine, m=theirs: pool_templates(g, o, m))
        peers = []
        for _ in range(2):
            peer_s, (expected, _) = timed(lambda g=given, o=mine, m=theirs: published_pooling(g, o, m))
            peers.append(peer_s)
        assert np.allclose(pooled.features, expected, atol=1e-5)
        del pooled, expected
        # Results are dropped between rounds: pages that no process has touched before cost more than the sums.
        ours_s = statistics.median(
            timed(lambda g=given, o=mine, m=theirs: pool_templates(g, o, m))[0] for _ in range(5)
        )
        peer_s = statistics.median(peers)
        row |= {f"ours{name}_s": ours_s, f"peer{name}_s": peer_s, f"times_faster{name}": peer_s / ours_s}
        row |= {f"ours_first_call{name}_s": first_s, f"times_faster_first_call{name}": peers[0] / first_s}
    return row | {"wanted_at_least": 20, "peer": "loop over templates, as published"}


# ---- Ten folds ------------------------------------------------------------------------------------------------------


def accuracy_at(threshold: float, distance: Array, same: Array) -> tuple[float, float, float]:
    """insightface's calculate_accuracy."""
    predicted = np.less(distance, threshold)
    tp = np.sum(np.logical_and(predicted, same))
    fp = np.sum(np.logical_and(predicted, np.logical_not(same)))
    tn = np.sum(np.logical_and(np.logical_not(predicted), np.logical_not(same)))
    fn = np.sum(np.logical_and(np.logical_not(predicted), same))
    return float(tp) / float(tp + fn), float(fp) / float(fp + tn), float(tp + tn) / distance.size


def published_folds(left: Array, right: Array, same: Array, thresholds: Any) -> tuple[float, float]:
    """insightface's calculate_roc; `thresholds` may depend on the training distances."""
    distance = np.sum(np.square(np.subtract(left, right)), 1)
    accuracies = []
    for test in np.array_split(np.arange(same.size), 10):
        train = np.setdiff1d(np.arange(same.size), test)
        grid = thresholds(distance[train])
        scores = np.zeros(len(grid))
        for index, threshold in enumerate(grid):
            scores[index] = accuracy_at(threshold, distance[train], same[train])[2]
        best = grid[np.argmax(scores)]
        for threshold in grid:
            accuracy_at(threshold, distance[test], same[test])
        accuracies.append(accuracy_at(best, distance[test], same[test])[2])
    return float(np.mean(accuracies)), float(np.std(accuracies))


def published_val(left: Array, right: Array, same: Array, target: float) -> tuple[float, float, float]:
    """insightface's calculate_val, its interpolation by the two neighboring points of the grid."""
    distance = np.sum(np.square(np.subtract(left, right)), 1)
    grid = np.arange(0, 4, 0.001)
    vals, fars = [], []
    for test in np.array_split(np.arange(same.size), 10):
        train = np.setdiff1d(np.arange(same.size), test)
        rates = np.zeros(len(grid))
        for index, threshold in enumerate(grid):
            rates[index] = val_far(threshold, distance[train], same[train])[1]
        limit = 0.0
        if rates.max() >= target:
            after = int(np.searchsorted(rates, target, side="right"))
            share = (target - rates[after - 1]) / (rates[after] - rates[after - 1])
            limit = grid[after - 1] + share * (grid[after] - grid[after - 1])
        val, far = val_far(limit, distance[test], same[test])
        vals.append(val)
        fars.append(far)
    return float(np.mean(vals)), float(np.std(vals)), float(np.mean(fars))


def val_far(threshold: float, distance: Array, same: Array) -> tuple[float, float]:
    """insightface's calculate_val_far."""
    predicted = np.less(distance, threshold)
    accepted = np.sum(np.logical_and(predicted, same))
    wrong = np.sum(np.logical_and(predicted, np.logical_not(same)))
    return float(accepted) / float(np.sum(same)), float(wrong) / float(np.sum(np.logical_not(same)))


def tenfold(scale: float) -> dict[str, Any]:
    from kdlib_faces.evaluation import verify_pairs

    rng = np.random.default_rng(3)
    half = max(20, round(300 * scale))
    same = np.tile(np.repeat([True, False], half), 10)
    left = rng.standard_normal((same.size, 512), dtype=np.float32)
    noise = rng.standard_normal((same.size, 512), dtype=np.float32)
    other = rng.standard_normal((same.size, 512), dtype=np.float32)
    right = np.where(same[:, None], left + 2.6 * noise, other + 0.25 * left)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right)]
    grid = np.arange(0, 4, 0.01)
    row: dict[str, Any] = {"pairs": int(same.size), "peer": "loops over thresholds and folds, as published"}

    def midpoints(known: Array) -> Array:
        known = np.unique(known)
        return np.concatenate([[known[0]], (known[1:] + known[:-1]) / 2, [known[-1] + 1]])

    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "grid": (lambda: verify_pairs(*unit, same), lambda: published_folds(*unit, same, lambda _: grid)),
        "grid_and_val": (
            lambda: verify_pairs(*unit, same, val_fars=(1e-3,)),
            lambda: (published_folds(*unit, same, lambda _: grid), published_val(*unit, same, 1e-3)),
        ),
        "exact": (
            lambda: verify_pairs(*unit, same, threshold="exact"),
            lambda: published_folds(*unit, same, midpoints),
        ),
    }
    for name, (ours, peer) in cases.items():
        found, expected = ours(), peer()
        accuracy, std = expected[0] if name == "grid_and_val" else expected
        # float32 distances in the published loop: a pair may fall on the other side of a threshold.
        assert abs(found.accuracy - accuracy) < 2 / same.size, (name, found, expected)
        assert abs(found.std - std) < 1e-3, (name, found, expected)
        if name == "grid_and_val":
            assert abs(found.val[1e-3].tar - expected[1][0]) < 2 / half, (found.val, expected)
        ours_s = statistics.median(timed(ours)[0] for _ in range(9))
        peer_s = statistics.median(timed(peer)[0] for _ in range(1 if name == "exact" else 3))
        row |= {f"{name}_ours_s": ours_s, f"{name}_peer_s": peer_s, f"{name}_times_faster": peer_s / ours_s}
    return row | {"wanted_at_least": 20}


# ---- Sets of images -------------------------------------------------------------------------------------------------


def images_once(scale: float, times: int, *, command: bool = False) -> dict[str, Any]:
    """Evaluation of images, by the function or by the command, which also keeps the embeddings on disk."""
    import torch

    from kdlib_faces.evaluation import PairProtocol, evaluate, evaluate_images
    from kdlib_faces.evaluation.summary import ModelEntry
    from kdlib_faces.harness.embeddings import OpenedModel, embed_set
    from kdlib_faces.harness.image_sets import ImageSet

    torch.set_num_threads(2)
    rng = np.random.default_rng(4)
    count = max(80, round(750 * scale) * 4) * times
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7, stride=4), torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten()
    )
    with tempfile.TemporaryDirectory() as folder:
        images = np.memmap(Path(folder) / "images.u8", dtype=np.uint8, mode="w+", shape=(count, 3, 112, 112))
        for start in range(0, count, 500):
            images[start : start + 500] = rng.integers(0, 256, (min(500, count - start), 3, 112, 112), dtype=np.uint8)
        images.flush()
        out = np.memmap(Path(folder) / "embeddings.f32", dtype=np.float32, mode="w+", shape=(count, 512))
        protocol = PairProtocol.interleaved(np.tile([True, False], count // 4))
        small = PairProtocol.interleaved(np.tile([True, False], 20))
        evaluate_images(model, images[:80], small)  # one-time allocations of the first forward

        def by_command() -> Any:
            embeddings = embed_set(opened, ImageSet("set", count, "set", lambda row, _: images[row], str), Path(folder))
            return evaluate(embeddings, protocol)

        opened = OpenedModel(Path("model"), model, 112, ModelEntry("student"), "model")
        with Peak() as memory:
            seconds, result = timed(
                by_command if command else lambda: evaluate_images(model, images, protocol, out=out)
            )
        assert result.pairs == count // 2
    return {"images": count, "seconds": seconds, "start_mb": memory.start / MB, "peak_mb": memory.peak / MB}


def images(scale: float) -> dict[str, Any]:
    """Peak of own memory at n and at 4n images, each in its own process."""
    once, four, command, command_four = (
        apart(name, scale) for name in ("images_n", "images_4n", "command_n", "command_4n")
    )
    own = [each["peak_mb"] - each["start_mb"] for each in (command, command_four)]
    return {
        "n": once["images"],
        "4n": four["images"],
        "peak_above_start_mb_n": once["peak_mb"] - once["start_mb"],
        "peak_above_start_mb_4n": four["peak_mb"] - four["start_mb"],
        "growth_mb": four["peak_mb"] - four["start_mb"] - once["peak_mb"] + once["start_mb"],
        "images_as_float32_twice_mb_4n": four["images"] * 3 * 112 * 112 * 4 * 2 / MB,
        "seconds_4n": four["seconds"],
        "command_peak_above_start_mb_n": own[0],
        "command_peak_above_start_mb_4n": own[1],
        "command_growth_mb": own[1] - own[0],
        "command_seconds_4n": command_four["seconds"],
    }


ROWS: dict[str, Callable[[float], dict[str, Any]]] = {
    "distractors": distractors,
    "pairs": pairs,
    "pooling": pooling,
    "tenfold": tenfold,
    "images": images,
}
PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "pairs_ours": pairs_ours,
    "pairs_peer": pairs_peer,
    "images_n": lambda scale: images_once(scale, 1),
    "images_4n": lambda scale: images_once(scale, 4),
    "command_n": lambda scale: images_once(scale, 1, command=True),
    "command_4n": lambda scale: images_once(scale, 4, command=True),
}


def apart(name: str, scale: float) -> dict[str, Any]:
    """One part in its own process."""
    command = [sys.executable, __file__, "--part", name, "--scale", str(scale)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run the rows, print and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(ROWS), action="append", help="only these rows")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the sizes: 0.05 for a quick run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=(*ROWS, *PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps((ROWS | PARTS)[arguments.part](arguments.scale)))
        return
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(arguments.threads)
    begin, results = time.monotonic(), {}
    for name in arguments.only or ROWS:
        seconds, results[name] = timed(lambda name=name: apart(name, arguments.scale))
        print(f"{name} ({seconds:.0f} s)")
        for key, value in results[name].items():
            print(f"  {key:28} {value:.4g}" if isinstance(value, float) else f"  {key:28} {value}")
    about = {
        "threads": arguments.threads,
        "scale": arguments.scale,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(about))
    if arguments.scale == 1.0 and not arguments.only:
        target = Path(__file__).parent / "results" / "evaluation.json"
        target.write_text(json.dumps({**about, "rows": results}, indent=1) + "\n")
        print(target.name)
    else:
        print("not saved: some rows only, or a smaller scale")


if __name__ == "__main__":
    main()
