"""Teachers stay frozen: mode, weights, type and preprocessing."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdlib.adapters import OUTPUT, StudentAdapter, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.losses import HintLoss
from kdlib.objective import Objective, Term
from tests.core.adapter_models import TAPS, double, net


def test_a_teacher_stays_in_eval_mode_until_its_last_thread_leaves(images: Tensor) -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, wait: bool) -> Tensor:
            if wait:
                inside.set()
                leave.wait(30)
            seen.append(self.norm.training)
            return self.norm(x)

    model = Waits()
    teacher = TeacherAdapter(model, {"x": OUTPUT})
    model.train()
    slow = threading.Thread(target=lambda: teacher(images, True))
    slow.start()
    assert inside.wait(30)
    quick = threading.Thread(target=lambda: teacher(images, False))
    quick.start()
    quick.join()
    leave.set()
    slow.join()
    assert seen == [False, False]
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training
    assert model.norm.training


def test_repr_contains_the_taps() -> None:
    assert "taps={'map': Tap('stem.1')" in repr(StudentAdapter(net(), TAPS))
    text = repr(TeacherAdapter(net(), {"x": OUTPUT}, preprocess=double, dtype=torch.float16))
    assert text.startswith("TeacherAdapter(Net, taps={'x': OUTPUT}, preprocess=<function double")
    assert text.endswith("dtype=torch.float16)")


class Holder(nn.Module):
    def __init__(self, teacher: TeacherAdapter) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.teacher = teacher


def test_a_module_that_preprocesses_is_left_out_of_parents_too() -> None:
    holder = Holder(TeacherAdapter(net(), TAPS, preprocess=nn.BatchNorm2d(3)))
    assert set(holder.state_dict()) == {"own.weight", "own.bias"}
    assert [name for name, _ in holder.named_parameters()] == ["own.weight", "own.bias"]
    assert list(holder.buffers()) == []


def test_one_model_may_be_teacher_and_student(images: Tensor) -> None:
    model = net()
    teacher = TeacherAdapter(model, {"x": OUTPUT["embedding"]})
    student = StudentAdapter(model, {"x": OUTPUT["embedding"]}).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    mean = model.stem[1].running_mean.clone()
    target = teacher(images)["x"]
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.stem[1].running_mean, mean, rtol=0, atol=0)
    (student(images)["x"] - target).square().sum().backward()
    assert model.stem[0].weight.grad.abs().sum() > 0
    assert not torch.equal(model.stem[1].running_mean, mean)


def test_a_teacher_moves_with_its_parent_and_keeps_its_dtype(images: Tensor) -> None:
    holder = Holder(TeacherAdapter(net(), {"x": OUTPUT["logits"]}))
    holder.to(torch.float64)
    assert holder.teacher(images.double())["x"].dtype == torch.float64
    fixed = Holder(TeacherAdapter(net(), {"x": OUTPUT["logits"]}, dtype=torch.float64)).float()
    assert fixed.teacher(images)["x"].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fixed.teacher(images)["x"].dtype == torch.float64
    holder.to(memory_format=torch.channels_last)
    assert holder.teacher.model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    holder.to("meta")
    assert next(holder.teacher.model.parameters()).is_meta
    assert not next(holder.to_empty(device="cpu").teacher.model.parameters()).is_meta


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(
    "change",
    [
        lambda parent: parent.to_empty(device="cpu"),
        lambda parent: parent.half(),
        lambda parent: parent.to("cpu", torch.bfloat16),
        lambda parent: parent.type(torch.HalfTensor),
        lambda parent: parent.double().float(),
        lambda parent: parent._apply(torch.zeros_like),
        lambda parent: parent._apply(lambda x: x.detach().zero_()),
        lambda parent: parent.apply(lambda module: [nn.init.zeros_(x) for x in module.parameters(recurse=False)]),
    ],
)
def test_a_parent_never_changes_the_values_of_a_teacher(
    change: Callable[[nn.Module], object], dtype: torch.dtype | None, images: Tensor
) -> None:
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(0))
    teacher = TeacherAdapter(net(), TAPS, preprocess=norm, dtype=dtype)
    terms = {"hint": Term(HintLoss(), student="x", teacher="logits")}
    for parent in (
        Holder(teacher),
        Distiller(StudentAdapter(nn.Linear(2, 2), {"x": OUTPUT}), {"t": teacher}, Objective(terms)),
    ):
        before = copy.deepcopy([teacher.model.state_dict(), norm.state_dict()])
        expected = teacher(images)
        change(parent)
        torch.testing.assert_close([teacher.model.state_dict(), norm.state_dict()], before, rtol=0, atol=0)
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=0)
        assert teacher(images.half())["logits"].dtype == torch.float32  # inputs are converted to the model's type


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_module_of_torch_export_can_be_a_teacher_if_exported_in_eval_mode(dtype: torch.dtype | None) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.ones(2, 3)
    exported = torch.export.export(model.eval(), (x,)).module()
    teacher = TeacherAdapter(exported, {"x": OUTPUT}, dtype=dtype)
    torch.testing.assert_close(teacher.train()(x)["x"], model.to(dtype or x.dtype)(x.to(dtype)))
    exported = torch.export.export(model.float().train(), (x,)).module()
    with pytest.raises(
        ValueError, match=r"TeacherAdapter: the model was exported in training mode .*; export model.eval"
    ):
        TeacherAdapter(exported, {"x": OUTPUT})


def test_preprocess_comes_first(images: Tensor) -> None:
    model = net()
    expected = TeacherAdapter(model, {"x": OUTPUT["logits"]})(2 * images)["x"]
    torch.testing.assert_close(TeacherAdapter(model, {"x": OUTPUT["logits"]}, preprocess=double)(images)["x"], expected)
    for prepare in (lambda a, b: (a + b,), lambda a, b: {"x": a + b}):
        first = TeacherAdapter(model, {"x": OUTPUT["logits"]}, preprocess=prepare)
        torch.testing.assert_close(first(images, b=images)["x"], expected)
    norm = nn.BatchNorm2d(3).train()
    TeacherAdapter(model, {"x": OUTPUT["logits"]}, preprocess=norm)(images)
    assert int(norm.num_batches_tracked) == 0
    with pytest.raises(TypeError, match="preprocess must be callable"):
        TeacherAdapter(model, {"x": OUTPUT}, preprocess=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch.dtype"):
        TeacherAdapter(model, {"x": OUTPUT}, dtype=torch.int8)
