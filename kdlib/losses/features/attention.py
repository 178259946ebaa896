"""Attention transfer: the spatial attention maps of the student as those of the teacher."""

from collections.abc import Sequence
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from kdlib._checks import check_choice, check_floating, check_number, check_prefix, check_same_batch
from kdlib._layouts import possible_positions
from kdlib._maths import Reduction, full_precision, hold_short, promote, promoted_dtype, reduce, rescale, unit_rows
from kdlib.losses._checks import check_layout, check_square
from kdlib.losses._layers import pool_to_smaller
from kdlib.losses._module import FunctionLoss
from kdlib.losses.features._energy import scaled_energy

__all__ = ["AttentionTransferLoss", "attention_map", "attention_transfer"]


MAP_LAYOUTS = ("bchw", "bhwc", "bnd")
LAYOUTS = (*MAP_LAYOUTS, "bhw")


def attention_map(
    features: Tensor, p: float = 2, *, layout: str | None = None, prefix_tokens: int | None = None
) -> Tensor:
    r"""Compute the spatial attention map :math:`A = \frac{1}{c} \sum_c |F_c|^p` of features.

    Args:
        features: `(b, c, h, w)`; with a `layout`, also `(b, h, w, c)`, or tokens `(b, n, d)` of a square grid.
        p: exponent, at least 1; a larger one gives more weight to the strongest channel.
        layout: `"bchw"`, `"bhwc"` or `"bnd"`; `None` is `"bchw"` unless the shape looks like `(b, h, w, c)`.
        prefix_tokens: number of tokens (class token, registers) before those of the grid; `None` is 0 where no other
            number of up to 8 would leave a square grid, and an error elsewhere.

    Returns:
        `(b, h, w)`, at least 0, not normalized. Float32, or float64 if given float64.

    Raises:
        ValueError: `features` has another shape, its layout is ambiguous, or `p` is below 1.
        TypeError: `features` is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> attention_map(torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]]))
        tensor([[[5., 2.]]])

    References:
        Zagoruyko, Komodakis, *Paying More Attention to Attention*, arXiv 1612.03928, section 3.1.
    """
    owner = "attention_map"
    check_number(owner, "p", p, min=1)
    check_floating(owner, features=features)
    layout = check_layout(owner, "features", features, layout, "layout", MAP_LAYOUTS)
    if layout == "bnd":
        features = features[:, check_prefix(owner, "features", features, prefix_tokens, "prefix_tokens") :]
        height, _ = check_square(owner, "features", features.shape[1])
        features = rearrange(features, "b (h w) c -> b c h w", h=height)
    elif layout == "bhwc":
        features = features.movedim(3, 1)
    with full_precision(features):
        return _energy(promote(features, features)[0], p)


