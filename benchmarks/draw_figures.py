"""Draw the picture of the README and the docs from kept figures: `python benchmarks/draw_figures.py`.

Reads benchmarks/results/synthetic.json and writes docs/_static/by_age_gap.png, which carries the checksum of what it shows.
"""

import hashlib
import io
import json
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kdlib_faces.report.figures import ages
from kdlib_faces.report.theme import LIGHT, to_png
from kdlib_faces.report.view import View

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks" / "results" / "synthetic.json"
TARGET = ROOT / "docs" / "_static" / "by_age_gap.png"


def checksum() -> str:
    """SHA-256 of the figures that the picture must show."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()


def main() -> None:
    """Draw and write."""
    figure = ages(View(json.loads(SOURCE.read_text("utf-8"))), LIGHT, False)
    if figure is None:
        raise SystemExit(f"{SOURCE.name} has no age gaps to draw")
    note = PngInfo()
    note.add_text("source", checksum())
    TARGET.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(to_png(figure))).save(TARGET, pnginfo=note, optimize=True)
    print(TARGET.name, TARGET.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
