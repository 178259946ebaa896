"""Parts of outputs: slices, structures of every kind, and outputs that differ between training and eval mode."""

import copy
import pickle
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, Tap, TeacherAdapter, Term
from kdlib.types import Teacher

Pair = namedtuple("Pair", ["logits", "hidden"])


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


class ModelOutput(OrderedDict):
    """An ordered mapping whose entries are also attributes and, by number, a tuple, as in transformers."""

    def __getitem__(self, key: int | str) -> object:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name: str) -> object:
        return self[name]


LOGITS, FIRST, SECOND = torch.rand(2, 5), torch.rand(2, 3, 4), torch.rand(2, 3, 4)
STRUCTURES = {
    "dict": {"logits": LOGITS, "hidden": (FIRST, SECOND)},
    "mapping": UserDict({"logits": LOGITS, "hidden": (FIRST, SECOND)}),
    "model output": ModelOutput(logits=LOGITS, hidden=(FIRST, SECOND)),
    "named tuple": Pair(LOGITS, [FIRST, SECOND]),
    "dataclass": Output(LOGITS, (FIRST, SECOND)),
    "tuple": (LOGITS, (FIRST, SECOND)),
}


class Inner(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


class Outer(nn.Module):
    """Returns what the module inside returns."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.inner = Inner(value)

    def forward(self, x: Tensor) -> object:
        return self.inner(x)


@pytest.mark.parametrize("adapter", [StudentAdapter, TeacherAdapter])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_outputs_of_every_kind_are_indexed_alike(kind: str, adapter: type) -> None:
    logits, hidden = (OUTPUT[0], OUTPUT[1]) if kind == "tuple" else (OUTPUT["logits"], OUTPUT["hidden"])
    first, second = ("0", "1") if kind == "tuple" else ("'logits'", "'hidden'")
    taps = {
        "logits": logits,
        "inner": f"inner[{first}]",
        "last": hidden[-1],
        "token": hidden[1][:, 0],
        "rest": f"inner[{second}][0][:, 1:]",
    }
    features = adapter(Outer(STRUCTURES[kind]), taps)(LOGITS)
    expected = {"logits": LOGITS, "inner": LOGITS, "last": SECOND, "token": SECOND[:, 0], "rest": FIRST[:, 1:]}
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    if kind in ("model output", "named tuple"):
        assert adapter(Outer(STRUCTURES[kind]), {"x": OUTPUT[0]})(LOGITS)["x"].equal(LOGITS)


def test_a_missing_part_of_a_dataclass_names_its_fields() -> None:
    model = Outer(STRUCTURES["dataclass"])
    for tap in (OUTPUT["logit"], OUTPUT[0]):
        with pytest.raises(ValueError, match=r"a Output with the fields \['logits', 'hidden', 'loss'\]"):
            StudentAdapter(model, {"x": tap})(LOGITS)
    with pytest.raises(TypeError, match="must lead to a tensor, got a NoneType in training mode"):
        StudentAdapter(model, {"x": OUTPUT["loss"]})(LOGITS)


SLICES = [
    ("norm[:, 0]", Tap("norm")[:, 0]),
    ("encoder[0][:, 1:]", Tap("encoder")[0][:, 1:]),
    ("a[:,..., -1]", Tap("a")[:, ..., -1]),
    ("a#1[:, ::2, 3:-1]", Tap("a", call=1)[:, ::2, 3:-1]),
    ("OUTPUT['last_hidden_state'][:, 0]", OUTPUT["last_hidden_state"][:, 0]),
    ("OUTPUT[:]", OUTPUT[:]),
]


@pytest.mark.parametrize(("spelling", "tap"), SLICES)
def test_spellings_of_slices(spelling: str, tap: Tap) -> None:
    assert Tap.parse(spelling) == tap
    assert Tap.parse(str(tap)) == tap
    assert eval(repr(tap)) == tap
    for same in (pickle.loads(pickle.dumps(tap)), copy.deepcopy(tap)):
        assert same == tap
        assert hash(same) == hash(tap)
    assert len({each for _, each in SLICES}) == len(SLICES)
    assert repr(OUTPUT[:, np.int64(1) : np.int64(2)]) == "OUTPUT[:, 1:2]"


@pytest.mark.parametrize("spelling", ["a[0, 1]", "a[1:]", "a[..., 0]", "a[0:1, 0]", "a[::1]"])
def test_a_slice_keeps_the_batch(spelling: str) -> None:
    with pytest.raises(ValueError, match=r"Tap: a slice must begin with ':' \(the batch\), as \[:, 0\] does, got \["):
        Tap.parse(spelling)


def test_bad_slices_are_errors() -> None:
    for key in [(slice(None), None), (slice(None), True), (slice(None), [0, 1]), (slice(None), slice(0.5))]:
        with pytest.raises(TypeError, match=r"Tap: a slice must hold whole numbers, ':' and '\.\.\.', got"):
            OUTPUT[key]
    with pytest.raises(ValueError, match="the step of a slice must be >= 1, got -1"):
        OUTPUT[:, ::-1]
    for spelling in ("a[:, ]", "a[:, 'x']", "a[:, 0", "a[:: ::]"):
        with pytest.raises(ValueError, match="Tap: a tap must be"):
            Tap.parse(spelling)
    for value, tap, message in [
        (FIRST, OUTPUT[:, 3], r"\(OUTPUT\[:, 3\]\) finds no \[:, 3\] in the value .* training mode, a tensor \(2, 3, 4\)"),
        (LOGITS, OUTPUT[:, 0, 0], r"finds no \[:, 0, 0\] .* a tensor \(2, 5\)"),
        ((FIRST,), OUTPUT[:, 0], r"must slice a tensor by \[:, 0\], got a tuple of 1 in training mode; index it first"),
        (FIRST, OUTPUT[0], r"indexes a tensor \(2, 3, 4\) in training mode; drop \[0\] or write \[:, 0\] to keep the batch"),
        (FIRST, OUTPUT[:, 1:]["x"], r"indexes a tensor \(2, 2, 4\) in training mode; drop \['x'\]"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            StudentAdapter(Outer(value), {"x": tap})(LOGITS)


class TwoHeads(nn.Module):
    """In training: logits and those of an auxiliary head, which eval mode does not call; as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | Pair:
        x = self.body(x)
        return Pair(self.head(x), self.aux(x)) if self.training else self.head(x)


BY_MODE = {"logits": {"train": OUTPUT["logits"], "eval": OUTPUT}, "aux": {"train": "aux"}, "body": "body"}


def test_taps_by_mode() -> None:
    x = torch.rand(3, 4)
    student = StudentAdapter(TwoHeads(), BY_MODE)
    copies = [student, copy.deepcopy(student), pickle.loads(pickle.dumps(student))]
    for each in copies:
        assert list(each.train()(x)) == ["logits", "aux", "body"]
        assert list(each.eval()(x)) == ["logits", "body"]
        torch.testing.assert_close(each.eval()(x)["logits"], each.train()(x)["logits"])
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    for training in (True, False, True):
        student.train(training)
        torch.testing.assert_close(compiled(x), student(x))
    teacher = TeacherAdapter(TwoHeads(), {"logits": BY_MODE["logits"], "body": "body"})
    assert teacher.taps == {"logits": OUTPUT, "body": Tap("body")}
    terms = {name: Term(HintLoss(), student=name, teacher="logits") for name in ("logits", "aux")}
    distiller = Distiller(student, {"t": teacher}, Objective(terms))
    assert distiller.train()(x).total.requires_grad


@pytest.mark.parametrize(
    ("taps", "training", "message"),
    [
        ({"x": OUTPUT[0]}, False, r"indexes a tensor \(3, 5\) in eval mode; .* give \{'train': tap, 'eval': tap\}"),
        ({"x": OUTPUT}, True, r"must lead to a tensor, got a Pair of 2 in training mode; .*'eval': tap\}"),
        ({"x": "aux"}, False, r"did not fire: the forward in eval mode did not call .*'eval': tap\}"),
    ],
)
def test_an_output_of_the_other_mode_is_an_error_that_names_the_remedy(taps, training: bool, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        StudentAdapter(TwoHeads(), taps).train(training)(torch.rand(3, 4))


def test_taps_by_mode_are_checked() -> None:
    for taps, error, message in [
        ({"x": {"training": OUTPUT}}, ValueError, "a tap by mode must have the keys 'train' or 'eval', got 'x'"),
        ({"x": {}}, ValueError, "a tap by mode must have the keys"),
        ({"x": {"train": 3}}, TypeError, "taps must map strings to module paths"),
        ({"x": {"train": "boddy"}}, ValueError, "no module at path 'boddy'; the nearest are 'body'"),
        ({"x": {"eval": "boddy"}}, ValueError, "no module at path 'boddy'"),
    ]:
        with pytest.raises(error, match=message):
            StudentAdapter(TwoHeads(), taps)
    with pytest.raises(ValueError, match="a teacher runs in eval mode, for which tap 'aux' has no entry, got"):
        TeacherAdapter(TwoHeads(), BY_MODE)


def test_both_adapters_have_the_shape_of_their_protocols() -> None:
    teacher = TeacherAdapter(TwoHeads(), {"x": OUTPUT})
    assert isinstance(teacher, Teacher)
    assert teacher.inputs is None
