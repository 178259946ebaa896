"""Students that start as a narrower copy of a teacher, and the joint space of two teachers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from kdlib import Objective
from kdlib.compression import shrink
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MBFFlat, build_backbone, describe_checkpoint, load_backbone, save_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import read_faces
from kdlib_faces.recipes import LIAADConfig
from kdlib_faces.recipes.joint_target import BothViews
from kdlib_faces.recipes.start import StartConfig, restore_norms, shrink_teacher
from kdlib_faces.teachers import FusedTeacher, cache_outputs, fit_joint_space, join_embeddings
from tests.faces.cache_files import COUNT, SIZE, build, fails, make_faces, run, settings

SMALL = ["training.steps=3", "training.batch_size=8", "recipe.input_size=32", "start.images=16", "start.keep=0.5"]
JOINT = ["recipe.target=joint", "recipe.joint_dim=12", "recipe.map_weight=0", "recipe.attention_weight=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Face lists, of which one has age groups; two teachers, and a network to start from."""
    made = make_faces(tmp_path_factory.mktemp("start"))
    rows = (made / "faces.csv").read_text().splitlines()
    groups = [f"{row},{'young' if number % 2 else 'adult'}" for number, row in enumerate(rows[1:])]
    (made / "ages.csv").write_text("\n".join([f"{rows[0]},age_group", *groups]) + "\n")
    save_backbone(build_backbone("mbf_flat", seed=2, **wide()), made / "wide.pt")
    return made


def wide() -> dict[str, object]:
    return {"embedding_dim": 16, "scale": 1, "blocks": (1, 1, 1, 1), "input_size": SIZE, "tail_channels": 8}


def noise_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def train(folder: Path, output: Path, *more: str, faces: str = "ages.csv", start: str = "wide.pt") -> list[object]:
    teachers = [word for name in ("general.pt", "age.pt") for word in ("--teacher", folder / name)]
    words = ["train", "--quiet", "--threads", "1", "--data", folder / faces, "--output", output, *teachers]
    return [*words, "--start", f"shrink:{folder / start}", *settings(*SMALL, *more)]


def test_a_student_starts_narrow_and_learns_the_joint_space(folder: Path, tmp_path: Path) -> None:
    assert run(*train(folder, tmp_path / "run", *JOINT)) == 0
    student, full = load_backbone(tmp_path / "run" / "student.safetensors"), load_backbone(folder / "wide.pt")
    images = torch.zeros(2, 3, SIZE, SIZE)
    assert student(images).shape == (2, 12)
    assert sum(map(torch.numel, student.parameters())) < 0.5 * sum(map(torch.numel, full.parameters()))
    (start,) = (tmp_path / "run").glob("start-*.safetensors")
    before = load_backbone(start)
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert moved == {name for name, _ in student.named_parameters()}
    terms = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["terms"]
    assert set(terms) == {"identity", "embedding"}


def test_the_start_is_read_again_and_fits_the_target(folder: Path, tmp_path: Path) -> None:
    def one() -> torch.Tensor:
        assert run(*train(folder, tmp_path / "run", *JOINT, "recipe.identity_weight=0", "training.steps=1")) == 0
        return load_file(tmp_path / "run" / "student.safetensors")["features.layers.2.weight"]

    first, (start,) = one(), (tmp_path / "run").glob("start-*.safetensors")
    written = start.stat().st_mtime_ns
    assert torch.equal(one(), first)
    assert start.stat().st_mtime_ns == written
    loss = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["terms"]["embedding"]
    alone = train(
        folder, tmp_path / "alone", *JOINT, "recipe.identity_weight=0", "training.steps=1", "recipe.width=0.25"
    )
    alone = [word for word in alone if not str(word).startswith(("--start", "shrink:"))]
    assert run(*alone) == 0
    assert loss < 0.8 * json.loads((tmp_path / "alone" / "log.jsonl").read_text().splitlines()[0])["terms"]["embedding"]


