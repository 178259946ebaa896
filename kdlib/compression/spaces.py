"""Channel spaces of a traced network: which channels have to be kept or removed together."""

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import lcm, prod
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["ADDITIONS", "ChannelSpace", "Layout", "Segment", "find_spaces", "is_depthwise", "reader_matrix"]

ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.MaxPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
LINEAR_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, nn.Upsample
)  # fmt: skip
ELEMENTWISE_FUNCTIONS: frozenset[object] = frozenset({
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.sigmoid, F.tanh, F.softplus, F.max_pool2d, F.adaptive_max_pool2d, torch.relu, torch.sigmoid, torch.tanh,
    torch.clamp, "relu", "relu_", "sigmoid", "tanh", "clamp",
})  # fmt: skip
LINEAR_FUNCTIONS: frozenset[object] = frozenset({
    F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, F.dropout2d, F.interpolate, "contiguous", "clone", "detach",
})  # fmt: skip
ADDITIONS: frozenset[object] = frozenset(
    {operator.add, operator.iadd, torch.add, operator.sub, torch.sub, "add", "add_"}
)
PRODUCTS: frozenset[object] = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})


@dataclass(eq=False)
class ChannelSpace:
    """Channels of one or more tensors that are kept or removed together.

    Args:
        size: number of channels c of the original network.
        fixed: no channel can be removed.
        blocks: the channels are this many consecutive blocks, each of which keeps the same number of channels.
        mixable: only linear maps over all channels write and read it, so the channels may be mixed linearly.
        readers: calls of dense or grouped layers that read the channels, by node.
    """

    size: int
    fixed: bool = False
    blocks: int = 1
    mixable: bool = True
    readers: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Segment:
    """A run of channels of one space; each channel takes `repeat` consecutive entries."""

    space: ChannelSpace
    repeat: int = 1


@dataclass(frozen=True)
class Layout:
    """Channels of a tensor: dimension `dim` holds the segments one after another."""

    dim: int
    segments: tuple[Segment, ...]


Layouts: TypeAlias = dict[fx.Node, Layout]


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution with one kernel per channel."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1


