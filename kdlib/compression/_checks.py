"""Argument checks of the compression."""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_finite, check_number, check_type

__all__ = [
    "check_batches", "check_block", "check_layer_shape", "check_model", "check_options", "check_same", "check_state", "check_width",
    "untraceable",
]  # fmt: skip


def check_batches(batches: Iterable[object]) -> list[Tensor]:
    """`batches` must yield at least one tensor of at least one sample."""
    if isinstance(batches, Tensor):
        raise TypeError("shrink: batches must be an iterable of tensors, got one torch.Tensor; give [tensor]")
    examples = [check_batch(number, batch) for number, batch in enumerate(batches)]
    if not examples:
        raise ValueError("shrink: batches must hold at least one batch, got none")
    return examples


def check_width(name: str, width: object, size: int, *, fixed: bool, blocks: int) -> None:
    """The channels of a layer must be removable, and their number must suit grouped convolutions."""
    check_number("shrink", f"widths[{name!r}]", width, min=1, max=size, integer=True)
    if fixed:
        raise ValueError(
            f"shrink: widths: the channels of {name!r} cannot be removed: the output of the model or an operation of "
            "unknown effect uses them"
        )
    if cast(int, width) % blocks:
        raise ValueError(
            f"shrink: widths[{name!r}] must be a multiple of {blocks} for a grouped convolution, got {width}"
        )


def check_block(path: str, *, nodes: int, ends: bool, same: bool) -> None:
    """A block to drop must exist, have one input and one output, and keep the channels."""
    if not nodes:
        raise ValueError(f"shrink: drop must hold paths of blocks of the model, got {path!r}")
    if not ends:
        raise ValueError(f"shrink: drop: block {path!r} must have one input and one output")
    if not same:
        raise ValueError(f"shrink: drop: block {path!r} must return the channels it receives, as a residual block does")


def untraceable(error: Exception) -> TypeError:
    """Return the error of a model that cannot be traced."""
    return TypeError(
        f"shrink: model must be traceable by torch.fx: {error}. Operations that depend on values have to move out of "
        "forward"
    )


def check_options(model: object, keep: object, widths: object, criterion: object, positions: object) -> None:
    """Check the arguments of `shrink`; `keep` or `widths` must be given."""
    check_model("shrink", model)
    if keep is None and widths is None:
        raise ValueError("shrink: keep or widths must be given, got neither")
    if keep is not None:
        check_number("shrink", "keep", keep, above=0, max=1)
    if widths is not None:
        check_type("shrink", "widths", widths, Mapping, "a mapping of layer paths to numbers of channels")
    check_choice("shrink", "criterion", criterion, ("reconstruction", "energy"))
    check_number("shrink", "positions", positions, min=1, integer=True)


def check_model(owner: str, model: object) -> None:
    """`model` must be a Module."""
    check_type(owner, "model", model, nn.Module, "a Module")


def check_state(state: object) -> None:
    """A state dict must map names to tensors."""
    check_type("narrow_like", "state_dict", state, Mapping, "a mapping of names to tensors")
    for name, value in cast(Mapping[str, object], state).items():
        check_type("narrow_like", f"state_dict[{name!r}]", value, Tensor, "a torch.Tensor")


def check_layer_shape(path: str, name: str, shape: tuple[int, ...], original: tuple[int, ...]) -> None:
    """A narrower layer has at least one and at most the original number of channels, and the same kernel."""
    fits = len(shape) == len(original) and shape[2:] == original[2:]
    if not fits or not all(1 <= new <= old for new, old in zip(shape, original, strict=True)):
        raise ValueError(
            f"narrow_like: state_dict[{f'{path}.{name}'!r}] must have a shape of at most {original}, got {shape}; "
            "build the model with the arguments of the network that was shrunk"
        )


def check_same_channels(path: str, name: str, shape: tuple[int, ...], channels: int, like: str) -> None:
    """All tensors of a layer have the same channels."""
    if shape != (channels,):
        raise ValueError(
            f"narrow_like: state_dict[{f'{path}.{name}'!r}] must have the shape {(channels,)}, as {path}.{like} has {channels} "
            f"channels, got {shape}; the saved weights are damaged"
        )


def check_batch(number: int, batch: object) -> Tensor:
    """A batch must be a finite tensor `(b, ...)` of at least one sample."""
    check_type("shrink", f"batch {number}", batch, Tensor, "a torch.Tensor")
    x = cast(Tensor, batch)
    if x.dim() < 2 or not len(x):
        raise ValueError(f"shrink: batch {number} must be (b, ...) with b >= 1, got {tuple(x.shape)}")
    if x.is_floating_point():
        check_finite("shrink", **{f"batch {number}": x})
    return x


def check_same(found: object, expected: object) -> None:
    """The student must compute what the side-by-side run computed, or its forward depends on the number of channels."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    if not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())) for a, b in pairs
    ):
        raise RuntimeError(
            "shrink: the forward of the model must not depend on the number of channels, but the narrow copy computes "
            "other values than the traced network"
        )


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [x for entry in value.values() for x in _tensors(entry)]
    return [x for entry in value for x in _tensors(entry)] if isinstance(value, (tuple, list)) else []
