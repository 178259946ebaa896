"""A small model with taps of every kind, for the tests of adapters."""

import torch
from torch import Tensor, nn

from kdlib.adapters import OUTPUT


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


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
