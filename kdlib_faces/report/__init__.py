"""Reports of a run: report.json, and Markdown, HTML and SVG figures made from it."""

from kdlib_faces.evaluation.summary import DataSummary, ModelEntry
from kdlib_faces.report.deployment import DeployedForm, Deployment, RuntimeRow
from kdlib_faces.report.files import read, render, write
from kdlib_faces.report.pictures import Picture, attention_picture, pairs_picture
from kdlib_faces.report.schema import Report, SeedEntry, StudentPair, TrainingCurve

__all__ = [
    "DataSummary", "DeployedForm", "Deployment", "ModelEntry", "Picture", "Report", "RuntimeRow", "SeedEntry", "StudentPair",
    "TrainingCurve", "attention_picture", "pairs_picture", "read", "render", "write",
]  # fmt: skip
