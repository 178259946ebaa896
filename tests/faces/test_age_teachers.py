"""Two published ways to an age-invariant teacher, far pairs, the fused teacher, and their files."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from kdlib import OUTPUT, StudentAdapter, TeacherAdapter, TrainConfig, train
from kdlib.distiller import Distiller
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MBF, IResNet, MobileFaceNet, build_backbone, save_backbone
from kdlib_faces.cli import main
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.harness.run import embed, load_model
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig, build_age_teacher, trained_parts
from kdlib_faces.teachers import (
    AgeAttention,
    AgeEstimationLoss,
    AgeFactorLoss,
    AgeInvariantNet,
    AttentiveAgeNet,
    CrossAgePairLoss,
    FusedTeacher,
    L2SPLoss,
    fit_fusion,
    joined,
    load_teacher,
    reverse_gradient,
    save_teacher,
)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _backbone(seed: int = 0) -> MobileFaceNet:
    return build_backbone("mobilefacenet", embedding_dim=16, width=0.25, input_size=32, seed=seed).eval()


IMAGES = torch.randn(4, 3, 32, 32, generator=_rng())


# The parts


def test_attention_splits_a_map_as_published() -> None:
    split = AgeAttention(32, start=0.0)
    maps = torch.randn(2, 32, 5, 6, generator=_rng())
    tapped = StudentAdapter(split, {"identity": OUTPUT, "age": "age"})(maps)
    torch.testing.assert_close(tapped["identity"] + tapped["age"], maps)

    def perceptron(x: torch.Tensor) -> torch.Tensor:
        return split.channel[2](F.relu(split.channel[0](x)))

    average = torch.cat([F.adaptive_avg_pool2d(maps, grid).flatten(1) for grid in (1, 2, 3)], 1)
    largest = torch.cat([F.adaptive_max_pool2d(maps, grid).flatten(1) for grid in (1, 2, 3)], 1)
    assert average.shape == (2, 14 * 32)
    by_channel = torch.sigmoid(perceptron(average) + perceptron(largest))[:, :, None, None]
    by_place = torch.sigmoid(split.spatial(torch.stack([maps.amax(1), maps.mean(1)], 1)))
    assert split.spatial.kernel_size == (7, 7)
    assert split.channel[0].out_features == 2
    torch.testing.assert_close(tapped["age"], 0.5 * (maps * by_channel + maps * by_place))


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: MobileFaceNet(16, width=0.25, input_size=32),
        lambda: MBF(16, scale=1, blocks=(1, 1, 1, 1), input_size=32),
        lambda: IResNet((1, 1, 1, 1), embedding_dim=16, width=0.125, input_size=32),
    ],
)
def test_any_backbone_takes_the_attention_and_begins_near_where_it_was(backbone) -> None:
    start = backbone().eval()
    keys = set(start.state_dict())
    net = AttentiveAgeNet(start).eval()
    assert set(start.state_dict()) == keys  # a copy was changed
    near = F.cosine_similarity(net(IMAGES), start(IMAGES))
    assert float(near.min().detach()) > 0.99
    taps = {"embedding": OUTPUT, "age": net.age_tap, "identity": net.identity_tap}
    features = StudentAdapter(net, taps)(IMAGES)
    assert features["age"].shape == features["identity"].shape
    assert features["age"].shape[1] == net.channels
    features["embedding"].sum().backward()
    assert all(p.grad is not None for p in net.get_submodule(net.age_tap.rpartition(".")[0]).parameters())
    with pytest.raises(InputError, match="must have stages"):
        AttentiveAgeNet(_Plain())


class _Plain(nn.Module):
    embedding_dim = 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16]


def test_a_branch_behind_a_trained_backbone_begins_small() -> None:
    start = _Plain()
    near, far = (F.cosine_similarity(AgeInvariantNet(start, gain=gain)(IMAGES), start(IMAGES)) for gain in (0.01, 1.0))
    assert float(far.min().detach()) < 0.999 < float(near.min().detach())


def test_age_estimation_is_expected_age_and_groups() -> None:
    loss = AgeEstimationLoss(6, hidden=8, scale=10.0)
    features = torch.randn(4, 6, generator=_rng())
    ages = torch.tensor([5.0, 33.0, float("nan"), 60.0])
    logits = loss.reader(features)
    years = logits.softmax(1) @ torch.arange(101.0)
    groups = torch.tensor([0, 3, 6])
    rows = [0, 1, 3]
    want = ((years[rows] - ages[rows]) / 10).square().mean() + F.cross_entropy(loss.grouper(logits[rows]), groups)
    torch.testing.assert_close(loss(features, ages), want)
    torch.testing.assert_close(loss.years_of(features), years.detach())
    # maps are averaged over their grid
    torch.testing.assert_close(loss(features[:, :, None, None].expand(-1, -1, 3, 3), ages), want)


def test_with_groups_alone_the_cross_entropy_alone_counts() -> None:
    loss = AgeEstimationLoss(6, groups=2, hidden=8)
    features = torch.randn(3, 6, generator=_rng())
    want = F.cross_entropy(loss.grouper(loss.reader(features[:2])), torch.tensor([1, 0]))
    torch.testing.assert_close(loss(features, torch.tensor([1, 0, -1])), want)
    nothing = loss(features.requires_grad_(), torch.tensor([-1, -1, -1]))
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    with pytest.raises(ValueError, match=r"features must be \(b, c\) or \(b, c, h, w\)"):
        loss(features[:, None], torch.tensor([1, 0, -1]))


def test_the_reader_learns_while_what_it_reads_is_pushed_the_other_way() -> None:
    features = torch.randn(5, 6, generator=_rng(), requires_grad=True)
    groups = torch.tensor([0, 1, 0, 1, 1])
    torch.manual_seed(0)
    plain = AgeEstimationLoss(6, groups=2, hidden=8)
    torch.manual_seed(0)
    turned = AgeEstimationLoss(6, groups=2, hidden=8, reverse=True)
    ours, theirs = (
        torch.autograd.grad(loss(features, groups), [features, *loss.parameters()]) for loss in (plain, turned)
    )
    torch.testing.assert_close(ours[0], -theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(reverse_gradient(features), features)


def test_dal_is_a_min_max_over_one_linear_map() -> None:
    """The map climbs to the direction of largest correlation; features that may move lose their correlation."""
    x = torch.randn(256, 6, generator=_rng())
    age = torch.cat([x[:, :1], torch.randn(256, 5, generator=_rng(1))], dim=1)
    loss = AgeFactorLoss(6, decorrelation=1.0)
    nothing = torch.full((256,), float("nan"))
    climb = torch.optim.Adam([loss.direction], lr=0.05)
    for _ in range(150):
        climb.zero_grad()
        loss(torch.stack([x, age], 1), nothing).backward()
        climb.step()
    direction = F.normalize(loss.direction.detach(), dim=0)
    assert float(direction[0].abs()) > 0.95
    moved = age.clone().requires_grad_()
    both = torch.optim.Adam([{"params": [moved], "lr": 0.02}, {"params": [loss.direction], "lr": 0.02}])
    first = float(loss(torch.stack([x, moved], 1), nothing).detach())
    for _ in range(300):
        both.zero_grad()
        value = loss(torch.stack([x, moved], 1), nothing)
        value.backward()
        both.step()
    assert first > 0.9
    assert float(value.detach()) < 0.1


def test_cross_age_pairs_are_told_from_all_strangers() -> None:
    x = torch.randn(6, 5, generator=_rng())
    target = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 1], [2, -1]], dtype=torch.float64)
    unit = F.normalize(x, dim=1)
    cosine = 16 * unit @ unit.T
    each = []
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        strangers = [k for k in range(6) if target[k, 0] != target[i, 0]]
        each.append(-torch.log_softmax(cosine[i, [j, *strangers]], 0)[0])
    torch.testing.assert_close(CrossAgePairLoss(groups=True)(x, target), torch.stack(each).mean())
    years = target.clone()
    years[:, 1] = torch.tensor([4, 40, 10, 15, 50, float("nan")])
    by_years = CrossAgePairLoss(gap=20)(x, years)
    torch.testing.assert_close(by_years, torch.stack(each[:2]).mean())


@pytest.mark.parametrize("ages", [[1.0, 1.0, 1.0], [float("nan"), -1.0, 3.0]])
def test_without_a_cross_age_pair_the_loss_is_zero_with_a_graph(ages) -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    target = torch.stack([torch.zeros(3), torch.tensor(ages)], 1)
    loss = CrossAgePairLoss(gap=1)(x, target)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.isfinite(x.grad).all()
    lonely = CrossAgePairLoss(gap=1)(x, torch.tensor([[0.0, 1.0], [0.0, 9.0], [0.0, 5.0]]))  # no stranger
    assert float(lonely.detach()) == 0.0
    with pytest.raises(ValueError, match=r"target must be \(b, 2\)"):
        CrossAgePairLoss()(x, torch.zeros(3, 3))


def test_the_pull_holds_the_trained_parameters_to_their_start() -> None:
    net = _backbone()
    moved = trained_parts(net, "embedding")
    assert {id(p) for p in moved} == {id(p) for p in (*net.linear.parameters(), *net.bn.parameters())}
    assert [p for p in net.parameters() if p.requires_grad] == moved
    tail = trained_parts(_backbone(), "tail")
    assert len(tail) == sum(1 for _ in (*net.conv_6_sep.parameters(), *net.conv_6_dw.parameters())) + len(moved)
    assert len(trained_parts(_backbone(), "all")) == sum(1 for _ in net.parameters())
    pull = L2SPLoss(moved)
    assert not list(pull.parameters())
    assert not pull.state_dict()
    assert float(pull().detach()) == 0.0
    with torch.no_grad():
        net.linear.weight.add_(1.0)
    size = sum(float(p.detach().square().sum()) for p in net.bn.parameters()) + float((net.linear.weight - 1).detach().square().sum())  # fmt: skip
    assert float(pull().detach()) == pytest.approx(net.linear.weight.numel() / size, rel=1e-4)


# Training


def _batches(faces: SyntheticFaces, by: str) -> FaceBatches:
    ages = faces.ages.clone()
    ages[::5] = float("nan")  # only some images have ages
    groups = torch.where(ages.isnan(), -1, (ages > 40).long())
    both = {"ages": ages} if by == "age" else {"age_groups": groups}
    options = {"batch_size": 16, "seed": 0, "samples_per_identity": 4, "identity_age": by}
    return FaceBatches(faces.images(), faces.labels, **options, **both)


@pytest.mark.parametrize("by", ["age", "age_group"])
@pytest.mark.parametrize("method", ["dal", "mtlface", "pairs"])
def test_each_way_trains_from_a_loaded_backbone_and_its_file_says_the_same(
    tmp_path: Path, method: str, by: str
) -> None:
    faces = SyntheticFaces(8, 4, 32, 0)
    start = _backbone()
    frozen = start.conv1.conv.weight.detach().clone()
    statistics = start.bn.running_mean.clone()
    config = AgeTeacherConfig(method=method, identity_weight=0.5)
    distiller = build_age_teacher(start, config, num_identities=8, groups=None if by == "age" else 2)
    wanted = {"dal": ["age"], "mtlface": ["adversary", "age"], "pairs": []}[method]
    assert sorted(distiller.objective.terms) == sorted(["identity", "pairs", "pull", *wanted])
    assert distiller.student.train().model.net.training
    before = {name: value.clone() for name, value in distiller.student.state_dict().items()}
    result = train(distiller, _batches(faces, by), TrainConfig(max_steps=4, lr=1e-2, optimizer="adamw"))
    assert all(torch.isfinite(value) for value in map(torch.as_tensor, result.terms.values()))
    net = distiller.student.model.net
    assert torch.equal(frozen, (net.backbone if method != "pairs" else net).conv1.conv.weight)
    assert torch.equal(statistics, (net.backbone if method != "pairs" else net).bn.running_mean)
    changed = [name for name, value in distiller.student.state_dict().items() if not torch.equal(value, before[name])]
    assert any("linear.weight" in name for name in changed)
    assert method == "pairs" or any("age_branch" in name or ".1." in name for name in changed)
    save_teacher(net, tmp_path / "teacher.pt")
    again = load_teacher(tmp_path / "teacher.pt")
    ours, theirs = (each(IMAGES).detach() for each in (net.eval(), again))
    assert torch.equal(ours, theirs)
    assert type(again) is type(net)


def test_from_scratch_the_whole_network_and_its_statistics_are_trained() -> None:
    config = AgeTeacherConfig(method="mtlface")
    distiller = build_age_teacher(_backbone(), config, num_identities=8, loaded=False)
    assert sorted(distiller.objective.terms) == ["adversary", "age", "identity"]
    assert all(p.requires_grad for p in distiller.student.parameters())
    assert distiller.train().student.model.net.backbone.bn.training
    assert [distiller.objective.terms[name].weight for name in ("age", "adversary")] == [0.001, 0.002]
    with pytest.raises(InputError, match="identity_weight or pair_weight must be above 0"):
        build_age_teacher(_backbone(), AgeTeacherConfig(identity_weight=0.0), num_identities=8, loaded=False)


def test_cross_age_pairs_bring_unseen_people_together_across_age() -> None:
    """A network that reads people and, three times as loud, age: trained on some people, tested on others."""
    generator = _rng()
    people, age = torch.randn(120, 12, generator=generator), 3 * torch.randn(12, generator=generator)
    noise = 0.3 * torch.randn(240, 12, generator=generator)
    x = torch.cat([people + age, people - age]) + noise
    who, when = torch.arange(120).repeat(2), torch.arange(2).repeat_interleave(120)
    layer = nn.Linear(12, 12)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(12))
        layer.bias.zero_()
    loss, pull = CrossAgePairLoss(groups=True), L2SPLoss(layer.parameters())
    rows = who < 80

    def rank1() -> float:
        out = F.normalize(layer(x[~rows]).detach(), dim=1)
        return float(((out[:40] @ out[40:].T).argmax(1) == torch.arange(40)).float().mean())

    before = rank1()
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(layer(x[rows]), torch.stack([who[rows], when[rows]], 1).double()) + 0.1 * pull()
        value.backward()
        optimizer.step()
    assert rank1() > before + 0.1


# Files


def _saved(tmp_path: Path) -> Path:
    save_teacher(AgeInvariantNet(_backbone()).eval(), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def test_a_plain_backbone_is_saved_as_one(tmp_path: Path) -> None:
    save_teacher(_backbone(), tmp_path / "a.pt")
    assert isinstance(load_teacher(tmp_path / "a.pt"), MobileFaceNet)
    with pytest.raises(TypeError, match="model must be an age-invariant teacher or a backbone, got Linear"):
        save_teacher(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(InputError, match="cannot write"):
        save_teacher(AgeInvariantNet(_backbone()), tmp_path / "no" / "b.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state"].pop("age_branch.0.weight"), r"missing \(1\): age_branch.0.weight"),
        (lambda c: c["state"].update(more=torch.ones(2)), r"unexpected \(1\): more"),
        (lambda c: c["state"].update({"age_branch.0.bias": torch.ones(3)}), r"age_branch.0.bias must be \(16,\)"),
        (lambda c: c["state"]["age_branch.0.bias"].fill_(float("nan")), "age_branch.0.bias holds NaN"),
        (lambda c: c.update(kind="gan"), "teacher of kind 'gan'"),
        (lambda c: c.update(backbone="mbfx"), "does not describe a teacher"),
        (lambda c: c["options"].update(more=1), "says too much"),
        (lambda c: c["arguments"].update(embedding_dim=10**9), "does not"),
        (lambda c: c.update(state=[1]), "must hold 'kind'"),
        (lambda c: c.update(kdlib_faces_teacher=9), "of format 9"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    path = _saved(tmp_path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


def test_broken_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    for each in (path, tmp_path / "no.pt"):
        with pytest.raises(InputError):
            load_teacher(each)


# The command line


def _list(folder: Path, *, ages: bool) -> Path:
    faces = SyntheticFaces(8, 4, 32, 3)
    with (folder / "faces.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "identity", "age" if ages else "age_group"])
        for at, pixels in enumerate(faces.images()):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{at}.png")
            age = float(faces.ages[at])
            known = f"{age:.1f}" if ages else ("young" if age < 40 else "adult")
            rows.writerow([f"{at}.png", f"p{int(faces.labels[at])}", known if at % 7 else ""])
    return folder / "faces.csv"


@pytest.mark.parametrize(("method", "ages"), [("dal", True), ("mtlface", False), ("pairs", True)])
def test_the_command_trains_from_a_start_and_all_commands_take_the_result(
    tmp_path: Path, method: str, ages: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = _list(tmp_path, ages=ages)
    save_backbone(_backbone(), tmp_path / "start.pt")
    out = tmp_path / "age"
    common = ["--faces", str(listed), "--quiet"]
    settings = ["--set", "steps=3", "--set", "batch_size=16", "--set", f"method={method}"]
    start = ["--teacher", str(tmp_path / "start.pt")]
    command = ["train", "--recipe", "age_teacher", *common, *start, *settings, "--output", str(out)]
    assert main(command) == 0, capsys.readouterr().err
    model, size = load_model(out / "model.pt")
    assert size == 32
    pixels = SyntheticFaces(2, 2, 32, 0).images()
    first = embed(model, pixels)
    assert first.shape == (4, 16)
    # the recorded run, loaded again from its checkpoint, is the very network
    assert main(command) == 0
    assert torch.equal(embed(load_model(out / "model.pt")[0], pixels), first)
    report = ["evaluate", *common, "--model", str(out / "model.pt"), "--output", str(tmp_path / "report")]
    assert main([*report, "--set", "replicates=5"]) == 0, capsys.readouterr().err
    student = ["--set", "network.width=0.25", "--set", "network.embedding_dim=16", "--set", "network.input_size=32"]
    two = ["--teacher", str(tmp_path / "start.pt"), "--teacher", str(out / "model.pt")]
    liaad = ["train", "--recipe", "liaad", *common, *two, *student, "--set", "steps=2", "--set", "batch_size=8"]
    assert main([*liaad, "--output", str(tmp_path / "student")]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["inspect", str(out / "model.pt")]) == 0
    assert "input       RGB, (pixel - 127.5) / 127.5, 32 x 32\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("age_group", ("young", "young"), "needs at least two age groups, the lists have 'young' alone"),
        ("age", ("20", "25"), "two people with images at least 10 years apart (gap), the lists have 0; without them"),
        ("age_group", ("young", ""), "needs at least two age groups"),
    ],
)
def test_lists_that_teach_nothing_of_age_are_refused(
    tmp_path: Path, column: str, values: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"path,identity,{column}"]
    for number, pixels in enumerate(SyntheticFaces(4, 2, 32, 0).images()):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,p{number // 2},{values[number % 2]}")
    (tmp_path / "faces.csv").write_text("\n".join(rows) + "\n")
    save_backbone(_backbone(), tmp_path / "start.pt")
    command = ["train", "--recipe", "age_teacher", "--faces", str(tmp_path / "faces.csv"), "--quiet"]
    command += ["--teacher", str(tmp_path / "start.pt"), "--output", str(tmp_path / "out"), "--set", "steps=1"]
    command += ["--set", "batch_size=4", "--set", "method=pairs"]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if column == "age":  # another gap, or the margin alone, are the ways out
        assert main([*command, "--set", "gap=5"]) == 0
        margin = ["--set", "pair_weight=0", "--set", "identity_weight=1"]
        assert main([*command[:-6], *margin, "--set", "batch_size=4", "--output", str(tmp_path / "b")]) == 0


def test_one_start_at_most_and_ages_at_least(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = _list(tmp_path, ages=True)
    two = ["--teacher", "a.pt", "--teacher", "b.pt"]
    assert main(["train", "--recipe", "age_teacher", "--faces", str(listed), *two]) == 2
    assert "takes one teacher to start from, or none, got 2" in capsys.readouterr().err
    text = listed.read_text().splitlines()
    listed.write_text("\n".join(",".join(line.split(",")[:2]) for line in text) + "\n")
    assert main(["train", "--recipe", "age_teacher", "--faces", str(listed), "--output", str(tmp_path / "o")]) == 2
    assert "needs ages or age groups" in capsys.readouterr().err


# The fused teacher


class _Says(nn.Module):
    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": x @ self.weight, "map": x[:, :, None, None]}


def test_two_views_of_a_person_are_more_than_either() -> None:
    """Each teacher sees one half of what tells people apart, in a space of its own, beside noise."""
    generator = _rng()
    people = torch.randn(150, 16, generator=generator)
    x = people.repeat_interleave(6, 0) + 0.6 * torch.randn(900, 16, generator=generator)
    x = torch.cat([x, 1.5 * torch.randn(900, 16, generator=generator)], 1)
    who = torch.arange(150).repeat_interleave(6)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    keep = torch.zeros(32, 32)
    keep[torch.arange(8), torch.arange(8)] = 1
    keep[torch.arange(16, 32), torch.arange(16, 32)] = 1
    other = torch.zeros(32, 32)
    other[torch.arange(8, 32), torch.arange(8, 32)] = 1
    teachers = {"a": _Says(keep), "b": _Says(other @ turn)}
    said = [each(x)["embedding"].detach() for each in teachers.values()]
    seen = who < 100
    matrix = fit_fusion([each[seen] for each in said], who[seen], dim=24, pull=0.1, steps=300, lr=1e-2, batch=128)
    fused = FusedTeacher(teachers, matrix, passed="a")

    def auc(rows: torch.Tensor) -> float:
        unit = F.normalize(rows[~seen], dim=1)
        same = who[~seen][:, None] == who[~seen][None]
        upper = torch.ones_like(same).triu(1)
        scores = unit @ unit.T
        return float((scores[same & upper][:, None] > scores[~same & upper][None, ::7]).float().mean())

    parts = [auc(each) for each in said]
    out = fused(x)
    assert auc(out["embedding"]) > max(*parts, auc(joined(said))) + 0.03
    torch.testing.assert_close(out["embedding"].norm(dim=1), torch.ones(900))
    assert torch.equal(out["map"], x[:, :, None, None])


def test_a_fused_teacher_is_frozen_and_stands_where_a_teacher_stands() -> None:
    adapters = {name: TeacherAdapter(_backbone(seed), {"embedding": OUTPUT}) for seed, name in enumerate("ab")}
    fused = FusedTeacher(adapters, torch.eye(32)[:, :16]).train()
    assert not fused.training
    assert not any(each.requires_grad for each in fused.parameters())
    before = fused(IMAGES)["embedding"]
    from kdlib import AngularDistillLoss
    from kdlib.objective import Objective, Term

    student = StudentAdapter(_backbone(7), {"embedding": OUTPUT})
    term = Term(AngularDistillLoss(form="cosine"), student="embedding", teacher="embedding")
    distiller = Distiller(student, {"fused": fused}, Objective({"angle": term}))
    distiller.train()
    distiller(IMAGES, {}).total.backward()
    assert torch.equal(before, fused(IMAGES)["embedding"])
    assert not before.requires_grad
    with pytest.raises(InputError, match="matrix must have the 32 rows"):
        FusedTeacher(adapters, torch.eye(8))(IMAGES)


def test_the_projection_begins_with_the_directions_that_keep_most() -> None:
    generator = _rng()
    said = [torch.randn(60, 5, generator=generator), torch.randn(60, 3, generator=generator)]
    rows = joined(said)
    held = fit_fusion(said, torch.arange(60) // 2, dim=8, pull=1e6, steps=1, lr=1e-9)
    torch.testing.assert_close((rows @ held) @ (rows @ held).T, rows @ rows.T, atol=1e-4, rtol=1e-4)
    cosines = sum(F.normalize(each, dim=1) @ F.normalize(each, dim=1).T for each in said) / 2
    torch.testing.assert_close(rows @ rows.T, cosines, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_fused_is_said() -> None:
    x = torch.randn(6, 4, generator=_rng())
    who = torch.arange(6) // 2
    for arguments, message in (
        (([], who), "at least one teacher"),
        (([x], torch.zeros(6, dtype=torch.int64)), "at least two"),
        (([x, x[:3]], who), "identities"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_fusion(*arguments, dim=2, steps=1)
    with pytest.raises(InputError, match="dim must be at most the 8"):
        fit_fusion([x, x], who, dim=9)
    with pytest.raises(InputError, match="passed must be one of a"):
        FusedTeacher({"a": _Says(torch.eye(2))}, torch.eye(2), passed="c")
    with pytest.raises(InputError, match="must hold at least one"):
        FusedTeacher({}, torch.eye(2))
    recorded = _Says(torch.eye(2))
    recorded.reads = ("sample", "view")
    with pytest.raises(InputError, match="read the same inputs"):
        FusedTeacher({"a": _Says(torch.eye(2)), "b": recorded}, torch.eye(2))


def test_a_teacher_of_images_that_are_not_square_keeps_their_size(tmp_path: Path) -> None:
    net = AttentiveAgeNet(IResNet((1, 1, 1, 1), embedding_dim=8, width=0.125, input_size=(32, 24))).eval()
    save_teacher(net, tmp_path / "a.pt")
    again = load_teacher(tmp_path / "a.pt")
    assert tuple(again.input_size) == (32, 24)
    images = torch.from_numpy(np.zeros((1, 3, 32, 24), np.float32))
    assert torch.equal(again(images), net(images))
