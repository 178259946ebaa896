"""Weights from the cosine between each teacher's embedding and the center of the sample's identity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdlib._checks import check_finite, check_identities, check_name, check_number, check_shape, check_type
from kdlib._gather import gather_rows
from kdlib._maths import full_precision, unit_rows
from kdlib._repr import CallRepr
from kdlib.types import Targets
from kdlib.weighting._checks import check_teachers

__all__ = ["CenterConfidenceWeighting"]


class CenterConfidenceWeighting(CallRepr):
    r"""Assigns larger weights to teachers that embed a sample closer to the center of its identity.

    This is confidence weighting for embeddings, for teachers that have no logits on the student's classes. With
    :math:`f_{k,i}` the embedding of sample i by teacher k and :math:`c_{k,y}` the center of identity y in the space of
    teacher k,

    .. math:: w_{k,i} = \mathrm{softmax}_k \bigl( \cos(f_{k,i}, c_{k,y_i}) / \tau \bigr)

    Each center is the direction of a running mean of unit embeddings. In training mode, after the weights of a batch
    are computed, `center <- unit(momentum * center + (1 - momentum) * mean)`, where the mean is that of all unit
    embeddings of the identity in the batch; the first time, `center <- unit(mean)`. A sample whose identity has no
    center yet for one of the teachers, or is negative (unknown), has uniform weights. The weights carry no gradient.

    The centers are buffers, created in the first call: `(num_identities, d_k)` float32 for teacher k. They are part of
    the state dict, and loading it into a new module creates them. They belong to one feature: use one weighting per
    feature, or `weigh_by` in the objective. Each process of a distributed run has its own centers, unless `gather` is set.

    Args:
        num_identities: identities are below this number.
        target: name of the identities in the targets.
        temperature: tau, above 0; smaller values give sharper weights.
        momentum: share of the old center in the running mean, from 0 to 1.
        gather: update the centers by the samples of all processes of a distributed run, as in one process with the whole
            batch. All processes must then call the weighting.

    Examples:
        >>> import torch
        >>> weighting = CenterConfidenceWeighting(2, temperature=1.0)
        >>> weighting.set_centers(0, torch.eye(2))
        >>> weighting.set_centers(1, torch.eye(3)[:2])
        >>> good, poor = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
        >>> targets = {"identity": torch.tensor([0])}
        >>> weighting(torch.ones(2, 1), student=torch.ones(1, 4), teachers=[good, poor], targets=targets)
        tensor([[0.7311],
                [0.2689]])

    References:
        Zhang et al., *Confidence-Aware Multi-Teacher Knowledge Distillation*, arXiv 2201.00007, weight teachers by the
        cross-entropy of their logits; the cosine to a center, the softmax over it and the defaults are our definition.
    """

    def __init__(
        self,
        num_identities: int,
        *,
        target: str = "identity",
        temperature: float = 0.1,
        momentum: float = 0.9,
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_number("CenterConfidenceWeighting", "num_identities", num_identities, min=1, integer=True)
        check_number("CenterConfidenceWeighting", "temperature", temperature, above=0)
        check_number("CenterConfidenceWeighting", "momentum", momentum, min=0, max=1)
        self.num_identities, self.target = num_identities, target
        self.temperature, self.momentum = temperature, momentum
        check_type("CenterConfidenceWeighting", "gather", gather, bool, "True or False")
        self.gather = gather

    @torch.no_grad()
    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets | Tensor
    ) -> Tensor:
        """Return weights `(k, b)`, then, in training mode, update the centers; `student` is ignored.

        Args:
            losses: `(k, b)`; only the shape is used.
            teachers: k tensors `(b, ...)`, flattened after the first dimension.
            targets: identities `(b,)`, whole numbers, under the name `target`; or that tensor itself.
        """
        check_teachers("CenterConfidenceWeighting", losses, teachers)
        if not isinstance(targets, Tensor):
            check_name("CenterConfidenceWeighting", "target", self.target, targets)
            targets = targets[self.target]
        check_identities("CenterConfidenceWeighting", targets, losses.shape[1], self.num_identities)
        with full_precision(losses):
            identities = targets.to(losses.device).long()
            known = identities >= 0
            identities = identities.clamp(min=0)
            embeddings = [unit_rows(teacher.detach().float().flatten(1))[0] for teacher in teachers]
            cosines = []
            for index, embedding in enumerate(embeddings):
                center = self._centers(index, embedding)[identities]
                cosines.append((embedding * center).sum(1))
                known = known & center.any(1)
            weights = (torch.stack(cosines) / self.temperature).softmax(0)
            weights = torch.where(known, weights, 1 / len(teachers))
            if self.training:
                labels = targets.to(losses.device).long()
                if self.gather:
                    labels = gather_rows(labels, grad=False)
                    embeddings = [gather_rows(embedding, grad=False) for embedding in embeddings]
                for index, embedding in enumerate(embeddings):
                    self._update(index, embedding, labels)
            return weights.to(losses.dtype)

    def set_centers(self, k_index: int, centers: Tensor) -> None:
        """Set the centers of teacher `k_index`, for example from its classifier or from a pass over the data.

        Args:
            k_index: position of the teacher, from 0.
            centers: `(num_identities, d)`, of any norm; a row of zeros means that the identity has no center yet.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
        """
        check_number("CenterConfidenceWeighting.set_centers", "k_index", k_index, min=0, integer=True)
        check_shape("CenterConfidenceWeighting.set_centers", "centers", centers, "n d", n=self.num_identities)
        check_finite("CenterConfidenceWeighting.set_centers", centers=centers)
        self.register_buffer(f"centers_{k_index}", unit_rows(centers.detach().float())[0])

    def _centers(self, index: int, embedding: Tensor) -> Tensor:
        """Return the centers `(num_identities, d)` of one teacher on the device of `embedding`; zeros at first."""
        name = f"centers_{index}"
        if name not in self._buffers:
            self.register_buffer(name, embedding.new_zeros(self.num_identities, embedding.shape[1]))
        centers: Tensor = self.get_buffer(name)
        name = f"teachers[{index}], flattened, as at the first call,"
        check_shape("CenterConfidenceWeighting", name, embedding, "b d", d=centers.shape[1])
        if centers.device != embedding.device:
            centers = centers.to(embedding.device)
            self.register_buffer(f"centers_{index}", centers)
        return centers

    def _update(self, index: int, embedding: Tensor, identities: Tensor) -> None:
        """Update the running mean of the identities in the batch."""
        if not len(identities):
            return
        known = identities >= 0
        # A sample without an identity writes what the first one with an identity does: a selection would read values.
        source = torch.where(known, torch.arange(len(known), device=known.device), known.int().argmax())
        embedding, identities = embedding[source], identities[source].clamp(min=0)
        # All samples of an identity write the same row, so the result does not depend on the order of the writes.
        same = ((identities[:, None] == identities[None, :]) & known).to(embedding.dtype)
        mean = same @ embedding / same.sum(1, keepdim=True).clamp(min=1)
        centers = self._centers(index, embedding)
        old = centers[identities]
        moved = torch.where(old.any(1, keepdim=True), self.momentum * old + (1 - self.momentum) * mean, mean)
        centers[identities] = torch.where(known.any(), unit_rows(moved)[0], old)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.startswith("centers_"):
                self.register_buffer(name, torch.zeros_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)
