"""A narrower copy of a network: exact where it can be, close where it cannot, and the same kind of network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlib.compression import narrow_like, shrink


class Residual(nn.Module):
    """Two residual blocks, the second with a stride and a projection, as in ResNet."""

    def __init__(self, *, activation: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.first = Block(16, 16, 1, activation)
        self.second = Block(16, 24, 2, activation)
        self.third = Block(24, 24, 1, activation)
        self.head = nn.Linear(24, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, 12, 12):
            raise ValueError("images must be (b, 3, 12, 12)")
        x = self.third(self.second(self.first(F.relu(self.stem_norm(self.stem(images))))))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.after = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.prelu(self.norm1(self.conv1(x)))))
        y += self.down(x)
        return self.after(y)


class Inverted(nn.Module):
    """A linear bottleneck whose stream only 1x1 convolutions read and write, squeeze and excitation, and a flat tail."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.expand = nn.ModuleList(nn.Conv2d(12, 32, 1) for _ in range(2))
        self.depthwise = nn.ModuleList(nn.Conv2d(32, 32, 3, 1, 1, groups=32) for _ in range(2))
        self.squeeze = nn.ModuleList(nn.Conv2d(32, 8, 1) for _ in range(2))
        self.excite = nn.ModuleList(nn.Conv2d(8, 32, 1) for _ in range(2))
        self.reduce = nn.ModuleList(nn.Conv2d(32, 12, 1) for _ in range(2))
        self.tail = nn.Linear(12 * 36, 10)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index in range(2):
            y = F.silu(self.depthwise[index](F.relu6(self.expand[index](x))))
            gate = self.excite[index](F.relu(self.squeeze[index](F.adaptive_avg_pool2d(y, 1))))
            x = x + self.reduce[index](y * torch.sigmoid(gate))
        return self.norm(self.tail(x.view(x.shape[0], -1)))


class Branches(nn.Module):
    """Concatenation, a grouped convolution, and a layer called twice, whose channels have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(20)
        self.mix = nn.Conv2d(20, 12, 1)
        self.grouped = nn.Conv2d(12, 16, 3, padding=1, groups=4)
        self.after = nn.Conv2d(16, 16, 1)
        self.shared = nn.Conv2d(16, 16, 1)
        self.pool = nn.MaxPool2d(2)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(16 * 36, 30), nn.GELU(), nn.Linear(30, 5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(torch.cat([self.left(x), F.relu(self.right(x))], dim=1))
        x = self.shared(torch.tanh(self.shared(self.after(self.grouped(F.relu(self.mix(x)))))))
        x = self.pool(x)
        return self.mlp(x), x


class Transformer(nn.Module):
    """Tokens: only the width of the MLP can change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(2).unfold(2, 3, 3).flatten(2)[:, :, :9])
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


NETWORKS = [Residual, lambda: Residual(activation=False), Inverted, Branches, Transformer]
NAMES = ["residual", "residual_linear", "inverted", "branches", "transformer"]


