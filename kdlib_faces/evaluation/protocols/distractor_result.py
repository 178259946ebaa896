"""Evaluation room: what a search among distractors found. Plain data and its JSON form."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdlib_faces.evaluation._checks import FloatArray, IntArray
from kdlib_faces.evaluation.roc import TarAtFar, far_name
from kdlib_faces.evaluation.statistics.intervals import Estimate

__all__ = ["DistractorResult", "DistractorTrials", "GapRates"]


@dataclass(frozen=True)
class DistractorTrials:
    """Each trial of its own: a probe with one mate among all distractors.

    Args:
        probe: (t,) row of the probe.
        mate: (t,) row of its mate.
        score: (t,) their cosine.
        place: (t,) place of the mate among the distractors, from 1; one more than the largest rank asked for where it
            is further behind.
        distractor: (n,) by probe, the number of its most alike distractor in the order given, the lowest of equal ones;
            -1 where none is above a zero row that counts as 0.
        distractor_score: (n,) by probe, that distractor's cosine.
    """

    probe: IntArray
    mate: IntArray
    score: FloatArray
    place: IntArray
    distractor: IntArray
    distractor_score: FloatArray


@dataclass(frozen=True)
class GapRates:
    """The rates of one bin of age gaps between probe and mate.

    Args:
        name: of the bin, `"10-19"`.
        trials: how many ordered pairs it holds.
        rank1: rank-1 rate, None in an empty bin.
        tar: by target FAR, the part of its pairs accepted at the one threshold.
    """

    name: str
    trials: int
    rank1: Estimate
    tar: Mapping[float, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        tar = {far_name(far): estimate.to_dict() for far, estimate in self.tar.items()}
        return {"name": self.name, "trials": self.trials, "rank1": self.rank1.to_dict(), "tar": tar}


@dataclass(frozen=True)
class DistractorResult:
    """The result of `identify_with_distractors`.

    Args:
        rates: by rank, the part of the trials that is correct, with an interval over identities.
        tar: by target FAR, the operating point; as a number it is the TAR. Its interval is Wilson's, over pairs.
        tar_by_identity: the TARs with intervals over identities, at thresholds kept as they are.
        by_gap: the rates by age gap; empty without ages.
        by_size: rank-1 rate with the first so many distractors.
        probes: number of probe images.
        mateless: how many of them have no mate; they are no trials, and impostors all the same.
        trials: number of ordered pairs of one identity.
        distractors: how many distractors were really used.
        cleaned: how many were left out as noisy.
        cleaning: how noisy ones were marked.
        ties: whether a mate as alike as the distractor is correct.
        per_trial: every trial of its own: who was missed, and for whom; not serialized.
    """

    rates: Mapping[int, Estimate]
    tar: Mapping[float, TarAtFar]
    tar_by_identity: Mapping[float, Estimate]
    by_gap: tuple[GapRates, ...]
    by_size: Mapping[int, Estimate]
    probes: int
    mateless: int
    trials: int
    distractors: int
    cleaned: int
    cleaning: str
    ties: str
    per_trial: DistractorTrials = field(repr=False, compare=False)

    @property
    def rank1(self) -> float:
        """The part of the trials whose mate is ahead of all distractors."""
        value = self.rates[1].value
        assert value is not None
        return value

    @property
    def convention(self) -> str:
        """How the numbers are defined, in words."""
        cleaned = "no cleaning" if self.cleaning == "none" else f"{self.cleaned} cleaned away ({self.cleaning})"
        return (
            f"MegaFace challenge 1: one mate and {self.distractors} distractors for each ordered pair of one identity, "
            f"{cleaned}; a tie is {self.ties}; TAR by the exact rule over probes x distractors"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        entry: dict[str, Any] = {f"rank{rank}": estimate.to_dict() for rank, estimate in self.rates.items()}
        entry["tar"] = {far_name(far): point.to_dict() for far, point in self.tar.items()}
        entry["tar_by_identity"] = {far_name(far): each.to_dict() for far, each in self.tar_by_identity.items()}
        if self.by_gap:
            entry["by_gap"] = [rates.to_dict() for rates in self.by_gap]
        if self.by_size:
            entry["by_size"] = {str(size): estimate.to_dict() for size, estimate in self.by_size.items()}
        for name in ("probes", "mateless", "trials", "distractors", "cleaned", "cleaning", "ties", "convention"):
            entry[name] = getattr(self, name)
        return entry
