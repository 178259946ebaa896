"""`kdlib-faces train --recipe age_teacher`, and the commands that read its result."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kdlib_faces.backbones import save_backbone
from kdlib_faces.cli import main
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.teachers import load_teacher
from tests.faces.cache_files import put_list, train
from tests.faces.small_networks import IMAGES, small_backbone


def _list(folder: Path, column: str, values: Sequence[str] = ()) -> Path:
    """A list of 8 identities with 4 images each; without `values`, ages as they are drawn, some unknown."""
    faces = SyntheticFaces(8, 4, 32, 3)
    rows = []
    for row, (label, age) in enumerate(zip(faces.labels.tolist(), faces.ages.tolist(), strict=True)):
        known = f"{age:.1f}" if column == "age" else ("young" if age < 40 else "adult")
        rows.append(f"p{label},{values[row % len(values)] if values else (known if row % 7 else '')}")
    save_backbone(small_backbone(), folder / "start.pt")
    pixels = faces.images().permute(0, 2, 3, 1).numpy()
    return put_list(folder, f"identity,{column}", zip(pixels, rows, strict=True))


def _train(folder: Path, recipe: str, teachers: Sequence[str], *settings: str, output: str = "age") -> int:
    return train(folder, recipe, folder / output, *settings, teachers=teachers)


@pytest.mark.parametrize(("method", "column"), [("dal", "age"), ("mtlface", "age_group"), ("pairs", "age")])
def test_the_command_fine_tunes_and_all_commands_read_the_result(
    tmp_path: Path, method: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = _list(tmp_path, column)
    settings = ("training.steps=3", "training.batch_size=16", f"age_teacher.method={method}")
    assert _train(tmp_path, "age_teacher", ["start.pt"], *settings) == 0, capsys.readouterr().err
    model = tmp_path / "age" / "teacher.safetensors"
    first = load_teacher(model)(IMAGES)
    assert first.shape == (4, 16)
    # The finished run is read from its checkpoint.
    assert _train(tmp_path, "age_teacher", ["start.pt"], *settings) == 0
    assert torch.equal(load_teacher(model)(IMAGES), first)
    report = ["evaluate", "--data", str(faces), "--quiet", "--model", str(model), "--output", str(tmp_path / "report")]
    assert main([*report, "--set", "replicates=5"]) == 0, capsys.readouterr().err
    student = ("recipe.width=0.25", "recipe.embedding_dim=16", "recipe.input_size=32")
    steps = ("training.steps=2", "training.batch_size=8")
    two = ["start.pt", "age/teacher.safetensors"]
    assert _train(tmp_path, "liaad", two, *student, *steps, output="student") == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["inspect", str(model)]) == 0
    assert "input       RGB, (pixel - 127.5) / 127.5, 32 x 32\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("age_group", ("young", "young"), "needs at least two age groups, the lists have 'young' alone"),
        ("age", ("20", "25"), "identities with images at least 10 years apart (min_age_gap), the lists have 0; w"),
        ("age_group", ("young", ""), "needs at least two age groups"),
        ("camera", ("a",), "needs ages or age groups"),
    ],
)
def test_lists_without_cross_age_pairs_are_refused(
    tmp_path: Path, column: str, values: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _list(tmp_path, column, values)
    settings = ("training.steps=1", "training.batch_size=4", "age_teacher.method=pairs")
    assert _train(tmp_path, "age_teacher", ["start.pt"], *settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "age").exists()
    if column == "age":  # a smaller gap and the margin softmax alone are the alternatives
        assert _train(tmp_path, "age_teacher", ["start.pt"], *settings, "age_teacher.min_age_gap=5") == 0
        margin = ("age_teacher.pair_weight=0", "age_teacher.identity_weight=1")
        assert _train(tmp_path, "age_teacher", ["start.pt"], *settings, *margin, output="margin") == 0


def test_at_most_one_pretrained_network_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _list(tmp_path, "age")
    assert _train(tmp_path, "age_teacher", ["start.pt", "start.pt"]) == 2
    assert "takes one pretrained network, or none, got 2" in capsys.readouterr().err
