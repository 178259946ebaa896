"""Data, training loop, results and figures that the tutorials share."""

import argparse
import hashlib
import importlib
import inspect
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import Distiller, TrainConfig, train
from kdlib.training import Hook

# Readable on a light and on a dark page: the background of every figure is transparent.
GRAY = "#808890"
COLORS = ("#2f81d6", "#e07b2a", "#2a9d6f", "#b65fc4", "#c9484f", "#8a8f2a")


@dataclass
class Row:
    """One line of the table: a model, the number of its parameters, and what was measured with each seed."""

    model: str
    values: list[float]
    parameters: int | None = None


@dataclass
class Lesson:
    """The results of one tutorial."""

    measure: str
    rows: list[Row]
    curves: dict[str, list[float]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def mean(self, model: str) -> float:
        return statistics.fmean(next(row.values for row in self.rows if row.model == model))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def table(lesson: Lesson) -> str:
    """Return the rows as a Markdown table: the mean over the seeds, and their standard deviation."""
    sized = any(row.parameters is not None for row in lesson.rows)
    lines = [
        f"| model |{' parameters |' if sized else ''} {lesson.measure} |",
        "|---|---|---|" if sized else "|---|---|",
    ]
    for row in lesson.rows:
        sign = "+" if " minus " in row.model else ""
        value = f"{statistics.fmean(row.values):{sign}.1f}"
        if len(row.values) > 1:
            value += f" ± {statistics.stdev(row.values):.1f}"
        size = f" {row.parameters:,} |" if row.parameters is not None else " |" if sized else ""
        lines.append(f"| {row.model} |{size} {value} |")
    return "\n".join(lines) + "\n"


def digits(examples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits of 8 x 8 pixels: images and labels to train on, and all the others to test on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, rest = order[:examples], order[examples:]
    return images[first], labels[first], images[rest], labels[rest]


def docstrings(modules: tuple[str, ...]) -> str:
    """The docstrings of the modules, their classes and their functions, in the order of their names."""
    texts: dict[str, None] = {}
    for module in map(importlib.import_module, modules):
        texts[inspect.getdoc(module) or ""] = None
        for _, value in inspect.getmembers(module, lambda value: inspect.isclass(value) or inspect.isfunction(value)):
            texts[inspect.getdoc(value) or ""] = None
            for _, method in inspect.getmembers(value, inspect.isfunction):
                texts[inspect.getdoc(method) or ""] = None
    return "\n".join(texts)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent."""
    return 100 * (model.eval()(images).argmax(1) == labels).double().mean().item()


# [fit]
def fit(
    distiller: Distiller,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float = 3e-3,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    **settings: Any,
) -> None:
    """Train with AdamW on batches of 50; the labels are the target "target" of the terms."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=50, shuffle=True, drop_last=True)
    config = TrainConfig(max_steps=steps, optimizer="adamw", lr=lr, warmup_steps=20, seed=seed, **settings)
    train(distiller, loader, config, hooks=hooks)


# [end]
def axes(figure: Figure, position: int = 111, *, x: str = "", y: str = "", title: str = "") -> Axes:
    """Add axes in the colors of the tutorials."""
    place = figure.add_subplot(position)
    place.set_facecolor("none")
    place.set_xlabel(x, color=GRAY)
    place.set_ylabel(y, color=GRAY)
    place.set_title(title, color=GRAY, fontsize=10)
    place.tick_params(colors=GRAY)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        place.spines[side].set_color(GRAY)
    return place


def legend(place: Axes) -> None:
    place.legend(frameon=False, labelcolor=GRAY, fontsize=9)


def dots(figure: Figure, lesson: Lesson, position: int = 111) -> None:
    """Draw the mean of each model of the table, and a small dot for each seed."""
    place = axes(figure, position, x=lesson.measure)
    rows = [row for row in lesson.rows if " minus " not in row.model][::-1]
    for at, row in enumerate(rows):
        color = COLORS[(len(rows) - 1 - at) % len(COLORS)]
        place.plot(row.values, [at] * len(row.values), "o", color=color, alpha=0.4, markersize=5)
        place.plot(statistics.fmean(row.values), at, "|", color=color, markersize=18, markeredgewidth=3)
    place.set_yticks(range(len(rows)), [row.model for row in rows])
    place.set_ylim(-0.6, len(rows) - 0.4)
    place.grid(axis="x", color=GRAY, alpha=0.25)


def read(path: Path) -> Lesson:
    stored = json.loads(path.read_text("utf-8"))
    return Lesson(**(stored | {"rows": [Row(**row) for row in stored["rows"]]}))


def write(
    lesson: Lesson, draw: Callable[[Figure, Lesson], None], name: str, folder: Path, size: tuple[float, float]
) -> None:
    text = json.dumps(asdict(lesson), indent=1) + "\n"
    results, figures = folder / "results" / f"{name}.json", folder / "figures" / f"{name}.png"
    for path in (results, figures):
        path.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(text, encoding="utf-8")
    page = folder / f"{name}.md"
    if page.exists():  # --output docs/learn puts the table into the page of the tutorial
        old = re.compile(r"^\| model \|(?: parameters \|)? [^|\n]+ \|\n(?:\|.*\n)*", re.MULTILINE)
        page.write_text(old.sub(lambda _: table(lesson), page.read_text("utf-8"), count=1), encoding="utf-8")
    figure = Figure(figsize=size, layout="constrained")
    draw(figure, lesson)
    # The picture names the results that it shows.
    source = hashlib.sha256(text.encode()).hexdigest()
    figure.savefig(figures, dpi=110, transparent=True, metadata={"source": source, "Software": None})


def main(
    script: str,
    run: Callable[[bool], Lesson],
    draw: Callable[[Figure, Lesson], None],
    size: tuple[float, float] = (7.0, 2.6),
) -> None:
    """Run a tutorial from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one seed and few steps, to see that everything runs")
    parser.add_argument("--output", type=Path, help="folder for results and figure; nothing is written without it")
    parser.add_argument("--draw", action="store_true", help="draw the figure of the results in --output again")
    options = parser.parse_args()
    name = Path(script).stem
    if options.draw:
        lesson = read(options.output / "results" / f"{name}.json")
    else:
        lesson = run(options.quick)
    print(table(lesson))
    if options.output is not None:
        write(lesson, draw, name, options.output, size)