def find_spaces(traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> Layouts:
    """Find the channel spaces of a traced network.

    Operations that are not known fix the channels of their inputs, so that a network of any structure is shrunk
    correctly, if less than it could be.

    Args:
        traced: the network.
        shapes: shape of the output of each node that returns a tensor.

    Returns:
        Layout of each node whose channels are known. Nodes without a layout keep all channels.
    """
    return _Finder(traced, shapes).find()


class _Finder:
    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.graph, self.shapes = traced.graph, shapes
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self.calls = Counter(
            id(self.modules[str(node.target)]) for node in self.graph.nodes if node.op == "call_module"
        )
        shared = Counter(id(p) for module in traced.modules() for p in module.parameters(recurse=False))
        self.shared = {key for key, count in shared.items() if count > 1}
        self.layouts: Layouts = {}
        self.parents: dict[ChannelSpace, ChannelSpace] = {}

    def find(self) -> Layouts:
        for node in self.graph.nodes:
            layout = self._visit(node)
            if layout is not None and node in self.shapes:
                self.layouts[node] = layout
        return {
            node: Layout(layout.dim, tuple(Segment(self._root(s.space), s.repeat) for s in layout.segments))
            for node, layout in self.layouts.items()
        }

    def _visit(self, node: fx.Node) -> Layout | None:
        if node.op == "call_module":
            return self._visit_module(node, self.modules[str(node.target)])
        if node.op in ("call_function", "call_method"):
            return self._visit_function(node)
        if node.op == "output":
            self._fix(node.all_input_nodes)
        return None

    def _visit_module(self, node: fx.Node, layer: nn.Module) -> Layout | None:
        source = self.layouts.get(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else None
        repeated = self.calls[id(layer)] > 1 or any(id(p) in self.shared for p in layer.parameters(recurse=False))
        if type(layer) in (nn.Conv2d, nn.Linear) and not repeated and node in self.shapes:
            return self._visit_layer(node, layer, source)
        if source is None:
            return self._opaque(node)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and not repeated and layer.track_running_stats:
            return self._elementwise(source) if source.dim == 1 else self._opaque(node)
        if isinstance(layer, nn.PReLU) and (layer.num_parameters == 1 or (not repeated and source.dim == 1)):
            return self._elementwise(source)
        if isinstance(layer, ELEMENTWISE_MODULES):
            return self._elementwise(source)
        if isinstance(layer, LINEAR_MODULES):
            return source
        if isinstance(layer, nn.Flatten):
            return self._flatten(node, source, layer.start_dim, layer.end_dim)
        return self._opaque(node)

    def _visit_layer(self, node: fx.Node, layer: nn.Module, source: Layout | None) -> Layout | None:
        """Dense layers read one space and write another; depthwise convolutions keep the space."""
        dim = 1 if isinstance(layer, nn.Conv2d) else len(self.shapes[node]) - 1
        out = ChannelSpace(self.shapes[node][dim])
        if source is not None and source.dim != dim:
            self._fix(node.all_input_nodes)
            source = None
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            self._fix(node.all_input_nodes)
            return None
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            if source is None or len(source.segments) > 1 or source.segments[0].repeat > 1:
                self._fix(node.all_input_nodes)
                return None
            space = self._root(source.segments[0].space)
            space.mixable = False
            if is_depthwise(layer):
                return source
            space.blocks = lcm(space.blocks, layer.groups)
            out.blocks, out.mixable = layer.groups, False
        if source is not None:
            for segment in source.segments:
                self._root(segment.space).readers.append(node)
        return Layout(dim, (Segment(out),))

    def _visit_function(self, node: fx.Node) -> Layout | None:
        sources = [self.layouts.get(argument) for argument in node.all_input_nodes if argument in self.shapes]
        source = sources[0] if sources else None
        if node not in self.shapes:  # a size or another value that is not a tensor
            return None
        if node.target in ADDITIONS or node.target in PRODUCTS:
            return self._combine(node, mixable=node.target in ADDITIONS)
        if node.target in (torch.cat, torch.concat):
            return self._concatenate(node)
        if source is None or len(sources) != 1:
            return self._opaque(node)
        if node.target in ELEMENTWISE_FUNCTIONS:
            return self._elementwise(source)
        if node.target in LINEAR_FUNCTIONS:
            return source
        if node.target in (torch.flatten, "flatten"):
            ends = [*node.args[1:], node.kwargs.get("start_dim"), node.kwargs.get("end_dim")]
            start, *end = [end for end in ends if isinstance(end, int)] or [0]
            return self._flatten(node, source, start, end[0] if end else -1)
        if node.target in ("view", "reshape", torch.reshape):
            sizes = node.args[1:] if len(node.args) > 2 else node.args[1]
            free = isinstance(sizes, (tuple, list)) and len(sizes) == 2 and sizes[1] == -1
            return self._flatten(node, source, 1, -1) if free else self._opaque(node)
        if node.target in (torch.mean, "mean"):
            return self._average(node, source)
        return self._opaque(node)

    def _elementwise(self, source: Layout) -> Layout:
        for segment in source.segments:
            self._root(segment.space).mixable = False
        return source

    def _flatten(self, node: fx.Node, source: Layout, start: int, end: int) -> Layout | None:
        shape = self.shapes[node.all_input_nodes[0]]
        if source.dim != 1 or start != 1 or end not in (-1, len(shape) - 1):
            return self._opaque(node)
        inner = prod(shape[2:])
        return Layout(1, tuple(Segment(segment.space, segment.repeat * inner) for segment in source.segments))

    def _average(self, node: fx.Node, source: Layout) -> Layout | None:
        """An average over positions keeps the channels; over channels it does not."""
        shape, dims = (
            self.shapes[node.all_input_nodes[0]],
            node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"),
        )
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, (tuple, list)) or source.dim != 1:
            return self._opaque(node)
        averaged = {int(dim) % len(shape) for dim in dims if isinstance(dim, int)}
        return source if averaged and min(averaged) >= 2 else self._opaque(node)

    def _combine(self, node: fx.Node, *, mixable: bool) -> Layout | None:
        """Sums and products of tensors keep the same channels on both sides."""
        operands = [argument for argument in node.args if isinstance(argument, fx.Node) and argument in self.shapes]
        layouts = [self.layouts.get(operand) for operand in operands]
        first = layouts[0] if layouts else None
        if first is None or any(layout is None for layout in layouts):
            return self._opaque(node)
        shapes = [self.shapes[operand] for operand in operands]
        if len(operands) == 1:  # with a number
            return self._elementwise(first)
        second = layouts[1]
        assert second is not None
        if len(shapes[0]) != len(shapes[1]) or shapes[0][first.dim] != shapes[1][first.dim] or second.dim != first.dim:
            return self._opaque(node)
        if [s.repeat for s in first.segments] != [s.repeat for s in second.segments] or any(
            self._root(a.space).size != self._root(b.space).size
            for a, b in zip(first.segments, second.segments, strict=True)
        ):
            return self._opaque(node)
        for a, b in zip(first.segments, second.segments, strict=True):
            self._merge(a.space, b.space)
        return first if mixable else self._elementwise(first)

    def _concatenate(self, node: fx.Node) -> Layout | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        layouts = [self.layouts.get(operand) for operand in node.all_input_nodes]
        whole = len(node.args[0]) == len(layouts) if isinstance(node.args[0], (tuple, list)) else False
        if not whole or any(layout is None or layout.dim != dim for layout in layouts):
            return self._opaque(node)
        segments = tuple(segment for layout in layouts if layout is not None for segment in layout.segments)
        return Layout(int(str(dim)), segments)

    def _opaque(self, node: fx.Node) -> Layout | None:
        """An operation of unknown effect: its inputs keep all channels."""
        self._fix(node.all_input_nodes)
        return None

    def _fix(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            layout = self.layouts.get(node)
            for segment in layout.segments if layout is not None else ():
                self._root(segment.space).fixed = True

    def _root(self, space: ChannelSpace) -> ChannelSpace:
        while space in self.parents:
            space = self.parents[space]
        return space

    def _merge(self, a: ChannelSpace, b: ChannelSpace) -> None:
        a, b = self._root(a), self._root(b)
        if a is b:
            return
        a.fixed |= b.fixed
        a.mixable &= b.mixable
        a.blocks = lcm(a.blocks, b.blocks)
        a.readers.extend(b.readers)
        self.parents[b] = a


def reader_matrix(layer: nn.Module, start: int, count: int, repeat: int) -> Tensor:
    """Return the weights that read `count` inputs from `start`, as `(n, c)`: one row per output and kernel position.

    Each channel takes `repeat` consecutive inputs, as after flattening; each of them is one row, too.
    """
    weight = layer.get_parameter("weight").detach().double()
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        rows = weight.flatten(2).movedim(2, 1)  # (o, k, c / g)
        inner = rows.shape[2]
        dense = rows.new_zeros(*rows.shape[:2], layer.groups * inner)
        for group, part in enumerate(dense.chunk(layer.groups)):
            part[..., group * inner : (group + 1) * inner] = rows.chunk(layer.groups)[group]
        return dense.flatten(0, 1)
    part = weight[:, start : start + count]
    return part.reshape(len(part), count // repeat, -1).movedim(2, 1).flatten(0, 1)
