"""Choose the L2-SP weight of the age map: `python benchmarks/study_age_map.py --faces LIST.csv --teacher A.onnx --teacher B.onnx`.

For a range of weights, `fit_age_map` is fitted to the frozen embeddings of some identities and tested on the others, in 5 folds over
identities, for several random splits. The metric is TAR at FAR 1e-3 of pairs of an adult and a young image and of pairs of two
adult images, with flip test. Differences from the weight named `over` have paired bootstrap intervals over identities. The row "chosen"
uses in each fold the weight that was best on the other folds, so that no pair is tested with a weight that it helped to choose.
Writes `results/age_map.json`, which holds no images.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_age_teacher import FAR, FOLDS, Faces, folds, protocol
from torch.nn import functional as F

from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import read_faces
from kdlib_faces.progress import progress
from kdlib_faces.teachers import OnnxTeacher, fit_age_map

RESULTS = Path(__file__).parent / "results" / "age_map.json"
WEIGHTS = (0.0, 10.0, 30.0, 50.0, 100.0, 200.0, 500.0)
OVER = 10.0
"""The default before this study."""

Estimates = dict[str, tuple[float, np.ndarray, int]]


def embed_list(path: str, faces: str) -> Faces:
    """The embeddings of a list by a teacher."""
    listed = read_faces([faces])
    if listed.age_groups is None:
        raise SystemExit("the list must have age groups")
    teacher = OnnxTeacher(path)
    images = load_images(listed, 112)
    views = []
    for view in (0, 1):
        parts = progress(torch.split(images, 64), f"{Path(path).stem}, view {view}")
        views += [teacher(to_float(each).flip(3) if view else to_float(each))["embedding"] for each in parts]
    embeddings = torch.cat(views).unflatten(0, (2, len(images)))
    return Faces(
        listed.identities, torch.empty(0), embeddings, None, groups=listed.age_groups, names=listed.group_names
    )


def fold(faces: Faces, test: np.ndarray, weight: float | None, replicates: int) -> Estimates:
    """TAR, its replicates and the number of genuine pairs by bin; without a map if the weight is None."""
    rows, train = np.flatnonzero(test), np.flatnonzero(~test)
    embeddings = faces.sums(rows)
    if weight is not None:
        matrix = fit_age_map(faces.sums(train), faces.labels(train), **faces.ages_of(train), l2_sp_weight=weight)
        embeddings = embeddings @ matrix
    result = protocol(faces, rows, replicates).evaluate(F.normalize(embeddings, dim=1).double().numpy())
    bins = {}
    for entry in result.bins:
        estimate = entry.own_tar[FAR]
        if estimate.value is not None and estimate.replicates is not None:
            bins[entry.name] = (estimate.value, estimate.replicates, entry.genuine)
    return bins


def pooled(parts: list[Estimates]) -> dict[str, tuple[float, np.ndarray]]:
    """Means over the folds, weighted by their genuine pairs."""
    out = {}
    for name in parts[0]:
        cells = [part[name] for part in parts if name in part]
        weight = np.array([genuine for *_, genuine in cells], dtype=float)
        weight /= weight.sum()
        value = sum(w * value for w, (value, *_) in zip(weight, cells, strict=True))
        draws = sum(w * draws for w, (_, draws, _) in zip(weight, cells, strict=True))
        out[name] = (float(value), np.asarray(draws))
    return out


def study(faces: Faces, splits: int, replicates: int) -> dict[str, Any]:
    """Every weight on every split into folds; means over the splits, and each split."""
    methods: dict[str, list[list[Estimates]]] = {}
    for split in range(splits):
        tests = folds(faces.identities, FOLDS, seed=split)
        by_weight: dict[float | None, list[Estimates]] = {}
        for weight in (None, *WEIGHTS):
            by_weight[weight] = [fold(faces, test, weight, replicates) for test in tests]
            methods.setdefault("start" if weight is None else f"L2-SP {weight:g}", []).append(by_weight[weight])
        chosen = []
        for at in range(FOLDS):
            others = {
                weight: pooled([part for number, part in enumerate(by_weight[weight]) if number != at])["adult-young"][
                    0
                ]
                for weight in WEIGHTS
            }
            chosen.append(by_weight[max(others, key=lambda weight: others[weight])][at])
        methods.setdefault("chosen", []).append(chosen)
    against = [pooled(parts) for parts in methods[f"L2-SP {OVER:g}"]]
    return {name: _row([pooled(parts) for parts in by_split], against) for name, by_split in methods.items()}


def _row(mine: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, Any]:
    bins = {}
    for name in mine[0]:
        over = [m[name][0] - a[name][0] for m, a in zip(mine, against, strict=True)]
        draws = np.mean([m[name][1] - a[name][1] for m, a in zip(mine, against, strict=True)], axis=0)
        low, high = np.nanquantile(draws, (0.025, 0.975))
        bins[name] = {
            "tar": round(float(np.mean([m[name][0] for m in mine])), 4),
            "over": {"value": round(float(np.mean(over)), 4), "low": round(low, 4), "high": round(high, 4)},
            "splits": [round(m[name][0], 4) for m in mine],
        }
    return bins


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="The L2-SP weight of the age map, tested on unseen identities.")
    parser.add_argument("--faces", required=True, help="CSV list with age groups")
    parser.add_argument("--teacher", action="append", required=True, help=".onnx; repeatable")
    parser.add_argument("--splits", type=int, default=3, help="random splits of the identities into folds (3)")
    parser.add_argument("--replicates", type=int, default=500)
    options = parser.parse_args()
    content: dict[str, Any] = {
        "metric": "TAR at FAR 1e-3 against impostor pairs of the same bin, mean of 5 folds over identities",
        "over": f"L2-SP {OVER:g}",
        "splits": options.splits,
        "replicates": options.replicates,
        "torch": torch.__version__,
        "teachers": {},
    }
    for path in options.teacher:
        began = time.perf_counter()
        rows = study(embed_list(path, options.faces), options.splits, options.replicates)
        content["teachers"][Path(path).stem] = rows
        for name, bins in rows.items():
            cells = [
                f"{at} {each['tar']:.3f} ({each['over']['value']:+.3f}, {each['over']['low']:+.3f} to {each['over']['high']:+.3f})"
                for at, each in bins.items()
            ]
            print(f"{Path(path).stem:24} {name:10} " + "  ".join(cells), flush=True)
        print(f"{Path(path).stem}: {time.perf_counter() - began:.0f} s", flush=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
