"""Covariances of the channels of a network on examples."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kdlib.compression.spaces import Layout

__all__ = ["Collector", "Covariance"]


class Covariance:
    """Covariance of the rows of several `(n, c)`, in float64."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.count = 0
        self.sum = like.new_zeros(size, dtype=torch.float64)
        self.outer = like.new_zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.outer += rows.T @ rows

    def value(self) -> Tensor:
        mean = self.sum / self.count
        return self.outer / self.count - torch.outer(mean, mean)


class Collector(fx.Interpreter):
    """Runs a network and accumulates the covariance of the channels of some nodes, by segment."""

    def __init__(
        self,
        traced: fx.GraphModule,
        layouts: Mapping[fx.Node, Layout],
        wanted: Iterable[fx.Node],
        sums: dict[tuple[fx.Node, int], Covariance],
        positions: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(traced)
        self.layouts, self.wanted, self.sums = layouts, set(wanted), sums
        self.positions, self.generator = positions, generator

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.wanted:
            layout = self.layouts[node]
            sizes = [segment.space.size * segment.repeat for segment in layout.segments]
            for index, part in enumerate(value.detach().split(sizes, layout.dim)):
                segment = layout.segments[index]
                rows = part.unflatten(layout.dim, (-1, segment.repeat)).movedim(layout.dim, -1).flatten(0, -2)
                chosen = torch.randperm(len(rows), generator=self.generator)[: self.positions].to(rows.device)
                if (node, index) not in self.sums:
                    self.sums[node, index] = Covariance(segment.space.size, rows)
                self.sums[node, index].add(rows[chosen].double())
        return value
