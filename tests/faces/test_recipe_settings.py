"""Settings of the recipes: those that a run would ignore are refused, and teachers of different spaces are noticed."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from kdlib_faces.backbones import build_backbone, save_backbone
from kdlib_faces.config import load_config
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.recipes.age_teacher import AgeTeacherRunConfig
from kdlib_faces.recipes.liaad import LIAADRunConfig
from kdlib_faces.recipes.student import StudentRunConfig
from tests.faces.cache_files import put_list, train

SMALL = ("training.steps=1", "training.batch_size=8", "training.lr=1e-3")
STUDENT = ("recipe.input_size=32", "recipe.width=0.25", "recipe.embedding_dim=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 32 faces, and teachers: two of one space, one of another, one of another dimension."""
    folder = tmp_path_factory.mktemp("faces")
    faces = SyntheticFaces(8, 4, 32, 0)
    values = (f"p{label},{age:.1f}" for label, age in zip(faces.labels.tolist(), faces.ages.tolist(), strict=True))
    put_list(folder, "identity,age", zip(faces.images().permute(0, 2, 3, 1).numpy(), values, strict=True))
    for name, seed, dim in (("a", 0, 16), ("other", 1, 16), ("wide", 0, 24)):
        net = build_backbone("mobilefacenet", embedding_dim=dim, width=0.25, input_size=32, seed=seed).eval()
        save_backbone(net, folder / f"{name}.pt")
        if name == "a":
            with torch.no_grad():
                net.linear.weight.add_(
                    0.1 * torch.randn(net.linear.weight.shape, generator=torch.Generator().manual_seed(0))
                )
            save_backbone(net, folder / "near.pt")
    return folder


def _train(folder: Path, output: Path, recipe: str, *settings: str, teachers: tuple[str, ...] = ()) -> int:
    return train(folder, recipe, output, *SMALL, *settings, teachers=teachers)


@pytest.mark.parametrize(
    ("recipe", "setting", "words"),
    [
        ("student", "recipe.embedding_weight=0", "no setting named 'recipe.embedding_weight'"),
        ("student", "recipe.map_form=angle", "no setting named 'recipe.map_form'"),
        ("general_teacher", "recipe.weighting=uniform", "no setting named 'recipe.weighting'"),
        ("liaad", "recipe.num_identities=5", "no setting named 'recipe.num_identities'"),
        ("liaad", "recipe.seed=5", "no setting named 'recipe.seed'"),
        ("liaad", "recipe.general_teacher=x.pt", "no setting named 'recipe.general_teacher'"),
        ("liaad", "age_teacher.method=dal", "no setting named 'age_teacher'"),
        ("age_teacher", "recipe.width=0.5", "no setting named 'recipe'"),
        ("age_teacher", "network.width=0.5", r"network\.width=0.5 has no effect: the network is that of --teacher"),
        ("age_teacher", "age_teacher.adversary_weight=1", "adversary_weight=1.0 has no effect: .*method=dal"),
        ("age_teacher", "age_teacher.age_scale=2", "age_scale=2.0 has no effect: .* only mtlface"),
    ],
)
def test_settings_that_the_run_would_ignore_are_refused(folder, tmp_path, capsys, recipe, setting, words) -> None:
    teachers = {"liaad": ("a.pt", "near.pt"), "age_teacher": ("a.pt",)}.get(recipe, ())
    assert _train(folder, tmp_path / "out", recipe, setting, teachers=teachers) == 2
    line = capsys.readouterr().err
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "name"), [("pairs", "age_weight"), ("pairs", "decorrelation"), ("mtlface", "decorrelation")]
)
def test_settings_of_another_method_are_refused(folder, tmp_path, capsys, method: str, name: str) -> None:
    settings = (f"age_teacher.method={method}", f"age_teacher.{name}=0.5")
    assert _train(folder, tmp_path / "out", "age_teacher", *settings, teachers=("a.pt",)) == 2
    assert f"age_teacher.{name}=0.5 has no effect: age_teacher.method={method}" in capsys.readouterr().err


def test_a_run_writes_the_settings_of_its_recipe_and_accepts_them_again(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "out" / "run.toml"
    for recipe, cls, teachers in (
        ("student", StudentRunConfig, ()),
        ("liaad", LIAADRunConfig, ("a.pt", "near.pt")),
        ("age_teacher", AgeTeacherRunConfig, ("a.pt",)),
    ):
        extra = () if recipe == "age_teacher" else STUDENT
        assert _train(folder, tmp_path / "out", recipe, *extra, teachers=teachers) == 0
        again = load_config(cls, config, other_tables=["run"])
        assert dataclasses.asdict(again) == dataclasses.asdict(load_config(cls, None, [*SMALL, *extra]))
        (tmp_path / "out").rename(tmp_path / recipe)
    text = (tmp_path / "student" / "run.toml").read_text()
    settings = text[text.index("[training]") :]
    assert not any(word in settings for word in ("embedding_weight", "teacher", "num_identities"))


def test_teachers_of_different_spaces_are_refused_or_projected(folder, tmp_path, capsys) -> None:
    assert _train(folder, tmp_path / "near", "liaad", *STUDENT, teachers=("a.pt", "near.pt")) == 0
    for other, words in (
        ("other.pt", "lie in different spaces: on 32 training images"),
        ("wide.pt", "equal dimensions"),
    ):
        capsys.readouterr()
        assert _train(folder, tmp_path / "out", "liaad", *STUDENT, teachers=("a.pt", other)) == 2
        line = capsys.readouterr().err
        assert words in line
        assert "--set recipe.embedding_projection=linear" in line
        assert not (tmp_path / "out").exists()
        for number, remedy in enumerate(("recipe.embedding_projection=linear", "recipe.embedding_weight=0")):
            output = tmp_path / f"{other}{number}"
            assert _train(folder, output, "liaad", *STUDENT, remedy, teachers=("a.pt", other)) == 0
