"""Backbones room: files to networks, by `weights_only=True` only, whole or not at all."""

import os
from typing import Literal

import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.backbones._arguments import InputSize
from kdlib_faces.backbones.checkpoint import Found, examine, list_differences
from kdlib_faces.backbones.input_spec import Triple
from kdlib_faces.backbones.registry import Backbone

__all__ = ["load_backbone"]


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

    The layout is told by keys and shapes: insightface's iresnet and mbf; MobileFaceNet as in TreB1eN, face.evoLVe,
    FaceX-Zoo, AdaDistill, cavaface, Xiaoccer and bubbliiiing; IR and IR-SE as in face.evoLVe, TreB1eN, AdaFace, CVLface
    and their kin; MTLFace; MobileNet V1 and V2 as in yakhyo, bubbliiiing and cavaface; each of any depth, width and
    embedding. Training checkpoints are opened and prefixes stripped (`state_dict`, `module.`, `model.` and the like).
    Both PyTorch files and safetensors are read. The network gets the weights as float32, in eval mode.

    What the images must be is in `model.input_spec`: known for most layouts, assumed for those that several projects
    share; what is given here counts. Call `model.input_spec(images)` before the network.

    Args:
        path: the file.
        input_size: side of the square images, or (height, width), in pixels. None reads it from the file: a state dict
            tells the final grid only, so sixteen times that; 112 for a grid of 7.
        color: order of the channels, `"rgb"` or `"bgr"`.
        mean: what is taken from pixels of 0 to 255, one value or one a channel.
        scale: what they are then divided by.
        normalized: whether the project divides its embeddings by their length; kept as a note, ours never does.

    Returns:
        The network on the CPU, (b, 3, h, w) to (b, d), not normalized.

    Raises:
        InputError: no such file; a truncated one; one that holds other things than tensors and plain values (nothing
            in it is run); an unknown layout; or weights that do not fit, with the list of differences.

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
    found = examine(path, input_size=input_size)
    try:
        spec = found.spec.changed(color=color, mean=mean, scale=scale, normalized=normalized)
    except (ValueError, TypeError) as error:
        raise InputError(f"{found.owner}: {error}") from error
    if found.differences:
        raise InputError(f"{found.owner} does not fit {found.model.name}; {list_differences(found.differences)}")
    model = found.model
    model.load_state_dict(_values(found), assign=True)
    model.input_spec = spec
    return model.eval()


def _values(found: Found) -> dict[str, Tensor]:
    """The file's tensors, copied, under our keys and in our dtypes."""
    wanted, state, names = found.model.state_dict(), found.unwrapped.state, found.names
    if sum(state[name].nbytes for name in names.values() if name in state) > found.weights.size:
        raise InputError(f"{found.owner} claims more values than its {found.weights.size} bytes can hold")
    values = {}
    for key, target in wanted.items():
        value = state.get(names[key], torch.zeros((), dtype=target.dtype)).detach()
        value = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(value).all():
            raise InputError(f"{found.owner} holds NaN or infinite values in {names[key]}")
        if key.endswith("running_var") and bool((value < 0).any()):  # its root would be NaN
            raise InputError(f"{found.owner} holds variances below 0 in {names[key]}")
        values[key] = value.reshape(target.shape)
    return values
