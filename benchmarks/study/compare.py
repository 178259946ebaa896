"""Paired differences of runs: `python benchmarks/study/compare.py --base recipe --work runs/study`.

Evaluates the students of all finished runs with as many images seen as the base, or of the runs named by `--other`, on the list of
judged faces that `run.py` wrote, and stores the differences to the base, with intervals of resamples that all students share, beside the JSON files of the runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from caches import command
from run import RESULTS

MEASURES = ("tar_0.01", "tar_0.001", "rank1")


def differences(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the run minus the base, by run and measure, from the content of report.json."""
    evaluation = next(each for each in report["evaluations"] if each["name"] == "between_groups")
    found: dict[str, dict[str, Any]] = {}
    for each in evaluation["differences"]:
        if each["a"] == "base" and each["measure"] in MEASURES:
            row = each["difference"]
            turned = {"value": -row["value"], "low": -row["high"], "high": -row["low"]}
            found.setdefault(each["b"], {})[each["measure"]] = turned
    return found


def main() -> None:
    """Evaluate and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="name of the run that the others are compared with")
    parser.add_argument(
        "--other", action="append", help="run to compare, repeatable; by default all with as many images"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--part", choices=("choose", "report"), default="choose")
    options = parser.parse_args()
    folder = RESULTS / options.part
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob(f"*-{options.seed}.json"))]
    base = next(row for row in rows if row["name"] == options.base)
    chosen = options.other or [row["name"] for row in rows if row["images_seen"] == base["images_seen"]]
    others = [row for row in rows if row["name"] in chosen and row is not base]
    names = {f"run{number}": row["name"] for number, row in enumerate(others)}

    def student(name: str) -> Path:
        return options.work / "runs" / f"{name}-{options.seed}" / "train" / "student.safetensors"

    words: list[object] = ["--model", f"base={student(options.base)}"]
    for key, name in names.items():
        words += ["--model", f"{key}={student(name)}"]
    output = options.work / f"compared-{options.part}-{options.seed}"
    faces = options.work / "lists" / f"{options.part}.csv"
    command("evaluate", *words, "--data", faces, "--protocol", "between_groups", "--output", output)
    found = differences(json.loads((output / "report.json").read_text()))
    content = {
        "base": options.base,
        "seed": options.seed,
        "runs": {names[key]: value for key, value in found.items()},
    }
    target = folder / f"differences_{options.base}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(target.name)


if __name__ == "__main__":
    main()
