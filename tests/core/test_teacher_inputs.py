"""Teachers that read targets in place of the inputs, and teachers on a device of their own."""

import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.types import TeacherInputs
from tests.core.adapter_models import double

META = torch.device("meta")


class Sum(nn.Module):
    """A model of two arguments; the second has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        return self.linear(first if second is None else first - second)


def distiller(teacher: TeacherAdapter) -> Distiller:
    student = StudentAdapter(nn.Linear(4, 3), {"out": OUTPUT})
    return Distiller(student, {"t": teacher}, Objective({"hint": Term(HintLoss(), student="out", teacher="out")}))


A, B, X = torch.rand(5, 4), torch.rand(5, 4), torch.rand(5, 4)


@pytest.mark.parametrize(
    ("inputs", "targets", "read"),
    [
        (None, {"a": A}, X),
        ("a", {"a": A}, A),
        (("a",), {"a": A}, A),
        (["a", "b"], {"b": B, "a": A}, A - B),
        ({"second": "a", "first": "b"}, {"b": B, "a": A}, B - A),
        ("whole", {"whole": (A, B)}, A - B),
        ("whole", {"whole": {"second": A, "first": B}}, B - A),
    ],
)
@pytest.mark.parametrize("preprocess", [None, double])
def test_a_teacher_reads_the_targets_that_inputs_names(
    inputs: TeacherInputs, targets: dict[str, Any], read: Tensor, preprocess: Any
) -> None:
    if preprocess is not None and len(read) and not torch.equal(read, A) and not torch.equal(read, X):
        preprocess = twice
    model = Sum()
    teacher = TeacherAdapter(model, {"out": OUTPUT}, inputs=inputs, preprocess=preprocess)
    expected = model(read if preprocess is None else 2 * read)
    for each in (teacher, copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        _, features = distiller(each).features(X, targets)
        torch.testing.assert_close(features["t"]["out"], expected.detach())
        assert each.inputs == (tuple(inputs) if isinstance(inputs, list) else inputs)


def twice(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return {"second": 2 * second, "first": 2 * first}


def test_inputs_are_checked() -> None:
    for inputs, error, message in [
        (
            (),
            ValueError,
            r"TeacherAdapter: inputs must name at least one target, got \(\); None reads the batch's inputs",
        ),
        ({}, ValueError, "inputs must name at least one target"),
        (3, TypeError, "inputs must be a name of a target, names or a mapping to names, got 3"),
        (["a", 3], TypeError, "each name in inputs must be a str, got int"),
        ({"first": 3}, TypeError, "each name in inputs must be a str, got int"),
    ]:
        with pytest.raises(error, match=message):
            TeacherAdapter(Sum(), {"out": OUTPUT}, inputs=inputs)
    teacher = TeacherAdapter(Sum(), {"out": OUTPUT}, inputs={"first": "a", "second": "b"})
    with pytest.raises(ValueError, match="teacher 't' reads the targets a, b; the batch lacks b"):
        distiller(teacher)(X, {"a": A})
    assert repr(teacher).endswith("inputs={'first': 'a', 'second': 'b'})")


class Lives(nn.Module):
    """A model that requires its inputs where its weights are, also those in structures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3))

    def forward(self, x: Any, **named: Any) -> dict[str, Tensor]:
        for each in [*found(x), *found(named)]:
            assert each.device == self.weight.device
        first = next(iter(found(x)))
        return {"out": first @ self.weight, "tokens": (first @ self.weight)[:, None]}


Point = namedtuple("Point", ["x", "y"])


@dataclass
class Boxes:
    corners: Tensor
    name: str = ""


def found(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Boxes):
        yield value.corners
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from found(item)


@contextmanager
def copies_from_meta() -> Iterator[list[tuple[str, str, bool]]]:
    """Let tensors be copied from the meta device, as from any other; yields all copies between devices."""
    copies: list[tuple[str, str, bool]] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is Tensor.to and args[1:] and isinstance(args[1], torch.device) and args[0].device != args[1]:
                copies.append((args[0].device.type, args[1].type, kwargs["non_blocking"]))
                if args[0].is_meta:
                    return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[1])
            return function(*args, **kwargs)

    with Mode():
        yield copies


