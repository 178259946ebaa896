"""From face crops to an int8 student: two teachers, the student alone, the student distilled, evaluation and export."""

import json
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from tutorial import COLORS, Lesson, Row, axes, legend, main

from kdlib_faces.cli import main as kdlib_faces
from kdlib_faces.data import SyntheticFaces

SIZE = 32


# [crops]
def write_crops(folder: Path, name: str, faces: SyntheticFaces) -> None:
    """What `kdlib-faces align` makes from photographs: crops, and a list of path, identity and age."""
    lines = ["path,identity,age"]
    (folder / name).mkdir()
    for row, (pixels, age) in enumerate(zip(faces.images(), faces.ages.tolist(), strict=True)):
        path = f"{name}/{row}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / path)
        lines.append(f"{path},{name}_{row // faces.images_per_identity},{age:.1f}")
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(words: str, folder: Path) -> None:
    """Run one command, with its paths inside the folder."""
    print("kdlib-faces", words.replace("{at}/", ""))
    code = kdlib_faces([*words.format(at=folder).split(), "--quiet", "--threads", "1"])
    if code:
        raise SystemExit(code)


# [commands]


def commands(steps: int) -> list[str]:
    train = f"--set training.steps={steps} --set training.lr=0.05 --set training.batch_size=32"
    network = "--set {kind}.width=0.5 --set {kind}.input_size=32 --set {kind}.embedding_dim=64"
    small = "--set recipe.width=0.25 --set recipe.input_size=32 --set recipe.embedding_dim=64"
    models = " ".join(
        f"--model {name}={{at}}/{name}/{file}.safetensors"
        for name, file in (("general", "teacher"), ("age", "teacher"), ("alone", "student"), ("distilled", "student"))
    )
    return [
        f"train --recipe general_teacher --data {{at}}/web.csv {network.format(kind='recipe')} {train} --output {{at}}/general",
        f"train --recipe age_teacher --data {{at}}/ages.csv {network.format(kind='network')} {train} --output {{at}}/age",
        f"train --recipe student --data {{at}}/ages.csv {small} {train} --output {{at}}/alone",
        f"train --recipe liaad --data {{at}}/ages.csv --teacher {{at}}/general/teacher.safetensors "
        f"--teacher {{at}}/age/teacher.safetensors --set recipe.embedding_projection=linear {small} {train} --output {{at}}/distilled",
        f"evaluate {models} --protocol age_gap={{at}}/new.csv --set replicates=100 --set num_failures=0 --output {{at}}/evaluation",
        "export {at}/distilled/student.safetensors --output {at}/student.onnx",
        "export {at}/distilled/student.safetensors --format int8 --data {at}/ages.csv --max-loss 0.05 --output {at}/student_int8.onnx",
    ]


# [run]
def run(quick: bool) -> Lesson:
    steps, identities = (6, 12) if quick else (300, 80)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Photographs from the web show an identity within a few years; a longitudinal set over decades.
        write_crops(folder, "web", SyntheticFaces(identities, 8, SIZE, seed=1, age_window=8.0))
        write_crops(folder, "ages", SyntheticFaces(identities, 8, SIZE, seed=2))
        write_crops(folder, "new", SyntheticFaces(identities // 2 + 6, 8, SIZE, seed=3))
        for words in commands(steps):
            command(words, folder)
        report = json.loads((folder / "evaluation" / "report.json").read_text("utf-8"))
        sizes = {path: (folder / path).stat().st_size / 1000 for path in ("student.onnx", "student_int8.onnx")}
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
