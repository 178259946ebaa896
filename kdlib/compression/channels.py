"""Choice of the channels, or of the mixtures of channels, that a narrower network keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelMap", "Reading", "choose_channels", "mix_channels"]

RIDGE = 1e-4
"""Part of the mean variance that is added to the covariance of the channels before it is inverted."""


@dataclass(frozen=True)
class Reading:
    """Weights of one layer that reads the channels of a space, and the covariance of these channels.

    Args:
        weights: `(n, c)`, one row for each output and kernel position of the layer that reads the channels.
        covariance: `(c, c)`, of the channels on the examples, float64.
    """

    weights: Tensor
    covariance: Tensor

    def metric(self) -> Tensor:
        """Return R `(r, c)` with `R.T R = W.T W / e`, where e is the energy of the outputs `W x`."""
        energy = ((self.weights @ self.covariance) * self.weights).sum()
        root: Tensor = self.weights
        if len(root) > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
        scaled: Tensor = root / energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()
        return scaled


@dataclass(frozen=True)
class ChannelMap:
    """Map between the c channels of the original network and the k channels of the narrow one.

    Args:
        kept: `(k,)` channels that are kept, or `None` for a mixture.
        encoder: `(k, c)`, from channels of the original to those of the narrow network.
        decoder: `(c, k)`, its approximate inverse on the examples.
    """

    kept: Tensor | None
    encoder: Tensor
    decoder: Tensor

    def encode(self, x: Tensor, dim: int) -> Tensor:
        """Map values of the original network along `dim` to those of the narrow network."""
        return x.index_select(dim, self.kept) if self.kept is not None else _apply(x, dim, self.encoder)

    def decode(self, weight: Tensor, dim: int) -> Tensor:
        """Map the weights along `dim`, which read the original's channels, to weights of the narrow network's."""
        return weight.index_select(dim, self.kept) if self.kept is not None else _apply(weight, dim, self.decoder.T)


def _apply(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    mapped: Tensor = torch.tensordot(x, matrix.to(x), dims=([dim], [1]))
    return mapped.movedim(-1, dim)


def choose_channels(readings: Sequence[Reading], keep: int, *, blocks: int, criterion: str) -> ChannelMap:
    r"""Choose the channels whose removal changes the outputs of the reading layers least.

    `"reconstruction"` removes one channel after another. Each time it removes the channel for which the outputs
    :math:`W x` of all readers, predicted from the remaining channels by least squares, change least:

    .. math:: \min_i \sum_r \frac{\lVert M_r e_i \rVert^2}{(\Sigma_r^{-1})_{ii}}

    with :math:`\Sigma_r` the covariance of the remaining channels and :math:`M_r` the least-squares map from them to the
    outputs, both updated after each removal (optimal brain surgeon, Hassibi and Stork 1993, for whole channels).
    `"energy"` keeps the channels of the largest :math:`\sum_r \Sigma_{ii} \lVert W_r e_i \rVert^2`.

    Args:
        readings: the readers, of which each counts equally.
        keep: k, a multiple of `blocks`.
        blocks: each of this many consecutive blocks of channels keeps `keep / blocks` channels.
        criterion: `"reconstruction"` or `"energy"`.

    Returns:
        The map to the k kept channels, in their order.
    """
    maps = [reading.metric() for reading in readings]
    size = maps[0].shape[1]
    if criterion == "energy":
        pairs = zip(maps, readings, strict=True)
        scores = torch.stack([m.square().sum(0) * reading.covariance.diagonal() for m, reading in pairs]).sum(0)
        best = scores.reshape(blocks, -1).topk(keep // blocks, dim=1).indices.sort(1).values
        kept = (best + torch.arange(blocks, device=best.device)[:, None] * (size // blocks)).flatten()
    else:
        kept = _eliminate(maps, [regularized(reading.covariance) for reading in readings], keep, blocks)
    identity = torch.eye(size, dtype=maps[0].dtype, device=maps[0].device)[kept]
    return ChannelMap(kept, identity, identity.T)


def _eliminate(maps: list[Tensor], covariances: list[Tensor], keep: int, blocks: int) -> Tensor:
    size = maps[0].shape[1]
    inverses = [torch.linalg.inv(covariance) for covariance in covariances]
    remaining = torch.ones(size, dtype=torch.bool, device=maps[0].device)
    block_of = torch.arange(size, device=remaining.device) // (size // blocks)
    left = torch.full((blocks,), size // blocks, device=remaining.device)
    for _ in range(size - keep):
        costs = torch.stack([
            m.square().sum(0) / inverse.diagonal().clamp(min=torch.finfo(inverse.dtype).tiny)
            for m, inverse in zip(maps, inverses, strict=True)
        ]).sum(0)  # fmt: skip
        removable = remaining & (left > keep // blocks)[block_of]
        worst = torch.where(removable, costs, torch.inf).argmin()
        for m, inverse in zip(maps, inverses, strict=True):
            row = inverse[worst] / inverse[worst, worst]
            m -= m[:, worst, None] * row
            inverse -= inverse[:, worst, None] * row
        remaining[worst] = False
        left[block_of[worst]] -= 1
    return remaining.nonzero().flatten()


def mix_channels(readings: Sequence[Reading], keep: int) -> ChannelMap:
    r"""Find the `keep` mixtures of channels from which the outputs of the reading layers are best predicted.

    With :math:`A` the sum of the readers' metrics and :math:`\Sigma` the mean covariance, the encoder is
    :math:`V^\top A^{1/2}` and the decoder :math:`A^{-1/2} V`, where V holds the leading eigenvectors of
    :math:`A^{1/2} \Sigma A^{1/2}`. Only for channels that are written and read by linear maps alone.
    """
    metric = sum(root.T @ root for root in (reading.metric() for reading in readings))
    covariance = torch.stack([reading.covariance for reading in readings]).mean(0)
    values, vectors = torch.linalg.eigh(regularized(torch.as_tensor(metric)))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inverse = (vectors / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()) @ vectors.T
    leading = torch.linalg.eigh(root @ covariance @ root).eigenvectors[:, -keep:]
    return ChannelMap(None, leading.T @ root, inverse @ leading)


def regularized(matrix: Tensor) -> Tensor:
    """Add a small multiple of the mean of the diagonal to the diagonal."""
    mean = matrix.diagonal().mean()
    added = torch.where(mean > 0, RIDGE * mean, 1.0)
    return matrix + added * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
