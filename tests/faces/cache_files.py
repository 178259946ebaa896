"""A small face list with teachers, and commands on it, for the tests of caches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib_faces.backbones import build_backbone, save_backbone
from kdlib_faces.cli import main

COUNT, SIZE = 16, 32


def make_faces(folder: Path) -> Path:
    """Write 16 images of 8 identities, `faces.csv`, and the teachers `general.pt` and `age.pt`, both of one space."""
    rows = ["path,identity"]
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,p{number // 2}")
    (folder / "faces.csv").write_text("\n".join(rows) + "\n")
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


def build_words(folder: Path, teacher: object, output: Path, *more: object) -> list[object]:
    """Return the words of `cache build` for the list in `folder`."""
    given = ("--faces", folder / "faces.csv", "--teacher", folder / str(teacher), "--output", output)
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
    assert lines[-1].startswith("kdlib-faces: error: ")
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]
