"""Reading of the batches that loaders yield."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdlib._checks import check_targets
from kdlib._held import input_names
from kdlib.adapters import StudentAdapter
from kdlib.distiller import Distiller
from kdlib.training._checks import check_inputs, check_pair
from kdlib.training.config import TrainConfig
from kdlib.types import PassesInputs

__all__ = ["batch_size", "sample_ids", "splitter", "to_device"]


def splitter(distiller: Distiller, config: TrainConfig) -> Callable[[Any], tuple[Any, Any]]:
    """Return a function from a batch to `(inputs, targets)`; see `TrainConfig.split_batch` for the batches it accepts."""

    def split(batch: Any) -> tuple[Any, Any]:
        source = "loader must yield" if config.split_batch is None else "split_batch must return"
        if config.split_batch is not None:
            batch = config.split_batch(batch)
        elif isinstance(batch, Mapping):
            return _split_mapping(distiller, batch)
        check_pair(batch, source)
        inputs, targets = batch
        targets = {"target": targets} if isinstance(targets, Tensor) else targets
        check_targets("train: loader", targets)
        return inputs, targets

    return split


def _split_mapping(distiller: Distiller, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The inputs are what the student's `forward` names and no term or teacher reads as a target."""
    student = distiller.student
    while isinstance(student, PassesInputs):
        student = student.receiver
    forward = student.model.forward if isinstance(student, StudentAdapter) else student.forward
    parameters = [
        p for p in inspect.signature(forward).parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    read = {name for term in distiller.objective.terms.values() for name in (term.target, term.sample_weight)}
    read |= {name for teacher in distiller.teachers.values() for name in input_names(teacher.inputs)}
    inputs = {p.name: batch[p.name] for p in parameters if p.name in batch and p.name not in read}
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in inputs]
    check_inputs(batch, missing, [p.name for p in parameters], found=bool(inputs))
    return inputs, batch


def batch_size(inputs: Any) -> int:
    """Return the batch size: the first dimension of the first tensor, 0 without a tensor."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 1
    items = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return next(filter(None, map(batch_size, items)), 0)


def sample_ids(group: list[tuple[Any, Any]]) -> tuple[int, ...]:
    """Return the sample ids of a group of batches, if their targets contain them."""
    found = [targets["sample"] for _, targets in group if isinstance(targets, Mapping) and "sample" in targets]
    return tuple(int(value) for ids in found if isinstance(ids, Tensor) for value in ids.flatten().tolist())


def to_device(value: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Move the tensors of a batch to the device, through tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if channels_last and value.dim() == 4 and value.is_floating_point():
            return value.to(device, non_blocking=True, memory_format=torch.channels_last)
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(item, device, channels_last=channels_last) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_device(item, device, channels_last=channels_last) for item in value)
    return value
