"""Evaluation room: one call for any protocol, on embeddings alone, so that any framework's model can be evaluated."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np

from kdlib._checks import check_choice, check_number
from kdlib_faces.evaluation._checks import (
    check_fars,
    check_flags,
    check_indices,
    check_labels,
    require,
    to_numpy,
    unit_rows,
)
from kdlib_faces.evaluation.identification import LeaveOneOutResult, leave_one_out_result
from kdlib_faces.evaluation.roc import tar_at_far
from kdlib_faces.evaluation.verification import VerificationResult, verify_pairs

__all__ = ["EvaluationProtocol", "LeaveOneOutProtocol", "PairProtocol", "Result", "evaluate"]


class Result(Protocol):
    """What a protocol returns: it can be written down."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ...


R = TypeVar("R", bound=Result, covariant=True)


class EvaluationProtocol(Protocol[R]):
    """Anything that knows a set of images and can measure embeddings of them; yours too."""

    def evaluate(self, embeddings: Any) -> R:
        """Measure (n, d) embeddings in the order of the images."""
        ...


def evaluate(embeddings: Any, protocol: EvaluationProtocol[R]) -> R:
    """Evaluate embeddings by a protocol.

    Args:
        embeddings: (n, d) array or tensor, normalised or not, in the order of the protocol's images.
        protocol: `PairProtocol`, `LeaveOneOutProtocol`, `AgeGapProtocol`, or an object of yours with the same method.

    Returns:
        The protocol's result; its `to_dict()` gives plain values for JSON.

    Raises:
        ValueError: an embedding that is not finite or zero (its row is named), or a wrong number of rows.

    Examples:
        >>> evaluate(np.eye(2)[[0, 0, 1, 1]], LeaveOneOutProtocol([5, 5, 6, 6], ranks=(1,))).to_dict()["probes"]
        4
    """
    if not callable(getattr(protocol, "evaluate", None)):
        raise TypeError(f"evaluate: protocol must have an evaluate(embeddings) method, got {type(protocol).__name__}")
    return protocol.evaluate(embeddings)


class PairProtocol:
    """Given pairs of images: accuracy over folds, and TAR at FARs over all pairs where asked for.

    Args:
        left: (p,) row number of each pair's first image.
        right: (p,) row number of its second.
        same: (p,) whether the pair shows one identity.
        fold_ids: (p,) fold of each pair; None for 10 contiguous folds.
        threshold: `"grid"` or `"exact"`, see `verify_pairs`.
        fars: target false accept rates; the intervals of their TARs are Wilson's and take pairs as independent.
        images: how many rows the embeddings must have; None for at least as many as the row numbers need.

    Raises:
        ValueError: lengths that differ, a negative row number.

    Examples:
        >>> protocol = PairProtocol([0, 0, 1, 1], [1, 2, 0, 3], [1, 0, 1, 0], fold_ids=[0, 0, 1, 1])
        >>> evaluate(np.eye(3)[[0, 0, 1, 2]], protocol).accuracy
        1.0
    """

    def __init__(
        self,
        left: Any,
        right: Any,
        same: Any,
        fold_ids: Any = None,
        threshold: Literal["grid", "exact"] = "grid",
        fars: Sequence[float] = (),
        *,
        images: int | None = None,
    ) -> None:
        owner = "PairProtocol"
        self.left, self.right = check_indices(owner, "left", left), check_indices(owner, "right", right)
        require(
            self.left.size == self.right.size,
            owner,
            f"right must be as long as left ({self.left.size}), got {self.right.size}",
        )
        self.same = check_flags(owner, "same", same, self.left.size)
        if fold_ids is not None:
            check_labels(owner, "fold_ids", fold_ids, rows=self.left.size, like="left")
        check_choice(owner, "threshold", threshold, ("grid", "exact"))
        self.fold_ids = None if fold_ids is None else to_numpy(fold_ids)
        self.threshold: Literal["grid", "exact"] = threshold
        self.fars = check_fars(owner, fars)
        self.needed = int(max(self.left.max(), self.right.max())) + 1
        if images is not None:
            check_number(owner, "images", images, least=self.needed, integer=True)
        self.images = images

    @classmethod
    def interleaved(
        cls,
        same: Any,
        fold_ids: Any = None,
        threshold: Literal["grid", "exact"] = "grid",
        fars: Sequence[float] = (),
    ) -> Self:
        """Pair k is rows 2k and 2k + 1, as in the `.bin` sets; exactly 2p embeddings are wanted.

        Args:
            same: (p,) whether each pair shows one identity.
            fold_ids: as in the class.
            threshold: as in the class.
            fars: as in the class.

        Examples:
            >>> PairProtocol.interleaved([True, False]).right.tolist()
            [1, 3]
        """
        count = to_numpy(same).size
        left = np.arange(count) * 2
        return cls(left, left + 1, same, fold_ids, threshold, fars, images=2 * count)

    def __repr__(self) -> str:
        folds = "None" if self.fold_ids is None else "..."
        return (
            f"PairProtocol(<{self.same.size} pairs>, fold_ids={folds}, threshold={self.threshold!r}, "
            f"fars={self.fars}, images={self.images})"
        )

    def evaluate(self, embeddings: Any) -> VerificationResult:
        """Measure (n, d) embeddings; see `verify_pairs`."""
        owner = "PairProtocol"
        unit = unit_rows(owner, "embeddings", embeddings, rows=self.images, like=f"images of {self.same.size} pairs")
        require(
            unit.shape[0] >= self.needed,
            owner,
            f"embeddings must hold row {self.needed - 1}, got {unit.shape[0]} rows",
        )
        left, right = unit[self.left], unit[self.right]
        result = verify_pairs(left, right, self.same, fold_ids=self.fold_ids, threshold=self.threshold)
        scores = np.einsum("pd,pd->p", left, right)
        tar = {far: tar_at_far(scores[self.same], scores[~self.same], far) for far in self.fars}
        return VerificationResult(
            result.accuracy,
            result.std,
            result.fold_accuracies,
            result.thresholds,
            result.threshold_rule,
            result.pairs,
            tar,
        )


class LeaveOneOutProtocol:
    """Each image against all the others: see `leave_one_out`.

    Args:
        identities: (n,) whole numbers or strings.
        ranks: the k's, from 1 to n - 1.

    Raises:
        ValueError: identities that cannot be used.

    Examples:
        >>> evaluate(np.eye(3)[[0, 0, 1, 2]], LeaveOneOutProtocol("aabc", ranks=(1,)))
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: LeaveOneOutProtocol: identities must be (n,), not empty, got shape ()
    """

    def __init__(self, identities: Any, ranks: Sequence[int] = (1, 5)) -> None:
        self.identities = to_numpy(identities)
        codes, _ = check_labels("LeaveOneOutProtocol", "identities", self.identities)
        for rank in ranks:
            check_number("LeaveOneOutProtocol", "ranks", rank, least=1, most=codes.size - 1, integer=True)
        self.ranks = tuple(ranks)

    def __repr__(self) -> str:
        return f"LeaveOneOutProtocol(<{self.identities.size} images>, ranks={self.ranks})"

    def evaluate(self, embeddings: Any) -> LeaveOneOutResult:
        """Measure (n, d) embeddings in the order of the identities."""
        return leave_one_out_result(embeddings, self.identities, self.ranks)
