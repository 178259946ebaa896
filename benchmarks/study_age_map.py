"""How hard should the age map be held? `python benchmarks/study_age_map.py --faces LIST.csv --teacher A.onnx --teacher B.onnx`.

`fit_age_map` on the frozen embeddings of some people of the list, tested on the others, in turn, until all have been tested
(5 folds over identities, dealt several times), for a row of pulls: TAR at FAR 1e-3 of pairs of an adult and a young image and of
pairs of two adult images; flipped image added. Of the pairs, differences to the pull of the line `over` have intervals of a
bootstrap over identities, paired. The line "chosen" takes for each fold the pull that was best on the other folds, so
that no pair is tested by a pull that it has helped to choose. Writes `results/age_map.json`: figures alone.
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

from kdlib_faces.data.images import load_images, to_float
from kdlib_faces.data.lists import read_faces
from kdlib_faces.progress import progress
from kdlib_faces.teachers import OnnxTeacher, fit_age_map

RESULTS = Path(__file__).parent / "results" / "age_map.json"
PULLS = (0.0, 10.0, 30.0, 50.0, 100.0, 200.0, 500.0)
OVER = 10.0
"""The default until these figures moved it."""

Draws = dict[str, tuple[float, np.ndarray, int]]


def seen(path: str, faces: str) -> Faces:
    """The list's people as a teacher sees them."""
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


def fold(faces: Faces, test: np.ndarray, pull: float | None, replicates: int) -> Draws:
    """By bin, TAR, its replicates and the number of genuine pairs; without a pull that of the embeddings as they are."""
    rows, train = np.flatnonzero(test), np.flatnonzero(~test)
    embeddings = faces.sums(rows)
    if pull is not None:
        who = torch.from_numpy(np.unique(faces.identities[train], return_inverse=True)[1])
        embeddings = embeddings @ fit_age_map(faces.sums(train), who, **faces.far(train), l2_sp_weight=pull)
    result = protocol(faces, rows, replicates).evaluate(F.normalize(embeddings, dim=1).double().numpy())
    found = {}
    for entry in result.bins:
        estimate = entry.own_tar[FAR]
        if estimate.value is not None and estimate.replicates is not None:
            found[entry.name] = (estimate.value, estimate.replicates, entry.genuine)
    return found


def pooled(parts: list[Draws]) -> dict[str, tuple[float, np.ndarray]]:
    """Over folds, weighted by their genuine pairs."""
    out = {}
    for name in parts[0]:
        cells = [part[name] for part in parts if name in part]
        weight = np.array([genuine for *_, genuine in cells], dtype=float)
        weight /= weight.sum()
        value = sum(w * value for w, (value, *_) in zip(weight, cells, strict=True))
        draws = sum(w * draws for w, (_, draws, _) in zip(weight, cells, strict=True))
        out[name] = (float(value), np.asarray(draws))
    return out


def study(faces: Faces, deals: int, replicates: int) -> dict[str, Any]:
    """Every pull on every deal of the folds; the mean over deals, and each deal by itself."""
    ways: dict[str, list[list[Draws]]] = {}
    for deal in range(deals):
        dealt = folds(faces.identities, FOLDS, seed=deal)
        mine: dict[float | None, list[Draws]] = {}
        for pull in (None, *PULLS):
            mine[pull] = [fold(faces, test, pull, replicates) for test in dealt]
            ways.setdefault("start" if pull is None else f"pull {pull:g}", []).append(mine[pull])
        chosen = []
        for at in range(FOLDS):
            others = {
                pull: pooled([part for number, part in enumerate(mine[pull]) if number != at])["adult-young"][0]
                for pull in PULLS
            }
            chosen.append(mine[max(others, key=lambda pull: others[pull])][at])
        ways.setdefault("chosen", []).append(chosen)
    against = [pooled(parts) for parts in ways[f"pull {OVER:g}"]]
    return {name: _row([pooled(parts) for parts in of_deals], against) for name, of_deals in ways.items()}


def _row(mine: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name in mine[0]:
        over = [m[name][0] - a[name][0] for m, a in zip(mine, against, strict=True)]
        draws = np.mean([m[name][1] - a[name][1] for m, a in zip(mine, against, strict=True)], axis=0)
        low, high = np.nanquantile(draws, (0.025, 0.975))
        found[name] = {
            "tar": round(float(np.mean([m[name][0] for m in mine])), 4),
            "over": {"value": round(float(np.mean(over)), 4), "low": round(low, 4), "high": round(high, 4)},
            "deals": [round(m[name][0], 4) for m in mine],
        }
    return found


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description="How hard the age map should be held, on people kept apart.")
    parser.add_argument("--faces", required=True, help="CSV list with age groups")
    parser.add_argument("--teacher", action="append", required=True, help=".onnx; repeatable")
    parser.add_argument("--deals", type=int, default=3, help="how often the people are dealt to folds (3)")
    parser.add_argument("--replicates", type=int, default=500)
    options = parser.parse_args()
    content: dict[str, Any] = {
        "metric": "TAR at FAR 1e-3 against impostor pairs of the same bin, mean of 5 folds over identities",
        "over": f"pull {OVER:g}",
        "deals": options.deals,
        "replicates": options.replicates,
        "torch": torch.__version__,
        "teachers": {},
    }
    for path in options.teacher:
        began = time.perf_counter()
        rows = study(seen(path, options.faces), options.deals, options.replicates)
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
