"""Tables and plots of the study from its JSON files alone: `python benchmarks/study/show.py [--part report]`.

Prints a Markdown table of all runs, in which values are means over the seeds and intervals are those of the first seed,
and draws `docs/_static/study_PART.png`: accuracy against the number of training images, with the teachers as lines.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "study"
PICTURES = ROOT / "docs" / "_static"
FARS = ("0.01", "0.001")
SPACE = "\N{NO-BREAK SPACE}"
COMPARED = {"tar_0.01": "TAR at FAR 1 %", "tar_0.001": "TAR at FAR 0.1 %", "rank1": "rank-1"}


def read(part: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Return the measures of the teachers and of the starts, and the runs by name with their seeds in order."""
    folder = RESULTS / part
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*-[0-9]*.json")):
        row = json.loads(path.read_text())
        runs[row["name"]].append(row)
    starts = [json.loads(path.read_text())["start"] for path in sorted(folder.glob("start_*.json"))]
    return json.loads((folder / "teachers.json").read_text()), starts, dict(runs)


def cells(rows: list[dict[str, Any]]) -> str:
    """AUC, TAR of both FARs with intervals, rank-1 identification and TAR of adult pairs, of one model with several seeds."""
    auc, rank, adults = (
        f"{fmean(each['value'] for each in values):.3f}"
        for values in zip(*[(row["auc"], row["rank1"], row["adult_tar"]["0.001"]) for row in rows], strict=True)
    )
    shown = []
    for far in FARS:
        first = rows[0]["tar"][far]
        value = fmean(row["tar"][far]["value"] for row in rows)
        shown.append(f"{value:.3f} {interval(first['low'], first['high'], '.3f')}")
    return " | ".join((auc, *shown, rank, adults))


def interval(low: float, high: float, form: str) -> str:
    """An interval that a line of text does not break."""
    return f"({low:{form}}{SPACE}to{SPACE}{high:{form}})"


def table(teachers: dict[str, Any], starts: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table, the best TAR at FAR 0.1 % first."""
    lines = [
        "| run | seeds | images | core minutes | M parameters | AUC | TAR at FAR 1 % | TAR at FAR 0.1 % | rank-1 | adults |",
        "|" + "---|" * 10,
    ]
    lines += [f"| {name} teacher | | | | {_size(row)} | {cells([row])} |" for name, row in teachers.items()]
    lines += [f"| start, untrained | | 0 | | {_size(row)} | {cells([row])} |" for row in starts]
    order = sorted(runs, key=lambda name: -fmean(row["student"]["tar"][FARS[1]]["value"] for row in runs[name]))
    for name in order:
        rows = runs[name]
        students = [row["student"] for row in rows]
        minutes = fmean(row["seconds"]["core"] for row in rows) / 60
        head = f"| `{name}` | {len(rows)} | {rows[0]['images_seen']:,} | {minutes:.0f} | {_size(students[0])}"
        lines.append(f"{head} | {cells(students)} |")
    return "\n".join(lines)


def compared(part: str) -> str:
    """A Markdown table of the paired differences that `compare.py` stored; empty without any."""
    tables = []
    for path in sorted((RESULTS / part).glob("differences_*.json")):
        content = json.loads(path.read_text())
        lines = [
            f"| run minus `{content['base']}` | TAR at FAR 1 % | TAR at FAR 0.1 % | rank-1 |",
            "|" + "---|" * 4,
        ]
        for name, row in sorted(content["runs"].items(), key=lambda item: -item[1]["tar_0.01"]["value"]):
            shown = [
                f"{row[key]['value']:+.3f} {interval(row[key]['low'], row[key]['high'], '+.3f')}" for key in COMPARED
            ]
            lines.append(f"| `{name}` | {' | '.join(shown)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _size(model: dict[str, Any]) -> str:
    return f"{model['parameters'] / 1e6:.2f}"


def draw(
    teachers: dict[str, Any], starts: list[dict[str, Any]], runs: dict[str, list[dict[str, Any]]], target: Path
) -> None:
    """Accuracy against images seen, of the runs that are not compared with another of the same length in `draw_differences`."""
    mpl.use("agg")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axis, far in zip(axes, FARS, strict=True):
        lines = [(f"{name} teacher", row) for name, row in teachers.items()]
        for name, row in [*lines, *(("start, untrained", row) for row in starts)]:
            axis.axhline(row["tar"][far]["value"], color="0.6", linestyle="--", linewidth=1)
            axis.text(
                1.0,
                row["tar"][far]["value"],
                f" {name}",
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=8,
            )
        for number, (name, rows) in enumerate(runs.items()):
            x = [row["images_seen"] for row in rows]
            y = [row["student"]["tar"][far]["value"] for row in rows]
            low = [v - row["student"]["tar"][far]["low"] for v, row in zip(y, rows, strict=True)]
            high = [row["student"]["tar"][far]["high"] - v for v, row in zip(y, rows, strict=True)]
            beside = 1 + 0.06 * (number - (len(runs) - 1) / 2)  # so that runs of equal length do not hide each other
            axis.errorbar(
                [beside * each for each in x], y, [low, high], fmt="o", capsize=2, color=f"C{number % 10}", label=name
            )
        axis.set_xscale("log")
        axis.set_xlim(20_000, 800_000)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("training images seen")
        axis.set_title(f"Young against adult, TAR at FAR {float(far):.1%}")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.25, 0.5))
    figure.savefig(target, dpi=130)
    print(target.name)


def draw_differences(content: dict[str, Any], target: Path) -> None:
    """Paired differences to one run, as points with intervals."""
    names = sorted(content["runs"], key=lambda name: content["runs"][name]["tar_0.01"]["value"])
    figure, axes = plt.subplots(
        1, len(COMPARED), figsize=(10, 1.4 + 0.28 * len(names)), layout="constrained", sharey=True
    )
    for axis, (key, title) in zip(axes, COMPARED.items(), strict=True):
        rows = [content["runs"][name][key] for name in names]
        value = [row["value"] for row in rows]
        errors = [[v - row["low"] for v, row in zip(value, rows, strict=True)]]
        errors.append([row["high"] - v for v, row in zip(value, rows, strict=True)])
        axis.errorbar(value, range(len(names)), xerr=errors, fmt="o", capsize=2, markersize=4)
        axis.axvline(0, color="0.4", linewidth=1)
        axis.grid(axis="x", color="0.9")
        axis.set_title(title, fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.suptitle(f"Run minus {content['base']}, 95 % intervals", fontsize=10)
    figure.savefig(target, dpi=130)
    print(target.name)


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("choose", "report"), default="choose")
    options = parser.parse_args()
    teachers, starts, runs = read(options.part)
    print(table(teachers, starts, runs))
    print(compared(options.part))
    contents = [json.loads(path.read_text()) for path in sorted((RESULTS / options.part).glob("differences_*.json"))]
    seen = {name: rows[0]["images_seen"] for name, rows in runs.items()}
    hidden = {each for content in contents for each in content["runs"] if seen[each] == seen[content["base"]]}
    shown = {name: rows for name, rows in runs.items() if name not in hidden}
    draw(teachers, starts, shown, PICTURES / f"study_{options.part}.png")
    for content in (each for each in contents if len(each["runs"]) > 1):
        draw_differences(content, PICTURES / f"study_{options.part}_{content['base']}.png")


if __name__ == "__main__":
    main()