def prepared(build, seed: int = 0) -> nn.Module:
    """A network in eval mode with BatchNorm statistics that are not those of its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(count: int = 48, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 12, 12, generator=generator)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else torch.cat([part.flatten(1) for part in found], 1)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def error(model: nn.Module, student: nn.Module, x: torch.Tensor) -> float:
    expected, found = outputs(model, x), outputs(student, x)
    return float(((found - expected).square().mean() / (expected - expected.mean(0)).square().mean()).sqrt())


@pytest.mark.parametrize("build", NETWORKS, ids=NAMES)
def test_nothing_removed_gives_equal_outputs(build):
    model = prepared(build)
    student = shrink(model, images().split(16), keep=1.0)
    assert type(student) is type(model)
    assert torch.equal(outputs(student, images(8, 2)), outputs(model, images(8, 2)))


@pytest.mark.parametrize("criterion", ["reconstruction", "energy"])
@pytest.mark.parametrize("build", NETWORKS, ids=NAMES)
def test_a_narrower_network_is_close_and_has_fewer_parameters(build, criterion):
    model = prepared(build)
    before = copy.deepcopy(model.state_dict())
    student = shrink(model, images(160).split(40), keep=0.75, criterion=criterion)
    assert type(student) is type(model)
    assert parameters(student) < parameters(model)
    unseen = images(40, 3)
    assert outputs(student, unseen).shape == outputs(model, unseen).shape
    assert error(model, student, unseen) < 0.7
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    biases = [key for key in before if key.endswith("bias")]
    assert [key for key in student.state_dict() if key.endswith("bias")] == biases
    student.train()
    sum(x.square().mean() for x in torch.atleast_1d(student(unseen)[0])).sum().backward()


def test_keep_is_the_share_of_each_space():
    """Each of the four groups of a grouped convolution keeps the same number of channels, 2 of 3 and 2 of 4."""
    student = shrink(prepared(Branches), [images()], keep=0.5)
    layers = (student.left, student.right, student.mix, student.grouped, student.after)
    assert [layer.out_channels for layer in layers] == [4, 6, 8, 8, 16]
    assert student.mlp[1].out_features == 15


@pytest.mark.parametrize("criterion", ["reconstruction", "energy"])
def test_each_group_keeps_as_many_channels_even_if_another_matters_more(criterion):
    model = prepared(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)))
    with torch.no_grad():
        model[2].weight[:2] *= 1e-3
    student = shrink(model, [images()], keep=0.5, criterion=criterion)
    kept = [index for index, row in enumerate(model[0].weight) if (student[0].weight == row).flatten(1).all(1).any()]
    assert [index // 4 for index in kept] == [0, 0, 1, 1]


def test_optional_inputs_keep_their_defaults():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor, scale: float = 2.0, bias: torch.Tensor | None = None) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x))) * scale

    model, x = prepared(Scaled), torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    student = shrink(model, [x], keep=0.5)
    assert student.first.out_features == 4
    assert error(model, student, x) < 0.7
    torch.testing.assert_close(student(x, 6.0), 3 * student(x))


def kill(layer: nn.Conv2d | nn.Linear, channels: list[int]) -> None:
    with torch.no_grad():
        layer.weight[channels] = 0
        layer.bias[channels] = 0


def test_dead_channels_cost_nothing():
    model = prepared(Inverted)
    for expand, depthwise in zip(model.expand, model.depthwise, strict=True):
        kill(expand, [0, 5, 6, 7, 20, 31])
        kill(depthwise, [0, 5, 6, 7, 20, 31])
    kill(model.squeeze[0], [1, 2])
    widths = {"expand.0": 26, "expand.1": 26, "squeeze.0": 6}
    student = shrink(model.double(), images().double().split(16), widths=widths)
    assert [layer.weight.shape[0] for layer in (student.expand[0], student.depthwise[1], student.squeeze[0])] == [
        26,
        26,
        6,
    ]
    torch.testing.assert_close(outputs(student, images(8, 2).double()), outputs(model, images(8, 2).double()))
    alive = [channel for channel in range(32) if channel not in (0, 5, 6, 7, 20, 31)]
    assert torch.equal(student.expand[0].weight, model.expand[0].weight[alive])  # a right layer is not refitted


def test_redundant_channels_cost_nothing():
    """Copies of a channel are predicted from the one that stays."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[0].weight[6:], model[0].bias[6:] = 2 * model[0].weight[:6], 2 * model[0].bias[:6]
    x = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = shrink(model, [x], keep=0.5)
    assert student[0].out_features == 6
    assert error(model, student, x) < 1e-2
    assert error(model, shrink(model, [x], keep=0.25), x) > 1e-2


def test_a_stream_of_linear_layers_keeps_mixtures():
    """A stream of rank 5 in 12 channels is reproduced by 5 mixtures, but not by 5 of the channels' own."""
    model = prepared(Inverted).double()
    with torch.no_grad():
        basis = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        project = basis @ torch.linalg.pinv(basis)
        for layer in (model.stem, *model.reduce):
            layer.weight.copy_(torch.einsum("oi,i...->o...", project, layer.weight))
            layer.bias.copy_(project @ layer.bias)
    student = shrink(model, images().double().split(16), widths={"stem": 5})
    assert student.stem.out_channels == student.reduce[0].out_channels == 5
    assert error(model, student, images(8, 2).double()) < 1e-3


