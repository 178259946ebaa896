"""A narrower copy of a trained network, with the layers after each removed channel refitted by least squares."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdlib.compression._checks import check_batches, check_options, check_same
from kdlib.compression.narrow import Narrower, ShrinkStep
from kdlib.compression.plan import choose_maps, space_sizes
from kdlib.compression.spaces import find_spaces
from kdlib.compression.tracing import fold_norms_of, record_shapes, trace

__all__ = ["ShrinkStep", "shrink"]

T = TypeVar("T", bound=nn.Module)


def shrink(
    model: T,
    batches: Iterable[Tensor],
    *,
    keep: float | None = None,
    widths: Mapping[str, int] | None = None,
    drop: Sequence[str] = (),
    fold_norms: bool = False,
    criterion: str = "reconstruction",
    positions: int = 60_000,
    seed: int = 0,
    on_step: Callable[[ShrinkStep], None] | None = None,
) -> T:
    r"""Make a narrower copy of a trained network that reproduces its outputs on example inputs, without training.

    1. The network is traced, and channels that must be kept or removed together are grouped: through additions and
       products, depthwise and grouped convolutions, BatchNorm, PReLU, pooling, concatenation and flattening. The
       channels of the output, and those that an unknown operation reads or writes, stay.
    2. In each group the channels are chosen from which the outputs of the layers that read them are best predicted
       (`criterion`). A residual stream that only linear layers read and write keeps mixtures of channels instead.
    3. Layer by layer, from the input to the output, the narrowed layer is refitted on the activations of the narrow
       network towards the outputs of the original one, so that an error is corrected by the layers after it. A layer
       that ends a residual branch also corrects the error of the stream that it is added to.

    Outputs are equal if nothing is removed, and equal up to rounding if only dead or redundant channels are. Activations
    of all batches are kept while layers need them: 1,000 images are a few gigabytes for a network of 112 x 112 pixels.

    Args:
        model: a network that `torch.fx` can trace; it is not changed.
        batches: example inputs `(b, ...)`, as the model receives them; 1,000 to 4,000 images are enough for most networks.
        keep: fraction of the channels to keep in every group, above 0 and at most 1.
        widths: path of a layer to the number of channels that its group keeps; overrides `keep`.
        drop: paths of blocks to replace by the identity; their outputs must have the shape of their inputs.
        fold_norms: fold each BatchNorm into the convolution or linear layer before it. A residual stream whose branches
            end in a BatchNorm can then keep mixtures of channels, which costs less accuracy than removing channels.
        criterion: `"reconstruction"`, greedy removal by the error after a refit of all readers; or `"energy"`, variance
            of a channel times the squared weights that read it.
        positions: number of positions (pixels of feature maps) of each layer that enter its refit.
        seed: seed of the sampled positions.
        on_step: called after each layer, for progress and for the error that the layer costs.

    Returns:
        A copy of the model of the same class, with narrower layers, on the same device and in the same mode.

    Raises:
        ValueError: A number is out of range, a layer does not exist, its channels are fixed, or there is no batch.
        TypeError: An argument has the wrong type, or the model cannot be traced.
        RuntimeError: The model's forward contains the number of channels as a constant.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(288, 4))
        >>> student = shrink(model, [torch.rand(32, 3, 8, 8)], keep=0.5)
        >>> student[0], student[2]
        (Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)), Conv2d(8, 4, kernel_size=(1, 1), stride=(1, 1)))

    References:
        He, Zhang, Sun, *Channel Pruning for Accelerating Very Deep Neural Networks*, arXiv 1707.06168, for the refit on
        the narrow network's activations; Hassibi, Stork, *Second order derivatives for network pruning: Optimal Brain
        Surgeon*, 1993, for the removal costs, here of whole channels.
    """
    check_options(model, keep, widths, criterion, positions)
    examples = check_batches(batches)
    modes = {name: module.training for name, module in model.named_modules()}
    original, student = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    share = -(-positions // len(examples))
    with torch.no_grad():
        if fold_norms:
            for network in (original, student):
                fold_norms_of(network, examples[0])
        traced = trace(original, examples[0])
        shapes = record_shapes(traced, examples[0])
        layouts = find_spaces(traced, shapes)
        sizes = space_sizes(layouts, keep, widths or {})
        maps = choose_maps(traced, layouts, sizes, examples, criterion=criterion, positions=share, generator=generator)
        narrower = Narrower(
            traced, shapes, layouts, maps, student, positions=share, generator=generator, on_step=on_step
        )
        expected = narrower.run(examples, drop)
        check_same(student(examples[0]), expected)
    for name, module in student.named_modules():
        module.training = modes.get(name, False)  # a module that was shared may have a name of its own now
    return student
