"""Store the results of a report: `python benchmarks/keep_figures.py runs/real/report.json real_quick`.

Writes benchmarks/results/NAME.json: tables, comparisons, configuration and the command, with file names instead of paths, and
without images, curves and names of identities.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

CURVES = ("roc", "histogram", "cmc", "search")


def reduce(report: dict[str, Any]) -> dict[str, Any]:
    """The report without curves, pictures and paths."""
    results = [protocol for model in report["models"].values() for protocol in model.get("protocols", {}).values()]
    results += [model for summary in report.get("evaluations", []) for model in summary["models"].values()]
    for result in results:
        for name in CURVES:
            result.pop(name, None)
    for summary in report.get("evaluations", []):
        summary.pop("pictures", None)
    for name in ("training", "pictures"):
        report.pop(name, None)
    report["command"] = re.sub(r"[^\s'\"=]*/", "", report["command"])
    return report


def main() -> None:
    """Read, reduce, write."""
    source, name = Path(sys.argv[1]), sys.argv[2]
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.write_text(json.dumps(reduce(json.loads(source.read_text())), indent=1) + "\n")
    print(target.name, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
