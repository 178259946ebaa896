"""Argument checks that only losses use."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdlib._checks import (
    check_batches,
    check_choice,
    check_dtype_whole,
    check_finite,
    check_floating,
    check_number,
    check_pair,
    check_rank,
    check_relation_reduction,
    check_same_batch,
    check_shape,
    check_type,
    check_weight,
    readable,
    show_shape,
)  # fmt: skip
from kdlib._layouts import grid_of, shown_layout

__all__ = [
    "check_affine", "check_batch_limit", "check_channels", "check_classes", "check_epoch", "check_gathered_reduction",
    "check_hidden", "check_layers", "check_layout", "check_layouts", "check_levels", "check_logits", "check_map",
    "check_margin", "check_mask", "check_order", "check_relation", "check_same_layers", "check_square", "check_trained",
    "no_second_derivative",
]  # fmt: skip


def check_gathered_reduction(owner: str, gather: bool, reduction: str) -> None:
    """With `gather` all processes return the same single value, so `reduction` must be `"mean"`."""
    if gather and reduction != "mean":
        raise ValueError(
            f"{owner}: reduction must be 'mean' with gather: the processes share one value, got {reduction!r}"
        )


def check_layout(owner: str, name: str, x: Tensor, layout: str | None, argument: str, choices: Sequence[str]) -> str:
    """Return the layout of `x`, one of `choices`: the given one, or `"bchw"` if its shape shows it."""
    if layout is not None:
        check_choice(owner, argument, layout, choices)
        check_rank(owner, name, x, " ".join(layout))
        return layout
    shown = shown_layout(x)
    if shown == "bchw":
        return shown
    if x.dim() not in map(len, choices):
        wanted = ", ".join(f"({', '.join(choice)})" for choice in choices[:-1])
        raise ValueError(f"{owner}: {name} must be {wanted} or ({', '.join(choices[-1])}), got {show_shape(x)}")
    which = "'bnd' for tokens (b, n, d)" + (" or 'bhw' for attention maps (b, h, w)" if "bhw" in choices else "")
    which = which if x.dim() == 3 else "'bhwc' for channels last or 'bchw' for channels first"
    raise ValueError(f"{owner}: the layout of {name} {show_shape(x)} is ambiguous; give {argument}={which}")


def check_layouts(owner: str, **layouts: str | None) -> None:
    """Each named argument must be a layout of maps, or None."""
    for name, layout in layouts.items():
        if layout is not None:
            check_choice(owner, name, layout, ("bchw", "bhwc"))


def check_map(owner: str, name: str, x: Tensor, layout: str | None, argument: str = "layout") -> Tensor:
    """Return a feature map with channels first, from the layout `"bchw"` or `"bhwc"` or one that its shape shows."""
    return x.movedim(3, 1) if check_layout(owner, name, x, layout, argument, ("bchw", "bhwc")) == "bhwc" else x


def check_square(owner: str, name: str, tokens: int) -> tuple[int, int]:
    """Return the grid of that many tokens, which must be square."""
    grid = grid_of(tokens)
    if grid is None:
        raise ValueError(
            f"{owner}: {name} must hold the tokens of a square grid or of the other side's grid, got {tokens}; reshape "
            "other grids to (b, h, w, c), layout 'bhwc'"
        )
    return grid


def check_levels(owner: str, levels: object) -> tuple[int, ...]:
    """Return `levels`, which must be a sequence or an array of whole numbers of at least 1."""
    levels = levels.tolist() if isinstance(levels, (np.ndarray, Tensor)) else levels
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"{owner}: levels must be a sequence of whole numbers, got {type(levels).__name__}")
    return tuple(check_number(owner, f"levels[{k}]", level, min=1, integer=True) for k, level in enumerate(levels))


def check_affine(owner: str, norm: object) -> None:
    """`norm` must have a weight and a bias of the same length, as BatchNorm with `affine=True`."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    good = isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dim() == 1 and weight.shape == bias.shape
    if not good:
        raise TypeError(f"{owner}: norm must have a weight and a bias (c,), as BatchNorm2d(c), got {norm!r}")


