"""Room: report. What a reader must be told besides the numbers: tiles under the headline, limits. Pure text."""

from __future__ import annotations

from collections.abc import Sequence

from kdlib_faces.report import words
from kdlib_faces.report.summary import evaluations_limits
from kdlib_faces.report.view import View

__all__ = ["is_synthetic", "limits", "made", "models", "separate", "tiles"]


def is_synthetic(view: View) -> bool:
    """Whether the run says that its faces are drawn, by a flag or in the data's name."""
    data = view.run.get("data") or {}
    given = data.get("synthetic")
    return bool(given) if given is not None else "synthetic" in str(data.get("name", "")).lower()


def tiles(view: View, verdict_words: str) -> list[tuple[int, tuple[str, str, str]]]:
    """Up to three (kind, (name, value, note)): kind 0 what was kept, 1 the gain, 2 the size."""
    out: list[tuple[int, tuple[str, str, str]]] = []
    if view.evaluations:
        return out
    large = view.large
    teacher = view.best_teacher(large) if large is not None else None
    if large is not None and view.distilled is not None:
        kept = view.kept(large)
        if kept is not None and teacher is not None:
            note = f"of {view.label(teacher)}, {words.large_words(view)}"
            out.append((0, ("Kept of the best teacher", words.per_cent(kept, 0), note)))
        metric = next((name for name in view.bin_metrics() if view.compared(large, name)), None)
        compared = view.compared(large, metric) if metric else None
        if compared is not None and compared.difference.value is not None and metric is not None:
            spread = words.interval(compared.difference, "difference")
            note = "; ".join(part for part in (spread, verdict_words) if part)
            name = f"Distilled minus alone, {words.metric_name(metric).split(',')[0]}"
            out.append((1, (name, words.points(compared.difference.value), note)))
    student = view.distilled or next(iter(view.students), None)
    if student is not None:
        model = view.models[student]
        against = [view.models[name] for name in ([teacher] if teacher else view.teachers)]
        for key, unit in (("macs", "multiply-adds"), ("parameters", "parameters")):
            mine, theirs = model.get(key), max((other.get(key) or 0 for other in against), default=0)
            if mine and theirs > mine:
                note = f"{words.count(mine)} {unit} against {words.count(theirs)}"
                ratio = theirs / mine
                out.append((2, ("Lighter than the teacher", f"{ratio:.{0 if ratio >= 10 else 1}f} ×", note)))
                break
    return out


def models(view: View) -> str:
    """The sentence under the table of models."""
    far = f" TAR is the share of genuine pairs accepted at {words.far_words(view.far)}." if view.far else ""
    return (
        f"Small figures are {words.level_words(view)} intervals; {words.NOTHING} means not measured.{far} "
        "Own impostors: different people whose pair falls into the same bin."
    )


def separate(view: View) -> str:
    """How to read the comparisons."""
    return (
        "Each line resamples the test identities and recomputes both models on the same ones; the "
        f"{words.level_words(view)} interval of their difference tells whether one is better on these identities. "
        "That the two models' own intervals are separate is the stricter sign. Many bins and metrics are compared at once, "
        "so a single interval that just misses zero is not yet news."
    )


def limits(view: View, missing: Sequence[str] = ()) -> list[str]:
    """Notes of the data first, then what every run must say."""
    data = view.run.get("data") or {}
    out = list(data.get("notes") or ())
    if is_synthetic(view):
        out.append(
            "The faces are drawn by a program. They show that the method and the code work; "
            "they are no claim about people, and no number here carries over to photographs."
        )
    else:
        out.append("The numbers describe the test images named above, and no other cameras, people or ages.")
    if not view.evaluations:
        out.append(
            f"Intervals are {words.level_words(view)} intervals from resampling whole identities: they cover the choice "
            "of test identities. They do not cover the luck of one training run; only several seeds do."
        )
    seeds = view.run.get("seeds") or []
    trained = view.run.get("training") or any(model.get("train_steps") for model in view.models.values())
    if trained and len(seeds) <= 1 and len(view.run.get("per_seed") or []) < 2:
        out.append("One seed was trained. Another seed would give somewhat different models.")
    out += evaluations_limits(view)
    if view.far is not None and not view.evaluations:
        out.append(
            "TAR (true accept rate) and FAR (false accept rate): the threshold is set once on all impostor pairs of "
            "the test set, so that no more than the stated share passes, and then used in every bin."
        )
    out.append("AUC is the chance that a genuine pair scores above an impostor pair; 0.5 is guessing.")
    if any("verification" in model["protocols"] for model in view.models.values()) or any(
        measure.title.startswith("Accuracy") for each in view.evaluations for measure in each.measures
    ):
        out.append(
            "Ten-fold accuracy picks the threshold on nine folds and measures on the tenth; "
            "± is the standard deviation over folds, not an interval."
        )
    out += [f"The picture {name!r} was recorded and is not on disk." for name in missing]
    return out


def made(view: View) -> str:
    """The footer: when, and by which version."""
    version, created = view.run.get("version"), view.run.get("created")
    parts = ["Made by kdlib-faces" + (f" {version}" if version else "")]
    if created:
        parts.append(str(created).replace("T", " ", 1))
    return " · ".join([*parts, "every number is in report.json"])
