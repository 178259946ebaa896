"""Test the tests: `python -m tests.mutants.campaign --mutants 400`.

The operators of mutmut change the code of the losses, weightings, evaluation and compression, one expression at a time. A change that
no test detects survives. Survivors that are not in `survivors.toml` end the command with exit code 1. A command that was interrupted
continues where it stopped, as long as neither the code nor the tests changed.
"""

import argparse
import hashlib
import json
import os
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.mutations import Mutant, mutants_of
from tests.mutants.runner import FAULT, FOLDERS, KILLED, SURVIVED, TIMEOUT, Runner

ROOT = Path(__file__).parents[2]
ACCEPTED = Path(__file__).with_name("survivors.toml")
TESTS = [
    "tests/core/test_c[!a]*.py", "tests/core/test_[defgi]*.py", "tests/core/test_l*.py", "tests/core/test_m*.py",
    "tests/core/test_objective.py", "tests/core/test_public_names.py", "tests/core/test_relation*.py",
    "tests/core/test_terms.py", "tests/core/test_testing*.py", "tests/core/test_weighting.py",
    "tests/faces/test_evaluat*.py", "tests/faces/test_identities.py", "tests/faces/test_listing.py",
    "tests/faces/test_report.py", "tests/faces/test_student_start.py", "tests/faces/test_thresholds.py", *FOLDERS,
]  # fmt: skip
"""Files whose tests run for mutants, and folders whose examples do."""
SELECTED = "not compile and (not process or preprocess or processed)"
"""Words in the names of tests: those of compilers and of several processes take too long."""


def every_mutant() -> dict[str, list[Mutant]]:
    """Return the mutants by file."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): mutants_of(path, ROOT) for path in paths}


def sample(mutants: dict[str, list[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Draw mutants evenly over the files: one of each file in turn, until there are enough."""
    # In the order of hashes, so that a change of the code changes few of the drawn mutants.
    drawn = [
        sorted(each, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest()) for each in mutants.values()
    ]
    turns = max(map(len, drawn))
    return [each[turn] for turn in range(turns) for each in drawn if turn < len(each)][:count]


def state() -> str:
    """Return a hash of the code and the tests."""
    digest = hashlib.sha256()
    for folder in ("kdlib", "kdlib_faces", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def verdicts_of(file: Path) -> dict[tuple[object, ...], str]:
    """Read the verdicts of an earlier run."""
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {tuple(row["key"]): row["verdict"] for row in rows}


def run(mutants: list[Mutant], folder: Path, workers: int) -> dict[tuple[object, ...], str]:
    """Run mutants that have no verdict yet, and return the verdicts of all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "verdicts.jsonl"
    known = verdicts_of(file)
    rest = [mutant for mutant in mutants if mutant.key not in known]
    if rest:
        tests = sorted({str(path) for pattern in TESTS for path in ROOT.glob(pattern)})
        runner = Runner(ROOT, rest, file, folder / "clean.pickle", workers)
        options = ["-q", "--tb=native", "-p", "no:cacheprovider", "--no-header", "--no-summary", "-k", SELECTED]
        if code := pytest.main([*tests, *options], plugins=[runner]):
            raise SystemExit(f"mutants: pytest ended with exit code {code}")
        print(f"{len(runner.failed)} tests are too slow for mutants, skipped, or fail on the original code")
    return verdicts_of(file)


def accepted() -> dict[tuple[object, ...], str]:
    """Read the reasons of accepted survivors."""
    rows = tomllib.loads(ACCEPTED.read_text(encoding="utf-8")).get("survivor", [])
    return {(row["path"], row["function"], row["before"], row["after"], row["number"]): row["reason"] for row in rows}


def report(
    mutants: list[Mutant], total: Counter[str], verdicts: dict[tuple[object, ...], str], folder: Path
) -> list[Mutant]:
    """Write `result.json` and `result.md`, and return the survivors that are not accepted."""
    reasons = accepted()
    table: dict[str, Counter[str]] = {folder: Counter() for folder in FOLDERS}
    for mutant in mutants:
        table[next(each for each in FOLDERS if mutant.path.startswith(each))][verdicts[mutant.key]] += 1
    table["all"] = sum(table.values(), Counter())
    survivors = sorted((m for m in mutants if verdicts[m.key] == SURVIVED), key=lambda m: (m.path, m.line))
    lines = [
        "| module | mutants | run | killed | timeout | survived | killed or timeout |", "|---|---|---|---|---|---|---|"
    ]  # fmt: skip
    for name, row in table.items():
        found, decided = row[KILLED] + row[TIMEOUT], row.total() - row[FAULT]
        share = f"{100 * found / decided:.1f} %" if decided else ""
        count = total.total() if name == "all" else total[name]
        lines.append(
            f"| {name} | {count} | {row.total()} | {row[KILLED]} | {row[TIMEOUT]} | {row[SURVIVED]} | {share} |"
        )
    lines += ["", "| survivor | change | reason |", "|---|---|---|"]
    for mutant in survivors:
        change = mutant.change.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {mutant.path}:{mutant.line} | `{change}` | {reasons.get(mutant.key, 'new')} |")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        {"path": m.path, "line": m.line, "function": m.function, "before": m.before, "after": m.after, "number": m.number,
         "reason": reasons.get(m.key)} for m in survivors
    ]  # fmt: skip
    result = {"mutants": dict(total), "run": len(mutants), "modules": table, "survivors": rows}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines[: len(table) + 2]))
    for mutant in mutants:
        if mutant.key in reasons and verdicts[mutant.key] == KILLED:
            print(f"killed now, remove from {ACCEPTED.name}: {mutant.path}:{mutant.line}: {mutant.change}")
    return [mutant for mutant in survivors if mutant.key not in reasons]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", default="400", help="how many to draw, or 'all'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="beginning of the path of the files to change")
    parser.add_argument("--survivors", type=Path, help="a result.json: run its survivors again, and nothing else")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("runs/mutants"))
    given = parser.parse_args()
    mutants = {path: each for path, each in every_mutant().items() if path.startswith(given.only)}
    total = Counter(
        {folder: sum(len(each) for path, each in mutants.items() if path.startswith(folder)) for folder in FOLDERS}
    )
    count = total.total() if given.mutants == "all" else int(given.mutants)
    chosen = sample(mutants, count, given.seed)
    if given.survivors:
        keys = {
            (row["path"], row["function"], row["before"], row["after"], row["number"])
            for row in json.loads(given.survivors.read_text())["survivors"]
        }
        chosen = [mutant for each in mutants.values() for mutant in each if mutant.key in keys]
    verdicts = run(chosen, given.output / state(), given.workers)
    new = report(chosen, total, verdicts, given.output)
    for mutant in new:
        print(f"new survivor: {mutant.path}:{mutant.line}: {mutant.change}")
    sys.exit(1 if new else 0)


if __name__ == "__main__":
    main()
