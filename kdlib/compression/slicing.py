"""Weights and values of the channels that a narrower network keeps."""

import copy
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kdlib.compression.channels import ChannelMap
from kdlib.compression.spaces import ChannelSpace, Layout, is_depthwise

__all__ = ["Maps", "encode", "encode_dim", "kept_entries", "slice_layer", "slice_parameters"]

Maps: TypeAlias = Mapping[ChannelSpace, ChannelMap]
"""The spaces that are reduced, with the channels that they keep."""


def encode_dim(x: Tensor, dim: int, layout: Layout, maps: Maps) -> Tensor:
    """Map values along `dim` from the original's channels to those of the narrow network."""
    return _map(x, dim, layout, maps, ChannelMap.encode)


def _map(
    x: Tensor, dim: int, layout: Layout, maps: Maps, method: Callable[[ChannelMap, Tensor, int], Tensor]
) -> Tensor:
    sizes = [segment.space.size * segment.repeat for segment in layout.segments]
    parts = []
    for part, segment in zip(torch.split(x, sizes, dim), layout.segments, strict=True):
        if segment.space in maps:
            channels = torch.unflatten(part, dim, (segment.space.size, segment.repeat))
            part = method(maps[segment.space], channels, dim).flatten(dim, dim + 1)
        parts.append(part)
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def encode(x: Tensor, layout: Layout, maps: Maps) -> Tensor:
    """Map a tensor of the original network to the narrow network's channels."""
    return encode_dim(x, layout.dim, layout, maps)


def slice_layer(
    layer: nn.Conv2d | nn.Linear, inside: Layout | None, outside: Layout, maps: Maps
) -> nn.Conv2d | nn.Linear:
    """Return the layer with the weights of the kept channels, before its refit."""
    new = copy.deepcopy(layer)
    weight, bias = layer.weight.detach(), layer.bias
    if is_depthwise(layer):
        weight = encode_dim(weight, 0, outside, maps)
    elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
        weight = _slice_groups(weight, layer, inside, maps)
        weight = encode_dim(weight, 0, outside, maps)
    else:
        weight = encode_dim(weight, 0, outside, maps)
        weight = weight if inside is None else _map(weight, 1, inside, maps, ChannelMap.decode)
    new.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        reduced = encode_dim(bias.detach(), 0, outside, maps)
        new.bias = nn.Parameter(reduced.clone(), requires_grad=bias.requires_grad)
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = weight.shape
    else:
        new.out_channels = weight.shape[0]
        new.groups = weight.shape[0] if is_depthwise(layer) else new.groups
        new.in_channels = weight.shape[1] * new.groups
    return new


def _slice_groups(weight: Tensor, layer: nn.Conv2d, inside: Layout | None, maps: Maps) -> Tensor:
    """Return the weights `(o, k / g, ...)` of a grouped convolution for the kept inputs of each group."""
    found = maps.get(inside.segments[0].space) if inside is not None else None
    if found is None or found.kept is None:
        return weight
    inner = weight.shape[1]
    local = found.kept.reshape(layer.groups, -1) % inner
    groups = torch.unflatten(weight, 0, (layer.groups, -1))
    return torch.stack([part.index_select(1, kept) for part, kept in zip(groups, local, strict=True)]).flatten(0, 1)


def kept_entries(layout: Layout, maps: Maps) -> Tensor:
    """Return the entries of a tensor's channels that stay."""
    size = sum(segment.space.size * segment.repeat for segment in layout.segments)
    return encode_dim(torch.arange(size), 0, layout, maps)


def slice_parameters(layer: nn.Module, kept: Tensor) -> nn.Module:
    """Return a BatchNorm or PReLU with the parameters and statistics of some channels."""
    new = copy.deepcopy(layer)
    for name, parameter in layer.named_parameters(recurse=False):
        if parameter.numel() > 1:  # one slope of a PReLU is for all channels
            chosen = parameter.detach()[kept.to(parameter.device)].clone()
            setattr(new, name, nn.Parameter(chosen, requires_grad=parameter.requires_grad))
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.dim():
            setattr(new, name, buffer[kept.to(buffer.device)].clone())
    if isinstance(new, (nn.BatchNorm1d, nn.BatchNorm2d)):
        new.num_features = len(kept)
    elif isinstance(new, nn.PReLU) and new.num_parameters > 1:
        new.num_parameters = len(kept)
    return new
