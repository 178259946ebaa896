"""Tracing of a network and the execution of its operations."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from kdlib.compression._checks import untraceable

__all__ = ["attribute", "call", "fold_norms_of", "is_inside", "record_shapes", "replace", "trace"]


class _Proxy(fx.Proxy):
    """A traced value that has the length of the example's."""

    tracer: "_Tracer"

    def __len__(self) -> int:
        return len(self.tracer.value(self.node))

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)


class _Attribute(fx.proxy.Attribute, _Proxy):
    """An attribute of a traced value."""


class _Tracer(fx.Tracer):
    """Traces a network for inputs like an example: conditions on shapes are decided as for the example."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.evaluating = False

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.value(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        values = range(len(self.value(obj.node)))
        return iter([self.create_proxy("call_function", operator.getitem, (obj, index), {}) for index in values])

    def value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return node.args[0] if node.args else self.example
        if node.op == "get_attr":
            return attribute(self.root, str(node.target))
        given = {source: self.value(source) for source in node.all_input_nodes}
        self.evaluating = True
        try:
            with torch.no_grad():
                return call(node, given, self.root)
        finally:
            self.evaluating = False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self.evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)


def call(node: fx.Node, given: Mapping[fx.Node, Any], model: nn.Module) -> Any:
    """Run one operation of a traced network on the values of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace a network for inputs `(b, ...)` like the example, without operations whose results are not used.

    Raises:
        TypeError: `torch.fx` cannot trace the network.
    """
    try:
        graph = _Tracer(example[:2]).trace(model)
    except Exception as error:  # tracing runs the model's own code
        raise untraceable(error) from error
    traced = fx.GraphModule(model, graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def fold_norms_of(model: nn.Module, example: Tensor) -> None:
    """Fold each BatchNorm into the layer before it, if only the BatchNorm reads that layer."""
    traced = trace(model, example)
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in traced.graph.nodes:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            continue
        (source,) = node.all_input_nodes
        if source.op != "call_module" or len(source.users) > 1 or calls[node.target] > 1 or calls[source.target] > 1:
            continue
        layer, norm = (model.get_submodule(str(call.target)) for call in (source, node))
        if isinstance(norm, nn.BatchNorm2d) and type(layer) is nn.Conv2d and norm.track_running_stats:
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(norm, nn.BatchNorm1d) and type(layer) is nn.Linear and norm.track_running_stats:
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        fused.requires_grad_(layer.weight.requires_grad)  # the fused bias does not require gradients by itself
        replace(model, str(source.target), fused)
        replace(model, str(node.target), nn.Identity())


def record_shapes(traced: fx.GraphModule, example: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Return the shape of each node that is a tensor."""
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    _Recorder(traced, shapes).run(example)
    return shapes


class _Recorder(fx.Interpreter):
    """Runs a network and notes the shape of each tensor."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        super().__init__(traced)
        self.shapes = shapes

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self.shapes[node] = tuple(value.shape)
        return value


def is_inside(node: fx.Node, path: str) -> bool:
    """Return whether a node was traced in the module at a path or in one below it."""
    return any(f"{entry}.".startswith(f"{path}.") for entry, _ in node.meta.get("nn_module_stack", {}).values())


def attribute(model: nn.Module, path: str) -> Any:
    """Return the attribute of a submodule at a dotted path, such as a parameter or a buffer."""
    *parents, name = path.split(".")
    return getattr(model.get_submodule(".".join(parents)), name)


def replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a module at the dotted path of another one."""
    *parents, name = path.split(".")
    setattr(model.get_submodule(".".join(parents)), name, layer)
