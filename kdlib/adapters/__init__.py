"""Adapters that turn a model and its taps into named features."""

from kdlib.adapters.listing import TapRow, TapTable, list_taps, match_taps
from kdlib.adapters.student import StudentAdapter
from kdlib.adapters.tap import OUTPUT, Tap
from kdlib.adapters.teacher import TeacherAdapter

__all__ = ["OUTPUT", "StudentAdapter", "Tap", "TapRow", "TapTable", "TeacherAdapter", "list_taps", "match_taps"]
