"""Stage 1: a model and its taps to named features. Imports torch and the shared vocabulary alone."""

from kdlib.adapters.student import StudentAdapter
from kdlib.adapters.tap import OUTPUT, Tap
from kdlib.adapters.teacher import TeacherAdapter

__all__ = ["OUTPUT", "StudentAdapter", "Tap", "TeacherAdapter"]
