"""Taps: which tensor they return, their errors, and tensors that are changed in place."""

import operator
import pickle
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib.adapters import OUTPUT, StudentAdapter, Tap, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.losses import HintLoss
from kdlib.objective import Objective, Term
from tests.core.adapter_models import TAPS, Encoder, net, num_hooks

Pair = namedtuple("Pair", ["embedding", "logits"])


def test_each_tap_returns_the_output_of_its_module(images: Tensor) -> None:
    model = net().eval()
    features = StudentAdapter(model, TAPS)(images)
    map_ = model.stem(images)
    first, rest = model.encoder(map_.relu())
    assert list(features) == list(TAPS)
    torch.testing.assert_close(features["map"], map_)
    torch.testing.assert_close(features["rest"], rest)
    torch.testing.assert_close(features["second"], first.relu())
    torch.testing.assert_close(features["logits"], model(images)["logits"])
    features["rest"].sum().backward()
    assert model.encoder.conv.weight.grad is not None
    assert model.stem[0].weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


@pytest.mark.parametrize(
    ("spelling", "tap"),
    [
        ("layer3", Tap("layer3")),
        ("a.0[1]", Tap("a.0", index=(1,))),
        ("a[-1]['key'][\"b\"][c]", Tap("a", index=(-1, "key", "b", "c"))),
        ("a.b#2[0]", Tap("a.b", call=2, index=(0,))),
    ],
)
def test_spellings(spelling: str, tap: Tap) -> None:
    assert Tap.parse(spelling) == tap
    assert eval(repr(tap)) == tap
    assert pickle.loads(pickle.dumps(tap)) == tap


@pytest.mark.parametrize("spelling", ["", "a[", "a[]", "a#x", "#1", "a[0]b", "a]"])
def test_bad_spellings_are_refused(spelling: str) -> None:
    with pytest.raises(ValueError, match="Tap: a tap must be"):
        Tap.parse(spelling)


def test_output_spelling() -> None:
    assert repr(OUTPUT["logits"][0]) == "OUTPUT['logits'][0]"
    assert Tap(None) == OUTPUT
    with pytest.raises(TypeError, match="index must be"):
        OUTPUT[1.5]  # type: ignore[index]


