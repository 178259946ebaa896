"""Room: report. One JSON file per run; Markdown, HTML and PNG made from it. Reads results only: no model, no image set.

`write` stores a run and draws it, `render` draws it again from what is stored. The shape of a run is in `schema`.
"""

from kdlib_faces.report.files import render, write
from kdlib_faces.report.pictures import Picture, attention_picture, pairs_picture
from kdlib_faces.report.schema import FORMAT, check_run, to_json

__all__ = ["FORMAT", "Picture", "attention_picture", "check_run", "pairs_picture", "render", "to_json", "write"]
