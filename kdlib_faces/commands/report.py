"""The command `kdlib-faces report`: render a report again from its report.json."""

from kdlib_faces.report import render

__all__ = ["render"]
