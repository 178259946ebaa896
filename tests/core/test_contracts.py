"""The shared contract of every public component; the number of checks that run is asserted.

To add a component, add a row to the table of its package.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import pytest
import torch

import kdlib.functional
import kdlib.losses
import kdlib.projections
import kdlib.weighting
from kdlib.adapters import OUTPUT, StudentAdapter, TeacherAdapter
from kdlib.testing import check_adapter, check_loss, check_projection, check_weighting

VECTORS = ((6, 5), (6, 5))
OTHER_WIDTH = ((6, 5), (6, 7))
LOGITS = ((6, 4), (6, 4))
TOKENS = ((5, 3, 4), (5, 3, 4))
MAPS = ((5, 3, 4, 4), (5, 3, 4, 4))
OTHER_CHANNELS = ((5, 3, 4, 4), (5, 4, 4, 4))
SAME_CHANNELS = ((5, 3, 4, 4), (5, 3, 6, 2))
OTHER_GRID = ((5, 3, 6, 4), (5, 4, 3, 2))
POOLED = ([(5, 3, 4, 4), (5, 4, 2, 3), (5, 2)], [(5, 2, 4, 4), (5, 3, 4, 4), (5, 4)])
TWO_LAYERS = ([(5, 3, 4, 4), (5, 4, 1, 1)], [(5, 2, 4, 4), (5, 3, 2, 2), (5, 4)])

PER_SAMPLE = 29
RELATION = 27  # without mean_of_none and weighted_mean
WEIGHTING = 16
PER_TEACHER = 14  # without one_teacher and permutation
PROJECTION = 14


@dataclass(frozen=True)
class Row:
    """A loss or a projection: its arguments, the shapes of its inputs, and the number of checks that must run."""

    checks: int
    shapes: tuple[Any, Any]  # a shape, or a list of the shapes of several layers
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    classes: int = 0


@dataclass(frozen=True)
class WeightingRow:
    """A weighting: its arguments and whether it treats all teachers alike."""

    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    num_teachers: int = 2
    symmetric: bool = True


LOSSES: dict[str, list[Row]] = {
    "ActivationBoundaryLoss": [Row(PER_SAMPLE, VECTORS), Row(PER_SAMPLE, MAPS, options={"margin": 0.5})],
    "AngularDistillLoss": [
        Row(PER_SAMPLE, VECTORS),
        Row(PER_SAMPLE, MAPS, options={"form": "cosine"}),
        Row(PER_SAMPLE, VECTORS, options={"form": "chord"}),
        Row(PER_SAMPLE, VECTORS, options={"form": "angle"}),
    ],
    "AttentionTransferLoss": [Row(PER_SAMPLE, MAPS), Row(PER_SAMPLE, OTHER_GRID, options={"p": 1.5})],
    "AttentiveSimilarityLoss": [Row(PER_SAMPLE, MAPS)],
    "ContrastiveRepresentationLoss": [
        Row(PER_SAMPLE, OTHER_WIDTH, (5, 7), {"feature_dim": 4}),
        Row(PER_SAMPLE, OTHER_WIDTH, (5, 7), {"feature_dim": 4, "queue_size": 8}),
    ],
    "CorrelationCongruenceLoss": [Row(RELATION, VECTORS)],
    "DISTLoss": [Row(RELATION, LOGITS), Row(RELATION, MAPS), Row(RELATION, TOKENS, options={"dim": -1})],
    "DarkRankLoss": [
        Row(RELATION, OTHER_WIDTH, options={"alpha": 0.5, "beta": 1.0}),
        Row(RELATION, OTHER_GRID, options={"normalize": True, "length": 3}),
    ],
    "DecoupledKDLoss": [Row(PER_SAMPLE, LOGITS, classes=4), Row(PER_SAMPLE, MAPS, classes=3)],
    "FactorTransferLoss": [
        Row(PER_SAMPLE, OTHER_CHANNELS, (3, 4)),
        Row(PER_SAMPLE, OTHER_GRID, (3, 4), {"rate": 0.75, "p": 2}),
    ],
    "HierarchicalContextLoss": [Row(PER_SAMPLE, MAPS), Row(PER_SAMPLE, MAPS, options={"levels": (3, 1)})],
    "HintLoss": [Row(PER_SAMPLE, VECTORS), Row(PER_SAMPLE, MAPS)],
    "LogSumLoss": [Row(RELATION, VECTORS), Row(RELATION, MAPS, options={"exponent": 2.0})],
    "MaskedGenerativeLoss": [
        Row(PER_SAMPLE, OTHER_CHANNELS, (3, 4)),
        Row(PER_SAMPLE, SAME_CHANNELS, (3, 3), {"mask": "channel", "mask_ratio": 0.4, "seed": 7}),
    ],
    "NSTLoss": [Row(PER_SAMPLE, OTHER_CHANNELS)],
    "OverhaulLoss": [
        Row(PER_SAMPLE, VECTORS, (-0.5,)),
        Row(PER_SAMPLE, MAPS, (torch.tensor([-0.1, -0.5, -2.0]),)),
        Row(PER_SAMPLE, SAME_CHANNELS, (-0.5,)),
    ],
    "PKTLoss": [Row(RELATION, OTHER_WIDTH)],
    "RKDAngleLoss": [Row(RELATION, OTHER_WIDTH)],
    "RKDDistanceLoss": [Row(RELATION, OTHER_WIDTH)],
    "ReviewKDLoss": [
        Row(PER_SAMPLE, POOLED, ([3, 4, 2], [2, 3, 4])),
        Row(PER_SAMPLE, POOLED, ([3, 4, 2], [2, 3, 4]), {"hidden": 3, "levels": (2,)}),
    ],
    "SemCKDLoss": [
        Row(PER_SAMPLE, TWO_LAYERS, ([3, 4], [2, 3, 4]), {"query_dim": 3}),
        # Its attention depends on the other samples.
        Row(PER_SAMPLE - 1, TWO_LAYERS, ([3, 4], [2, 3, 4]), {"query_dim": 3, "batch_size": 6}, ("weight_zero_masks",)),
    ],
    "SimilarityPreservingLoss": [Row(RELATION, OTHER_WIDTH), Row(RELATION, OTHER_GRID)],
    "SoftTargetLoss": [
        Row(PER_SAMPLE, LOGITS),
        Row(PER_SAMPLE, LOGITS, options={"temperature": 1.0}),
        Row(PER_SAMPLE, LOGITS, options={"standardize": True}),
        Row(PER_SAMPLE, MAPS, options={"divergence": "jensen_shannon"}),
        Row(PER_SAMPLE, TOKENS, options={"dim": -1}),
    ],
    "VariationalInformationLoss": [Row(PER_SAMPLE, OTHER_CHANNELS, (3, 4))],
}

WEIGHTINGS: dict[str, list[WeightingRow]] = {
    "CenterConfidenceWeighting": [WeightingRow((3,)), WeightingRow((3,), {"temperature": 0.5}, 3)],
    "ConfidenceWeighting": [WeightingRow(), WeightingRow(num_teachers=3)],
    "EntropyWeighting": [WeightingRow(), WeightingRow(num_teachers=3)],
    "FixedWeighting": [WeightingRow(([3, 1],), symmetric=False)],
    "GateWeighting": [
        WeightingRow((5, 2), symmetric=False),
        WeightingRow((5, 3), {"hidden": 4, "floor": 0.1}, 3, symmetric=False),
    ],
    "GradientWeighting": [WeightingRow(), WeightingRow(num_teachers=3)],
    "UncertaintyWeighting": [WeightingRow((2,), symmetric=False)],
    "UniformWeighting": [WeightingRow(), WeightingRow(num_teachers=3)],
}

PROJECTIONS: dict[str, list[Row]] = {
    "ConvProjection": [
        Row(PROJECTION, ((3, 3, 4, 4), (3, 5, 4, 4)), (3, 5)),
        Row(PROJECTION, ((3, 3, 4, 6), (3, 5, 2, 9)), (3, 5), {"size": (2, 9)}),
    ],
    "LinearProjection": [Row(PROJECTION, OTHER_WIDTH, (5, 7)), Row(PROJECTION, OTHER_WIDTH, (5, 7), {"bias": True})],
    "TokenProjection": [
        Row(PROJECTION, ((3, 7, 4), (3, 7, 6)), (4, 6)),
        Row(PROJECTION, ((3, 5, 4), (3, 10, 6)), (4, 6), {"size": (3, 3), "class_token": "keep"}),
        Row(PROJECTION, ((3, 6, 4), (3, 5, 6)), (4, 6), {"size": (2, 2), "grid": (3, 2), "class_token": "mean"}),
    ],
}
OTHERS = {"infer_projection", "LinearSoftTargetLoss", "Paraphraser"}  # see their own tests


def rows(package: Any, table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, row, id=f"{name}-{index}")
        for name in package.__all__
        for index, row in enumerate(table.get(name, []))
    ]


def examples(row: Row) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Any) -> Any:
        layers = isinstance(shape, list)
        return [draw(each) for each in shape] if layers else torch.randn(shape, generator=generator)

    return draw(row.shapes[0]), draw(row.shapes[1])


def component(package: Any, name: str, row: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(package, name)(*row.arguments, **row.options)
    if isinstance(made, kdlib.losses.FactorTransferLoss):
        made.paraphraser.freeze()
    return made


@pytest.mark.parametrize(
    ("package", "table"),
    [(kdlib.losses, LOSSES), (kdlib.weighting, WEIGHTINGS), (kdlib.projections, PROJECTIONS)],
)
def test_every_public_name_has_a_row(package: Any, table: dict[str, list[Any]]) -> None:
    assert set(package.__all__) - OTHERS - set(table) == set()
    assert all(table.values())


@pytest.mark.parametrize(("name", "row"), rows(kdlib.losses, LOSSES))
def test_losses(name: str, row: Row) -> None:
    student, teacher = examples(row)
    target = None
    if row.classes:
        positions = (student.shape[0], *student.shape[2:])
        target = torch.arange(math.prod(positions)).reshape(positions) % row.classes
    loss = component(kdlib.losses, name, row)
    ran = check_loss(loss, student, teacher, target=target, exclude=row.exclude)
    assert len(ran) == row.checks
    assert row.checks == (PER_SAMPLE - len(row.exclude) if type(loss).per_sample else RELATION)


def test_a_student_or_teacher_that_is_not_a_tensor_is_named() -> None:
    required = {"decoupled_kd": {"target": torch.zeros(4, dtype=torch.long)}, "overhaul": {"margin": 0.0}}
    good, num_functions = torch.ones(4, 3), 0
    for name in kdlib.functional.__all__:
        function = getattr(kdlib.functional, name)
        if list(signature(function).parameters)[:2] != ["student", "teacher"]:
            continue
        for wrong in ([[1.0] * 3] * 4, good.numpy(), 3.0, None):
            for side, given in (("student", (wrong, good)), ("teacher", (good, wrong))):
                message = rf"^{name}: {side} must be a torch.Tensor, got {type(wrong).__name__}$"
                with pytest.raises(TypeError, match=message):
                    function(*given, **required.get(name, {}))
        num_functions += 1
    assert num_functions == 20


@pytest.mark.parametrize(("name", "row"), rows(kdlib.weighting, WEIGHTINGS))
def test_weightings(name: str, row: WeightingRow) -> None:
    weighting = component(kdlib.weighting, name, row)
    ran = check_weighting(weighting, num_teachers=row.num_teachers, symmetric=row.symmetric)
    assert len(ran) == (WEIGHTING if row.symmetric else PER_TEACHER)


@pytest.mark.parametrize(("name", "row"), rows(kdlib.projections, PROJECTIONS))
def test_projections(name: str, row: Row) -> None:
    ran = check_projection(component(kdlib.projections, name, row), *examples(row))
    assert len(ran) == row.checks == PROJECTION


@pytest.mark.parametrize(("kind", "checks"), [(StudentAdapter, 9), (TeacherAdapter, 11)])
def test_adapters(kind: Callable[..., torch.nn.Module], checks: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5))
    ran = check_adapter(kind(model, {"norm": "1", "out": OUTPUT}), torch.ones(3, 4))
    assert len(ran) == checks