def _energy(features: Tensor, p: float) -> Tensor:
    return (features.square() if p == 2 else features.abs().pow(p)).mean(1)


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    p: float = 2,
    layout: str | None = None,
    student_layout: str | None = None,
    teacher_layout: str | None = None,
    prefix_tokens: int | None = None,
    student_prefix_tokens: int | None = None,
    teacher_prefix_tokens: int | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the squared distance of the student's and the teacher's attention maps, each flattened and of unit norm.

    .. math:: \left\| \frac{\mathrm{vec} A_s}{\|A_s\|} - \frac{\mathrm{vec} A_t}{\|A_t\|} \right\|^2

    with :math:`A` the `attention_map` of a sample; between 0 and 2. The numbers of channels may differ. If the grids
    differ, both maps are average-pooled to the smaller height and the smaller width. A map of zeros, where every unit
    is dead, counts as a zero vector and gets no gradient. The loss does not depend on the scale of either feature.

    Tokens are on a square grid, on that of the map on the other side, or on any grid if both sides have as many. Tokens
    before the grid (a class token, registers) are left out. Their number is read from the shapes only if one number of
    up to 8 is possible, and either 0 or confirmed by the other side, as with 197 tokens and a grid of 14 x 14.

    With `p=2`, only the gradient takes memory of the size of the features: they are processed in chunks that fit the
    processor's cache, and nothing else is saved for the backward pass. Second derivatives and `torch.func.grad` are
    supported, `torch.func.vmap` is not.

    Args:
        student: features `(b, c, h, w)`; with a layout, also `(b, h, w, c)`, tokens `(b, n, d)`, or an attention map
            `(b, h, w)` with values of at least 0.
        teacher: the same, with any number of channels and any grid; never receives a gradient.
        p: exponent of the attention maps, at least 1; does not apply to inputs that are attention maps.
        layout: `"bchw"`, `"bhwc"`, `"bnd"` or `"bhw"` for both sides; `None` is `"bchw"` for four dimensions unless they
            look like `(b, h, w, c)`.
        student_layout: the layout of the student, if not `layout`.
        teacher_layout: the layout of the teacher, if not `layout`.
        prefix_tokens: number of tokens before those of the grid, for both sides.
        student_prefix_tokens: that of the student, if not `prefix_tokens`.
        teacher_prefix_tokens: that of the teacher, if not `prefix_tokens`.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: An input has another shape, its layout or number of prefix tokens is ambiguous, batch sizes differ,
            `p` is below 1, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[0.0, 0.0], [0.0, 5.0]]]])
        >>> attention_transfer(student, teacher).item()
        2.0
        >>> attention_transfer(torch.rand(4, 8, 14, 14), torch.rand(4, 64, 7, 7), reduction="none").shape
        torch.Size([4])

    References:
        Zagoruyko, Komodakis, *Paying More Attention to Attention*, arXiv 1612.03928. Public code takes the mean over
        the `h * w` positions instead of the sum, so our value is theirs times `h * w` and does not shrink with the
        grid. It also pools signed features, which may cancel, where we pool the maps.
    """
    check_number("attention_transfer", "p", p, min=1)
    check_floating("attention_transfer", student=student, teacher=teacher)
    prefixes = [prefix_tokens if each is None else each for each in (student_prefix_tokens, teacher_prefix_tokens)]
    student, teacher = _maps((student, teacher), (student_layout or layout, teacher_layout or layout), prefixes)
    check_same_batch("attention_transfer", "student", student, "teacher", teacher)
    origin = student.dtype
    dtype = promoted_dtype(student, teacher)
    with full_precision(student):
        (a_s, size), (a_t, _) = _scaled_map(student, p, dtype), _scaled_map(teacher.detach(), p, dtype)
        a_s, a_t = pool_to_smaller(a_s.unsqueeze(1), a_t.unsqueeze(1))
        (q_s, _), (q_t, _) = unit_rows(a_s.flatten(1)), unit_rows(a_t.flatten(1))
        losses = (q_s - q_t).square().sum(1)
        return reduce("attention_transfer", hold_short(losses, size, origin), reduction, weight)


class AttentionTransferLoss(FunctionLoss):
    """`attention_transfer` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.rand(2, 3, 4, 4)
        >>> AttentionTransferLoss()(features, 10 * features).item() < 1e-12
        True
    """

    _function = staticmethod(attention_transfer)

    def __init__(
        self,
        *,
        p: float = 2,
        layout: str | None = None,
        student_layout: str | None = None,
        teacher_layout: str | None = None,
        prefix_tokens: int | None = None,
        student_prefix_tokens: int | None = None,
        teacher_prefix_tokens: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "AttentionTransferLoss"
        check_number(owner, "p", p, min=1)
        for side, each, prefix in (
            ("", layout, prefix_tokens),
            ("student_", student_layout, student_prefix_tokens),
            ("teacher_", teacher_layout, teacher_prefix_tokens),
        ):
            if each is not None:
                check_choice(owner, f"{side}layout", each, LAYOUTS)
            if prefix is not None:
                check_number(owner, f"{side}prefix_tokens", prefix, min=0, integer=True)
        self.p, self.layout, self.student_layout, self.teacher_layout = p, layout, student_layout, teacher_layout
        self.prefix_tokens = prefix_tokens
        self.student_prefix_tokens, self.teacher_prefix_tokens = student_prefix_tokens, teacher_prefix_tokens


def _scaled_map(features: Tensor, p: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the attention map `(b, h, w)` of the samples divided by their largest magnitudes, and these `(b,)`."""
    if p == 2 and features.dim() == 4:
        energy, _, largest = scaled_energy(features, dtype)
        return energy, largest
    scaled, largest = rescale(features.to(dtype))
    return (_energy(scaled, p) if scaled.dim() == 4 else scaled), largest


def _maps(
    sides: Sequence[Tensor], layouts: Sequence[str | None], prefixes: Sequence[int | None]
) -> tuple[Tensor, Tensor]:
    """Return features `(b, c, h, w)` or attention maps `(b, h, w)` of both sides."""
    owner, names = "attention_transfer", ("student", "teacher")
    triples = zip(names, sides, layouts, strict=True)
    found = [check_layout(owner, name, x, layout, f"{name}_layout", LAYOUTS) for name, x, layout in triples]
    maps = [x.movedim(3, 1) if layout == "bhwc" else x for x, layout in zip(sides, found, strict=True)]
    grids = [None if layout == "bnd" else tuple(x.shape[-2:]) for x, layout in zip(maps, found, strict=True)]
    positions = [
        possible_positions(x.shape[1], prefix) if grid is None else [prod(grid)]
        for x, prefix, grid in zip(maps, prefixes, grids, strict=True)
    ]
    for k, name in enumerate(names):
        if found[k] == "bnd":
            leading = check_prefix(owner, name, maps[k], prefixes[k], f"{name}_prefix_tokens", positions[1 - k])
            maps[k] = maps[k][:, leading:].mT
    counts = [x.shape[2] if grid is None else prod(grid) for x, grid in zip(maps, grids, strict=True)]
    for k, name in enumerate(names):
        if found[k] == "bnd":
            shared = grids[1 - k] or (counts[k], 1)  # without a map on either side, only the order of the tokens counts
            grid = shared if counts[0] == counts[1] else check_square(owner, name, counts[k])
            maps[k] = rearrange(maps[k], "b c (h w) -> b c h w", h=grid[0])
    return maps[0], maps[1]
