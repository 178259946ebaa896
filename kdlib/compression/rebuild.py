"""The structure of a narrow network, from the shapes of its saved weights."""

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from kdlib.compression._checks import check_layer_shape, check_model, check_same_channels, check_state
from kdlib.compression.spaces import is_depthwise
from kdlib.compression.tracing import replace

__all__ = ["narrow_like"]

T = TypeVar("T", bound=nn.Module)


def narrow_like(model: T, state_dict: Mapping[str, Tensor]) -> T:
    """Give a network of the original size the structure of a shrunk one, so that its saved weights can be loaded.

    Convolutions, linear layers, BatchNorm and PReLU take the shapes of `state_dict`. A module of which `state_dict` contains
    no entry becomes the identity: a block that was dropped, or a BatchNorm that was folded into the layer before it.

    Args:
        model: a network built as the one that was shrunk; it is not changed. It may be on the `meta` device.
        state_dict: weights of the shrunk network; only keys and shapes are read.

    Returns:
        A copy of the model, in which the weights of the changed layers are zero; call its `load_state_dict(state_dict)`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A shape belongs to no narrower version of its layer.

    Examples:
        >>> import torch
        >>> from kdlib.compression import shrink
        >>> def build():
        ...     return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
        >>> student = shrink(build(), [torch.rand(16, 3, 8, 8)], keep=0.5)
        >>> again = narrow_like(build(), student.state_dict())
        >>> again.load_state_dict(student.state_dict()), again[0].out_channels
        (<All keys matched successfully>, 8)
    """
    check_model("narrow_like", model)
    check_state(state_dict)
    student = copy.deepcopy(model)
    _drop(student, "", state_dict)
    for path, module in list(student.named_modules()):
        own = [name for name, _ in module.named_parameters(recurse=False)]
        own += [name for name, _ in module.named_buffers(recurse=False)]
        shapes = {name: tuple(state_dict[f"{path}.{name}"].shape) for name in own if f"{path}.{name}" in state_dict}
        no_new_bias = "bias" in own or f"{path}.bias" not in state_dict
        if no_new_bias and all(tuple(getattr(module, name).shape) == shape for name, shape in shapes.items()):
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            replace(student, path, _layer(path, module, shapes, state_dict.get(f"{path}.bias")))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)):
            replace(student, path, _parameters(path, module, shapes))
    return student


def _drop(module: nn.Module, prefix: str, state: Mapping[str, Tensor]) -> None:
    """Replace submodules that have weights, but none in the saved state, by the identity."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        keys = child.state_dict().keys()
        if keys and not any(f"{path}{key}" in state for key in keys):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, path, state)


def _layer(
    path: str, layer: nn.Conv2d | nn.Linear, shapes: Mapping[str, tuple[int, ...]], bias: Tensor | None
) -> nn.Conv2d | nn.Linear:
    old = tuple(layer.weight.shape)
    shape = shapes.get("weight", old)
    check_layer_shape(path, "weight", shape, old)
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = shape
    else:
        new.groups = shape[0] if is_depthwise(layer) else new.groups
        new.out_channels, new.in_channels = shape[0], shape[1] * new.groups
    new.weight = _resized(layer.weight, shape)
    if bias is not None or layer.bias is not None:
        size = tuple(bias.shape) if bias is not None else (shape[0],)
        check_same_channels(path, "bias", size, shape[0], "weight")
        new.bias = _resized(layer.weight if layer.bias is None else layer.bias, size)
    return new


def _parameters(path: str, layer: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Return a BatchNorm or PReLU with as many channels as its saved parameters have."""
    new = copy.deepcopy(layer)
    first: tuple[str, int] | None = None
    for name, old in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        shape = shapes.get(name, (first[1],) if first and old.dim() else tuple(old.shape))
        check_layer_shape(path, name, shape, tuple(old.shape))
        if shape:  # all but the number of batches
            first = first or (name, shape[0])
            check_same_channels(path, name, shape, first[1], first[0])
        setattr(new, name, _resized(old, shape) if isinstance(old, nn.Parameter) else old.new_zeros(shape))
    if isinstance(new, (nn.BatchNorm1d, nn.BatchNorm2d)):
        new.num_features = shapes.get("weight", shapes.get("running_mean", (new.num_features,)))[0]
    elif isinstance(new, nn.PReLU):
        new.num_parameters = new.weight.numel()
    return new


def _resized(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(parameter.detach().new_zeros(shape), requires_grad=parameter.requires_grad)
