"""The meta device and fake tensors: no loss, weighting, projection or distiller reads a value or needs the CPU."""

from collections.abc import Callable
from dataclasses import replace
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

# The values decide which pairs of samples need care, so these are operations of the library with a fake for compilers.
READ_VALUES = {"RKDDistanceLoss", "RKDAngleLoss", "DarkRankLoss"}


class Recorded(TorchDispatchMode):
    """Collects the operations of the library itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "kdlib":
            self.names.add(func.name())
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
    with Recorded() as recorded, on_meta():
        loss = component(kdlib.losses, name, row).to("meta")
        loss(student, teacher, **options).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in inputs)
    assert (recorded.names != set()) == (name in READ_VALUES)


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


def test_values_are_still_checked_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="target must be from 0 to below c = 3, got 3"):
        kdlib.functional.decoupled_kd(torch.zeros(2, 3), torch.zeros(2, 3), target=torch.tensor([0, 3]))
