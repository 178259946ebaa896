"""Adapters: taps and their errors, compilation, threads, and teachers that stay frozen."""

import copy
import gc
import pickle
import sys
import threading
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdlib.adapters import OUTPUT, StudentAdapter, Tap, TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.losses import AngularDistillLoss, HintLoss
from kdlib.objective import Objective, Term

Pair = namedtuple("Pair", ["embedding", "logits"])


class Net(nn.Module):
    """A small model with a tuple inside, a module called twice, one never called, and a named output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU()
        self.encoder = Encoder()
        self.unused = nn.Linear(1, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.relu(self.stem(x))
        x, _ = self.encoder(x)
        x = self.relu(x)
        embedding = x.mean(dim=(2, 3))
        return {"embedding": embedding, "logits": self.head(embedding)}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, x - y


TAPS = {"map": "stem.1", "rest": "encoder[1]", "second": "relu#1", "logits": OUTPUT["logits"]}


def double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


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
        (Pair(A, B), OUTPUT, TypeError, "a Pair of 2; index it"),
        (Pair(A, B), OUTPUT["other"], ValueError, r"finds no \['other'\]"),
        ((A, B), OUTPUT[2], ValueError, r"finds no \[2\] in the returned value, a tuple of 2"),
        ({"logits": A}, OUTPUT["logit"], ValueError, r"keys \['logits'\]"),
        (A, OUTPUT[0], ValueError, "indexes a tensor"),
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


def test_a_tensor_changed_in_place_after_its_tap_is_an_error(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match=r"tap 'x' \('1'\) was changed in place"):
        StudentAdapter(model, {"x": "1"})(images)
    with pytest.raises(ValueError, match="changed in place"):
        TeacherAdapter(model, {"x": "1"})(images)
    assert (StudentAdapter(model, {"x": "2"})(images)["x"] >= 0).all()
    with torch.inference_mode():
        assert StudentAdapter(model, {"x": "2"})(images)["x"].is_inference()


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


def test_teacher_moves_with_its_parent_and_keeps_its_dtype(images: Tensor) -> None:
    holder = Holder(TeacherAdapter(net(), {"x": OUTPUT["logits"]}))
    holder.to(torch.float64)
    assert holder.teacher(images.double())["x"].dtype == torch.float64
    fixed = Holder(TeacherAdapter(net(), {"x": OUTPUT["logits"]}, dtype=torch.float64)).float()
    assert fixed.teacher(images)["x"].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fixed.teacher(images)["x"].dtype == torch.float64
    holder.to("meta")
    assert next(holder.teacher.model.parameters()).is_meta


def test_preprocess_comes_first(images: Tensor) -> None:
    model = net()
    expected = TeacherAdapter(model, {"x": OUTPUT["logits"]})(2 * images)["x"]
    torch.testing.assert_close(TeacherAdapter(model, {"x": OUTPUT["logits"]}, preprocess=double)(images)["x"], expected)
    first = TeacherAdapter(model, {"x": OUTPUT["logits"]}, preprocess=lambda a, b: (a + b,))
    torch.testing.assert_close(first(images, images)["x"], expected)
    norm = nn.BatchNorm2d(3).train()
    TeacherAdapter(model, {"x": OUTPUT["logits"]}, preprocess=norm)(images)
    assert int(norm.num_batches_tracked) == 0
    with pytest.raises(TypeError, match="preprocess must be callable"):
        TeacherAdapter(model, {"x": OUTPUT}, preprocess=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch.dtype"):
        TeacherAdapter(model, {"x": OUTPUT}, dtype=torch.int8)
