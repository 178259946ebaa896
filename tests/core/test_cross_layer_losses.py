"""Losses that compare several layers: SemCKD and ReviewKD."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib import Distiller, Objective, ReviewKDLoss, SemCKDLoss, StudentAdapter, TeacherAdapter, Term
from kdlib.functional import hierarchical_context
from tests.core import reference_features as reference
from tests.core.loss_inputs import noise, seeded
from tests.core.test_generated_losses import affine, array

SHAPES = {
    "semckd": ([(3, 4, 4), (4, 2, 3)], [(2, 4, 4), (3, 2, 2), (4, 1, 1)]),
    "semckd, similarities": ([(3, 4, 4), (4, 2, 3)], [(2, 4, 4), (3, 2, 2), (4, 1, 1)]),
    "review_kd": ([(3, 6, 6), (4, 3, 4), (2, 1, 1)], [(2, 6, 6), (3, 6, 6), (4, 1, 1)]),
}
each_name = pytest.mark.parametrize("name", SHAPES)


def build(name: str) -> Any:
    channels = [[shape[0] for shape in side] for side in SHAPES[name]]
    options = {"query_dim": 3, "batch_size": 6 if "sim" in name else None}
    loss = seeded(lambda: ReviewKDLoss(*channels) if name == "review_kd" else SemCKDLoss(*channels, **options))
    with torch.no_grad():
        for k, norm in enumerate(m for m in loss.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.copy_(1 + 0.3 * noise(len(norm.weight), seed=k, dtype=torch.float32))
            norm.bias.copy_(noise(len(norm.bias), seed=k + 50, dtype=torch.float32))
    return loss


def layers(name: str, batch: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], ...]:
    return tuple(
        [noise(batch, *shape, seed=seed + 20 * i + k, dtype=dtype) for k, shape in enumerate(side)]
        for i, side in enumerate(SHAPES[name])
    )


def expected_of(name: str, loss: Any, students: list[Tensor], teachers: list[Tensor]) -> Any:
    s, t = [array(x) for x in students], [array(x) for x in teachers]
    if name == "review_kd":
        parts = [
            [array(p) for key, p in fusion.named_parameters()]  # in the order of the constructor
            for fusion in loss.fusions
        ]
        # first, first_norm (2), attention (2), second, second_norm (2)
        return reference.review_kd(s, t, parts)
    if loss.batch_size is None:
        described = tuple([x.mean((2, 3)) for x in side] for side in (s, t))
    else:
        flat = ([x.reshape(len(x), -1) for x in side] for side in (s, t))
        described = tuple([np.pad(x @ x.T, ((0, 0), (0, loss.batch_size - len(x)))) for x in side] for side in flat)
    networks = tuple([(affine(each.first), affine(each.second)) for each in of] for of in (loss.queries, loss.keys))
    projections = [[[array(p) for p in project.parameters()] for project in row] for row in loss.projections]
    return reference.semckd(s, t, described, networks, projections)  # type: ignore[arg-type]


@each_name
def test_equals_the_naive_reference(name: str) -> None:
    loss, (students, teachers) = build(name).double(), layers(name)
    got = loss(students, teachers, reduction="none")
    np.testing.assert_allclose(array(got), expected_of(name, loss, students, teachers), rtol=1e-9)
    torch.testing.assert_close(loss(students, teachers), got.mean())


@each_name
def test_gradients_are_those_of_finite_differences_and_reach_every_parameter(name: str) -> None:
    loss, (students, teachers) = build(name).double(), layers(name)
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in students]
    teachers = [x.requires_grad_() for x in teachers]
    for each in (None, weight):
        assert torch.autograd.gradcheck(
            lambda *s, each=each: loss(s[: len(leaves)], teachers, weight=each),
            (*leaves, *loss.parameters()),
            fast_mode=True,
            atol=1e-6,
        )
    loss(leaves, teachers).backward()
    assert all(x.grad is not None and x.grad.any() for x in leaves)
    assert all(p.grad is not None for p in loss.parameters()), "DistributedDataParallel needs all of them"
    assert all(x.grad is None for x in teachers)


@pytest.mark.parametrize(
    "name", ["semckd", "review_kd"]
)  # with similarities, a sample's attention depends on the others
def test_masked_samples_take_no_part_in_values_gradients_and_statistics(name: str) -> None:
    keep = torch.tensor([True, False, True, True, False])
    loss, other, (students, teachers) = build(name).double(), build(name).double(), layers(name)
    for x in (*students, *teachers):
        x[~keep] = 1e12
    leaves = [x.clone().requires_grad_() for x in students]
    value = loss(leaves, teachers, weight=keep.double())
    torch.testing.assert_close(value, other([x[keep] for x in students], [x[keep] for x in teachers]))
    value.backward()
    assert all(not x.grad[~keep].any() and x.grad[keep].any() for x in leaves)
    assert any(name.endswith("running_var") for name in loss.state_dict())
    for key, x in loss.state_dict().items():
        torch.testing.assert_close(x, other.state_dict()[key], msg=key)
    before = {key: x.clone() for key, x in loss.state_dict().items()}
    assert loss(students, teachers, weight=torch.zeros(5)).item() == 0
    assert all(torch.equal(x, before[key]) for key, x in loss.state_dict().items())


@each_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_parameters_of_any_dtype_and_eval_mode(name: str, dtype: torch.dtype) -> None:
    reference_loss = build(name).to(dtype).float()
    loss = build(name).to(dtype)
    students, teachers = layers(name, dtype=torch.float32)
    for mode in (True, False):
        value = loss.train(mode)(students, teachers)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference_loss.train(mode)(students, teachers), rtol=2e-2, atol=1e-3)


@each_name
def test_extreme_values_are_finite(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        end, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
        for factors in ((end, 1.0), (1.0, end), (end, end), (-end, end), (tiny, 1.0), (0.0, 0.0)):
            students, teachers = layers(name, batch=3, dtype=dtype)
            sides = [
                [x.sign() * factor if abs(factor) > 1 else x * factor for x in side]
                for side, factor in zip((students, teachers), factors, strict=True)
            ]
            leaves = [x.detach().requires_grad_() for x in sides[0]]
            loss = build(name)
            value = loss(leaves, sides[1])
            value.backward()
            assert torch.isfinite(value), (dtype, factors)
            assert all(torch.isfinite(x.grad).all() for x in leaves), (dtype, factors)
            assert all(torch.isfinite(p.grad).all() for p in loss.parameters()), (dtype, factors)


@pytest.mark.parametrize(
    "make", [lambda: SemCKDLoss([3], [2, 3], query_dim=2), lambda: ReviewKDLoss([3, 2], [2, 3], levels=(2,))]
)
def test_compiles_as_one_graph(make: Any) -> None:
    torch._dynamo.reset()
    loss, other = seeded(make), seeded(make)
    students = [noise(5, c, 4, 4, seed=c, dtype=torch.float32) for c in loss.student_channels]
    teachers = [noise(5, c, 2, 4, seed=c + 9, dtype=torch.float32) for c in loss.teacher_channels]
    weight = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7])
    compiled = torch.compile(lambda s, t, w: loss(s, t, weight=w), fullgraph=True, backend="aot_eager")
    for each in (None, weight):
        torch.testing.assert_close(compiled(students, teachers, each), other(students, teachers, weight=each))
    for key, x in loss.state_dict().items():
        torch.testing.assert_close(x, other.state_dict()[key])


@each_name
def test_runs_on_the_meta_device(name: str) -> None:
    loss, (students, teachers) = build(name).to("meta"), layers(name, dtype=torch.float32)
    for weight in (None, torch.ones(5, device="meta")):
        value = loss([x.to("meta") for x in students], [x.to("meta") for x in teachers], weight=weight)
        assert value.device.type == "meta"
        assert value.shape == ()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(SHAPES)), scale=st.floats(0.01, 100))
def test_losses_are_positive_means_and_attention_is_a_distribution(seed: int, name: str, scale: float) -> None:
    loss, (students, teachers) = build(name).double(), layers(name, seed=seed)
    each = loss([scale * x for x in students], teachers, reduction="none")
    assert (each >= 0).all()
    if name == "review_kd":
        return
    attention = loss.attention([scale * x for x in students], teachers)
    assert attention.shape == (5, 2, 3)
    torch.testing.assert_close(attention.sum(2), torch.ones(5, 2, dtype=torch.float64))
    assert (attention >= torch.softmax(torch.tensor([-1.0, 1.0, 1.0]), 0)[0] - 1e-6).all()


@each_name
def test_vectors_are_maps_of_one_position(name: str) -> None:
    loss, (students, teachers) = build(name).double(), layers(name)
    teachers[-1] = teachers[-1].flatten(1)
    value = loss(students, teachers)
    teachers[-1] = teachers[-1][..., None, None]
    assert torch.equal(value, loss(students, teachers))


def test_semckd_by_hand() -> None:
    """Equal queries weigh all layers alike; projections to zero leave the mean squares of the teacher."""
    loss = SemCKDLoss([2], [1, 1])
    for p in loss.parameters():
        nn.init.zeros_(p)
    teachers = [torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 1, 1), -1.0)]
    assert loss([torch.rand(2, 2, 2, 2)], teachers).item() == pytest.approx((9 + 1) / 2)
    # One layer on each side: the attention is 1.
    single = SemCKDLoss([2], [1])
    for p in single.parameters():
        nn.init.zeros_(p)
    assert single([torch.rand(2, 2, 2, 2)], teachers[:1]).item() == pytest.approx(9)


def test_semckd_learns_to_attend_to_the_layer_that_can_be_predicted() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = seeded(lambda: SemCKDLoss([3], [2, 2], query_dim=4))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(80):
        student = torch.randn(16, 3, 3, 3, generator=generator)
        noise_layer = torch.randn(16, 2, 3, 3, generator=generator)
        optimizer.zero_grad()
        loss([student], [noise_layer, student[:, :2]]).backward()
        optimizer.step()
    assert loss.attention([student], [noise_layer, student[:, :2]]).mean((0, 1))[1] > 0.75


def test_review_kd_by_hand() -> None:
    """In eval mode BatchNorm is the identity up to its epsilon; one by one maps have no coarser grid."""
    loss = ReviewKDLoss([1, 1], [1, 1], hidden=1).eval()
    for fusion in loss.fusions:
        nn.init.ones_(fusion.first.weight)
        nn.init.dirac_(fusion.second.weight)
        if fusion.attention is not None:
            nn.init.zeros_(fusion.attention.weight)
            nn.init.zeros_(fusion.attention.bias)
    students, teachers = [torch.full((1, 1), 4.0), torch.full((1, 1), 2.0)], [torch.zeros(1, 1), torch.zeros(1, 1)]
    # The deep layer: 2^2. The shallow one: (4 + 2) / 2, because both attention maps are sigmoid(0).
    assert loss(students, teachers).item() == pytest.approx(4 + 9, rel=1e-3)


def test_review_kd_of_one_layer_is_a_projection_with_hierarchical_context() -> None:
    loss = seeded(lambda: ReviewKDLoss([3], [2], levels=(2,))).double()
    student, teacher = noise(4, 3, 6, 6), noise(4, 2, 6, 6, seed=1)
    fusion = loss.fusions[0]
    projected = fusion.second_norm(fusion.second(fusion.first_norm(fusion.first(student))))
    torch.testing.assert_close(loss([student], [teacher]), hierarchical_context(projected, teacher, levels=(2,)))


def test_batch_norm_of_all_samples_is_that_of_torch() -> None:
    """Weights of one take the way of masked samples; all values, gradients and statistics are those without weights."""
    for name in SHAPES:
        loss, other, (students, teachers) = build(name), build(name), layers(name, dtype=torch.float32)
        torch.testing.assert_close(loss(students, teachers, weight=torch.ones(5)), other(students, teachers))
        for key, x in loss.state_dict().items():
            torch.testing.assert_close(x, other.state_dict()[key])


MAPS = [torch.ones(2, 3, 4, 4), torch.ones(2, 4, 2, 2)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SemCKDLoss(3, [4]), TypeError, "SemCKDLoss: student_channels must be a sequence with the channels of"),
        (
            lambda: SemCKDLoss([3], []),
            ValueError,
            "SemCKDLoss: teacher_channels must hold the channels of at least one",
        ),
        (lambda: SemCKDLoss([3, 0], [4]), ValueError, r"SemCKDLoss: student_channels\[1\] must be a whole number"),
        (lambda: ReviewKDLoss([3, 4], [3]), ValueError, "ReviewKDLoss: teacher_channels must have one number for each"),
        (
            lambda: ReviewKDLoss([3, 4], [3, 4])(MAPS[0], MAPS),
            TypeError,
            r"ReviewKDLoss: students must be a list of 2 tensors, .* got Tensor; give the Term a list of taps, student=",
        ),
        (lambda: SemCKDLoss([3, 4], [3])(MAPS, MAPS), ValueError, "SemCKDLoss: teachers must hold 1 tensors"),
        (
            lambda: SemCKDLoss([3, 5], [3, 4])(MAPS, MAPS),
            ValueError,
            r"students\[1\] must be .* with c = 5, got \(2, 4",
        ),
        (
            lambda: SemCKDLoss([3, 4], [3, 4])(MAPS, [x[:1] for x in MAPS]),
            ValueError,
            r"teachers\[0\] must have the batch size of students\[0\] \(2, 3, 4, 4\), got \(1, 3, 4, 4\)",
        ),
        (lambda: SemCKDLoss([3, 4], [3, 4], batch_size=1)(MAPS, MAPS), ValueError, "at most batch_size = 1 samples"),
        (lambda: ReviewKDLoss([3, 4], [3, 4])(MAPS, MAPS, weight=torch.ones(3)), ValueError, "ReviewKDLoss: weight"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class Stages(nn.Module):
    def __init__(self, *channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, channels[0], 3, 2, 1), nn.Conv2d(channels[0], channels[1], 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu().mean((2, 3))


@pytest.mark.parametrize("make", [lambda: SemCKDLoss([4, 6], [5, 7]), lambda: ReviewKDLoss([4, 6], [5, 7])])
def test_a_distiller_trains_with_lists_of_taps(make: Any) -> None:
    taps = {"first": "first", "second": "second"}
    student, teacher = seeded(lambda: (Stages(4, 6), Stages(5, 7)))
    layers = ["first", "second"]
    terms = {"layers": Term(seeded(make), student=layers, teacher=layers, sample_weight="weight")}
    distiller = Distiller(StudentAdapter(student, taps), {"big": TeacherAdapter(teacher, taps)}, Objective(terms))
    optimizer = torch.optim.Adam(distiller.trainable_parameters(), lr=0.01)
    images = noise(8, 3, 8, 8, dtype=torch.float32)
    targets = {"weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.5, 1.0])}
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        output = distiller(images, targets)
        output.total.backward()
        optimizer.step()
        values.append(output.total.item())
    assert values[-1] < 0.8 * values[0]
    assert all(p.grad is not None for p in distiller.trainable_parameters())
    assert {name.split(".")[2] for name in distiller.state_dict() if name.startswith("objective.losses")} == {"layers"}


def test_the_batch_size_limits_samples_and_not_channels() -> None:
    loss = SemCKDLoss([7], [7], batch_size=5)
    layers = [torch.ones(5, 7, 2, 2)]
    assert loss(layers, layers).shape == ()
    assert loss.attention(layers, layers).shape == (5, 1, 1)
    with pytest.raises(ValueError, match="at most batch_size = 5 samples, got 6"):
        loss([torch.ones(6, 3, 2, 2).repeat(1, 3, 1, 1)[:, :7]], [torch.ones(6, 7, 2, 2)])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_all_samples_are_those_of_batch_norm(momentum: float | None) -> None:
    """With weights the statistics are computed here, without weights by torch; without samples they stay."""
    losses = [seeded(lambda: ReviewKDLoss([3, 4], [3, 4])) for _ in range(2)]
    norms = [[each for each in loss.modules() if isinstance(each, nn.BatchNorm2d)] for loss in losses]
    assert norms[0]
    for norm in (*norms[0], *norms[1]):
        norm.momentum = momentum
    for step in range(3):
        maps = [noise(5, c, 4, 4, seed=step).float() * (step + 1) for c in (3, 4)]
        values = [loss(maps, maps, weight=weight) for loss, weight in zip(losses, (None, torch.ones(5)), strict=True)]
        torch.testing.assert_close(*values)
    with torch.no_grad():
        before = [norm.running_mean.clone() for norm in norms[1]]
        losses[1](maps, maps, weight=torch.zeros(5))
    for first, second, mean in zip(*norms, before, strict=True):
        torch.testing.assert_close(first.running_mean, second.running_mean)
        torch.testing.assert_close(first.running_var, second.running_var)
        assert first.num_batches_tracked == second.num_batches_tracked == 3
        assert torch.equal(second.running_mean, mean)


def test_the_fusions_are_as_wide_as_the_last_layer_of_the_student_up_to_512() -> None:
    with torch.device("meta"):
        for channels, hidden, width in ((7, None, 7), (512, None, 512), (600, None, 512), (7, 9, 9), (600, 530, 530)):
            loss = ReviewKDLoss([3, channels], [4, 5], hidden=hidden)
            convolutions = [each for each in loss.modules() if isinstance(each, nn.Conv2d)]
            assert {each.out_channels for each in convolutions if each.in_channels in (3, channels)} >= {width}
            assert {each.in_channels for each in convolutions if each.out_channels in (4, 5)} == {width}
