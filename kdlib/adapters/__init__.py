"""Adapters that turn a model and its taps into named features."""

from kdlib.adapters.student import StudentAdapter
from kdlib.adapters.tap import OUTPUT, Tap
from kdlib.adapters.teacher import TeacherAdapter

__all__ = ["OUTPUT", "StudentAdapter", "Tap", "TeacherAdapter"]
