"""The narrow network, layer by layer, beside the original one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kdlib.compression._checks import check_block
from kdlib.compression.refit import Fit, refit
from kdlib.compression.slicing import Maps, encode, encode_dim, kept_entries, slice_layer, slice_parameters
from kdlib.compression.spaces import ADDITIONS, Layout
from kdlib.compression.tracing import attribute, call, is_inside, replace

__all__ = ["Narrower", "ShrinkStep"]


@dataclass(frozen=True)
class ShrinkStep:
    """One layer of the narrower network.

    Args:
        layer: path of the layer.
        shape: shape of its weight.
        original_shape: shape of the weight in the original network.
        error_before: root mean square of the error of its output on held-out images before the refit, relative to the
            standard deviation of its target.
        error: the same after the refit.
        ridge: chosen ridge parameter; infinite if the layer was not changed.

    Examples:
        >>> step = ShrinkStep("conv1", (8, 3, 3, 3), (16, 3, 3, 3), error_before=0.5, error=0.1, ridge=1e-3)
        >>> step.shape[0] / step.original_shape[0]
        0.5
    """

    layer: str
    shape: tuple[int, ...]
    original_shape: tuple[int, ...]
    error_before: float
    error: float
    ridge: float

    def __str__(self) -> str:
        sizes = f"{'x'.join(map(str, self.original_shape))} -> {'x'.join(map(str, self.shape))}"
        return f"{self.layer}: {sizes}, error {self.error_before:.3f} -> {self.error:.3f}"


class Narrower:
    """Runs the original and the narrow network side by side and narrows each layer when it is reached."""

    def __init__(
        self,
        traced: fx.GraphModule,
        shapes: Mapping[fx.Node, tuple[int, ...]],
        layouts: Mapping[fx.Node, Layout],
        maps: Maps,
        student: nn.Module,
        *,
        positions: int,
        generator: torch.Generator,
        on_step: Callable[[ShrinkStep], None] | None,
    ) -> None:
        self.traced, self.shapes, self.layouts, self.maps, self.student = traced, shapes, layouts, maps, student
        self.positions, self.generator, self.on_step = positions, generator, on_step
        self.shifts: dict[fx.Node, Tensor] = {}

    def run(self, examples: Sequence[Tensor], drop: Sequence[str]) -> object:
        """Narrow the student, layer by layer; return its output on the first batch.

        Args:
            examples: batches of inputs.
            drop: paths of blocks that the student replaces by the identity.
        """
        nodes = list(self.traced.graph.nodes)
        blocks = self._drop(drop)
        last = {source: node for node in nodes for source in (*node.all_input_nodes, blocks.get(node)) if source}
        unused = {node: [source for source in last if last[source] is node] for node in last.values()}
        wide: dict[fx.Node, list[Any]] = {}
        narrow: dict[fx.Node, list[Any]] = {}
        same: set[fx.Node] = set()  # nodes with equal values in both networks
        for node in nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda source: narrow[source][0])
            inputs_same = all(source in same for source in node.all_input_nodes)
            wide[node] = _outputs(node, wide, self.traced, examples)
            if node in blocks:
                entry = blocks[node]
                if entry is not None:
                    narrow[node] = narrow[entry]
            elif inputs_same and not self._reduced(node):
                narrow[node] = wide[node]
                same.add(node)
            else:
                if node.op == "call_module" and node in self.layouts:
                    self._narrow(node, wide, narrow, exact=inputs_same)
                narrow[node] = _outputs(node, narrow, self.student, examples)
            for source in unused.get(node, ()):
                wide.pop(source)
                narrow.pop(source, None)
        return None

    def _drop(self, paths: Sequence[str]) -> dict[fx.Node, fx.Node | None]:
        """Replace blocks by the identity; return their nodes, each exit with the node whose value it takes."""
        found: dict[fx.Node, fx.Node | None] = {}
        for path in paths:
            inside = [node for node in self.traced.graph.nodes if is_inside(node, path)]
            exits = [node for node in inside if any(user not in inside for user in node.users)]
            entries = {source for node in inside for source in node.all_input_nodes if source not in inside}
            entries &= self.shapes.keys()
            check_block(path, nodes=len(inside), ends=len(exits) == len(entries) == 1, same=True)
            (entry,), (exit_,) = entries, exits
            same = self.shapes[entry] == self.shapes[exit_] and self.layouts.get(entry) == self.layouts.get(exit_)
            check_block(path, nodes=len(inside), ends=True, same=same)
            found |= {node: entry if node is exit_ else None for node in inside}
            replace(self.student, path, nn.Identity())
        return found

    def _reduced(self, node: fx.Node) -> bool:
        layout = self.layouts.get(node)
        return layout is not None and any(segment.space in self.maps for segment in layout.segments)

    def _narrow(
        self, node: fx.Node, wide: dict[fx.Node, list[Any]], narrow: dict[fx.Node, list[Any]], *, exact: bool
    ) -> None:
        """Put the narrow version of a layer into the student."""
        path, layer = str(node.target), self.traced.get_submodule(str(node.target))
        (source,) = node.all_input_nodes
        inside, outside = self.layouts.get(source), self.layouts[node]
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)):
            new = slice_parameters(layer, kept_entries(outside, self.maps))
            if node in self.shifts and isinstance(new, (nn.BatchNorm1d, nn.BatchNorm2d)):
                cast(Tensor, new.running_mean).sub_(self.shifts.pop(node))
            replace(self.student, path, new)
            return
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            return
        new = slice_layer(layer, inside, outside, self.maps)
        if not exact:
            fit = self._refit(node, new, wide, narrow)
            if self.on_step is not None:
                shapes = tuple(new.weight.shape), tuple(layer.weight.shape)
                self.on_step(ShrinkStep(path, *shapes, fit.error_before, fit.error, fit.ridge))
        replace(self.student, path, new)

    def _refit(
        self,
        node: fx.Node,
        new: nn.Conv2d | nn.Linear,
        wide: dict[fx.Node, list[Any]],
        narrow: dict[fx.Node, list[Any]],
    ) -> Fit:
        """Refit a sliced layer in place; a BatchNorm that follows takes the bias of a layer that has none."""
        (source,) = node.all_input_nodes
        outside, stream = self.layouts[node], self._stream(node, wide, narrow)

        def target(number: int) -> Tensor:
            value = encode(wide[node][number], outside, self.maps)
            if stream is None:
                return value
            other, scale = stream
            missing = encode(wide[other][number], self.layouts[other], self.maps) - narrow[other][number]
            factor = scale.to(value).reshape(-1, *[1] * (value.dim() - outside.dim - 1))
            return torch.addcmul(value, missing, factor)

        fit = refit(new, narrow[source], target, positions=self.positions, generator=self.generator)
        new.weight.add_(fit.weight)
        (user, *others) = node.users
        follower = self.traced.get_submodule(str(user.target)) if user.op == "call_module" else None
        if new.bias is not None:
            new.bias.add_(fit.bias)
        elif not others and isinstance(follower, nn.BatchNorm2d) and user in self.layouts:
            self.shifts[user] = fit.bias
        elif fit.bias.any():
            new.bias = nn.Parameter(fit.bias, requires_grad=new.weight.requires_grad)
        return fit

    def _stream(
        self, node: fx.Node, wide: dict[fx.Node, list[Any]], narrow: dict[fx.Node, list[Any]]
    ) -> tuple[fx.Node, Tensor] | None:
        """Return the stream that a layer's output is added to, and the factor from the sum to the layer's output."""
        (user, *others) = node.users
        scale = torch.ones(1)
        if not others and user.op == "call_module":
            norm = self.traced.get_submodule(str(user.target))
            if not isinstance(norm, nn.BatchNorm2d) or user not in self.layouts or len(user.users) != 1:
                return None
            gamma = norm.weight.detach() if norm.affine else torch.ones(norm.num_features)
            slope = gamma / (cast(Tensor, norm.running_var) + norm.eps).sqrt()
            usable = slope.abs() > 1e-3 * slope.abs().max()
            scale = torch.where(usable, 1 / torch.where(usable, slope, 1.0), 0.0)
            scale = encode_dim(scale, 0, self.layouts[user], self.maps)
            (user,) = user.users
        if others or user.target not in ADDITIONS or len(user.all_input_nodes) != 2 or user not in self.layouts:
            return None
        (other,) = (source for source in user.all_input_nodes if source is not node and not _leads_to(source, node))
        ready = other in wide and other in narrow and other in self.layouts
        return (other, scale) if ready and self.shapes[other] == self.shapes[user] else None


def _outputs(
    node: fx.Node, values: Mapping[fx.Node, list[Any]], model: nn.Module, examples: Sequence[Tensor]
) -> list[Any]:
    """Run one node on all batches."""
    if node.op == "placeholder":
        first = node.prev.op == "root"
        return list(examples) if first else [node.args[0] if node.args else None] * len(examples)
    if node.op == "get_attr":
        return [attribute(model, str(node.target))] * len(examples)
    return [
        call(node, {source: values[source][number] for source in node.all_input_nodes}, model)
        for number in range(len(examples))
    ]


def _leads_to(source: fx.Node, node: fx.Node) -> bool:
    """Return whether `source` is the BatchNorm after `node`."""
    return source.all_input_nodes == [node]
