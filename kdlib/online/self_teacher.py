"""Self-distillation: a student's own deeper features as the teacher of its shallower ones."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from kdlib._checks import check_key, check_name, check_type
from kdlib.online._checks import check_head, check_new_name
from kdlib.types import Features, HasTaps

__all__ = ["AuxiliaryHeads", "SelfTeacher"]


class SelfTeacher:
    """A teacher that consists of the student's own features, without a forward pass of its own.

    A term with this teacher compares two features of the student, for example logits of a shallow stage with the final
    logits. The teacher's side receives no gradient.

    Args:
        taps: the teacher's name of a feature to the student's; `None` for all features under the student's names.

    Examples:
        >>> import torch
        >>> from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, Term
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> student = StudentAdapter(model, {"shallow": "1", "deep": "3", "logits": OUTPUT})
        >>> terms = {"hint": Term(HintLoss(), student="shallow", teacher="deep", teachers=["self"])}
        >>> distiller = Distiller(student, {"self": SelfTeacher()}, Objective(terms))
        >>> distiller(torch.randn(2, 4)).total.backward()
        >>> model[0].weight.grad is None, model[2].weight.grad is None
        (False, True)

    References:
        Zhang et al., *Be Your Own Teacher*, arXiv 1905.08094; see `AuxiliaryHeads` for its classifiers.
    """

    inputs: ClassVar[None] = None
    """The targets passed in place of the inputs: none."""

    reads_student: ClassVar[bool] = True
    """A distiller passes the student's features in place of the inputs."""

    def __init__(self, taps: Mapping[str, str] | None = None) -> None:
        if taps is not None:
            check_type("SelfTeacher", "taps", taps, Mapping, "a mapping of names to features of the student, or None")
            for name, feature in taps.items():
                check_type("SelfTeacher", f"taps[{name!r}]", feature, str, "a feature of the student")
            self.taps = dict(taps)

    def __call__(self, student: Features) -> Features:
        """Return the features of the student under the teacher's names, detached."""
        taps = self.__dict__.get("taps", {name: name for name in student})
        for feature in taps.values():
            check_name("SelfTeacher", "feature of the student", feature, student)
        return {name: student[feature].detach() for name, feature in taps.items()}

    @property
    def fingerprint(self) -> str:
        """The call that rebuilds the teacher."""
        return repr(self)

    def __repr__(self) -> str:
        return f"SelfTeacher({vars(self).get('taps') or ''})"


class AuxiliaryHeads(nn.Module):
    """A student with further features, which heads compute from the student's features.

    With a classifier at each stage, the final logits can teach the shallower ones. The heads are trained with the
    student and left out of what is deployed: the student's model is unchanged.

    Args:
        student: maps inputs to named features; usually a `StudentAdapter`.
        heads: name of a new feature to a pair: the feature that the head takes, and the head.

    Raises:
        TypeError, ValueError: a head is not such a pair, or a name is unknown or taken.

    Examples:
        >>> import torch
        >>> from kdlib import OUTPUT, Distiller, Objective, SelfTeacher, SoftTargetLoss, StudentAdapter, Term
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> student = StudentAdapter(model, {"hidden": "1", "logits": OUTPUT})
        >>> student = AuxiliaryHeads(student, {"shallow": ("hidden", nn.Linear(8, 3))})
        >>> terms = {
        ...     "ce": Term(nn.CrossEntropyLoss(), student="logits", target="label"),
        ...     "shallow_ce": Term(nn.CrossEntropyLoss(), student="shallow", target="label"),
        ...     "self": Term(SoftTargetLoss(), student="shallow", teacher="logits"),
        ... }
        >>> distiller = Distiller(student, {"self": SelfTeacher()}, Objective(terms))
        >>> sorted(distiller(torch.randn(2, 4), {"label": torch.tensor([0, 2])}).terms)
        ['ce', 'self', 'shallow_ce']
    """

    taps: Mapping[str, object]

    def __init__(self, student: nn.Module, heads: Mapping[str, tuple[str, nn.Module]]) -> None:
        super().__init__()
        check_type("AuxiliaryHeads", "student", student, nn.Module, "a Module")
        check_type("AuxiliaryHeads", "heads", heads, Mapping, "a mapping of names to pairs (feature, Module)")
        known = student.taps if isinstance(student, HasTaps) else None
        for name, head in heads.items():
            check_key("AuxiliaryHeads", "a head's name", name)
            check_head(name, head)
            check_new_name(name, known)
            if known is not None:
                check_name("AuxiliaryHeads", "feature of the student", head[0], known)
        self.student = student
        self.heads = nn.ModuleDict({name: head for name, (_, head) in heads.items()})
        self.features = {name: feature for name, (feature, _) in heads.items()}
        if known is not None:
            self.taps = {**known, **dict.fromkeys(heads)}

    @property
    def model(self) -> nn.Module:
        """The student's model, without the heads."""
        return cast(nn.Module, self.student.model)

    @property
    def receiver(self) -> nn.Module:
        """The student, which receives the inputs."""
        return self.student

    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Return the student's features and those of the heads."""
        features: Features = self.student(*inputs, **named)
        added = {}
        for name, head in self.heads.items():
            check_name("AuxiliaryHeads", "feature of the student", self.features[name], features)
            check_new_name(name, features)
            added[name] = head(features[self.features[name]])
        return {**features, **added}
