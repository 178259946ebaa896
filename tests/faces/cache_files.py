"""Small face lists with teachers, and commands on them."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib_faces.backbones import build_backbone, save_backbone
from kdlib_faces.cli import main

COUNT, SIZE = 16, 32


def noise(seed: int, side: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


def put_list(folder: Path, columns: str, rows: Iterable[tuple[np.ndarray, str]]) -> Path:
    """Write the images `0.png`, `1.png` and so on, and `faces.csv` with their paths and the values of other columns."""
    lines = [f"path,{columns}"]
    for number, (pixels, values) in enumerate(rows):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{values}")
    (folder / "faces.csv").write_text("\n".join(lines) + "\n")
    return folder / "faces.csv"


def make_faces(folder: Path) -> Path:
    """Write 16 images of 8 identities, `faces.csv`, and the teachers `general.pt` and `age.pt`, both of one space."""
    put_list(folder, "identity", ((noise(number), f"p{number // 2}") for number in range(COUNT)))
    network = build_backbone("mobilefacenet", seed=0, embedding_dim=16, width=0.25, input_size=SIZE)
    save_backbone(network, folder / "general.pt")
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    save_backbone(network, folder / "age.pt")
    return folder


def settings(*given: str) -> list[str]:
    """Return `--set` options."""
    return [word for entry in given for word in ("--set", entry)]


def run(*words: object) -> int:
    """Run a command and return its exit code."""
    return main([str(word) for word in words])


def train(folder: Path, recipe: str, output: Path, *given: str, teachers: Iterable[str] = ()) -> int:
    """Train from the list and the teachers in `folder`, and return the exit code."""
    words = ["train", "--recipe", recipe, "--quiet", "--data", folder / "faces.csv", "--output", output]
    return run(*words, *(word for name in teachers for word in ("--teacher", folder / name)), *settings(*given))


def build_words(folder: Path, teacher: object, output: Path, *more: object) -> list[object]:
    """Return the words of `cache build` for the list in `folder`."""
    given = ("--data", folder / "faces.csv", "--teacher", folder / str(teacher), "--output", output)
    return ["cache", "build", "--quiet", *given, *more]


def build(folder: Path, teacher: object, output: Path, *more: object) -> Path:
    """Build a cache and return its folder."""
    assert run(*build_words(folder, teacher, output, *more)) == 0
    return output


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail with one line of text, and return that line."""
    capsys.readouterr()
    assert run(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("kdlib-faces: error: ")] == lines[-1:]
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait for a condition, and return whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found