def check_margin(owner: str, margin: object, channels: int | None) -> None:
    """`margin` must be a number of at most 0, or a tensor `(c,)` of such numbers."""
    if not isinstance(margin, Tensor):
        check_number(owner, "margin", margin, max=0)
        return
    check_floating(owner, margin=margin)
    if margin.dim() > 1 or (margin.dim() == 1 and channels is not None and margin.shape[0] != channels):
        expected = "(c,)" if channels is None else f"(c,) = ({channels},)"
        raise ValueError(f"{owner}: margin must be {expected} or a number, got {show_shape(margin)}")
    if margin.numel() == 0 or not readable(margin):
        return  # only on the CPU: reading would wait for a device
    check_finite(owner, margin=margin)
    if margin.amax() > 0:
        raise ValueError(f"{owner}: margin must be <= 0, got {margin.amax().item():g}")


def no_second_derivative() -> RuntimeError:
    """Return the error of a gradient that is differentiated again."""
    return RuntimeError("this loss has a gradient, but no second derivative")


def check_logits(owner: str, student: Tensor, teacher: Tensor, dim: int, mask: Tensor | None) -> None:
    """Logits of both sides must have the same shape, with the classes at `dim`; a mask has it without `dim`."""
    check_floating(owner, student=student, teacher=teacher)
    if student.dim() < 3 and dim in (1, -1):
        check_pair(owner, student, teacher, "b c")
    else:
        check_rank(owner, "student", student, "b c ...")
        if not (-student.dim() < dim < student.dim() and dim):
            raise ValueError(
                f"{owner}: dim must be from 1 to {student.dim() - 1}, or from {1 - student.dim()} to -1, got {dim}"
            )
        if student.shape != teacher.shape:
            raise ValueError(
                f"{owner}: teacher must have the shape of student {show_shape(student)}, got {show_shape(teacher)}; the "
                "logits must be of the same classes and positions"
            )
    if mask is not None:
        positions = [size for index, size in enumerate(student.shape) if index != dim % student.dim()]
        check_mask(owner, mask, tuple(positions))


def check_classes(owner: str, target: object, positions: tuple[int, ...], classes: int, mask: Tensor | None) -> None:
    """`target` must hold the class of each position that is not masked: a whole number from 0 to below `classes`.

    On an accelerator the values are not read, because that would force a wait.
    """
    check_type(owner, "target", target, Tensor, "a torch.Tensor")
    if not isinstance(target, Tensor):
        return
    check_dtype_whole(owner, "target", target)
    if tuple(target.shape) != positions:
        expected = f"(b,) with b = {positions[0]}" if len(positions) == 1 else f"{positions}, one class per position"
        raise ValueError(f"{owner}: target must be {expected}, got {show_shape(target)}")
    if target.device.type != "cpu" or not readable(target):
        return
    seen = target if mask is None else target[mask.cpu()]
    wrong = seen[(seen < 0) | (seen >= classes)]
    if len(wrong):
        hint = "; leave an ignore index out by mask=target != ignore_index" if mask is None else " where mask is True"
        raise ValueError(f"{owner}: target must be from 0 to below c = {classes}, got {int(wrong[0])}{hint}")


def check_mask(owner: str, mask: object, positions: tuple[int, ...]) -> None:
    """`mask` must be a boolean tensor of one value per position."""
    check_type(owner, "mask", mask, Tensor, "a torch.Tensor")
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise TypeError(f"{owner}: mask must be a boolean tensor, got {mask.dtype}; use mask != 0")
    if isinstance(mask, Tensor) and tuple(mask.shape) != positions:
        raise ValueError(
            f"{owner}: mask must be {positions}, the shape of the logits without the classes, got {show_shape(mask)}"
        )


def check_hidden(
    owner: str, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    """Hidden states of both sides must have the same positions, and both output matrices the same vocabulary."""
    check_floating(
        owner, student_hidden=student_hidden, student_weight=student_weight, teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
    )  # fmt: skip
    for side, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        check_rank(owner, f"{side}_hidden", hidden, "b d ...")
        check_rank(owner, f"{side}_weight", weight, "v d")
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{owner}: {side}_weight must be (v, d) with d = {hidden.shape[-1]} of {side}_hidden, got {show_shape(weight)}"
            )
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"{owner}: teacher_hidden must have the positions of student_hidden {tuple(student_hidden.shape[:-1])}, got "
            f"{tuple(teacher_hidden.shape[:-1])}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"{owner}: both vocabularies must have the same size, got v = {student_weight.shape[0]} of the student and "
            f"{teacher_weight.shape[0]} of the teacher; pass the rows of the tokens that both share, in the same order"
        )


