"""Age-invariant teachers: losses, networks, training from a start, files, the command line, and fusion."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import OUTPUT, StudentAdapter, TrainConfig, train
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MBF, IResNet, MobileFaceNet
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig, build_age_teacher
from kdlib_faces.teachers import (
    AgeAttention,
    AgeEstimationLoss,
    AgeInvariantNet,
    AttentiveAgeNet,
    CrossAgePairLoss,
    L2SPLoss,
    load_teacher,
    reverse_gradient,
    save_teacher,
)
from kdlib_faces.teachers.fine_tuning import freeze_all_but
from tests.faces.small_networks import IMAGES, rng, small_backbone

NAN = float("nan")


# Networks and losses


def test_attention_splits_a_map_as_published() -> None:
    split = AgeAttention(32, initial_bias=0.0)
    maps = torch.randn(2, 32, 5, 6, generator=rng())
    tapped = StudentAdapter(split, {"identity": OUTPUT, "age": "age"})(maps)
    torch.testing.assert_close(tapped["identity"] + tapped["age"], maps)

    def perceptron(x: Tensor) -> Tensor:
        return split.channel[2](F.relu(split.channel[0](x)))

    average = torch.cat([F.adaptive_avg_pool2d(maps, grid).flatten(1) for grid in (1, 2, 3)], 1)
    maximum = torch.cat([F.adaptive_max_pool2d(maps, grid).flatten(1) for grid in (1, 2, 3)], 1)
    assert average.shape == (2, 14 * 32)
    by_channel = torch.sigmoid(perceptron(average) + perceptron(maximum))[:, :, None, None]
    by_position = torch.sigmoid(split.spatial(torch.stack([maps.amax(1), maps.mean(1)], 1)))
    assert split.spatial.kernel_size == (7, 7)
    assert split.channel[0].out_features == 2
    torch.testing.assert_close(tapped["age"], 0.5 * (maps * by_channel + maps * by_position))


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: MobileFaceNet(16, width=0.25, input_size=32),
        lambda: MBF(16, scale=1, blocks=(1, 1, 1, 1), input_size=32),
        lambda: IResNet((1, 1, 1, 1), embedding_dim=16, width=0.125, input_size=32),
    ],
)
def test_attention_extends_any_backbone_and_starts_with_little_effect(backbone) -> None:
    start = backbone().eval()
    keys = set(start.state_dict())
    net = AttentiveAgeNet(start).eval()
    assert set(start.state_dict()) == keys  # the backbone was copied
    assert float(F.cosine_similarity(net(IMAGES), start(IMAGES)).min().detach()) > 0.99
    taps = {"embedding": OUTPUT, "age": net.age_tap, "identity": net.identity_tap}
    features = StudentAdapter(net, taps)(IMAGES)
    assert features["age"].shape == features["identity"].shape
    assert features["age"].shape[1] == net.channels
    features["embedding"].sum().backward()
    assert all(p.grad is not None for p in net.get_submodule(net.age_tap.rpartition(".")[0]).parameters())
    with pytest.raises(TypeError, match="backbone must be a face backbone, got Linear"):
        AttentiveAgeNet(nn.Linear(2, 2))


def test_a_branch_of_small_gain_starts_with_little_effect() -> None:
    start = small_backbone()
    near, far = (F.cosine_similarity(AgeInvariantNet(start, gain=g).eval()(IMAGES), start(IMAGES)) for g in (0.01, 1.0))
    assert float(far.min().detach()) < 0.999 < float(near.min().detach())


def test_age_estimation_is_expected_age_and_groups() -> None:
    loss = AgeEstimationLoss(6, hidden=8, scale=10.0)
    features = torch.randn(4, 6, generator=rng())
    ages = torch.tensor([5.0, 33.0, NAN, 60.0])
    logits = loss.estimator(features)
    years = logits.softmax(1) @ torch.arange(101.0)
    rows = [0, 1, 3]
    entropy = F.cross_entropy(loss.classifier(logits[rows]), torch.tensor([0, 3, 6]))
    expected = ((years[rows] - ages[rows]) / 10).square().mean() + entropy
    torch.testing.assert_close(loss(features, ages), expected)
    # Maps are averaged over their grid.
    torch.testing.assert_close(loss(features[:, :, None, None].expand(-1, -1, 3, 3), ages), expected)


def test_age_estimation_from_groups_is_the_cross_entropy() -> None:
    loss = AgeEstimationLoss(6, groups=2, hidden=8)
    features = torch.randn(3, 6, generator=rng())
    expected = F.cross_entropy(loss.classifier(loss.estimator(features[:2])), torch.tensor([1, 0]))
    torch.testing.assert_close(loss(features, torch.tensor([1, 0, -1])), expected)
    unknown = loss(features.requires_grad_(), torch.tensor([-1, -1, -1]))
    unknown.backward()
    assert float(unknown.detach()) == 0.0
    with pytest.raises(ValueError, match=r"features must be \(b, c\) or \(b, c, h, w\)"):
        loss(features[:, None], torch.tensor([1, 0, -1]))


def test_reversal_negates_the_gradient_of_the_features_alone() -> None:
    features = torch.randn(5, 6, generator=rng(), requires_grad=True)
    groups = torch.tensor([0, 1, 0, 1, 1])
    gradients = []
    for reverse in (False, True):
        torch.manual_seed(0)
        loss = AgeEstimationLoss(6, groups=2, hidden=8, reverse=reverse)
        gradients.append(torch.autograd.grad(loss(features, groups), [features, *loss.parameters()]))
    plain, reversed_ = gradients
    torch.testing.assert_close(plain[0], -reversed_[0])
    torch.testing.assert_close(plain[1:], reversed_[1:])
    assert torch.equal(reverse_gradient(features), features)


def test_cross_age_pairs_are_contrasted_with_all_other_identities() -> None:
    x = torch.randn(6, 5, generator=rng())
    target = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 1], [2, -1]], dtype=torch.float64)
    cosine = 16 * F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    values = []
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        negatives = [k for k in range(6) if target[k, 0] != target[i, 0]]
        values.append(-torch.log_softmax(cosine[i, [j, *negatives]], 0)[0])
    torch.testing.assert_close(CrossAgePairLoss(groups=True)(x, target), torch.stack(values).mean())
    years = target.clone()
    years[:, 1] = torch.tensor([4, 40, 10, 15, 50, NAN])
    torch.testing.assert_close(CrossAgePairLoss(min_age_gap=20)(x, years), torch.stack(values[:2]).mean())


@pytest.mark.parametrize("ages", [[1.0, 1.0, 1.0], [NAN, -1.0, 3.0], [1.0, 9.0, 5.0]])
def test_without_a_cross_age_pair_or_negatives_the_loss_is_zero_with_a_graph(ages) -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    loss = CrossAgePairLoss(min_age_gap=1)(x, torch.stack([torch.zeros(3), torch.tensor(ages)], 1))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match=r"target must be \(b, 2\)"):
        CrossAgePairLoss()(x, torch.zeros(3, 3))


def test_l2_sp_measures_the_distance_of_the_trainable_part_from_its_start() -> None:
    net = small_backbone()
    moved = freeze_all_but(net, "embedding")
    assert {id(p) for p in moved} == {id(p) for p in (*net.linear.parameters(), *net.bn.parameters())}
    assert [p for p in net.parameters() if p.requires_grad] == moved
    tail = len(list(net.conv_6_sep.parameters())) + len(list(net.conv_6_dw.parameters())) + len(moved)
    assert len(freeze_all_but(small_backbone(), "tail")) == tail
    assert len(freeze_all_but(small_backbone(), "all")) == len(list(net.parameters()))
    l2_sp = L2SPLoss(moved)
    assert not list(l2_sp.parameters())
    assert not l2_sp.state_dict()
    assert float(l2_sp().detach()) == 0.0
    norm = sum(float(p.detach().square().sum()) for p in moved)
    with torch.no_grad():
        net.linear.weight.add_(1.0)
    assert float(l2_sp().detach()) == pytest.approx(net.linear.weight.numel() / norm, rel=1e-4)


# Training


def _batches(faces: SyntheticFaces, by: str) -> FaceBatches:
    ages = faces.ages.clone()
    ages[::5] = NAN
    groups = torch.where(ages.isnan(), -1, (ages > 40).long())
    column = {"ages": ages} if by == "age" else {"age_groups": groups}
    options = {"batch_size": 16, "seed": 0, "samples_per_identity": 4, "identity_age": by}
    return FaceBatches(faces.images(), faces.labels, **options, **column)


@pytest.mark.parametrize("by", ["age", "age_group"])
@pytest.mark.parametrize(("method", "added"), [("dal", ["age"]), ("mtlface", ["adversary", "age"]), ("pairs", [])])
def test_each_method_fine_tunes_and_its_file_gives_the_same_embeddings(
    tmp_path: Path, method: str, added: list[str], by: str
) -> None:
    start = small_backbone()
    frozen, statistics = start.conv1.conv.weight.detach().clone(), start.bn.running_mean.clone()
    config = AgeTeacherConfig(method=method, identity_weight=0.5)
    distiller = build_age_teacher(start, config, num_identities=8, groups=None if by == "age" else 2)
    assert sorted(distiller.objective.terms) == sorted(["identity", "pairs", "l2_sp", *added])
    assert distiller.student.train().model.net.training
    before = {name: value.clone() for name, value in distiller.student.state_dict().items()}
    batches = _batches(SyntheticFaces(8, 4, 32, 0), by)
    result = train(distiller, batches, TrainConfig(max_steps=4, lr=1e-2, optimizer="adamw"))
    assert all(torch.isfinite(value) for value in map(torch.as_tensor, result.terms.values()))
    net = distiller.student.model.net
    backbone = net if method == "pairs" else net.backbone
    assert torch.equal(frozen, backbone.conv1.conv.weight)
    assert torch.equal(statistics, backbone.bn.running_mean)
    changed = [name for name, value in distiller.student.state_dict().items() if not torch.equal(value, before[name])]
    assert any("linear.weight" in name for name in changed)
    assert method == "pairs" or any("age_branch" in name or ".1." in name for name in changed)
    save_teacher(net, tmp_path / "teacher.pt")
    again = load_teacher(tmp_path / "teacher.pt")
    assert torch.equal(net.eval()(IMAGES), again(IMAGES))
    assert type(again) is type(net)


def test_from_scratch_the_whole_network_and_its_statistics_are_trained() -> None:
    distiller = build_age_teacher(
        small_backbone(), AgeTeacherConfig(method="mtlface"), num_identities=8, pretrained=False
    )
    assert sorted(distiller.objective.terms) == ["adversary", "age", "identity"]
    assert all(p.requires_grad for p in distiller.student.parameters())
    assert distiller.train().student.model.net.backbone.bn.training
    assert [distiller.objective.terms[name].weight for name in ("age", "adversary")] == [0.001, 0.002]
    with pytest.raises(InputError, match="identity_weight or pair_weight must be above 0"):
        build_age_teacher(small_backbone(), AgeTeacherConfig(identity_weight=0.0), num_identities=8, pretrained=False)
    with pytest.raises(InputError, match="the start is a AgeInvariantNet already, method 'mtlface' needs a backbone"):
        build_age_teacher(AgeInvariantNet(small_backbone()), AgeTeacherConfig(method="mtlface"), num_identities=8)


# Files


def test_backbones_are_saved_as_backbones_and_other_modules_refused(tmp_path: Path) -> None:
    save_teacher(small_backbone(), tmp_path / "a.pt")
    assert isinstance(load_teacher(tmp_path / "a.pt"), MobileFaceNet)
    with pytest.raises(TypeError, match="model must be an age-invariant teacher or a backbone, got Linear"):
        save_teacher(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(InputError, match="cannot write"):
        save_teacher(AgeInvariantNet(small_backbone()), tmp_path / "a.pt" / "b.pt")


def test_a_teacher_of_images_that_are_not_square_keeps_their_size(tmp_path: Path) -> None:
    net = AttentiveAgeNet(IResNet((1, 1, 1, 1), embedding_dim=8, width=0.125, input_size=(32, 24))).eval()
    save_teacher(net, tmp_path / "a.pt")
    again = load_teacher(tmp_path / "a.pt")
    assert tuple(again.input_size) == (32, 24)
    assert torch.equal(again(IMAGES[..., :24]), net(IMAGES[..., :24]))


def _expanded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes that take four bytes each in a file."""
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items() if value.is_floating_point()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state"].pop("age_branch.0.weight"), r"missing \(1\): age_branch.0.weight"),
        (lambda c: c["state"].update(more=torch.ones(2)), r"unexpected \(1\): more"),
        (lambda c: c["state"].update({"age_branch.0.bias": None}), "age_branch.0.bias is not a floating-point tensor"),
        (
            lambda c: c["state"].update({"age_branch.0.bias": torch.ones(3)}),
            r"age_branch.0.bias is \(3,\) in the file, \(16,\)",
        ),
        (lambda c: c["state"]["age_branch.0.bias"].fill_(NAN), "contains NaN or infinite values in age_branch.0.bias"),
        (
            lambda c: c["state"]["backbone.bn.running_var"].fill_(-1),
            "contains negative variances in backbone.bn.running_var",
        ),
        (lambda c: c["state"].update(_expanded(c["state"])), "declares more values"),
        (lambda c: c.update(kind="gan"), "teacher of kind 'gan'"),
        (lambda c: c.update(backbone="mbfx"), "does not describe a teacher"),
        (lambda c: c["options"].update(more=1), "unknown arguments"),
        (lambda c: c["arguments"].update(embedding_dim=10**9), "does not"),
        (lambda c: c["input"].update(color="cmyk"), "does not describe its images"),
        (lambda c: c.update(state=[1]), "must hold 'kind'"),
        (lambda c: c.update(kdlib_faces_teacher=9), "of format 9"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "teacher.pt"
    save_teacher(AgeInvariantNet(small_backbone()).eval(), path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="damaged"):
        load_teacher(path)