STRUCTURES = {
    "tensor": X,
    "list": [X, {"mask": A}],
    "dict": OrderedDict(x=X, more=(A, None, "text")),
    "named tuple": Point(X, Point(A, 3)),
    "dataclass": [X, Boxes(A, "box")],
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_inputs_are_brought_to_the_teacher_and_features_to_the_inputs(kind: str) -> None:
    value = STRUCTURES[kind]
    model = Lives()
    teacher = TeacherAdapter(model, {"out": OUTPUT["out"], "token": OUTPUT["tokens"][:, 0]}, device="meta")
    assert model.weight.is_meta
    with copies_from_meta() as copies:
        features = teacher(value, mask=A, names=["a"])
    assert {x.device.type for x in features.values()} == {"cpu"}
    assert {x.shape for x in features.values()} == {(5, 3)}
    # Copies to an accelerator do not wait; values on the CPU are read at once, so that a copy to it must.
    assert [each for each in copies if each[1] == "cpu"] == [("meta", "cpu", False)] * 2
    inputs = [each for each in copies if each[1] == "meta"]
    assert set(inputs) == {("cpu", "meta", True)}
    assert len(inputs) == len([*found(value)]) + 1
    for original, same in zip(found(STRUCTURES[kind]), found(value), strict=True):
        assert original is same


def test_a_teacher_with_a_device_stays_there(images: Tensor) -> None:
    norm, model = nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(144, 3))
    nn.init.uniform_(norm.weight)  # values that a cast to half precision would not keep
    teacher = TeacherAdapter(model, {"out": OUTPUT}, preprocess=norm, device="cpu")
    expected = teacher(images)["out"]
    parent = nn.ModuleDict({"teacher": teacher, "own": nn.Linear(1, 1)})
    whole = distiller(teacher)
    for moved in (parent.to("meta"), whole.to("meta")):
        assert {x.device.type for x in (*model.parameters(), *model.buffers(), *norm.buffers())} == {"cpu"}
        assert next(moved.parameters()).is_meta
        torch.testing.assert_close(teacher(images)["out"], expected, rtol=0, atol=0)
    whole.to_empty(device="cpu")
    parent.to(memory_format=torch.channels_last).half()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(images)["out"], expected)
    assert whole.double().teachers["t"].model[0].weight.dtype == torch.float64  # a cast that keeps every value
    away = nn.ModuleDict({"teacher": TeacherAdapter(Sum(), {"out": OUTPUT}, device=META)})
    assert next(away.to_empty(device="cpu")["teacher"].model.parameters()).is_meta
    for same in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert same.device == torch.device("cpu")
        torch.testing.assert_close(same(images.double())["out"], teacher(images.double())["out"])


def test_features_are_brought_to_the_student() -> None:
    ours = distiller(TeacherAdapter(Sum(), {"out": OUTPUT}, inputs="view", device=META))
    with copies_from_meta():
        output = ours(X, {"view": A})
        assert output.total.device.type == "cpu"
        output.total.backward()
    # The target may already be where its teacher lives: the features are brought to the student's device.
    with copies_from_meta() as copies:
        _, features = ours.features(X, {"view": A.to("meta")})
    assert features["t"]["out"].device.type == "cpu"
    assert copies == [("meta", "cpu", False)]
    on_meta = distiller(TeacherAdapter(Sum(), {"out": OUTPUT}, inputs="view", device="cpu")).to("meta")
    assert on_meta(X.to("meta"), {"view": A}).total.is_meta


def test_inputs_without_a_tensor_are_converted_by_the_teacher() -> None:
    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[float(len(text))] * 4 for text in texts])

    teacher = TeacherAdapter(Sum(), {"out": OUTPUT}, preprocess=tokenize, device="meta")
    assert teacher(["a", "few", "words"])["out"].is_meta
    plain = TeacherAdapter(Sum(), {"out": OUTPUT}, preprocess=tokenize)
    assert plain(["a", "few", "words"])["out"].shape == (3, 3)


def test_a_teacher_with_a_device_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    teacher = TeacherAdapter(Sum(), {"out": OUTPUT}, inputs={"first": "a", "second": "b"}, device="cpu")
    ours = distiller(teacher)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    targets = {"a": A, "b": B}
    torch.testing.assert_close(compiled(X, targets).total, ours(X, targets).total)
    nested = TeacherAdapter(Lives(), {"out": OUTPUT["out"]}, device="cpu", dtype=torch.float64)
    compiled = torch.compile(nested, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled([X, Point(A, B)], mask=A), nested([X, Point(A, B)], mask=A))


def test_floating_point_tensors_in_structures_are_converted() -> None:
    teacher = TeacherAdapter(Lives(), {"out": OUTPUT["out"]}, dtype=torch.float64)
    assert teacher([X, Boxes(A)], mask={"a": A.half()})["out"].dtype == torch.float64


def test_options_are_checked() -> None:
    for device in ("gpu:7", 1.5):
        with pytest.raises(
            TypeError, match=r"TeacherAdapter: device must be a torch.device or its name, such as 'cuda:1'"
        ):
            TeacherAdapter(Sum(), {"out": OUTPUT}, device=device)  # type: ignore[arg-type]

    class Quantized(nn.Linear):
        def to(self, *arguments: Any, **named: Any) -> Any:
            raise ValueError("a quantized model cannot be moved")

    assert TeacherAdapter(Quantized(4, 3), {"out": OUTPUT})(X)["out"].shape == (5, 3)
