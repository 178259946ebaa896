"""Numbers of channels to keep, and the choice of the channels."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx

from kdlib._checks import check_name
from kdlib.compression._checks import check_width
from kdlib.compression.channels import ChannelMap, Reading, choose_channels, mix_channels
from kdlib.compression.covariance import Collector, Covariance
from kdlib.compression.spaces import ChannelSpace, Layout, reader_matrix

__all__ = ["choose_maps", "space_sizes"]


def space_sizes(
    layouts: Mapping[fx.Node, Layout], keep: float | None, widths: Mapping[str, int]
) -> dict[ChannelSpace, int]:
    """Return the number of channels that each reduced space keeps; `widths` overrides `keep`."""
    spaces = {segment.space: None for layout in layouts.values() for segment in layout.segments}
    written = {
        str(node.target): layout.segments[0].space
        for node, layout in layouts.items()
        if node.op == "call_module" and len(layout.segments) == 1
    }
    sizes = {
        space: space.blocks * max(1, round(keep * space.size / space.blocks))
        for space in spaces
        if keep is not None and not space.fixed and space.readers
    }
    for name, width in widths.items():
        check_name("shrink", "layer", name, written)
        space = written[name]
        check_width(name, width, space.size, fixed=space.fixed or not space.readers, blocks=space.blocks)
        sizes[space] = width
    return {space: size for space, size in sizes.items() if size < space.size}


def choose_maps(
    traced: fx.GraphModule,
    layouts: Mapping[fx.Node, Layout],
    sizes: Mapping[ChannelSpace, int],
    examples: Iterable[Tensor],
    *,
    criterion: str,
    positions: int,
    generator: torch.Generator,
) -> dict[ChannelSpace, ChannelMap]:
    """Choose the channels of each space, from their covariances on at most `positions` positions of each batch."""
    readers = {reader: None for space in sizes for reader in space.readers}
    sources = {reader.all_input_nodes[0]: None for reader in readers}
    covariances: dict[tuple[fx.Node, int], Covariance] = {}
    for batch in examples:
        Collector(traced, layouts, sources, covariances, positions, generator).run(batch)
    readings: dict[ChannelSpace, list[Reading]] = {}
    for reader in readers:
        (source,) = reader.all_input_nodes
        layer = traced.get_submodule(str(reader.target))
        start = 0
        for index, segment in enumerate(layouts[source].segments):
            count = segment.space.size * segment.repeat
            if segment.space in sizes:
                weights = reader_matrix(layer, start, count, segment.repeat)
                readings.setdefault(segment.space, []).append(Reading(weights, covariances[source, index].value()))
            start += count
    return {
        space: mix_channels(readings[space], size)
        if space.mixable and criterion == "reconstruction"
        else choose_channels(readings[space], size, blocks=space.blocks, criterion=criterion)
        for space, size in sizes.items()
    }
