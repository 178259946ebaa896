"""Teachers: age-invariant networks, ONNX files, linear maps and fusion of embeddings, and cached outputs."""

from kdlib_faces.teachers.age_attention import AgeAttention, AttentiveAgeNet
from kdlib_faces.teachers.age_estimation import AgeEstimationLoss, reverse_gradient
from kdlib_faces.teachers.age_invariant import AgeFactorLoss, AgeInvariantNet, canonical_correlation
from kdlib_faces.teachers.age_pairs import CrossAgePairLoss
from kdlib_faces.teachers.files import TeacherNet, load_teacher, save_teacher
from kdlib_faces.teachers.fine_tuning import FrozenBatchNorm, L2SPLoss
from kdlib_faces.teachers.fused import FusedTeacher, fit_fusion, join_embeddings
from kdlib_faces.teachers.input_options import InputOptions
from kdlib_faces.teachers.joint import fit_joint_space
from kdlib_faces.teachers.mapped import MappedTeacher, fit_age_map, fit_rotation, space_agreement
from kdlib_faces.teachers.onnx.import_graph import import_onnx, restore_statistics
from kdlib_faces.teachers.onnx.session import OnnxTeacher
from kdlib_faces.teachers.open import load_pretrained
from kdlib_faces.teachers.outputs import cache_outputs, read_outputs

__all__ = [
    "AgeAttention",
    "AgeEstimationLoss",
    "AgeFactorLoss",
    "AgeInvariantNet",
    "AttentiveAgeNet",
    "CrossAgePairLoss",
    "FrozenBatchNorm",
    "FusedTeacher",
    "InputOptions",
    "L2SPLoss",
    "MappedTeacher",
    "OnnxTeacher",
    "TeacherNet",
    "cache_outputs",
    "canonical_correlation",
    "fit_age_map",
    "fit_fusion",
    "fit_joint_space",
    "fit_rotation",
    "import_onnx",
    "join_embeddings",
    "load_pretrained",
    "load_teacher",
    "read_outputs",
    "restore_statistics",
    "reverse_gradient",
    "save_teacher",
    "space_agreement",
]
