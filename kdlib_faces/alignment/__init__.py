"""Photographs to aligned face crops with a detector in an ONNX file."""

from kdlib_faces.alignment.detector import DetectedFace, FaceDetector
from kdlib_faces.alignment.photographs import AlignConfig
from kdlib_faces.alignment.run import AlignResult, align_photos

__all__ = ["AlignConfig", "AlignResult", "DetectedFace", "FaceDetector", "align_photos"]
