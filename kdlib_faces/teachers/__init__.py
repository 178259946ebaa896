"""Teachers room: heavy networks that know more, general or age-invariant, native or from an ONNX file."""

from kdlib_faces.teachers.age_invariant import AgeFactorLoss, AgeInvariantNet, canonical_correlation
from kdlib_faces.teachers.linear import MappedTeacher, fit_age_map, fit_rotation
from kdlib_faces.teachers.onnx import OnnxTeacher
from kdlib_faces.teachers.onnx_import import import_onnx, restore_statistics
from kdlib_faces.teachers.outputs import record, said_of_all

__all__ = [
    "AgeFactorLoss",
    "AgeInvariantNet",
    "MappedTeacher",
    "OnnxTeacher",
    "canonical_correlation",
    "fit_age_map",
    "fit_rotation",
    "import_onnx",
    "record",
    "restore_statistics",
    "said_of_all",
]
