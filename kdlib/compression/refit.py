"""Least-squares refit of a narrowed layer towards the outputs of the original one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Fit", "refit"]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge parameters that are tried, as parts of the mean second moment of the inputs."""

HELD_OUT = 5
"""Every fifth image is held out to choose the ridge."""

SMALLEST = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Fit:
    """Change of a layer's weights and its effect.

    Args:
        weight: change of the weight, in its shape.
        bias: change of the bias, `(o,)`.
        ridge: chosen ridge parameter; infinite if no change is better on the held-out images.
        error_before: root mean square of the layer's error on held-out images, relative to the deviation of its target.
        error: the same after the refit.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    error_before: float
    error: float


def refit(
    layer: nn.Conv2d | nn.Linear,
    inputs: Sequence[Tensor],
    target: Callable[[int], Tensor],
    *,
    positions: int,
    generator: torch.Generator,
) -> Fit:
    r"""Find the change of a layer that brings its outputs closest to targets.

    .. math:: \min_\Delta \sum_i \lVert y_i - W x_i - \Delta x_i \rVert^2 + \lambda m \lVert \Delta \rVert^2

    over sampled positions i, with an intercept that is not penalized and m the sum of the mean squares of the inputs.
    The penalty is on the change, so a layer that is right already stays as it is. Sums are in float64. The ridge
    :math:`\lambda` is the one with the smallest error on the held-out images; then all images are used.

    Args:
        layer: the narrowed layer.
        inputs: its inputs, by batch.
        target: batch number to the target of the layer's output, in the shape of the output.
        positions: at most this many positions are sampled in each batch.
        generator: random generator of the positions, on the CPU.

    Returns:
        The change to add to weight and bias; zeros if no ridge parameter lowers the error on the held-out images.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    width = layer.weight[0].numel()
    samples = _samples(layer, inputs, target, positions, generator)
    rows = sum(min(positions, _positions(layer, x)) for x in inputs)
    parts = _Rows.split(samples) if groups == 1 and width > rows else _Moments.split(samples)
    fitted, held, everything, spread = parts
    errors = [held.error(fitted.solve(ridge)) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    before = held.error(None)
    scale = max(spread, SMALLEST)
    if not errors[best] < before:
        share = (before / scale) ** 0.5
        return Fit(torch.zeros_like(layer.weight), layer.weight.new_zeros(layer.weight.shape[0]), inf, share, share)
    change = everything.solve(RIDGES[best]).mT  # (g, o / g, p + 1)
    return Fit(
        change[..., :-1].reshape(layer.weight.shape).to(layer.weight),
        change[..., -1].flatten().to(layer.weight),
        RIDGES[best],
        (before / scale) ** 0.5,
        (errors[best] / scale) ** 0.5,
    )


@dataclass(frozen=True)
class _Sample:
    """Sampled positions of one batch, in float64: inputs `(g, n, p + 1)` with a column of ones, and outputs."""

    x: Tensor
    residual: Tensor
    target: Tensor
    held: Tensor


class _Moments:
    """Normal equations of residuals on inputs."""

    def __init__(self, gram: Tensor, cross: Tensor, energy: Tensor) -> None:
        self.gram, self.cross, self.energy = gram, cross, energy

    @classmethod
    def split(cls, samples: Iterator[_Sample]) -> tuple["_Moments", "_Moments", "_Moments", float]:
        """Return the moments of the fitted, the held-out and all images, and the spread of the held-out targets."""
        sums: dict[bool, list[Tensor]] = {}
        spread = _Spread()
        for sample in samples:
            spread.add(sample.target[:, sample.held])
            for part, chosen in ((False, ~sample.held), (True, sample.held)):
                x, r = sample.x[:, chosen], sample.residual[:, chosen]
                new = [x.mT @ x, x.mT @ r, r.square().sum()]
                if part in sums:
                    for total, value in zip(sums[part], new, strict=True):
                        total += value
                else:
                    sums[part] = new
        whole = [a + b for a, b in zip(sums[False], sums[True], strict=True)]
        return cls(*sums[False]), cls(*sums[True]), cls(*whole), spread.value()

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients `(g, p + 1, o / g)`."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)[:, :-1]
        mean = diagonal.mean(1, keepdim=True)
        penalty = torch.where(mean > 0, ridge * mean, 1.0).expand_as(diagonal)
        penalty = F.pad(penalty, (0, 1))  # none for the intercept
        change: Tensor = torch.linalg.solve(self.gram + torch.diag_embed(penalty), self.cross)
        return change

    def error(self, change: Tensor | None) -> float:
        """Return the squared error after a change."""
        if change is None:
            return float(self.energy)
        return float(self.energy - 2 * (change * self.cross).sum() + (change * (self.gram @ change)).sum())


class _Rows:
    """The same from the inputs themselves, for layers with more inputs than there are samples."""

    def __init__(self, x_np: Tensor, r_no: Tensor) -> None:
        self.x, self.r = x_np, r_no
        self.center, self.level = x_np.mean(0), r_no.mean(0)
        self.inner = (x_np - self.center)[:, :-1]

    @classmethod
    def split(cls, samples: Iterator[_Sample]) -> tuple["_Rows", "_Rows", "_Rows", float]:
        """Return the rows of the fitted, the held-out and all images, and the spread of the held-out targets."""
        spread, found = _Spread(), []
        for sample in samples:
            spread.add(sample.target[:, sample.held])
            found.append((sample.x[0], sample.residual[0], sample.held))
        x, r, held = (torch.cat(column) for column in zip(*found, strict=True))
        return cls(x[~held], r[~held]), cls(x[held], r[held]), cls(x, r), spread.value()

    def solve(self, ridge: float) -> Tensor:
        """Return the coefficients `(1, p + 1, o)`."""
        gram = self.inner @ self.inner.T
        mean = self.x[:, :-1].square().sum() / self.inner.shape[1]
        added = torch.where(mean > 0, ridge * mean, 1.0)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        slope = self.inner.T @ torch.linalg.solve(gram + added * eye, self.r - self.level)
        return torch.cat([slope, (self.level - self.center[:-1] @ slope)[None]])[None]

    def error(self, change: Tensor | None) -> float:
        """Return the squared error after a change."""
        residual = self.r if change is None else self.r - self.x @ change[0]
        return float(residual.square().sum())


class _Spread:
    """Sum of the squared deviations of targets `(g, n, o)` from the mean of each output."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self.sum: Tensor | float = 0.0

    def add(self, target: Tensor) -> None:
        self.count += target.shape[1]
        self.sum = self.sum + target.sum(1)
        self.squares += float(target.square().sum())

    def value(self) -> float:
        return max(0.0, self.squares - float(torch.as_tensor(self.sum).square().sum()) / max(self.count, 1))


def _positions(layer: nn.Module, x: Tensor) -> int:
    """Return an upper bound of the output positions of one batch."""
    return x.shape[0] * x.shape[2] * x.shape[3] if isinstance(layer, nn.Conv2d) else x[..., 0].numel()


def _samples(
    layer: nn.Conv2d | nn.Linear,
    inputs: Sequence[Tensor],
    target: Callable[[int], Tensor],
    positions: int,
    generator: torch.Generator,
) -> Iterator[_Sample]:
    """Yield the sampled positions of each batch; every fifth image, or position if there are few images, is held out."""
    by_image = sum(len(x) for x in inputs) >= HELD_OUT
    images = 0
    for number, x in enumerate(inputs):
        output, wanted = layer(x), target(number)
        if isinstance(layer, nn.Conv2d):
            groups, (b, _, h, w) = layer.groups, output.shape
            chosen = torch.randperm(b * h * w, generator=generator)[:positions].to(x.device)
            image, row, column = chosen // (h * w), chosen // w % h, chosen % w
            patches = _patches(layer, x, image, row, column).reshape(len(chosen), groups, -1)
            wanted, output = (y[image, :, row, column] for y in (wanted, output))
        else:
            groups, count = 1, x[..., 0].numel()
            chosen = torch.randperm(count, generator=generator)[:positions].to(x.device)
            image = chosen // (count // len(x))
            patches = x.flatten(0, -2)[chosen, None]
            wanted, output = (y.flatten(0, -2)[chosen] for y in (wanted, output))
        order = image + images if by_image else torch.arange(len(image), device=x.device)
        wanted, output = (y.double().reshape(len(y), groups, -1).movedim(1, 0) for y in (wanted, output))
        rows = F.pad(patches.double(), (0, 1), value=1.0).movedim(1, 0)
        yield _Sample(rows, wanted - output, wanted, order % HELD_OUT == HELD_OUT - 1)
        images += len(x)


def _patches(layer: nn.Conv2d, x: Tensor, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the inputs of each sampled output position, `(n, c, kh * kw)`."""
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    ph, pw = (int(p) for p in layer.padding)
    padded = F.pad(x, (pw, pw, ph, ph))
    rows = (row * sh)[:, None, None] + (torch.arange(kh, device=x.device) * dh)[None, :, None]
    columns = (column * sw)[:, None, None] + (torch.arange(kw, device=x.device) * dw)[None, None, :]
    return padded[image[:, None, None], :, rows, columns].permute(0, 3, 1, 2).flatten(2)
