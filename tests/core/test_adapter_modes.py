"""Adapters in wrappers, DDP, `torch.compile`, activation checkpoints, the transforms of `torch.func` and threads."""

import copy
import gc
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdlib.adapters import OUTPUT, StudentAdapter, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.losses import AngularDistillLoss, HintLoss
from kdlib.objective import Objective, Term
from tests.core.adapter_models import TAPS, double, net, num_hooks


def test_paths_ignore_wrappers(images: Tensor) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = net().eval()
    expected = StudentAdapter(model, {"map": "stem.1"})(images)["map"]
    for held, path in [(model, "module.stem.1"), (Wrapper(model), "stem.1"), (Wrapper(model), "module.stem.1")]:
        torch.testing.assert_close(StudentAdapter(held, {"map": path})(images)["map"], expected, rtol=0, atol=0)


def test_ddp(images: Tensor, tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inside = StudentAdapter(DistributedDataParallel(net()), TAPS)
        outside = DistributedDataParallel(StudentAdapter(net(), TAPS))
        plain = StudentAdapter(net(), TAPS)
        for adapter in (inside, outside, plain):
            features = adapter(images)
            (features["map"].square().sum() + features["logits"].square().sum()).backward()
        for adapter in (inside, outside):
            for one, two in zip(adapter.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one.grad, two.grad)
    finally:
        gc.collect()  # reference cycles of DDP would keep the threads of the group alive until exit
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapter", [StudentAdapter, TeacherAdapter])
def test_compile_fullgraph(adapter: type, images: Tensor) -> None:
    torch._dynamo.reset()
    plain = adapter(net(), TAPS).eval()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for shift in range(3):
        got, expected = compiled(images + shift), plain(images + shift)
        assert list(got) == list(expected)
        torch.testing.assert_close(got, expected)
        assert {x.requires_grad for x in got.values()} == {adapter is StudentAdapter}
    assert num_hooks(plain.model) == 0
    assert {type(module._forward_hooks) for module in plain.model.modules()} == {OrderedDict}


def test_compile_keeps_other_hooks(images: Tensor) -> None:
    torch._dynamo.reset()
    model = net().eval()
    handle = model.stem[1].register_forward_hook(lambda module, inputs, output: output + 1)
    adapter = StudentAdapter(model, {"map": "stem.1", "relu": "relu#0"})
    got = torch.compile(adapter, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(got["map"], adapter(images)["map"])
    assert num_hooks(model) == 1
    handle.remove()
    assert num_hooks(model) == 0
    torch.testing.assert_close(adapter(images)["map"] + 1, got["map"])


def test_taps_inside_a_compiled_model_are_errors(images: Tensor) -> None:
    torch._dynamo.reset()
    model = torch.compile(net(), backend="eager")
    with pytest.raises(ValueError, match=r"'stem.1' lies in a compiled module.*compile the adapter instead"):
        StudentAdapter(model, {"map": "stem.1"})
    assert StudentAdapter(model, {"x": OUTPUT["logits"]})(images)["x"].shape == (2, 5)
    late = net()
    adapter = StudentAdapter(late, {"map": "stem.1"})
    late.compile(backend="eager")
    with pytest.raises(ValueError, match="compile the adapter instead"):
        adapter(images)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.block(x).tanh()
        return checkpoint(self.block, x, use_reentrant=self.reentrant).tanh()


def gradients(adapter: nn.Module, images: Tensor, whole: bool | None = None) -> list[Tensor]:
    images = images.clone().requires_grad_()
    features = adapter(images) if whole is None else checkpoint(adapter, images, use_reentrant=whole)
    sum(x.square().sum() for x in features.values()).backward()
    return [images.grad, *[parameter.grad for parameter in adapter.parameters()]]


def test_activation_checkpointing(images: Tensor) -> None:
    taps = {"inner": "block.1", "block": "block", "out": OUTPUT}
    expected = gradients(StudentAdapter(Checkpointed(None), taps), images)
    inside = StudentAdapter(Checkpointed(False), taps)
    torch.testing.assert_close(gradients(inside, images), expected)
    assert num_hooks(inside.model) == 0
    around = StudentAdapter(Checkpointed(None), taps)
    torch.testing.assert_close(gradients(around, images, whole=False), expected)
    assert num_hooks(around.model) == 0


@pytest.mark.parametrize("path", ["block.0", "block.1"])
def test_a_tap_in_a_reentrant_checkpoint_is_an_error(images: Tensor, path: str) -> None:
    adapter = StudentAdapter(Checkpointed(True), {"inner": path})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        adapter(images.clone().requires_grad_())
    assert num_hooks(adapter.model) == 0
    with torch.no_grad():
        assert adapter(images.clone().requires_grad_())["inner"].shape == (2, 4, 6, 6)
    adapter.requires_grad_(False)
    assert not adapter(images.clone().requires_grad_())["inner"].requires_grad


@pytest.mark.parametrize("path", ["block", "block.2"])
def test_the_output_of_a_reentrant_checkpoint_can_be_tapped(images: Tensor, path: str) -> None:
    taps = {"block": path, "out": OUTPUT}
    expected = gradients(StudentAdapter(Checkpointed(None), taps), images)
    torch.testing.assert_close(gradients(StudentAdapter(Checkpointed(True), taps), images), expected)


def test_functional_call_and_transforms(images: Tensor) -> None:
    adapter = StudentAdapter(net().eval(), TAPS)
    moved = {name: p.detach() + 0.1 for name, p in adapter.named_parameters()}
    other = copy.deepcopy(adapter)
    other.load_state_dict(moved, strict=False)
    expected = other(images)
    torch.testing.assert_close(torch.func.functional_call(adapter, moved, (images,)), expected)

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(adapter, parameters, (x,))["rest"].square().sum()

    expected["rest"].square().sum().backward()
    name = "model.encoder.conv.weight"
    gradient = torch.func.grad(total)(moved, images)[name]
    torch.testing.assert_close(gradient, other.get_parameter(name).grad)
    single = torch.func.vmap(torch.func.grad(total), (None, 0))(moved, images[:, None])[name]
    torch.testing.assert_close(single.sum(0), gradient)
    teacher = TeacherAdapter(net(), TAPS)
    each = torch.func.vmap(lambda x: teacher(x[None])["map"][0])(images)
    torch.testing.assert_close(each, teacher(images)["map"])
    assert num_hooks(adapter.model) == 0


def test_a_distiller_of_adapters_compiles_to_one_graph(images: Tensor) -> None:
    torch._dynamo.reset()
    terms = {
        "map": Term(HintLoss(), student="map", teacher="map", project="auto"),
        "logits": Term(AngularDistillLoss(), student="logits", teacher="logits"),
    }
    teachers = {"one": TeacherAdapter(net(), TAPS), "two": TeacherAdapter(net(), TAPS, preprocess=double)}
    distiller = Distiller(StudentAdapter(net(), TAPS), teachers, Objective(terms)).infer(images)
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (distiller, compiled):
        distiller.zero_grad()
        run(images).total.backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in distiller.parameters()])
    assert any(gradient is not None and gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_threads_that_switch_often_do_not_mix(images: Tensor) -> None:
    model = net().eval()
    adapter = StudentAdapter(model, TAPS)

    def work(seed: int) -> None:
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        expected = model(x)["logits"]
        for _ in range(50):
            assert torch.equal(adapter(x)["logits"], expected)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))  # raises the error of a thread
    finally:
        sys.setswitchinterval(interval)
    assert num_hooks(model) == 0