class Returns(nn.Module):
    """A model that returns a constant."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


A, B = torch.ones(1, 2), torch.zeros(1, 2)


@pytest.mark.parametrize(
    ("value", "tap", "expected"),
    [(A, OUTPUT, A), ((A, [B]), OUTPUT[1][0], B), (Pair(A, B), OUTPUT["logits"], B), (Pair(A, B), OUTPUT[0], A)],
)
def test_output_may_be_a_tensor_a_tuple_or_named(value: object, tap: Tap, expected: Tensor) -> None:
    assert StudentAdapter(Returns(value), {"x": tap})(A)["x"] is expected


@pytest.mark.parametrize(
    ("value", "tap", "error", "message"),
    [
        (Pair(A, B), OUTPUT, TypeError, "a Pair of 2 in training mode; index it"),
        (Pair(A, B), OUTPUT["other"], ValueError, r"finds no \['other'\]"),
        ((A, B), OUTPUT[2], ValueError, r"finds no \[2\] in the value returned in training mode, a tuple of 2"),
        ({"logits": A}, OUTPUT["logit"], ValueError, r"keys \['logits'\]"),
        (A, OUTPUT[0], ValueError, r"indexes a tensor \(1, 2\) in training mode; drop \[0\]"),
    ],
)
def test_a_tap_that_does_not_lead_to_a_tensor_is_an_error(
    value: object, tap: Tap, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StudentAdapter(Returns(value), {"x": tap})(A)


@pytest.mark.parametrize("adapter", [StudentAdapter, TeacherAdapter])
@pytest.mark.parametrize(
    ("taps", "error", "message"),
    [
        ({"map": "stem.2"}, ValueError, r"no module at path 'stem.2'; the nearest are 'stem.1'|'stem.0'"),
        ({"map": "encodr"}, ValueError, "no module at path 'encodr'; the nearest are 'encoder'"),
        ({"map": "none"}, ValueError, "the module at path 'none' is None"),
        ({}, ValueError, "at least one feature"),
        (["stem"], TypeError, "taps must map"),
        ({"map": 3}, TypeError, "taps must map strings"),
    ],
)
def test_invalid_taps_fail_at_construction(adapter: type, taps: object, error: type, message: str) -> None:
    model = net()
    model.register_module("none", None)
    with pytest.raises(error, match=message):
        adapter(model, taps)
    with pytest.raises(TypeError, match=f"{adapter.__name__}: model must be a Module, got str"):
        adapter("resnet50", {"map": OUTPUT})


def test_a_tap_that_does_not_fire_is_an_error(images: Tensor) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"tap 'x' \('unused'\) did not fire"):
        StudentAdapter(model, {"x": "unused"})(images)
    assert num_hooks(model) == 0


def test_a_tap_of_a_module_called_twice_must_choose_a_call(images: Tensor) -> None:
    model = net().eval()
    with pytest.raises(ValueError, match=r"fired 2 times in one forward; choose a call: 'relu#0'.*'relu#1'"):
        StudentAdapter(model, {"x": "relu"})(images)
    with pytest.raises(ValueError, match="requests call 2, counted from 0, but the module was called 2 times"):
        StudentAdapter(model, {"x": "relu#2"})(images)
    both = StudentAdapter(model, {"a": "relu#0", "b": Tap("relu", call=1)})(images)
    torch.testing.assert_close(both["a"], model.stem(images).relu())
    assert not torch.equal(both["a"], both["b"])


class ChangesInPlace(nn.Module):
    """A tapped module, and a later change of its input `x` or its output `y`."""

    def __init__(self, tapped: nn.Module, change: Callable[[Tensor, Any], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.tapped = tapped
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.change(x, self.tapped(x))
        return x


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"key": 2 * x}


CHANGES = {
    "activation": (nn.Identity(), "tapped", lambda x, y: y.relu_()),
    "residual": (nn.Identity(), "tapped", lambda x, y: operator.iadd(y, y.sigmoid())),
    "view": (nn.Identity(), "tapped", lambda x, y: y.flatten(1).mul_(2)),
    "slice": (nn.Identity(), "tapped", lambda x, y: y[:, 0].zero_()),
    "detached": (nn.Identity(), "tapped", lambda x, y: y.detach().add_(1)),
    "base of a view": (nn.Flatten(), "tapped", lambda x, y: x.add_(1)),
    "part of a tuple": (Encoder(), "tapped[1]", lambda x, y: y[1].add_(1)),
    "part of a dict": (Named(), "tapped['key']", lambda x, y: y["key"].add_(1)),
    "slice of the tap": (nn.Identity(), "tapped[:, 1:]", lambda x, y: y[:, 1:].mul_(2)),
}


@pytest.mark.parametrize("adapter", [StudentAdapter, TeacherAdapter])
@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_changed_in_place_after_its_tap_keeps_its_value_or_is_an_error(
    name: str, adapter: type, images: Tensor
) -> None:
    tapped, tap, change = CHANGES[name]
    expected = adapter(ChangesInPlace(tapped, lambda x, y: None), {"x": tap})(images)["x"].detach()
    changed = adapter(ChangesInPlace(tapped, change), {"x": tap})
    for mode in (nullcontext, torch.no_grad):
        with mode(), pytest.raises(ValueError, match=r"tap 'x' \('tapped'\) was changed in place after the tap"):
            changed(images)
    torch._dynamo.reset()
    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    for mode, run in [
        (torch.inference_mode, changed),
        (nullcontext, compiled),
        (torch.no_grad, compiled),
        (torch.inference_mode, compiled),
    ]:
        with mode():
            torch.testing.assert_close(run(images)["x"], expected)
    each = torch.func.vmap(lambda x: changed(x[None])["x"][0])(images)
    torch.testing.assert_close(each.detach(), expected)


def test_a_compiled_student_has_the_gradient_of_a_tensor_changed_later(images: Tensor) -> None:
    torch._dynamo.reset()
    model = ChangesInPlace(nn.Identity(), lambda x, y: y.relu_())
    compiled = torch.compile(StudentAdapter(model, {"x": "tapped"}), fullgraph=True, backend="aot_eager")
    compiled(images)["x"].sum().backward()
    torch.testing.assert_close(model.conv.bias.grad, torch.full((4,), 72.0))


def test_the_output_of_an_in_place_module_can_be_tapped(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    for mode in (nullcontext, torch.inference_mode):
        with mode():
            assert (StudentAdapter(model, {"x": "1"})(images)["x"] >= 0).all()


class Passes(nn.Module):
    """Returns its input, and a later module changes it in place."""

    def __init__(self, later: nn.Module) -> None:
        super().__init__()
        self.tapped = nn.Identity()
        self.later = later

    def forward(self, x: Tensor) -> Tensor:
        return self.later(self.tapped(x))


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_an_ordinary_tensor_that_is_changed_in_inference_mode(mode: Callable[[], Any], images: Tensor) -> None:
    adapter = StudentAdapter(Passes(nn.ReLU(inplace=True)), {"x": "tapped[:, 0]"})
    with mode(), pytest.raises(ValueError, match=r"tap 'x' \('tapped'\) was changed in place after the tap"):
        adapter(images)  # not created in inference mode: its version is counted there too


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_change_by_a_compiled_module_is_seen_too(mode: Callable[[], Any], images: Tensor) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Passes(nn.ReLU(inplace=True)))
    expected = model[0](images).detach()
    model[1].later.compile(backend="aot_eager")
    adapter = StudentAdapter(model, {"x": "1.tapped"})
    with mode():
        if mode is torch.inference_mode:
            torch.testing.assert_close(adapter(images)["x"], expected)
        else:
            with pytest.raises(ValueError, match="was changed in place after the tap"):
                adapter(images)


def test_a_teacher_in_a_distiller_reports_a_change_in_place(images: Tensor) -> None:
    student = StudentAdapter(nn.Sequential(nn.Conv2d(3, 4, 1)), {"x": OUTPUT})
    teacher = TeacherAdapter(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)), {"x": "0"})
    terms = {"hint": Term(HintLoss(), student="x", teacher="x")}
    distiller = Distiller(student, {"t": teacher}, Objective(terms))
    with pytest.raises(ValueError, match=r"TeacherAdapter: the tensor of tap 'x' .* was changed in place"):
        distiller(images)
    expected = HintLoss()(student.model(images), teacher.model[0](images))
    torch._dynamo.reset()
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).total, expected)
    with torch.inference_mode():
        torch.testing.assert_close(distiller(images).total, expected)
