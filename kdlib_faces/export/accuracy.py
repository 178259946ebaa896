"""Pairs on which the loss of an exported model is measured, and the refusal of a model that lost too much."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation import PairProtocol, PairResult

__all__ = ["AccuracyLoss", "check_loss", "sample_pairs"]

LOSS_FAR = 1e-2
FOLDS = 10


@dataclass(frozen=True)
class AccuracyLoss:
    """Accuracy of an exported model, and its loss against the model that it was made from.

    Attributes:
        accuracy: Ten-fold accuracy of the exported model.
        accuracy_loss: The accuracy of the original less that of the exported model; negative for a gain.
        tar: TAR of the exported model at FAR 1e-2.
        tar_loss: The TAR of the original less that of the exported model.
        pairs: Number of pairs.
    """

    accuracy: float
    accuracy_loss: float
    tar: float
    tar_loss: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.4f} ({-self.accuracy_loss:+.4f}), TAR at FAR 0.01 {self.tar:.4f} "
            f"({-self.tar_loss:+.4f}), on {self.pairs:,} pairs"
        )


def sample_pairs(identities: ArrayLike, *, pairs: int = 6000, seed: int = 0) -> PairProtocol:
    """Choose genuine and impostor pairs of a face list, as many of each kind, in ten folds.

    Args:
        identities: (n,) identity of each image; negative for unknown, which enters no pair.
        pairs: Maximum number of pairs.
        seed: Seed of the choice.

    Returns:
        The protocol, with TAR at FAR 1e-2.

    Raises:
        InputError: The list has fewer than 20 genuine pairs, or one identity only.

    Examples:
        >>> protocol = sample_pairs([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
        >>> int(protocol.same.sum()), protocol.same.size
        (24, 48)
    """
    check_number("sample_pairs", "pairs", pairs, min=40, integer=True)
    codes, random = np.asarray(identities), np.random.default_rng(seed)
    known = np.flatnonzero(codes >= 0)
    order = known[np.argsort(codes[known], kind="stable")]
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    genuine: list[tuple[int, int]] = []
    for rows in np.split(order, starts[1:]):
        # Of an identity with many images, every image enters some pairs.
        i, j = np.triu_indices(min(len(rows), 8), 1)
        chosen = random.permutation(rows)[: min(len(rows), 8)]
        genuine += zip(chosen[i].tolist(), chosen[j].tolist(), strict=True)
    if len(genuine) < 2 * FOLDS or starts.size < 2:
        raise InputError(
            f"the loss of accuracy needs at least {2 * FOLDS} genuine pairs and two identities, the list has {len(genuine)}"
        )
    genuine = [genuine[k] for k in random.permutation(len(genuine))[: pairs // 2].tolist()]
    impostor: list[tuple[int, int]] = []
    while len(impostor) < len(genuine):
        drawn = random.choice(known, (len(genuine), 2))
        impostor += map(tuple, drawn[codes[drawn[:, 0]] != codes[drawn[:, 1]]].tolist())
    left, right = np.array([*genuine, *impostor[: len(genuine)]]).T
    same = np.arange(len(left)) < len(genuine)
    folds = np.tile(np.arange(len(genuine)) % FOLDS, 2)
    return PairProtocol(left, right, same, folds, fars=(LOSS_FAR,), images=codes.size)


def check_loss(original: PairResult, exported: PairResult, max_loss: float) -> AccuracyLoss:
    """Compare both results on the same pairs.

    Args:
        original: Result of the original model, with TAR at FAR 1e-2.
        exported: Result of the exported model.
        max_loss: Largest accepted loss of accuracy, as a fraction.

    Returns:
        The accuracy of the exported model, and its loss.

    Raises:
        InputError: The accuracy is lower by more than `max_loss`.
    """
    loss = AccuracyLoss(
        exported.accuracy, original.accuracy - exported.accuracy, float(exported.tar[LOSS_FAR]),
        float(original.tar[LOSS_FAR]) - float(exported.tar[LOSS_FAR]), exported.pairs,
    )  # fmt: skip
    if loss.accuracy_loss > max_loss:
        raise InputError(
            f"the exported model loses {loss.accuracy_loss:.4f} of accuracy, more than --max-loss {max_loss:g}: {loss}; nothing was "
            "written. Give more --data that is like the images of the application, or a larger --max-loss"
        )
    return loss