def test_folded_norms_are_restored_without_a_change_of_the_outputs(folder: Path, tmp_path: Path) -> None:
    narrow = shrink_teacher(load_backbone(folder / "wide.pt"), noise_images(16), StartConfig(images=16), seed=0)
    images = to_float(noise_images(8))
    before = narrow(images)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in narrow.modules())
    restore_norms(narrow, noise_images(16))
    norms = {name: each for name, each in narrow.named_modules() if isinstance(each, nn.BatchNorm2d)}
    assert norms.keys() == {
        name for name, each in load_backbone(folder / "wide.pt").named_modules() if isinstance(each, nn.BatchNorm2d)
    }
    torch.testing.assert_close(narrow(images), before)
    save_backbone(narrow, tmp_path / "norms.safetensors")
    torch.testing.assert_close(load_backbone(tmp_path / "norms.safetensors")(images), before)
    assert run(*train(folder, tmp_path / "run", *JOINT)) == 0
    (start,), student = (
        (tmp_path / "run").glob("start-*.safetensors"),
        load_file(tmp_path / "run" / "student.safetensors"),
    )
    name = f"{next(iter(norms))}.running_mean"
    assert not torch.equal(load_file(start)[name], student[name])


def test_each_teacher_is_a_target_too_and_caches_are_read(folder: Path, tmp_path: Path) -> None:
    assert run(*train(folder, tmp_path / "each", "recipe.stage=2")) == 0
    assert load_backbone(tmp_path / "each" / "student.safetensors").embedding_dim == 16
    caches = [build(folder, name, tmp_path / name, "--tap", "map=stage2") for name in ("general.pt", "age.pt")]
    words = [word for cache in caches for word in ("--teacher", cache)]
    words = [*words, "--data", folder / "faces.csv", "--start", f"shrink:{folder / 'wide.pt'}", "--quiet"]
    more = settings(*SMALL, *JOINT[:2], "recipe.map_weight=1")
    assert run("train", *words, "--output", tmp_path / "cached", *more) == 0
    terms = json.loads((tmp_path / "cached" / "log.jsonl").read_text().splitlines()[0])["terms"]
    assert set(terms) == {"identity", "embedding", "map", "attention"}


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("prune:x.pt", "--start must be 'scratch' or 'shrink:FILE', got 'prune:x.pt'"),
        ("shrink:", "--start must be 'scratch' or 'shrink:FILE'"),
        ("shrink:missing.pt", "missing.pt"),
    ],
)
def test_unusable_starts_are_refused(folder: Path, tmp_path: Path, capsys, start: str, words: str) -> None:
    command = train(folder, tmp_path / "run", *JOINT)
    command[command.index("--start") + 1] = start
    assert words in fails(capsys, *command)
    assert not (tmp_path / "run").exists()  # before the teachers run over all images


def test_other_recipes_have_no_start(folder: Path, tmp_path: Path, capsys) -> None:
    command = ["train", "--recipe", "student", "--data", folder / "faces.csv", "--start", "shrink:x.pt"]
    assert "--start applies to recipe 'liaad' only" in fails(capsys, *command, "--output", tmp_path / "run")


def test_a_network_that_takes_other_images_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    model = build_backbone("mbf_flat", seed=2, **wide())
    model.input_spec = model.input_spec.changed(color="bgr")
    save_backbone(model, folder / "bgr.pt")
    assert "must take RGB images" in fails(capsys, *train(folder, tmp_path / "run", *JOINT, start="bgr.pt"))


def test_what_is_stated_about_a_teacher_holds_for_a_start_from_it(folder: Path, tmp_path: Path, capsys) -> None:
    command = train(folder, tmp_path / "run", *JOINT, start="general.pt")
    assert "must take RGB images" in fails(capsys, *command, "--input", "color=bgr", "--input", "auto")


def test_images_of_another_size_than_those_of_the_network_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    line = fails(capsys, *train(folder, tmp_path / "run", *JOINT, "recipe.input_size=48"))
    assert f"the network takes images of {SIZE} x {SIZE} pixels, the student's have 48 x 48" in line
    assert not (tmp_path / "run").exists()  # before the teachers run over all images


# --- images without identity or age -----------------------------------------------------------------------------------


