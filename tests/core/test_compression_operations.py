"""Operations between two layers: those that keep channels apart are followed, all others keep every channel."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.compression import narrow_like, shrink

C, SIDE = 8, 4


class Between(nn.Module):
    """A convolution with channels of which half are dead, an operation, and the layer that reads its output."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.first = nn.Conv2d(3, C, 3, padding=1).double()
        with torch.no_grad():
            self.first.weight[1::2], self.first.bias[1::2] = 0, 0
            shape = operation(torch.ones(2, C, SIDE, SIDE, dtype=torch.float64)).shape
        last = nn.Conv2d(shape[1], 5, 1) if len(shape) == 4 else nn.Linear(shape[-1], 5)
        self.last = last.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "method relu": lambda h: h.relu(),
    "gelu": F.gelu,
    "clamp": lambda h: torch.clamp(h, -0.5, 0.5),
    "method clamp": lambda h: h.clamp(min=0),
    "module": nn.Hardswish(),
    "dropout": nn.Dropout(0.5).eval(),
    "max pool": lambda h: F.max_pool2d(h, 2),
    "average pool": lambda h: F.avg_pool2d(h, 2),
    "adaptive pool": nn.AdaptiveAvgPool2d(2),
    "interpolate": lambda h: F.interpolate(h, scale_factor=2),
    "contiguous": lambda h: h.contiguous().clone(),
    "add a number": lambda h: h + 1,
    "add a number first": lambda h: 0.5 + h,
    "scale": lambda h: 2 * h,
    "sum": lambda h: torch.add(h, h.relu()),
    "difference": lambda h: h - h.tanh(),
    "product": lambda h: torch.mul(h, h.sigmoid()),
    "method product": lambda h: h.mul(h),
    "attention": lambda h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
    "cat": lambda h: torch.cat([h, h.relu()], 1),
    "cat of a tuple": lambda h: torch.cat((h.relu(), h, h.tanh()), dim=1),
    "flatten": lambda h: torch.flatten(h, 1),
    "flatten by name": lambda h: torch.flatten(h, start_dim=1, end_dim=3),
    "method flatten": lambda h: h.flatten(1, -1),
    "module flatten": nn.Flatten(),
    "view": lambda h: h.view(h.shape[0], -1),
    "view of a tuple": lambda h: h.view((h.size(0), -1)),
    "reshape": lambda h: torch.reshape(h, (h.shape[0], -1)),
    "flatten a pool": lambda h: F.adaptive_avg_pool2d(h, 1).flatten(1),
    "cat of flat": lambda h: torch.cat([h.flatten(1), h.relu().flatten(1)], 1),
    "mean": lambda h: h.mean((2, 3)),
    "mean by name": lambda h: torch.mean(h, dim=[-1, -2]),
    "mean of one": lambda h: h.mean(3, keepdim=True),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumulative sum": lambda h: torch.cumsum(h, 1),
    "flip": lambda h: h.flip(1),
    "softmax": lambda h: torch.softmax(h, 1),
    "cat with an unknown one": lambda h: torch.cat([h, h.flip(1)], 1),
    "cat of rows": lambda h: torch.cat([h, h], 2),
    "cat by name of rows": lambda h: torch.cat([h, h], dim=3),
    "mean of channels": lambda h: h.mean((1, 2)),
    "mean of channels too": lambda h: h.mean((1, 2, 3), keepdim=True) + h,
    "mean of all": lambda h: h - h.mean(),
    "another size": lambda h: h * h.sum(1, keepdim=True),
    "flatten positions": lambda h: h.flatten(2),
    "flatten samples": lambda h: h.flatten(0, 1).flatten(1).view(-1, C * SIDE * SIDE),
    "view of a fixed size": lambda h: h.view(-1, C * SIDE * SIDE),
    "view of positions": lambda h: h.view(h.shape[0], C, -1),
    "transpose": lambda h: h.transpose(1, 2),
    "split": lambda h: h[:, :6],
    "normalize": lambda h: F.layer_norm(h, h.shape[1:]),
    "slope": lambda h: F.prelu(h, torch.full((C,), 0.2, dtype=h.dtype)),
}


def images(count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).double()


def between(operation: Callable[[Tensor], Tensor]) -> Between:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Between(operation).eval()


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("criterion", ["reconstruction", "energy"])
def test_dead_channels_are_removed_through_known_operations(name: str, criterion: str) -> None:
    model = between(KNOWN[name])
    student = shrink(model, images().split(20), keep=0.5, criterion=criterion)
    assert student.first.out_channels == C // 2
    assert student.last.weight.numel() == model.last.weight.numel() // 2
    torch.testing.assert_close(student(images(8, 1)), model(images(8, 1)), rtol=1e-5, atol=1e-5)
    assert repr(narrow_like(model, student.state_dict())) == repr(student)


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_keep_all_channels(name: str) -> None:
    model = between(OTHERS[name])
    student = shrink(model, images().split(20), keep=0.5)
    assert student.first.out_channels == C
    assert torch.equal(student(images(8, 1)), model(images(8, 1)))
    with pytest.raises(ValueError, match="the channels of 'first' cannot be removed"):
        shrink(model, [images()], widths={"first": 4})