def test_the_mean_of_a_stream_needs_no_mixture():
    """Channels that vary in 2 directions about a large mean are reproduced by 2 mixtures."""
    model = prepared(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double())
    with torch.no_grad():
        model[0].weight.copy_(
            torch.outer(torch.arange(6.0), torch.ones(4)) + torch.outer(torch.ones(6), torch.arange(4.0))
        )
        model[0].bias.copy_(100 * torch.arange(6.0).cos())
    x = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = shrink(model, x.split(10), widths={"0": 2})
    assert error(model, student, x) < 1e-6


def test_batches_of_one_image_equal_a_large_one():
    """Every fifth image of all batches is held out, so that each layer is refitted in both cases."""
    model, steps = prepared(Residual), {1: [], 50: []}
    for size, found in steps.items():
        shrink(model, images(50).split(size), keep=0.5, on_step=found.append)
    for alone, together in zip(*steps.values(), strict=True):
        assert alone.error == pytest.approx(together.error, rel=0.05, abs=0.01)


class Shared(nn.Module):
    """One PReLU slope for all channels, flatten as a function, a bare parameter, and an output that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 6, 3, 3), nn.PReLU()
        self.last = nn.Linear(6 * 16, 4)
        self.offset = nn.Parameter(torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        x = self.slope(self.first(x))
        rows = torch.flatten(x, 1) + x.flatten(1)
        return {"logits": self.last(rows) + self.offset, "state": None}


@pytest.mark.parametrize("width", [1, 3])
def test_a_slope_for_all_channels_stays(width):
    student = shrink(prepared(Shared), [images()], widths={"first": width})
    assert (student.first.out_channels, student.slope.num_parameters, student.last.in_features) == (
        width,
        1,
        16 * width,
    )
    assert student(images(2))["logits"].shape == (2, 4)
    assert student(images(2))["state"] is None


def test_channels_that_an_unknown_operation_reads_stay():
    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.second(torch.cumsum(self.first(x), 1))))

    model, x = prepared(Cumulative), torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    student = shrink(model, [x], keep=0.5)
    assert (student.first.out_features, student.second.out_features) == (8, 3)
    with pytest.raises(ValueError, match="the channels of 'first' cannot be removed"):
        shrink(model, [x], widths={"first": 4})


def test_channels_that_the_output_and_a_layer_read_stay():
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.first(x)
            return self.last(torch.relu(self.second(features))), features

    model, x = prepared(Tapped), torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    student = shrink(model, [x], keep=0.5)
    assert (student.first.out_features, student.second.out_features) == (8, 3)
    with pytest.raises(ValueError, match="the channels of 'first' cannot be removed"):
        shrink(model, [x], widths={"first": 4})


def test_refitting_on_the_narrow_activations_equals_least_squares():
    """The second layer of a two-layer network is the least-squares solution for the kept channels."""
    model = prepared(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    x = torch.randn(2000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student = shrink(model, [x], keep=0.5)
    hidden = F.pad(student[1](student[0](x)), (0, 1), value=1.0)
    solution = torch.linalg.lstsq(hidden, model(x)).solution.T
    torch.testing.assert_close(
        torch.cat([student[2].weight, student[2].bias[:, None]], 1), solution, rtol=1e-3, atol=1e-4
    )


def test_greedy_choice_equals_a_naive_search():
    """At each step the channel is removed without which the outputs are predicted best by least squares."""
    model = prepared(lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double())
    x = torch.randn(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hidden = model[1](model[0](x)).detach()
    target = hidden @ model[2].weight.detach().T
    kept = list(range(9))

    def residual(channels: list[int]) -> float:
        rows = F.pad(hidden[:, channels], (0, 1), value=1.0)
        return float((rows @ torch.linalg.lstsq(rows, target).solution - target).square().sum())

    while len(kept) > 4:
        kept = min(([c for c in kept if c != removed] for removed in kept), key=residual)
    student = shrink(model, [x], widths={"0": 4})
    assert torch.equal(student[0].weight, model[0].weight[kept])


def test_the_energy_criterion_keeps_the_channels_with_the_largest_share_of_the_outputs():
    model = prepared(lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double(), seed=2)
    x = torch.randn(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hidden = model[1](model[0](x)).detach()
    energy = hidden.var(0) * model[2].weight.detach().square().sum(0)
    kept = energy.topk(4).indices.sort().values
    student = shrink(model, [x], widths={"0": 4}, criterion="energy")
    assert torch.equal(student[0].weight, model[0].weight[kept])
    assert not torch.equal(shrink(model, [x], widths={"0": 4})[0].weight, student[0].weight)


def test_folding_norms_allows_mixtures_and_keeps_outputs():
    model = prepared(lambda: Residual(activation=False))
    whole = shrink(model, [images()], keep=1.0, fold_norms=True)
    assert isinstance(whole.first.norm2, nn.Identity)
    assert isinstance(model.first.norm2, nn.BatchNorm2d)
    assert all(parameter.requires_grad for parameter in whole.parameters())
    torch.testing.assert_close(outputs(whole, images(4, 2)), outputs(model, images(4, 2)), rtol=1e-4, atol=1e-5)


def test_norms_are_folded_where_the_layer_has_no_other_reader():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.norm(x) + x

    model = prepared(Twice)
    whole = shrink(model, [images()], keep=1.0, fold_norms=True)
    assert isinstance(whole.norm, nn.BatchNorm2d)
    torch.testing.assert_close(outputs(whole, images(4, 2)), outputs(model, images(4, 2)))
    assert isinstance(shrink(prepared(Inverted), [images()], keep=1.0, fold_norms=True).norm, nn.Identity)


@pytest.mark.parametrize("shared", ["conv", "norm"])
def test_norms_of_layers_that_are_called_twice_stay(shared):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 6, 1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
            layers = self.convs if shared == "conv" else self.norms
            layers[1] = layers[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norms[0](self.convs[0](x)) + self.norms[1](self.convs[1](2 * x))

    model = prepared(Shared)
    whole = shrink(model, [images()], keep=1.0, fold_norms=True)
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in whole.norms)
    torch.testing.assert_close(outputs(whole, images(4, 2)), outputs(model, images(4, 2)))


def test_blocks_are_dropped():
    model = prepared(Residual)
    with torch.no_grad():
        model.first.norm2.weight.mul_(0.05)
        model.first.norm2.bias.zero_()
        model.first.norm2.running_mean.zero_()
    steps = []
    student = shrink(model, images().split(16), keep=1.0, drop=["first"], on_step=steps.append)
    assert isinstance(student.first, nn.Identity)
    assert error(model, student, images(8, 2)) < 0.2
    assert steps
    assert all(step.error <= step.error_before for step in steps)
    assert "-> " in str(steps[0])
    assert steps[0].layer == "second.conv1"


def test_options_and_networks_that_cannot_be_used_are_refused():
    model = prepared(Residual)
    batch = [images(4)]
    with pytest.raises(ValueError, match="keep or widths must be given"):
        shrink(model, batch)
    with pytest.raises(ValueError, match="keep must be a finite number and > 0 and <= 1, got 2"):
        shrink(model, batch, keep=2.0)
    with pytest.raises(ValueError, match=r"no layer named 'firs\.conv1'; the nearest are 'first\.conv1'"):
        shrink(model, batch, widths={"firs.conv1": 4})
    for name in ("norm", "relu"):  # channels of two layers, and a function
        with pytest.raises(ValueError, match=f"no layer named '{name}'"):
            shrink(prepared(Branches), batch, widths={name: 4})
    with pytest.raises(ValueError, match="the channels of 'head' cannot be removed"):
        shrink(model, batch, widths={"head": 4})
    with pytest.raises(ValueError, match=r"widths\['stem'\] must be a whole number and >= 1 and <= 16, got 17"):
        shrink(model, batch, widths={"stem": 17})
    with pytest.raises(ValueError, match="must be a multiple of 4 for a grouped convolution"):
        shrink(prepared(Branches), batch, widths={"grouped": 6})
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        shrink(model, [], keep=0.5)
    with pytest.raises(
        TypeError, match=r"batches must be an iterable of tensors, got one torch.Tensor; give \[tensor\]"
    ):
        shrink(model, images(4), keep=0.5)
    for wrong in (torch.ones(4), torch.ones(0, 3, 12, 12)):
        with pytest.raises(ValueError, match=r"batch 1 must be \(b, ...\) with b >= 1, got"):
            shrink(model, [*batch, wrong], keep=0.5)
    with pytest.raises(ValueError, match=r"batch 0 must be finite, got .* NaN or infinite values"):
        shrink(model, [images(4) * torch.nan], keep=0.5)
    with pytest.raises(ValueError, match="block 'second' must return the channels it receives"):
        shrink(model, batch, keep=1.0, drop=["second"])
    with pytest.raises(ValueError, match="drop must hold paths of blocks"):
        shrink(model, batch, keep=1.0, drop=["fifth"])

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * (8 if x.shape[1] == 8 else 0))

    with pytest.raises(RuntimeError, match="must not depend on the number of channels"):
        shrink(Constant(), [torch.randn(8, 4)], keep=0.5)


def test_runs_are_reproducible_and_keep_mode_and_trainability():
    model = prepared(Residual).train()
    for parameter in (model.stem.weight, model.first.norm1.weight):
        parameter.requires_grad_(False)
    first, second = (shrink(model, images().split(16), keep=0.5, positions=500, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.training
    assert all(module.training for network in (first, model) for module in network.modules())
    assert not first.stem.weight.requires_grad
    assert not first.first.norm1.weight.requires_grad
    assert first.first.conv1.weight.requires_grad


@pytest.mark.parametrize("build", NETWORKS, ids=NAMES)
@pytest.mark.parametrize("fold_norms", [False, True])
def test_saved_weights_load_into_a_newly_built_network(build, fold_norms):
    student = shrink(prepared(build), images().split(16), keep=0.5, fold_norms=fold_norms)
    wide = build().eval()
    before = copy.deepcopy(wide.state_dict())
    again = narrow_like(wide, student.state_dict())
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(outputs(again, images(4, 2)), outputs(student, images(4, 2)))
    assert repr(again) == repr(student)
    assert all(torch.equal(before[key], value) for key, value in wide.state_dict().items())
    with torch.device("meta"):
        shell = narrow_like(build(), student.state_dict())
    assert all(value.is_meta for value in shell.state_dict().values())
    shell.load_state_dict(student.state_dict(), assign=True)
    torch.testing.assert_close(outputs(shell.eval(), images(4, 2)), outputs(student, images(4, 2)))


def test_a_saved_network_without_a_block_loads():
    student = shrink(prepared(Residual), images().split(16), keep=0.75, drop=["first"])
    again = narrow_like(Residual(), student.state_dict()).eval()
    again.load_state_dict(student.state_dict())
    assert isinstance(again.first, nn.Identity)
    torch.testing.assert_close(outputs(again, images(4, 2)), outputs(student, images(4, 2)))


@pytest.mark.parametrize("option", ["track_running_stats", "affine"])
def test_weights_without_a_bias_and_norms_without_statistics_or_weights_load(option):
    def build(width: int) -> nn.Module:
        norm = nn.BatchNorm2d(width, **{option: False})
        return nn.Sequential(nn.Conv2d(3, width, 3), norm, nn.Conv2d(width, 4, 1))

    state = {key: value for key, value in build(5).state_dict().items() if key != "2.bias"}
    again = narrow_like(build(8), state)
    assert again.load_state_dict(state, strict=False).missing_keys == ["2.bias"]
    assert repr(again) == repr(build(5))


def test_weights_of_another_network_are_refused():
    state = Residual().state_dict()
    with pytest.raises(
        ValueError, match=r"narrow_like: state_dict\['head.weight'\] must have a shape of at most \(6, 24\)"
    ):
        narrow_like(Residual(), {**state, "head.weight": torch.zeros(6, 25)})
    for size in (5, 7):
        with pytest.raises(
            ValueError, match=r"state_dict\['head.bias'\] must have the shape \(6,\), as head.weight has 6"
        ):
            narrow_like(Residual(), {**state, "head.bias": torch.zeros(size)})
    norm = {"0.weight": torch.ones(5), "0.bias": torch.ones(5), "0.running_mean": torch.ones(4)}
    with pytest.raises(
        ValueError, match=r"state_dict\['0.running_mean'\] must have the shape \(5,\), as 0.weight has 5"
    ):
        narrow_like(nn.Sequential(nn.BatchNorm2d(6)), norm)
    with pytest.raises(TypeError, match=r"state_dict\['head.weight'\]"):
        narrow_like(Residual(), {**state, "head.weight": 3})
    with pytest.raises(TypeError, match="model"):
        narrow_like("Residual", state)