def check_channels(owner: str, name: str, channels: object) -> tuple[int, ...]:
    """Return `channels`, which must be a sequence of at least one whole number of at least 1."""
    channels = channels.tolist() if isinstance(channels, (np.ndarray, Tensor)) else channels
    if isinstance(channels, (str, bytes)) or not isinstance(channels, Sequence):
        raise TypeError(
            f"{owner}: {name} must be a sequence with the channels of each layer, got {type(channels).__name__}"
        )
    if not channels:
        raise ValueError(f"{owner}: {name} must hold the channels of at least one layer, got none")
    return tuple(check_number(owner, f"{name}[{k}]", each, min=1, integer=True) for k, each in enumerate(channels))


def check_same_layers(owner: str, students: Sequence[int], teachers: Sequence[int]) -> None:
    """Both sides must have the same number of layers."""
    if len(students) != len(teachers):
        raise ValueError(
            f"{owner}: teacher_channels must have one number for each of the {len(students)} student_channels, got "
            f"{len(teachers)}"
        )


def check_relation(owner: str, student: Tensor, teacher: Tensor, reduction: str, weight: Tensor | None) -> None:
    """A relation loss compares two batches of equal length, of any feature shape, and returns one value per batch."""
    check_relation_reduction(owner, reduction)
    check_batches(owner, "b d ...", student=student, teacher=teacher)
    check_weight(owner, weight, student.shape[0])


def check_layers(
    owner: str, students: object, student_channels: Sequence[int], teachers: object, teacher_channels: Sequence[int]
) -> None:
    """Both sides must be sequences of maps `(b, c, h, w)` or vectors `(b, c)` with these channels and one batch size."""
    first: Tensor | None = None
    for side, layers, channels in (
        ("student", students, student_channels),
        ("teacher", teachers, teacher_channels),
    ):
        name = f"{side}s"
        if isinstance(layers, (Tensor, str, bytes)) or not isinstance(layers, Sequence):
            raise TypeError(
                f"{owner}: {name} must be a list of {len(channels)} tensors, one for each of {side}_channels, got "
                f"{type(layers).__name__}; give the Term a list of taps, {side}=[...]"
            )
        if len(layers) != len(channels):
            raise ValueError(
                f"{owner}: {name} must hold {len(channels)} tensors, one for each of {side}_channels, got {len(layers)}"
            )
        for k, (layer, count) in enumerate(zip(layers, channels, strict=True)):
            at = f"{name}[{k}]"
            check_floating(owner, **{at: layer})
            layout = "b c" if layer.dim() == 2 else "b c h w"
            check_rank(owner, at, layer, layout)
            check_shape(owner, at, layer, layout, c=count)
            first = layer if first is None else first
            check_same_batch(owner, "students[0]", first, at, layer)


def check_batch_limit(owner: str, batch: int, limit: int | None) -> None:
    """The batch must not exceed `batch_size`."""
    if limit is not None and batch > limit:
        raise ValueError(
            f"{owner}: students must hold at most batch_size = {limit} samples, got {batch}; give a larger batch_size, or "
            "batch_size=None"
        )


def check_trained(owner: str, trained: bool) -> None:
    """The paraphraser must have been trained."""
    if not trained:
        raise RuntimeError(
            f"{owner}: the paraphraser is not trained; call loss.paraphraser.fit(loader, features) first, or "
            "loss.paraphraser.freeze() after a training of your own"
        )


def check_epoch(owner: str, epoch: int, batches: int) -> None:
    """An epoch must have batches."""
    if not batches:
        raise ValueError(
            f"{owner}: loader must yield at least one batch in each epoch, got none in epoch {epoch}; a generator can be "
            "iterated only once, use a list or a DataLoader"
        )


def check_order(owner: str, p: object) -> None:
    """`p` must be 1 or 2, the order of a norm."""
    if p not in (1, 2):
        raise ValueError(f"{owner}: p must be 1 or 2, the order of the norm, got {p!r}")
