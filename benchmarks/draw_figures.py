"""Draw the picture of the README and the docs from stored results: `python benchmarks/draw_figures.py`.

Reads benchmarks/results/synthetic.json and writes docs/_static/by_age_gap.png, which contains the checksum of its source.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdlib_faces.evaluation.summary import Bins, MeasuredValue, ModelSummary, ProtocolSummary, Unit
from kdlib_faces.report import ModelEntry, Report
from kdlib_faces.report.plots import draw_bins

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks" / "results" / "synthetic.json"
TARGET = ROOT / "docs" / "_static" / "by_age_gap.png"
MODELS = ("student_distilled", "student_alone", "general_teacher", "age_teacher")


def checksum() -> str:
    """SHA-256 of the results that the picture shows."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def summarize(models: dict[str, Any]) -> ProtocolSummary:
    """TAR and AUC by age gap."""
    bins = {name: models[name]["protocols"]["age_gap"]["bins"] for name in MODELS}
    first = bins[MODELS[0]]
    labels, at = [entry["name"] for entry in first], [float(index) for index in range(len(first))]
    counts = [entry["genuine"] for entry in first]

    def axis(title: str, unit: Unit) -> Bins:
        return Bins(title, labels, "age gap in years, and genuine pairs in the bin", at, counts, unit)

    values = {
        name: ModelSummary(
            bins={
                "tar": [MeasuredValue(**entry["tar"]["0.01"]) for entry in rows],
                "auc": [MeasuredValue(**entry["own_auc"]) for entry in rows],
            }
        )
        for name, rows in bins.items()
    }
    axes = {"tar": axis("Genuine pairs accepted, TAR at FAR 1 %", "rate"), "auc": axis("AUC within the bin", "auc")}
    return ProtocolSummary("age_gap", "By age gap", bins=axes, models=values)


def main() -> None:
    """Draw and write."""
    models = json.loads(SOURCE.read_text("utf-8"))["models"]
    entries = {name: ModelEntry(models[name]["role"], label=models[name]["label"]) for name in MODELS}
    figure = draw_bins(Report("Demo", entries), summarize(models))
    if figure is None:
        raise SystemExit(f"{SOURCE.name} has no age gaps to draw")
    buffer, note = io.BytesIO(), PngInfo()
    figure.savefig(buffer, dpi=150)
    note.add_text("source", checksum())
    TARGET.parent.mkdir(exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(128).save(TARGET, pnginfo=note, optimize=True)
    print(TARGET.name, TARGET.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
