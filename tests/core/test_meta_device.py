"""The meta device and fake tensors: no loss, weighting, projection or distiller reads a value or needs the CPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdlib.functional
import kdlib.losses
from kdlib import (
    OUTPUT,
    Distiller,
    EMATeacher,
    GradientWeighting,
    HintLoss,
    Objective,
    RKDAngleLoss,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    infer_projection,
)
from kdlib.testing._meta import on_meta
from tests.core.test_contracts import LOGITS, LOSSES, Row, component, rows


class Plain(TorchDispatchMode):
    """Fails on operations of the library itself, whose bodies do not run on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != "kdlib", func.name()
        return func(*args, **(kwargs or {}))


def large(shape: tuple[int, ...], *, logits: bool) -> tuple[int, ...]:
    """A batch that takes the path of large inputs; a tensor on the meta device takes no memory."""
    if logits:
        return 1024, 30_000
    return (256, shape[1], 16 * shape[2], 16 * shape[3]) if len(shape) == 4 else (512, shape[1])


def empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def larger(side: Any, *, logits: bool) -> Tensor | list[Tensor]:
    """The large input of one side, or of each layer of a side with several."""
    if isinstance(side, list):
        return [empty((6, shape[1], *(16 * size for size in shape[2:]))) for shape in side]
    return empty(large(side, logits=logits))


@pytest.mark.parametrize(("name", "row"), rows(kdlib.losses, LOSSES))
def test_losses_of_large_batches(name: str, row: Row) -> None:
    student, teacher = (larger(side, logits=row.shapes == LOGITS) for side in row.shapes)
    inputs = student if isinstance(student, list) else [student]
    options: dict[str, Any] = {"weight": empty((len(inputs[0]),))}
    if row.classes:
        shape = len(inputs[0]), *inputs[0].shape[2:]
        options["target"] = torch.empty(shape, dtype=torch.long, device="meta")
    for x in inputs:
        x.requires_grad_()
    with Plain(), on_meta():
        loss = component(kdlib.losses, name, row).to("meta")
        loss(student, teacher, **options).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)


ARGUMENTS: dict[str, Callable[[], Any]] = {
    "attention_map": lambda: (empty((2, 3, 4, 4)),),
    "channel_attention_map": lambda: (empty((2, 3, 4, 4)),),
    "overhaul_margin": lambda: (nn.BatchNorm2d(3, device="meta"),),
    "linear_soft_target": lambda: (empty((2, 9, 4)), empty((50, 4)), empty((2, 9, 6)), empty((50, 6))),
}
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "decoupled_kd": lambda: {"target": torch.zeros(4, dtype=torch.long, device="meta")},
    "overhaul": lambda: {"margin": empty((3,))},
    "variational_information": lambda: {"variance": empty((3,))},
}
MAPS = {"attention_transfer", "factor_transfer", "attentive_similarity", "hierarchical_context", "nst", "overhaul"}


def test_functions() -> None:
    for name in kdlib.functional.__all__:
        shape = (4, 3, 4, 4) if name in MAPS else (4, 3)
        given = ARGUMENTS[name]() if name in ARGUMENTS else (empty(shape), empty(shape))
        options = OPTIONS[name]() if name in OPTIONS else {}
        with on_meta():
            assert getattr(kdlib.functional, name)(*given, **options).is_meta, name


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"])
@pytest.mark.parametrize(("shape", "dim"), [((4, 64, 50_000), -1), ((8, 19, 256, 256), 1)])
def test_masked_logits_of_tokens_and_pixels(divergence: str, shape: tuple[int, ...], dim: int) -> None:
    student, teacher = empty(shape).requires_grad_(), empty(shape)
    mask = torch.empty([*shape[:-1]] if dim == -1 else [shape[0], *shape[2:]], dtype=torch.bool, device="meta")
    with on_meta():
        SoftTargetLoss(divergence=divergence, dim=dim)(student, teacher, mask=mask).backward()
    assert student.grad is not None


