"""Fine-tuning of a pretrained network: frozen BatchNorm, frozen parameters, and L2-SP regularization."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import Backbone
from kdlib_faces.teachers.files import TeacherNet

__all__ = ["FrozenBatchNorm", "L2SPLoss", "Part", "freeze_all_but"]

Part: TypeAlias = Literal["all", "tail", "embedding"]
"""Part of a backbone: all of it, what is behind its last stage, or its embedding layer."""


class FrozenBatchNorm(nn.Module):
    """A network whose BatchNorm layers stay in eval mode during training, and which converts images to its own format.

    Args:
        net: The network. Its tap paths get the prefix `net.`.
        frozen: Whether BatchNorm layers stay in eval mode.

    Examples:
        >>> from kdlib_faces.backbones import MobileFaceNet
        >>> net = FrozenBatchNorm(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)).train()
        >>> norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        >>> net.training, any(norm.training for norm in norms)
        (True, False)
    """

    def __init__(self, net: TeacherNet, *, frozen: bool = True) -> None:
        super().__init__()
        self.net, self.frozen = net, frozen

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Set the mode of all layers but the frozen ones."""
        super().train(mode)
        if self.frozen:
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of images in [-1, 1], RGB."""
        embeddings: Tensor = self.net(self.net.input_spec(images))
        return embeddings


def freeze_all_but(backbone: Backbone, part: Part) -> list[nn.Parameter]:
    """Freeze all parameters of a backbone except one part, and return the trainable ones.

    Args:
        backbone: A backbone whose modules are registered in the order in which they run.
        part: `"all"`, `"tail"` (behind the last stage) or `"embedding"` (the last linear or convolutional layer and what is
            behind it).

    Returns:
        The trainable parameters, in their order in the backbone.

    Raises:
        InputError: The backbone has no such part.
    """
    named = list(backbone.named_parameters())
    start = 0
    if part == "tail":
        last = f"{backbone.stages[-1]}."
        order = [name for name, _ in backbone.named_modules()]
        inside = max((at for at, name in enumerate(order) if f"{name}.".startswith(last)), default=len(order))
        behind = set(order[inside + 1 :])
        start = next((at for at, (name, _) in enumerate(named) if name.rpartition(".")[0] in behind), len(named))
    elif part == "embedding":
        layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        start = next((at for at, (name, _) in enumerate(named) if name.startswith(f"{layers[-1]}.")), len(named))
    if start >= len(named):
        raise InputError(f"age teacher: {type(backbone).__name__} has no parameters in its part {part!r}")
    for _, parameter in named[:start]:
        parameter.requires_grad_(False)
    return [parameter for _, parameter in named[start:] if parameter.requires_grad]


class L2SPLoss(nn.Module):
    """L2-SP regularization: `sum_p ||p - p_0||^2 / sum_p ||p_0||^2`, with `p_0` the values at construction.

    The loss depends on the parameters alone. As a `Term` it ignores the embeddings and targets that it is called with.

    Args:
        parameters: The trainable parameters. Parameters without gradient are left out.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> l2_sp = L2SPLoss(layer.parameters())
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(2), layer.bias.mul_(2)
        >>> round(float(l2_sp().detach()), 4)
        1.0

    References:
        Li, Grandvalet, Davoine: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018. We divide
        by the squared norm of the initial values; the paper's separate penalty on new layers is not included.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        # Plain tuples: neither the network's parameters nor their initial values belong to this module's state.
        self._pairs = tuple((each, each.detach().clone()) for each in parameters if each.requires_grad)

    def forward(self, *_: Tensor) -> Tensor:
        """Return the relative squared distance from the initial values."""
        distance, norm = torch.zeros(()), torch.zeros(())
        for parameter, start in self._pairs:
            start = start.to(parameter.device)
            distance = distance.to(parameter.device) + (parameter - start).float().square().sum()
            norm = norm.to(parameter.device) + start.float().square().sum()
        return distance / norm.clamp(min=1e-12)
