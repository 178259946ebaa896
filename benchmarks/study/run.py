"""Run a grid of students: `python benchmarks/study/run.py benchmarks/study/screen.toml --judged LAG.csv --extra LFW.csv ...`.

Each run of the grid is one call of `kdlib-faces train` and one of `kdlib-faces evaluate`, written to `WORK/runs/NAME-SEED`, and a
JSON file in `benchmarks/results/study`. A finished run is skipped and an interrupted one resumed. Identities are split by the hash
of their name: settings are compared on the part "choose"; `--part report` judges runs whose settings are final.
"""

import argparse
import json
import os
import resource
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

import torch
from caches import cache_of, command
from lists import write_lists

from kdlib_faces.backbones import count_macs, load_backbone

RESULTS = Path(__file__).parents[1] / "results" / "study"


def train(name: str, run: dict[str, Any], seed: int, options: argparse.Namespace, lists: dict[str, Path]) -> Path:
    """Train one student; return its folder, in which `seconds.json` holds the processor time of all attempts.

    The time does not contain the outputs of the teachers, which all runs share, nor a start that another run has made.
    """
    folder = options.work / "runs" / f"{name}-{seed}"
    (folder / "train").mkdir(parents=True, exist_ok=True)
    settings = run["settings"]
    everything = [lists[f"train-{Path(each).stem}"] for each in (options.judged, *options.extra)]
    data = [lists[f"train-{each}"] for each in run["data"]]
    files = {"general": options.general, "age": options.age}
    start = run["start"].replace("general", options.general).replace("age", options.age)
    maps = (settings["recipe.map_weight"] > 0, settings["recipe.attention_weight"] > 0)
    teachers = [files[name] for name in run["teachers"]]
    caches = [
        cache_of(teacher, data, everything, options.work, maps=each)
        for teacher, each in zip(teachers, maps, strict=True)
    ]
    words = [word for path in data for word in ("--data", path)]
    words += [word for cache in caches for word in ("--teacher", cache)]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={_text(value)}")]
    starts = options.work / "starts"
    starts.mkdir(exist_ok=True)
    for path in starts.glob("*.safetensors"):  # the name is a hash of everything that a start depends on
        shutil.copy(path, folder / "train")
    spent = folder / "seconds.json"
    before = json.loads(spent.read_text()) if spent.exists() else {"core": 0.0, "wall": 0.0}
    began, used = time.perf_counter(), _core_seconds()
    try:
        command(
            "train", "--recipe", "liaad", "--start", start, "--seed", seed, "--output", folder / "train", *words,
            *(["--threads", options.threads] if options.threads else []),
        )  # fmt: skip
    finally:
        total = {"core": before["core"] + _core_seconds() - used, "wall": before["wall"] + time.perf_counter() - began}
        spent.write_text(json.dumps(total))
    return folder


def judge(models: list[str], output: Path, faces: Path) -> dict[str, Any]:
    """Evaluate models between the age groups of a list; return the measures of each."""
    words = [word for model in models for word in ("--model", model)]
    command(
        "evaluate",
        *words,
        "--data",
        faces,
        "--protocol",
        "between_groups",
        "--protocol",
        "age_group",
        "--output",
        output,
    )
    content = json.loads((output / "report.json").read_text())["models"]
    files = dict(model.split("=", 1) for model in models)
    return {name: _measures(each, files[name]) for name, each in content.items()}


def _measures(model: dict[str, Any], file: str) -> dict[str, Any]:
    between, bins = model["protocols"]["between_groups"], model["protocols"]["age_group"]["bins"]
    adult = next(each for each in bins if each["name"] == "adult-adult")
    return {
        "parameters": model["parameters"],
        "macs": model["macs"] if "macs" in model else _macs(file),
        "auc": between["auc"],
        "tar": between["tar"],
        "rank1": between["rank1"],
        "adult_tar": adult["own_tar"],
    }


def _macs(file: str) -> int:
    network = load_backbone(file)
    return count_macs(network, network.input_size)


def _core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def merged(base: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """A run of the grid: the base, with what the run changes."""
    return {**base, **run, "settings": {**base.get("settings", {}), **run.get("settings", {})}}


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, help="TOML file with [base] and [runs.NAME]")
    parser.add_argument(
        "--judged", required=True, help="list with age groups, of which half of the identities are judged"
    )
    parser.add_argument("--extra", action="append", default=[], help="further training list; repeatable")
    parser.add_argument("--general", required=True, help="ONNX file of the general teacher")
    parser.add_argument("--age", required=True, help="ONNX file of the age-invariant teacher")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--part", choices=("choose", "report"), default="choose")
    parser.add_argument("--only", action="append", help="name of a run; repeatable")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    grid = tomllib.loads(options.grid.read_text())
    lists = write_lists(options.judged, options.extra, options.age, options.work)
    target = RESULTS / options.part
    target.mkdir(parents=True, exist_ok=True)
    teachers = target / "teachers.json"
    if not teachers.exists():
        rows = judge(
            [f"general={options.general}", f"age={options.age}"],
            options.work / "teachers" / options.part,
            lists[options.part],
        )
        teachers.write_text(json.dumps(rows, indent=1) + "\n")
    for name, given in grid["runs"].items():
        if options.only and name not in options.only:
            continue
        run = merged(grid["base"], given)
        for seed in run["seeds"]:
            result = target / f"{name}-{seed}.json"
            if result.exists():
                continue
            folder = train(name, run, seed, options, lists)
            for path in (folder / "train").glob("start-*.safetensors"):
                judged = target / f"{path.stem.replace('-', '_')}.json"
                if not judged.exists():
                    shutil.copy(path, options.work / "starts")
                    rows = judge([f"start={path}"], options.work / path.stem / options.part, lists[options.part])
                    judged.write_text(json.dumps(rows, indent=1) + "\n")
            student = f"student={folder / 'train' / 'student.safetensors'}"
            measured = judge([student], folder / options.part, lists[options.part])
            settings = run["settings"]
            row = {
                "name": name,
                "seed": seed,
                "part": options.part,
                "run": run,
                "images_seen": settings["training.steps"] * settings["training.batch_size"],
                "seconds": json.loads((folder / "seconds.json").read_text()),
                "cores": os.cpu_count(),
                "threads": options.threads or torch.get_num_threads(),
                "torch": torch.__version__,
                "lists": json.loads((options.work / "lists" / "lists.json").read_text()),
                **measured,
            }
            result.write_text(json.dumps(row, indent=1) + "\n")
            print(f"{name}-{seed}: {summary(row['student'])}", flush=True)


def summary(row: dict[str, Any]) -> str:
    """One line of measures."""
    tar = " ".join(f"TAR@{far} {each['value']:.3f}" for far, each in row["tar"].items())
    return f"AUC {row['auc']['value']:.3f} {tar} rank-1 {row['rank1']['value']:.3f}"


if __name__ == "__main__":
    main()