@pytest.mark.parametrize("num_teachers", [2, 3])
@pytest.mark.parametrize("half", [False, True])
def test_a_distiller(num_teachers: int, half: bool) -> None:
    """Adapters, projections, losses, a weighting that differentiates, a running mean: one step on the meta device."""

    def net(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(36 * width, 5))

    student = StudentAdapter(net(4), {"map": "1", "out": OUTPUT})
    teachers = {str(k): TeacherAdapter(net(6), {"map": "1", "out": OUTPUT}) for k in range(num_teachers - 1)}
    terms = {
        "map": Term(HintLoss(), student="map", teacher="map", teachers=list(teachers), project="auto"),
        "out": Term(SoftTargetLoss(), student="out", teacher="out"),
        "angle": Term(RKDAngleLoss(), student="out", teacher="out"),
        "label": Term(nn.CrossEntropyLoss(), student="out", target="label"),
    }
    distiller = Distiller(student, {**teachers, "mean": EMATeacher(student)}, Objective(terms, GradientWeighting()))
    distiller.to("meta")
    targets = {"label": torch.empty(4, dtype=torch.long, device="meta")}
    with on_meta(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        output = distiller(empty((4, 3, 8, 8)), targets)
        output.total.backward()
        torch.optim.SGD(distiller.trainable_parameters(), lr=0.1).step()
        distiller.update_teachers()
    assert output.total.is_meta
    assert output.weights["out"].shape == (num_teachers, 4)
    assert all(parameter.grad is not None for parameter in distiller.trainable_parameters())


def test_projections_are_inferred_from_shapes_alone() -> None:
    for one, two in [((2, 3), (2, 5)), ((2, 3, 4, 4), (2, 5, 2, 2))]:
        assert infer_projection(empty(one), empty(two)).to("meta")(empty(one)).shape == two


@pytest.mark.parametrize(("name", "row"), rows(kdlib.losses, LOSSES))
def test_losses_of_fake_tensors(name: str, row: Row) -> None:
    """As tools do that estimate memory or trace a step without running it."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in row.arguments)
        student, teacher = (
            [torch.randn(each) for each in side] if isinstance(side, list) else torch.randn(side) for side in row.shapes
        )
        inputs = student if isinstance(student, list) else [student]
        shape = len(inputs[0]), *inputs[0].shape[2:]
        options = {"target": torch.zeros(shape, dtype=torch.long)} if row.classes else {}
        loss = component(kdlib.losses, name, replace(row, arguments=arguments))
        for x in inputs:
            x.requires_grad_()
        loss(student, teacher, weight=torch.ones(len(inputs[0])), **options).backward()
        assert all(x.grad is not None for x in inputs)


class Remote(Tensor):
    """A tensor on the CPU that is treated like one on an accelerator: its values are not read."""


RELATIONS: dict[str, Callable[..., Tensor]] = {
    "rkd_distance": kdlib.functional.rkd_distance,
    "rkd_angle": kdlib.functional.rkd_angle,
    "dark_rank": partial(kdlib.functional.dark_rank, alpha=0.01),
}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4, 1e-7, 0.0])
def test_relations_without_reading_values(name: str, apart: float) -> None:
    """Equal and near rows, masked rows of any size and tiny ones, with the same results as where values are read."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, noise = (torch.randn(24, 16, generator=generator) for _ in range(3))
    student[12:] = student[:12] + apart * noise[:12]
    teacher[6:9] = teacher[:3] * (1 + apart)
    for weight in (None, torch.ones(24).index_fill(0, torch.tensor([3, 14]), 0), torch.rand(24, generator=generator)):
        if weight is not None:
            student[weight == 0] *= 1e30
        results = []
        for kind in (Tensor, Remote):
            x = student.clone().requires_grad_()
            value = RELATIONS[name](x.as_subclass(kind), teacher.as_subclass(kind), weight=weight)
            value.backward()
            results.append((value.detach().as_subclass(Tensor), x.grad))
        (value, slope), (remote, remote_slope) = results
        torch.testing.assert_close(remote, value, rtol=1e-5, atol=1e-9)
        assert (remote_slope - slope).norm() <= 1e-4 * slope.norm()
        if weight is not None:
            student[weight == 0] *= 1e-30


def test_angles_at_very_uneven_vertices_stay_bounded() -> None:
    """Without reading values, sides shorter than about 1e-14 of the longest count as 0, and get no gradient."""
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for apart, exact in ((1e-11, True), (1e-30, False)):
        student = torch.cat([torch.eye(4), torch.zeros(2, 4)])
        student[5, 1] = apart
        slopes = []
        for kind in (Tensor, Remote):
            x = student.clone().requires_grad_()
            kdlib.functional.rkd_angle(x.as_subclass(kind), teacher.as_subclass(kind)).backward()
            slopes.append(x.grad)
        assert torch.isfinite(slopes[1]).all()
        assert torch.allclose(slopes[1] * apart, slopes[0] * apart, rtol=1e-3, atol=1e-6) == exact


@pytest.mark.parametrize("bound", [1.0, 0.6])
@pytest.mark.parametrize("k", [3, 5])
def test_gradients_are_weighted_without_reading_values(monkeypatch: pytest.MonkeyPatch, k: int, bound: float) -> None:
    """Steps after the minimum change nothing."""
    generator = torch.Generator().manual_seed(k)
    for scale in (0.0, 1.0, 30.0):
        teachers = [scale**i * torch.randn(4, 8, generator=generator) for i in range(k - 1)]
        teachers.append(teachers[0])
        student = torch.zeros(4, 8).requires_grad_()
        losses = torch.stack([(student - each).square().sum(1) for each in teachers])
        weights = []
        for read in (True, False):
            with monkeypatch.context() as patch:
                if not read:
                    patch.setattr("kdlib.weighting.gradient.readable", lambda x: False)
                weighting = GradientWeighting(max_weight=bound)
                weights.append(weighting(losses, student=student, teachers=teachers, targets={}))
        torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-9)
        assert not torch.allclose(weights[0], torch.full_like(losses, 1 / k))


def test_values_are_still_checked_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="target must be from 0 to below c = 3, got 3"):
        kdlib.functional.decoupled_kd(torch.zeros(2, 3), torch.zeros(2, 3), target=torch.tensor([0, 3]))
