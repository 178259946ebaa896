"""Weighting: trust the teacher that places a sample near its identity's centre. Touches teacher tensors and targets.

A form of confidence weighting for embeddings: teachers of open-set recognition have no logits on the student's classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_finite, check_identities, check_name, check_number, check_shape
from kdlib._maths import full_precision, unit_rows
from kdlib.weighting._checks import check_teachers

__all__ = ["CentreConfidenceWeighting"]


class CentreConfidenceWeighting(nn.Module):
    r"""Weights from how close each teacher puts a sample to the centre of its identity.

    With :math:`f_{k,i}` the embedding of sample i by teacher k and :math:`c_{k,y}` the centre of identity y in the
    space of teacher k,

    .. math:: w_{k,i} = \mathrm{softmax}_k \bigl( \cos(f_{k,i}, c_{k,y_i}) / \tau \bigr)

    Each centre is the direction of a running mean of unit embeddings: in training mode, after the weights of a batch
    are taken, `centre <- unit(momentum * centre + (1 - momentum) * mean)` with the mean of the unit embeddings of that
    identity in the batch, however often it occurs; the first time, the mean alone. A sample whose identity is new to
    one of the teachers, or is negative (unknown), gets uniform weights. No gradient flows.

    The centres are buffers, made at the first call: `(num_identities, d_k)` float32 for teacher k. They travel in the
    state dict, and loading one into a fresh module makes them. They are those of one feature: use one weighting for
    each feature, or let the objective weigh all terms by one. Each process of a distributed run keeps its own centres.

    Args:
        num_identities: identities are 0 to this number less 1.
        target: name of the identities in the targets.
        temperature: tau, above 0; smaller prefers the better teacher more sharply.
        momentum: share of the old centre that is kept, from 0 to 1.

    Raises:
        ValueError: an argument out of its range.

    Examples:
        >>> import torch
        >>> weighting = CentreConfidenceWeighting(2, temperature=1.0)
        >>> weighting
        CentreConfidenceWeighting(2, target='identity', temperature=1.0, momentum=0.9)
        >>> weighting.set_centres(0, torch.eye(2))
        >>> weighting.set_centres(1, torch.eye(3)[:2])
        >>> good, poor = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
        >>> targets = {"identity": torch.tensor([0])}
        >>> weighting(torch.ones(2, 1), student=torch.ones(1, 4), teachers=[good, poor], targets=targets)
        tensor([[0.7311],
                [0.2689]])

    References:
        Zhang et al., *Confidence-Aware Multi-Teacher Knowledge Distillation*, arXiv 2201.00007, weighs teachers by the
        cross-entropy of their logits; the cosine to a centre, the softmax over it and the defaults are our definition.
    """

    def __init__(
        self, num_identities: int, *, target: str = "identity", temperature: float = 0.1, momentum: float = 0.9
    ) -> None:
        super().__init__()
        check_number("CentreConfidenceWeighting", "num_identities", num_identities, least=1, integer=True)
        check_number("CentreConfidenceWeighting", "temperature", temperature, above=0)
        check_number("CentreConfidenceWeighting", "momentum", momentum, least=0, most=1)
        self.num_identities = num_identities
        self.target = target
        self.temperature = temperature
        self.momentum = momentum

    @torch.no_grad()
    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`; then, in training mode, the centres move.

        Args:
            losses: `(k, b)`; only the shape is looked at.
            student: not looked at.
            teachers: k tensors `(b, ...)`, flattened after the first dimension.
            targets: identities `(b,)`, whole numbers, under the name `target`; or that tensor itself.
        """
        check_teachers("CentreConfidenceWeighting", losses, teachers)
        if not isinstance(targets, Tensor):
            check_name("CentreConfidenceWeighting", "target", self.target, targets)
            targets = targets[self.target]
        check_identities("CentreConfidenceWeighting", targets, losses.shape[1], self.num_identities)
        with full_precision(losses):
            identities = targets.to(losses.device).long()
            known = identities >= 0
            identities = identities.clamp(min=0)
            embeddings = [unit_rows(teacher.detach().float().flatten(1))[0] for teacher in teachers]
            cosines = []
            for index, embedding in enumerate(embeddings):
                centre = self._centres(index, embedding)[identities]
                cosines.append((embedding * centre).sum(1))
                known = known & centre.any(1)
            weights = (torch.stack(cosines) / self.temperature).softmax(0)
            weights = torch.where(known, weights, 1 / len(teachers))
            if self.training:
                for index, embedding in enumerate(embeddings):
                    self._move(index, embedding, targets.to(losses.device).long())
            return weights.to(losses.dtype)

    def set_centres(self, k_index: int, centres: Tensor) -> None:
        """Set the centres of teacher `k_index`, from its classifier or from a pass over the data.

        Args:
            k_index: position of the teacher, from 0.
            centres: `(num_identities, d)`, of any length; a row of zeros is an identity not seen yet.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        check_number("CentreConfidenceWeighting.set_centres", "k_index", k_index, least=0, integer=True)
        check_shape("CentreConfidenceWeighting.set_centres", "centres", centres, "n d", n=self.num_identities)
        check_finite("CentreConfidenceWeighting.set_centres", centres=centres)
        self.register_buffer(f"centres_{k_index}", unit_rows(centres.detach().float())[0])

    def _centres(self, index: int, embedding: Tensor) -> Tensor:
        """Centres of one teacher `(num_identities, d)` on the device of `embedding`, zeros at first."""
        name = f"centres_{index}"
        if name not in self._buffers:
            self.register_buffer(name, embedding.new_zeros(self.num_identities, embedding.shape[1]))
        centres: Tensor = self.get_buffer(name)
        name = f"teachers[{index}], flattened, as at the first call,"
        check_shape("CentreConfidenceWeighting", name, embedding, "b d", d=centres.shape[1])
        if centres.device != embedding.device:
            centres = centres.to(embedding.device)
            self.register_buffer(f"centres_{index}", centres)
        return centres

    def _move(self, index: int, embedding: Tensor, identities: Tensor) -> None:
        """One step of the running mean for the identities of this batch."""
        embedding, identities = embedding[identities >= 0], identities[identities >= 0]
        # Every sample takes the mean of all samples of its identity: a repeated identity writes the same row again, so
        # the result does not depend on the order of the writes.
        same = (identities[:, None] == identities[None, :]).to(embedding.dtype)
        mean = same @ embedding / same.sum(1, keepdim=True)
        centres = self._centres(index, embedding)
        old = centres[identities]
        moved = torch.where(old.any(1, keepdim=True), self.momentum * old + (1 - self.momentum) * mean, mean)
        centres[identities] = unit_rows(moved)[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.startswith("centres_"):
                self.register_buffer(name, torch.zeros_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return (
            f"CentreConfidenceWeighting({self.num_identities}, target={self.target!r}, "
            f"temperature={self.temperature!r}, momentum={self.momentum!r})"
        )