def test_lists_without_identities_ages_or_both_train_together(folder: Path, tmp_path: Path, capsys) -> None:
    pixels = [(folder / f"{number}.png").read_bytes() for number in range(COUNT)]
    for name in ("nothing", "years"):
        (tmp_path / name).mkdir()
        for number, data in enumerate(pixels[:8]):
            (tmp_path / name / f"{number}.png").write_bytes(data)
    rows = [f"years/{number}.png,{5 * number}" for number in range(8)]
    (tmp_path / "years.csv").write_text("\n".join(["path,age", *rows]) + "\n")
    faces = read_faces([folder / "ages.csv", tmp_path / "years.csv", tmp_path / "nothing"], unlabeled=True)
    assert repr(faces) == "<FaceList: 32 images, 8 identities, 16 without identity, 8 ages, groups adult, young>"
    command = train(folder, tmp_path / "run", *JOINT)
    more = ["--data", tmp_path / "years.csv", "--data", tmp_path / "nothing"]
    assert run(*command, *more) == 0
    terms = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["terms"]
    assert set(terms) == {"identity", "embedding"}
    alone = [word for word in command if word not in ("--data", folder / "ages.csv")]
    alone[alone.index(tmp_path / "run")] = tmp_path / "alone"
    line = fails(capsys, *alone, *more)
    assert "the lists hold 0 identities" in line
    assert "--set recipe.identity_weight=0" in line
    capsys.readouterr()
    alone.remove("--quiet")
    assert run(*alone, *more, *settings("recipe.identity_weight=0")) == 0
    assert "no age map is fitted: 0 identities" in capsys.readouterr().err


def test_unlabeled_images_do_not_change_the_identity_term() -> None:
    pixels = torch.randint(0, 255, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    identities = torch.tensor([0, 0, 1, 1, -1, -1, -1, -1])
    _, targets = next(iter(FaceBatches(pixels, identities, batch_size=8, seed=0)))
    assert torch.equal(targets["labeled"], (targets["identity"] >= 0).float())
    term = LIAADConfig(embedding_dim=4).identity_term(2, all_labeled=False)
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective({"identity": term})
    mixed = objective({"embedding": embeddings}, {}, targets).total
    labeled = targets["identity"] >= 0
    torch.testing.assert_close(mixed, term.loss(embeddings[labeled], targets["identity"][labeled]))


def test_evaluation_and_other_recipes_need_identities(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "ages.csv").write_text(f"path,age\n{folder}/0.png,3\n{folder}/1.png,9\n")
    assert "no column named 'identity'" in fails(
        capsys, "train", "--recipe", "student", "--data", tmp_path / "ages.csv", "--output", tmp_path / "run"
    )
    (tmp_path / "empty.csv").write_text(f"path,identity\n{folder}/0.png,\n{folder}/1.png,a\n")
    with pytest.raises(InputError, match="identity is empty"):
        read_faces([tmp_path / "empty.csv"])


def test_subsets_keep_unknown_identities(folder: Path, tmp_path: Path) -> None:
    rows = [f"{folder}/{number}.png,{name}" for number, name in enumerate(["a", "", "b", "", "c"])]
    (tmp_path / "faces.csv").write_text("\n".join(["path,identity", *rows]) + "\n")
    part = read_faces([tmp_path / "faces.csv"], unlabeled=True).subset([1, 2, 4])
    assert (part.identities.tolist(), part.identity_names, part.all_labeled) == ([-1, 0, 1], ("b", "c"), False)


# --- files of narrow networks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> MBFFlat:
    images = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return shrink(MBFFlat(**wide()).eval(), [images], keep=0.5, fold_norms=True, drop=["layers.5.layers.0"])


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_narrow_networks_are_saved_and_loaded(name, narrow, tmp_path) -> None:
    images, student = torch.rand(4, 3, SIZE, SIZE), narrow
    save_backbone(student, tmp_path / name)
    loaded = load_backbone(tmp_path / name)
    torch.testing.assert_close(loaded(images), student(images))
    info = describe_checkpoint(tmp_path / name)
    assert info.kind == ("PyTorch" if name == "m.pt" else "safetensors")
    assert "narrower than its arguments" in info.about
    assert info.parameters == sum(map(torch.numel, student.parameters()))
    assert not info.differences


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file["state"].pop("layers.2.layers.1.layers.0.weight"), "layers.2.layers.1.layers.0"),
        (lambda file: file.update(removed=[1]), "'removed' must be a list of module paths"),
        (lambda file: file.update(removed=["features"]), "entries of"),
        (lambda file: file["state"].update({"features.layers.2.weight": torch.zeros(99, 9)}), "at most"),
        (lambda file: file["state"].update({"layers.0.layers.0.weight": torch.zeros(3)}), "at most"),
    ],
)
def test_damaged_files_of_narrow_networks_are_refused(change, words, narrow, tmp_path) -> None:
    save_backbone(narrow, tmp_path / "m")
    file = torch.load(tmp_path / "m", weights_only=True)
    change(file)
    torch.save(file, tmp_path / "m")
    with pytest.raises(InputError, match=words):
        load_backbone(tmp_path / "m")


