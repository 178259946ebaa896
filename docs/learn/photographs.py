"""From face crops to an int8 student: two teachers, the student alone, the student distilled, evaluation and export."""

import contextlib
import json
import shlex
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from tutorial import COLORS, Lesson, Row, axes, legend, main

from kdlib_faces.cli import main as kdlib_faces
from kdlib_faces.data import SyntheticFaces

SIZE = 32


# [crops]
def write_crops(name: str, faces: SyntheticFaces) -> None:
    """What `kdlib-faces align` makes from photographs: crops, and a list of path, identity and age."""
    lines = ["path,identity,age"]
    Path(name).mkdir()
    for row, (pixels, age) in enumerate(zip(faces.images(), faces.ages.tolist(), strict=True)):
        path = f"{name}/{row}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        lines.append(f"{path},{name}_{row // faces.images_per_identity},{age:.1f}")
    Path(f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


# [commands]
def run_commands(steps: int) -> None:
    """Run the commands of `photographs.sh` in this folder."""
    text = Path(__file__).with_suffix(".sh").read_text("utf-8").replace("training.steps=200", f"training.steps={steps}")
    for line in text.replace("\\\n", " ").splitlines():
        if not line.startswith("#"):
            print(*line.split())
            if code := kdlib_faces([*shlex.split(line)[1:], "--quiet", "--threads", "1"]):
                raise SystemExit(code)


# [run]
def run(quick: bool) -> Lesson:
    steps, identities, images = (2, 8, 4) if quick else (200, 80, 8)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # Photographs from the web show an identity within a few years; a longitudinal set over decades.
        write_crops("web", SyntheticFaces(identities, images, SIZE, seed=1, age_window=8.0))
        write_crops("ages", SyntheticFaces(identities, images, SIZE, seed=2))
        write_crops("new", SyntheticFaces(identities // 2 + 4, 8, SIZE, seed=3))
        run_commands(steps)
        report = json.loads(Path("evaluation/report.json").read_text("utf-8"))
        sizes = {
            path: Path(path).stat().st_size / 1000 for path in ("distilled/student.safetensors", "student_int8.onnx")
        }
    return lesson(report, sizes)


def lesson(report: dict, sizes: dict[str, float]) -> Lesson:
    rows, curves = [], {}
    for model in ("general", "age", "alone", "distilled"):
        found = report["models"][model]["protocols"]["age_gap"]
        curves[model] = [round(100 * entry["auc"]["value"], 4) for entry in found["bins"]]
        rows.append(Row(model, [100 * found["all"]["auc"]["value"]]))
    return Lesson(
        "AUC of all pairs, %", rows, curves, {f"size of {name}, kB": round(size, 1) for name, size in sizes.items()}
    )


# [draw]
def draw(figure: Figure, lesson: Lesson) -> None:
    place = axes(figure, x="years between the two images", y="AUC, %")
    names = ["0-4", "5-9", "10-19", "20-29", "30+"]
    for (model, curve), color in zip(lesson.curves.items(), (COLORS[2], COLORS[3], COLORS[1], COLORS[0]), strict=True):
        place.plot(range(len(curve)), curve, "o-", color=color, label=model)
    place.set_xticks(range(len(curve)), names[: len(curve)])
    legend(place)


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 3.2))
