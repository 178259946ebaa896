"""Keep the figures of a report: `python benchmarks/keep_figures.py runs/real/report.json real_quick`.

Writes benchmarks/results/NAME.json: tables, comparisons, configuration and the command, with file names in place of paths;
no image, no curve, no name of a person.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

DROPPED = ("roc", "histogram", "cmc", "search")


def kept(report: dict[str, Any]) -> dict[str, Any]:
    """The report without curves and paths."""
    for entry in [report, *report.get("per_seed", [])]:
        for row in entry["models"].values():
            for protocol in row["protocols"].values():
                for name in DROPPED:
                    protocol.pop(name, None)
    for evaluation in report.get("evaluations", []):
        for found in evaluation["models"].values():
            for name in DROPPED:
                found.pop(name, None)
        evaluation.pop("pictures", None)
    for name in ("training", "figures", "pictures"):
        report.pop(name, None)
    report["command"] = re.sub(r"[^\s'\"=]*/", "", report["command"])
    return report


def main() -> None:
    """Read, reduce, write."""
    source, name = Path(sys.argv[1]), sys.argv[2]
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.write_text(json.dumps(kept(json.loads(source.read_text())), indent=1) + "\n")
    print(target.name, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