@pytest.mark.parametrize(("groups", "least"), [(1, 1), (2, 2), (4, 4), (8, 1)])
def test_the_smallest_part_keeps_a_channel_of_each_group(groups: int, least: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 5, 1)]
    student = shrink(nn.Sequential(*layers).double().eval(), [images()], keep=1e-6)
    assert [student[0].out_channels, student[1].in_channels] == [least, least]
    assert student[1].out_channels == least
    assert student(images(2)).shape == (2, 5, SIDE, SIDE)


class Joined(nn.Module):
    """Two convolutions with dead channels, side by side, with other operations on each."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1).double(), nn.Conv2d(3, C, 3, padding=1).double()
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight[::2], layer.bias[::2] = 0, 0
        self.flat = flat
        self.last = (nn.Linear(14 * SIDE * SIDE, 5) if flat else nn.Conv2d(14, 5, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x))], 1)
        return self.last(x.flatten(1) if self.flat else x)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("criterion", ["reconstruction", "energy"])
def test_the_channels_of_each_part_of_a_concatenation_are_chosen_by_their_use(flat: bool, criterion: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Joined(flat=flat).eval()
    student = shrink(model, images().split(20), keep=0.5, criterion=criterion)
    assert torch.equal(student.a.weight, model.a.weight[1::2])
    assert torch.equal(student.b.weight, model.b.weight[1::2])
    torch.testing.assert_close(student(images(8, 1)), model(images(8, 1)), rtol=1e-5, atol=1e-5)


class Sum(nn.Module):
    """Two branches of the same features, of which the second has a dead channel, and a BatchNorm at its end."""

    def __init__(self, *, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.d.load_state_dict(self.c.state_dict())
        with torch.no_grad():
            self.d.weight[5], self.d.bias[5] = 0, 0
            self.c.weight[5], self.c.bias[5] = 0, 0
        self.a, self.b, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 3, 1)
        self.norm = norm
        if norm is not None:
            norm.running_var.uniform_(0.5, 3)
        if norm is not None and norm.affine:
            nn.init.uniform_(norm.weight, -2, -0.5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(F.relu(self.c(x))), self.b(F.relu(self.d(x)))
        return self.last(torch.tanh(left + (right if self.norm is None else self.norm(right))))


@pytest.mark.parametrize("affine", [None, False, True])
def test_the_end_of_a_branch_corrects_the_error_of_the_sum(affine: bool | None) -> None:
    """The first branch loses all features but one, of which the second has copies."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Sum(norm=None if affine is None else nn.BatchNorm2d(4, affine=affine)).double().eval()
    student = shrink(model, images(200).split(50), widths={"c": 1, "d": 7})
    assert (student.c.out_channels, student.d.out_channels) == (1, 7)
    torch.testing.assert_close(student(images(8, 1)), model(images(8, 1)), rtol=1e-2, atol=1e-3)


def test_a_layer_with_more_inputs_than_examples_is_refitted_with_an_intercept() -> None:
    """The inputs have a mean of about 1/2, so that weights alone would shift the outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 200), nn.Sigmoid(), nn.Linear(200, 4)).double().eval()
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = []
    student = shrink(model, [x], keep=0.5, on_step=steps.append)
    assert steps[-1].layer == "2"
    assert steps[-1].ridge < 1
    assert steps[-1].error < 0.5 * steps[-1].error_before
    torch.testing.assert_close(student(x).mean(0), model(x).mean(0), rtol=0, atol=1e-6)
    assert (student(x) - model(x)).square().mean() < 1e-3 * model(x).var(0).mean()


@pytest.mark.parametrize("criterion", ["reconstruction", "energy"])
def test_channels_of_a_large_mean_are_chosen_by_their_variance(criterion: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    spread = torch.tensor([1.0, 1.2, 0.5, 0.9, 0.7, 1.1])
    with torch.no_grad():
        model[0].weight.copy_(spread.diag())
        model[0].bias.fill_(1e4)
        model[2].weight.fill_(1)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    student = shrink(model, x.split(100), widths={"0": 4}, criterion=criterion)
    assert torch.equal(student[0].weight, model[0].weight[[0, 1, 3, 5]])


def test_two_channels_become_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.PReLU(2), nn.Conv2d(2, 3, 1)).double().eval()
    student = shrink(model, [images(8)], keep=0.5)
    assert (student[1].num_features, student[1].weight.numel(), student[1].running_mean.numel()) == (1, 1, 1)
    assert (student[2].num_parameters, student[2].weight.numel()) == (1, 1)


def test_a_grouped_convolution_with_more_inputs_than_examples_is_refitted() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = nn.Sequential(nn.Conv2d(4, 40, 1), nn.ReLU(), nn.Conv2d(40, 6, 3, groups=2)).double().eval()
    x = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = []
    student = shrink(model, [x], widths={"0": 30}, on_step=steps.append)
    assert (steps[-1].layer, student[2].groups, student[2].in_channels) == ("2", 2, 30)
    assert steps[-1].error < 0.8 * steps[-1].error_before
    torch.testing.assert_close(student(x), model(x), rtol=0, atol=1e-2)


def test_few_examples_need_a_larger_ridge() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 4)).double().eval()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = []
    shrink(model, [x], keep=0.5, on_step=steps.append)
    assert 1e-4 < steps[-1].ridge < 1
