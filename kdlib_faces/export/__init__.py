"""Students as files to deploy: safetensors, ONNX in float32, float16 and int8, and `torch.export` programs."""

from kdlib_faces.export.float_graph import export_onnx, export_program
from kdlib_faces.export.int8_graph import convert_float16, quantize_onnx
from kdlib_faces.export.student import save_student

__all__ = ["convert_float16", "export_onnx", "export_program", "quantize_onnx", "save_student"]