# --- the joint space --------------------------------------------------------------------------------------------------


def _two_teachers() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Embeddings of 40 identities, young and adult; growing up moves every face in one direction."""
    generator = torch.Generator().manual_seed(0)
    identities, groups = torch.arange(40).repeat_interleave(2), torch.tensor([0, 1]).repeat(40)
    found = []
    for _ in range(2):
        faces = torch.randn(40, 16, generator=generator).repeat_interleave(2, 0)
        aging = 3 * groups[:, None] * torch.randn(16, generator=generator)
        found.append(faces + aging + 0.3 * torch.randn(80, 16, generator=generator))
    return found, identities, groups


def test_without_ages_the_joint_space_keeps_the_mean_cosine() -> None:
    embeddings, identities, _ = _two_teachers()
    matrix = fit_joint_space(embeddings, identities, dim=32)
    joined = F.normalize(join_embeddings(embeddings) @ matrix, dim=1)
    cosines = sum(F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in embeddings) / 2
    torch.testing.assert_close(joined @ joined.T, cosines, atol=1e-5, rtol=1e-5)


def test_the_age_map_brings_identities_together_across_ages() -> None:
    embeddings, identities, groups = _two_teachers()
    train = identities < 24

    def margin(**ages: torch.Tensor) -> float:
        chosen = {name: values[train] for name, values in ages.items()}
        matrix = fit_joint_space([x[train] for x in embeddings], identities[train], **chosen, dim=16, l2_sp_weight=0.1)
        rows = F.normalize(join_embeddings(embeddings) @ matrix, dim=1)[~train]
        cosines = rows[0::2] @ rows[1::2].T
        return float(cosines.diagonal().mean() - cosines.mean())

    assert margin(age_groups=groups) > margin() + 0.05
    years = torch.where(groups == 1, 40.0, 8.0)
    assert margin(ages=years) > margin() + 0.05


def test_the_fused_teacher_of_the_joint_space_has_unit_embeddings() -> None:
    embeddings, identities, groups = _two_teachers()
    matrix = fit_joint_space(embeddings, identities, age_groups=groups, dim=8)

    class Half(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"embedding": x.chunk(2, 1)[self.number]}

    fused = FusedTeacher({"a": Half(0), "b": Half(1)}, matrix)(torch.cat(embeddings, 1))["embedding"]
    assert fused.shape == (80, 8)
    torch.testing.assert_close(fused.norm(dim=1), torch.ones(80))


def test_wrong_arguments_of_the_joint_space() -> None:
    embeddings, identities, _ = _two_teachers()
    with pytest.raises(InputError, match="at least one teacher"):
        fit_joint_space([], identities)
    with pytest.raises(InputError, match="dim must be at most the 32 dimensions"):
        fit_joint_space(embeddings, identities, dim=33)


def test_the_target_of_both_views_does_not_depend_on_the_view(tmp_path: Path) -> None:
    class Sides(nn.Module):
        """Mean of the left and of the right half."""

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"embedding": torch.stack([half.mean((1, 2, 3)) for half in images.chunk(2, 3)], 1)}

    images = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8)
    cached = cache_outputs(Sides(), images, tmp_path, quiet=True)
    target = BothViews(cached)(torch.arange(3))["embedding"]
    torch.testing.assert_close(target[:, 0], target[:, 1])  # a mirror image swaps the halves
    own = [cached(torch.arange(3), torch.full((3,), view))["embedding"] for view in (0, 1)]
    torch.testing.assert_close(target, own[0] + own[1])
