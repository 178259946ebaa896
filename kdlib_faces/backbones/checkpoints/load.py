"""Loading of backbones from checkpoint files."""

import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones.checkpoints.describe import COUNTER, examine, list_differences
from kdlib_faces.backbones.input_spec import InputSize, Triple
from kdlib_faces.backbones.networks.base import Backbone

__all__ = ["load_backbone", "load_values"]


def load_backbone(
    path: str | os.PathLike[str],
    *,
    input_size: InputSize | None = None,
    color: Literal["rgb", "bgr"] | None = None,
    mean: Triple | None = None,
    scale: Triple | None = None,
    normalized: bool | None = None,
) -> Backbone:
    """Read a backbone from a file of `save_backbone`, or from a checkpoint of a public face-recognition project.

    The layout is identified by keys and shapes: insightface's iresnet and mbf; MobileFaceNet as in TreB1eN, face.evoLVe,
    FaceX-Zoo, AdaDistill, cavaface, Xiaoccer, foamliu and bubbliiiing; IR and IR-SE as in face.evoLVe, TreB1eN, AdaFace,
    CVLface and related projects; MTLFace; MobileNet V1 and V2 as in yakhyo, bubbliiiing and cavaface; each with any
    depth, width and embedding size. Training checkpoints, also of `kdlib.train`, are unwrapped and prefixes removed
    (`state_dict`, `module.`, `model.`, ...); objects beside the weights are ignored. PyTorch and safetensors files are
    supported. The network has float32 weights and is in eval mode.

    `model.input_spec` describes the images: known for most layouts, assumed for layouts that several projects share.
    Arguments given here override it. Call `model.input_spec(images)` before the network.

    Args:
        path: the file.
        input_size: side of the square images, or (height, width), in pixels. None derives it from the file: sixteen
            times the final grid of a state dict, 112 for a grid of 7.
        color: order of the channels, `"rgb"` or `"bgr"`.
        mean: value subtracted from pixels of 0 to 255, one or one per channel.
        scale: value that they are then divided by.
        normalized: whether the project normalizes its embeddings; stored as a note, the returned network never does.

    Returns:
        The network on the CPU, (b, 3, h, w) to (b, d), not normalized.

    Raises:
        InputError: the file is missing or truncated, is a whole pickled module or names a function that runs code
            (nothing in it is executed), has an unknown layout, or does not fit the network; the message lists the
            differences.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.backbones import IRNet
        >>> kind = {"mid_norm": True, "affine": False}  # AdaFace's network
        >>> theirs = IRNet((1, 1, 1, 1), embedding_dim=16, width=0.125, input_size=32, **kind)
        >>> state = {f"model.{key}": value for key, value in theirs.state_dict().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {**state, "head.kernel": torch.ones(16, 3)}}, f"{folder}/ada.ckpt")
        ...     ours = load_backbone(f"{folder}/ada.ckpt")
        >>> ours.input_spec.describe()
        'BGR, (pixel - 127.5) / 127.5, 32 x 32'
    """
    file = examine(path, input_size=input_size)
    try:
        spec = file.spec.changed(color=color, mean=mean, scale=scale, normalized=normalized)
    except (ValueError, TypeError) as error:
        raise InputError(f"{file.owner}: {error}") from error
    if file.differences:
        hint = ""
        if "other shape" in file.differences or "missing" not in file.differences:
            hint = (
                "; a bare state dict does not describe a network made narrower, write such a network with "
                "kdlib_faces.export.save_student(model, 'student.safetensors')"
            )
        raise InputError(f"{file.owner} does not fit {file.model.name}; {list_differences(file.differences)}{hint}")
    model = file.model
    tensors = {key: value for key, value in file.unwrapped.state.items() if isinstance(value, Tensor)}
    load_values(file.owner, model, file.names, tensors, file.weights.size)
    model.input_spec = spec
    return model.eval()


def load_values(
    owner: str, model: nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor], file_size: int
) -> None:
    """Assign copies of the tensors of a file to a network on the meta device; `names` maps its keys to those of the file."""
    if sum(state[name].nbytes for key, name in names.items() if not key.endswith(COUNTER)) > file_size:
        raise InputError(f"{owner} declares more values than its {file_size} bytes can hold")
    values = {}
    for key, target in model.state_dict().items():
        if key.endswith(COUNTER):
            values[key] = _counter(state.get(names[key]))
            continue
        value = state[names[key]].detach()
        value = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(value).all():
            raise InputError(f"{owner} contains NaN or infinite values in {names[key]}")
        if key.endswith("running_var") and bool((value < 0).any()):  # its square root would be NaN
            raise InputError(f"{owner} contains negative variances in {names[key]}")
        values[key] = value.reshape(target.shape)
    model.load_state_dict(values, assign=True)


def _counter(value: Tensor | None) -> Tensor:
    """Return the number of batches of a BatchNorm; 0 if there is none, as in a file of half-precision values above 65504."""
    if value is None or value.numel() != 1 or value.layout != torch.strided or value.device.type != "cpu":
        return torch.zeros((), dtype=torch.int64)
    return value.detach().reshape(()).double().nan_to_num(0, 0, 0).clamp(0, 2**53).long()
