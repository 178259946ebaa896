"""`list_taps` and `match_taps`: what they return, and that the model stays as it was."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn

import kdlib
from kdlib import OUTPUT, StudentAdapter, Tap, list_taps, match_taps
from tests.core.adapter_models import Net, net, num_hooks

TABLE = """\
tap                  module       shape         dtype    calls
stem                 Sequential   (2, 4, 6, 6)  float32  1
stem.0               Conv2d       (2, 4, 6, 6)  float32  1
stem.1               BatchNorm2d  (2, 4, 6, 6)  float32  1
relu#0               ReLU         (2, 4, 6, 6)  float32  2
relu#1               ReLU         (2, 4, 6, 6)  float32  2
encoder[0]           Encoder      (2, 4, 6, 6)  float32  1
encoder[1]           Encoder      (2, 4, 6, 6)  float32  1
encoder.conv         Conv2d       (2, 4, 6, 6)  float32  1
unused               Linear       not called             0
head                 Linear       (2, 5)        float32  1
OUTPUT['embedding']  Net          (2, 4)        float32  1
OUTPUT['logits']     Net          (2, 5)        float32  1"""


def test_the_table(images: Tensor) -> None:
    rows = list_taps(net(), images)
    assert repr(rows) == str(rows) == TABLE
    assert rows[3].tap == Tap("relu", call=0)
    assert rows[-1] == kdlib.adapters.TapRow(OUTPUT["logits"], "Net", (2, 5), torch.float32, 1)
    assert [row for row in rows if row.shape is None] == [rows[8]]
    assert pickle.loads(pickle.dumps(rows)) == rows


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_each_row_with_a_shape_is_a_tap(wrap, images: Tensor) -> None:
    rows = list_taps(wrap(net()), images)
    features = StudentAdapter(net(), {str(row.tap): row.tap for row in rows if row.shape})(images)
    assert [(tuple(x.shape), x.dtype) for x in features.values()] == [
        (row.shape, row.dtype) for row in rows if row.shape
    ]
    assert [str(row.tap) for row in rows] == [line.split("  ")[0] for line in TABLE.splitlines()[1:]]


class Random(nn.Module):
    """Uses the random state, counts its calls in a buffer and an attribute, and returns a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, object]:
        if self.calls == 0:  # as models of transformers do
            self.norm.register_forward_hook(lambda module, inputs, output: None, with_kwargs=False)
        self.calls += 1
        self.seen += 1
        x = self.dropout(self.norm(x)) + torch.rand(3)
        return {"x": scale * x, "mode": self.training, "hidden": [x, (x, None)], 3: x.long(), None: x}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_stay_as_they_were(training: bool) -> None:
    model = Random().train(training)
    model.dropout.train(not training)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    x, random = torch.ones(1, 3, requires_grad=True), torch.get_rng_state()
    rows = list_taps(model, x, scale=2.0)  # one sample: batch norm would refuse it in training mode
    assert [str(row.tap) for row in rows][2:] == [
        "OUTPUT['x']", "OUTPUT['hidden'][0]", "OUTPUT['hidden'][1][0]", "OUTPUT[3]",
    ]  # fmt: skip
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.calls == 0
    assert num_hooks(model) == 0
    with pytest.raises(AttributeError):
        list_taps(model, 3)
    assert num_hooks(model) == 0
    assert [m.training for m in model.modules()] == modes


def test_a_model_on_the_meta_device_is_listed() -> None:
    with torch.device("meta"):
        model, x = Net(), torch.empty(2, 3, 6, 6)
    assert str(list_taps(model, x)) == TABLE


def test_modules_without_a_tensor_and_lazy_models() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    assert str(list_taps(nn.Sequential(Nothing()), 1)).splitlines()[1].split("  ")[0] == "0"
    assert "no tensor" in str(list_taps(Nothing(), 1))
    with pytest.raises(ValueError, match="list_taps: the model has lazy parameters, such as 'weight'; call it on one"):
        list_taps(nn.LazyLinear(3), torch.rand(2, 3))
    with pytest.raises(TypeError, match="list_taps: model must be a Module, got str"):
        list_taps("resnet")  # type: ignore[arg-type]


def test_match_taps(images: Tensor) -> None:
    model = net()
    assert match_taps(model, r"stem\.\d") == {"stem.0": Tap("stem.0"), "stem.1": Tap("stem.1")}
    assert match_taps(model, re.compile("STEM", re.IGNORECASE)) == {"stem": Tap("stem")}
    assert list(match_taps(model, r"(\w+)\.(?P<last>\w+)", name=r"\1_\g<last>")) == ["stem_0", "stem_1", "encoder_conv"]
    taps = {name: tap[:, 0] for name, tap in match_taps(model, r"stem\.\d").items()}
    assert {x.shape for x in StudentAdapter(model, taps)(images).values()} == {(2, 6, 6)}
    assert match_taps(torch.compile(model, backend="eager"), "stem") == {"stem": Tap("stem")}


@pytest.mark.parametrize(
    ("pattern", "options", "error", "message"),
    [
        (
            "stm",
            {},
            ValueError,
            "no module path matches 'stm' as a whole; the nearest are 'stem'.*; '.*' matches any text",
        ),
        ("tem", {}, ValueError, "no module path matches 'tem' as a whole; the nearest are 'stem'"),
        ("stem(", {}, ValueError, r"pattern must be a regular expression, got 'stem\(': missing \)"),
        (rb"stem", {}, TypeError, "pattern must be a regular expression, got bytes"),
        (re.compile(b"stem"), {}, ValueError, "pattern must be a regular expression"),
        ("stem", {"name": r"\1"}, ValueError, r"name '\\\\1' must refer to groups of the pattern 'stem'"),
        (r"stem\.\d", {"name": "x"}, ValueError, "name='x' gives several paths the name 'x'; use more groups"),
    ],
)
def test_errors_of_match_taps(pattern, options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        match_taps(net(), pattern, **options)
