"""Adapters and whole distillers on the meta device, where no value can be read."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kdlib
from kdlib import OUTPUT, Distiller, Objective, StudentAdapter, TeacherAdapter, Term, match_taps
from kdlib.testing import check_adapter
from tests.core.adapter_models import TAPS, double, net

META = torch.device("meta")


class Tokens(nn.Module):
    """A small transformer with a class token and keyword arguments; in training it returns a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x if scale is None else x * scale[:, None, None])
        return {"logits": self.head(x[:, 0]), "tokens": x} if self.training else self.head(x[:, 0])


def taps(model: nn.Module) -> dict[str, object]:
    return {
        "class": "norm[:, 0]",
        "tokens": "norm[:, 1:]",
        "logits": {"train": OUTPUT["logits"], "eval": OUTPUT},
        **match_taps(model, r"blocks\.(\d)", name=r"block\1"),
    }


@pytest.mark.parametrize("adapter", [StudentAdapter, TeacherAdapter])
@pytest.mark.parametrize("training", [True, False])
def test_features_on_the_meta_device_have_the_shapes_of_those_on_the_cpu(adapter: type, training: bool) -> None:
    for model, places, inputs in [
        (net(), TAPS, (torch.rand(2, 3, 6, 6),)),
        (Tokens(8), taps(Tokens(8)), (torch.rand(2, 5, 3),)),
    ]:
        ours = adapter(model, places).train(training)
        expected = {name: (x.shape, x.dtype) for name, x in ours(*inputs).items()}
        ours = pickle.loads(pickle.dumps(ours)).to(META)
        features = ours(*(x.to(META) for x in inputs))
        assert {name: (x.shape, x.dtype) for name, x in features.items()} == expected
        assert all(x.is_meta for x in features.values())
        assert any(x.requires_grad for x in features.values()) is (adapter is StudentAdapter)


def test_adapters_on_the_meta_device_with_every_option() -> None:
    x = torch.rand(2, 3, 6, 6)
    for options in ({}, {"preprocess": double}, {"preprocess": nn.BatchNorm2d(3)}, {"dtype": torch.float16}):
        teacher = TeacherAdapter(net(), TAPS, **options).to(META)
        assert {feature.is_meta for feature in teacher(x.to(META)).values()} == {True}
    fixed = TeacherAdapter(net(), TAPS, device=META, inputs="view", dtype=torch.float64)
    assert {feature.dtype for feature in fixed(x.to(META)).values()} == {torch.float64}


def build(weighting: nn.Module) -> Distiller:
    read = {"x": "view", "scale": "scale"}
    teachers = {
        "one": TeacherAdapter(Tokens(12), taps(Tokens(12))),
        "two": TeacherAdapter(Tokens(16), taps(Tokens(16)), inputs=read, dtype=torch.float64),
    }
    terms = {
        "class": Term(kdlib.HintLoss(), student="class", teacher="class", project="auto"),
        "tokens": Term(kdlib.HintLoss(), student="tokens", teacher="tokens", project="auto"),
        "block": Term(kdlib.AngularDistillLoss(), student="block1", teacher="block0", project="auto"),
        "relation": Term(kdlib.RKDDistanceLoss(), student="class", teacher="class"),
        "kd": Term(kdlib.SoftTargetLoss(), student="logits", teacher="logits", sample_weight="weight"),
        "label": Term(nn.CrossEntropyLoss(), student="logits", target="label"),
    }
    return Distiller(StudentAdapter(Tokens(8), taps(Tokens(8))), teachers, Objective(terms, weighting))


@pytest.mark.parametrize("late", [False, True])  # whether the projections are inferred on the meta device
@pytest.mark.parametrize(
    "weighting",
    [
        kdlib.UniformWeighting,
        lambda: kdlib.FixedWeighting([1, 2]),
        lambda: kdlib.UncertaintyWeighting(2),
    ],
)
def test_a_whole_distiller_runs_on_the_meta_device(weighting: Callable[[], nn.Module], late: bool) -> None:
    ours, inputs = build(weighting()), {"x": torch.rand(4, 5, 3), "scale": torch.rand(4)}
    targets = {
        "view": torch.rand(4, 5, 3),
        "scale": torch.rand(4),
        "label": torch.tensor([0, 1, 2, 3]),
        "weight": torch.rand(4),
    }
    if not late:
        ours.infer(inputs, targets)
        assert ours(inputs, targets).total.requires_grad
    ours.to(META)
    on_meta = {name: each.to(META) for name, each in targets.items()}
    inputs = {name: each.to(META) for name, each in inputs.items()}
    output = ours.infer(inputs, on_meta)(inputs, on_meta)
    assert {each.is_meta for each in (output.total, *output.terms.values(), *output.weights.values())} == {True}
    output.total.backward()
    assert all(p.grad is None or p.grad.is_meta for p in ours.trainable_parameters())


def test_an_adapter_is_checked_with_keyword_arguments() -> None:
    batch = {"x": torch.rand(2, 5, 3), "scale": torch.rand(2)}
    places = {name: tap for name, tap in taps(Tokens(8)).items() if name != "logits"}
    assert "inputs_unchanged" in check_adapter(StudentAdapter(Tokens(8), places), batch)
    teacher = TeacherAdapter(Tokens(8), taps(Tokens(8)), device="cpu", inputs={"x": "view", "scale": "scale"})
    assert "statistics" in check_adapter(teacher, batch, exclude=["on_meta"])  # it never leaves the CPU
