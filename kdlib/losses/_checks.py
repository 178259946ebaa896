"""Argument checks that only losses use."""

from collections.abc import Sequence

from torch import Tensor

from kdlib._checks import check_finite, check_floating, check_number, readable, show_shape

__all__ = [
    "check_affine", "check_gathered_reduction", "check_levels", "check_map", "check_margin", "no_second_derivative"
]  # fmt: skip


def check_gathered_reduction(owner: str, gather: bool, reduction: str) -> None:
    """With `gather` all processes return the same single value, so `reduction` must be `"mean"`."""
    if gather and reduction != "mean":
        raise ValueError(
            f"{owner}: reduction must be 'mean' with gather: the processes share one value, got {reduction!r}"
        )


def check_map(owner: str, **tensors: Tensor) -> None:
    """Each named argument must be a feature map `(b, c, h, w)` or an attention map `(b, h, w)`."""
    for name, x in tensors.items():
        if x.dim() not in (3, 4):
            raise ValueError(f"{owner}: {name} must be (b, c, h, w) or (b, h, w), got {show_shape(x)}")


def check_levels(owner: str, levels: object) -> None:
    """`levels` must be a sequence of whole numbers of at least 1."""
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"{owner}: levels must be a sequence of whole numbers, got {type(levels).__name__}")
    for index, level in enumerate(levels):
        check_number(owner, f"levels[{index}]", level, min=1, integer=True)


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
        return
    check_finite(owner, margin=margin)
    if margin.amax() > 0:
        raise ValueError(f"{owner}: margin must be <= 0, got {margin.amax().item():g}")


def no_second_derivative() -> RuntimeError:
    """Return the error of a gradient that is differentiated again."""
    return RuntimeError("this relation loss has a gradient, but no second derivative")
