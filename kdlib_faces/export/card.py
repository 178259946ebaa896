"""The model card of an exported file, in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdlib_faces.evaluation.summary import Measure, MeasuredValue, ProtocolSummary
from kdlib_faces.export.accuracy import AccuracyLoss
from kdlib_faces.export.measure import Measurement, table

__all__ = ["write_card"]

MAX_ROWS = 40
INTENDED = """## Intended use

The model maps an aligned face crop to an embedding. Two crops of one identity have embeddings of high cosine. It is meant for
verification and identification research, and for applications whose users have agreed to it.

**Biometric data.** Embeddings of faces identify individuals. In many countries, among them those of the European Union (GDPR,
article 9), they are personal data of a special category: process them only with a legal basis, store them encrypted, and delete
them on request. Do not use the model for covert surveillance or for decisions about individuals without human review.

## Limits

- Images have to be aligned by five landmarks to the template of 112 x 112 crops; other crops lower every figure.
- Error rates depend on age, age gap, skin color, pose and image quality. Measure them on images of your application.
- A threshold holds for images like those of the evaluation that it comes from, and for embeddings made in the same way.
- Nothing in the model detects photographs of photographs, masks or generated faces.

## Licenses

The rights to a distilled model depend on its teachers and its training data: weights for non-commercial research make a student for
non-commercial research, and so do many face sets. State both here before the file is passed on.
"""


def write_card(
    path: Path,
    *,
    model: Path,
    rows: Mapping[str, object],
    loss: AccuracyLoss | None = None,
    protocols: Sequence[ProtocolSummary] = (),
    name: str = "",
    measurements: Sequence[Measurement] = (),
) -> Path:
    """Write the model card of an exported file beside it, as `FILE.md`.

    Args:
        path: The exported file.
        model: The file that it was made from.
        rows: Facts about the file, by heading.
        loss: Accuracy of the exported model, and its loss.
        protocols: Results of an evaluation.
        name: The model in these results.
        measurements: Time and memory.

    Returns:
        The path of the card.
    """
    lines = [f"# {path.name}", "", "| | |", "|---|---|", f"| made from | `{model.name}` |"]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    if loss is not None:
        lines.append(f"| against the original | {loss} |")
    if protocols:
        lines += ["", "## Accuracy", ""]
    for summary in protocols:
        found = summary.models[name]
        lines += [f"### {summary.title}", "", "| measure | value | interval |", "|---|---|---|"]
        shown = list(summary.measures.items())[:MAX_ROWS]
        lines += [_row(measure.title, measure, found.measures[key]) for key, measure in shown if key in found.measures]
        for key, bins in summary.bins.items():
            values = zip(bins.labels, found.bins.get(key, ()), strict=False)
            scale = Measure(bins.title, bins.unit)
            lines += [_row(f"{bins.title}, {bins.axis or 'group'} {label}", scale, value) for label, value in values]
        lines.append("")
    if measurements:
        lines += ["", "## Deployment", "", table(measurements)]
    target = path.with_name(f"{path.name}.md")
    target.write_text("\n".join([*lines, "", INTENDED]), encoding="utf-8")
    return target


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _row(title: str, measure: Measure, value: MeasuredValue) -> str:
    def text(number: float | None) -> str:
        if number is None:
            return ""
        return f"{100 * number:.2f} %" if measure.unit == "rate" else f"{number:.4g}"

    note = f", {measure.note}" if measure.note else ""
    interval = f"{text(value.low)} to {text(value.high)}" if value.low is not None else ""
    return f"| {_cell(title + note)} | {text(value.value)} | {interval} |"
