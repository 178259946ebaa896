"""Room: report. Reads the run dict for the pages: who is who, which bin is the large age gap, one estimate by name.

Every reader of a page or a figure asks here, so that text, tables and figures cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kdlib_faces.report.evaluations import Evaluation

__all__ = ["ALL", "Comparison", "Estimate", "View"]

ALL = "all"


class Estimate(NamedTuple):
    """A value with its interval; any part may be None (nothing was measured)."""

    value: float | None
    low: float | None
    high: float | None
    n: int | None

    @classmethod
    def read(cls, record: Mapping[str, Any] | None) -> Estimate:
        """From the JSON form; None gives an estimate of nothing."""
        record = record or {}
        return cls(record.get("value"), record.get("low"), record.get("high"), record.get("n"))


class Comparison(NamedTuple):
    """Model `a` minus model `b` by one metric in one bin."""

    a: str
    b: str
    bin: str
    metric: str
    difference: Estimate
    separate: bool | None


class View:
    """A checked run dict, read by role and by bin.

    Args:
        run: passed `check_run`.

    Examples:
        >>> view = View({"format": 1, "title": "t", "models": {"m": {"role": "student", "protocols": {}}}})
        >>> view.names, view.large, view.estimate("m", "all", "auc").value
        (['m'], None, None)
    """

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.run = run
        self.models: Mapping[str, Mapping[str, Any]] = run["models"]
        self.comparisons = [
            Comparison(c["a"], c["b"], c["bin"], c["metric"], Estimate.read(c["difference"]), c.get("separate"))
            for c in run.get("comparisons") or ()
        ]
        self.students = [name for name, model in self.models.items() if model["role"] == "student"]
        self.teachers = [name for name, model in self.models.items() if model["role"] == "teacher"]
        self.distilled, self.alone = self._pair()
        first = [name for name in (self.alone, self.distilled) if name is not None]
        self.names = first + [name for name in (*self.students, *self.teachers) if name not in first]
        if run.get("evaluations"):
            self.names = list(self.models)  # as they were asked for: no one stands back
        self.evaluations = [Evaluation(entry, self.names) for entry in run.get("evaluations") or ()]
        self.kind = next((gap["kind"] for gap in map(self.age_gap, self.names) if gap), None)
        self.bins = self._bins()
        self.far = self._far()
        self.large = self._large()

    def _pair(self) -> tuple[str | None, str | None]:
        for comparison in self.comparisons:
            if comparison.a in self.students and comparison.b in self.students and comparison.a != comparison.b:
                return comparison.a, comparison.b
        distilled = next((name for name in self.students if name.endswith("distilled")), None)
        alone = next((name for name in self.students if name.endswith("alone")), None)
        return distilled, alone

    def _bins(self) -> list[str]:
        names: dict[str, None] = {}
        for model in self.names:
            names.update(dict.fromkeys(record["name"] for record in self.age_gap(model).get("bins", ())))
        return list(names)

    def fars(self) -> list[str]:
        """False accept rates with a TAR, largest first, as spelled in the run."""
        keys: dict[float, str] = {}
        for model in self.names:
            gap = self.age_gap(model)
            for record in (*gap.get("bins", ()), gap.get("all") or {}):
                for key in record.get("tar") or {}:
                    keys.setdefault(float(key), key)
        return [keys[rate] for rate in sorted(keys, reverse=True)]

    def _far(self) -> str | None:
        compared = {float(c.metric.split("@")[1]) for c in self.comparisons if c.metric.startswith("tar@")}
        fars = self.fars()
        return next((far for far in fars if float(far) in compared), fars[0] if fars else None)

    def _large(self) -> str | None:
        """The bin that the headline speaks of: one with its own ROC, else one compared, else the last with pairs."""
        order = [name for name in (self.distilled, self.alone, *self.names) if name is not None]
        drawn = [key for name in order for key in self.roc(name) if key in self.bins]
        compared = [c.bin for c in self.comparisons if c.bin in self.bins]
        filled = [name for name in reversed(self.bins) if self.pairs(name, "genuine")]
        return next(iter([*drawn, *compared, *filled]), None)

    def label(self, name: str) -> str:
        """The model's name for readers."""
        return str(self.models[name].get("label") or name.replace("_", " ")) if name in self.models else name

    def age_gap(self, name: str) -> Mapping[str, Any]:
        """The model's age-gap protocol, empty if it was not run."""
        return self.models[name]["protocols"].get("age_gap") or {}

    def roc(self, name: str) -> Mapping[str, Any]:
        """ROC curves by bin name."""
        return self.age_gap(name).get("roc") or {}

    def record(self, name: str, bin_name: str) -> Mapping[str, Any]:
        """One bin of one model (`ALL` for all pairs), empty if absent."""
        gap = self.age_gap(name)
        if bin_name == ALL:
            return gap.get("all") or {}
        return next((record for record in gap.get("bins", ()) if record["name"] == bin_name), {})

    def pairs(self, bin_name: str, which: str) -> int | None:
        """Pairs in a bin; `which` is "genuine" or "impostor"."""
        counts = [self.record(name, bin_name).get(which) for name in self.names]
        return next((count for count in counts if count is not None), None)

    def estimate(self, name: str, bin_name: str, metric: str) -> Estimate:
        """`metric` is "auc", "own_auc", "tar@FAR" or "own_tar@FAR"."""
        kind, _, far = metric.partition("@")
        found = self.record(name, bin_name).get(kind)
        if far and found is not None:
            found = next((value for key, value in found.items() if float(key) == float(far)), None)
        return Estimate.read(found)

    def has(self, metric: str, bins: list[str] | None = None) -> bool:
        """Whether any model has a value of this metric in these bins (all bins by default)."""
        return any(
            self.estimate(name, bin_name, metric).value is not None
            for name in self.names
            for bin_name in (self.bins if bins is None else bins)
        )

    def bin_metrics(self) -> list[str]:
        """The metrics worth a table, the headline's first."""
        fars = sorted(self.fars(), key=lambda far: far != self.far)
        names = [f"tar@{far}" for far in fars] + ["own_auc", "auc"] + [f"own_tar@{far}" for far in fars]
        return [metric for metric in names if self.has(metric)]

    def compared(self, bin_name: str, metric: str) -> Comparison | None:
        """Distilled minus alone, if the run has it."""
        pair = (self.distilled, self.alone)
        found = (c for c in self.comparisons if (c.a, c.b) == pair and c.bin == bin_name and c.metric == metric)
        return next(found, None)

    def best_teacher(self, bin_name: str) -> str | None:
        """The teacher with the highest TAR in this bin at the headline's false accept rate."""
        rates = {name: self.estimate(name, bin_name, f"tar@{self.far}").value for name in self.teachers if self.far}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        return max(known, key=known.__getitem__) if known else None

    def kept(self, bin_name: str) -> float | None:
        """The fraction of the best teacher's TAR that the distilled student has: as given, else computed."""
        given: float | None = (self.run.get("teachers_kept") or {}).get(bin_name)
        teacher = self.best_teacher(bin_name)
        if given is not None or teacher is None or self.distilled is None:
            return given
        student = self.estimate(self.distilled, bin_name, f"tar@{self.far}").value
        best = self.estimate(teacher, bin_name, f"tar@{self.far}").value
        return student / best if student is not None and best else None
