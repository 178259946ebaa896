"""Loading of the class centers of a PartialFC head, which are stored in one file per process.

insightface's PartialFC distributes the centers of n identities over k processes: each has n // k of them, the first n %
k one more, in the order of identities.

References:
    An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC",
    CVPR 2022, arXiv:2203.15565.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from kdlib_faces._checks import InputError
from kdlib_faces._weights import read_weights
from kdlib_faces.heads._margin import MarginHead
from kdlib_faces.heads.arcface import ArcFaceHead

__all__ = ["load_partial_fc", "merge_partial_fc"]

WRAPPERS = ("state_dict_softmax_fc", "state_dict", "softmax_fc")
KEYS = ("weight", "module.weight", "head.weight")


T = TypeVar("T", bound=MarginHead)


def merge_partial_fc(shards: Sequence[Tensor]) -> Tensor:
    """Merge shards of class centers in the order of ranks.

    Args:
        shards: one per process, each `(n_r, d)`; the first may be one row longer than the last.

    Returns:
        `(n, d)` float32; row i is the center of identity i.

    Raises:
        ValueError: there is no shard; shards are not two-dimensional, finite, floating point and of the same d; or
            their lengths are impossible for PartialFC, because a shard is missing or the order is wrong.

    Examples:
        >>> merge_partial_fc([torch.zeros(3, 4), torch.ones(2, 4)])[:, 0]
        tensor([0., 0., 0., 1., 1.])
    """
    if not shards:
        raise ValueError("merge_partial_fc: shards must contain at least one tensor, got none")
    for rank, shard in enumerate(shards):
        if not isinstance(shard, Tensor) or shard.dim() != 2 or not shard.is_floating_point():
            got = f"{tuple(shard.shape)} {shard.dtype}" if isinstance(shard, Tensor) else type(shard).__name__
            raise ValueError(f"merge_partial_fc: shard {rank} must be floating point (n, d), got {got}")
        if shard.shape[1] != shards[0].shape[1] or 0 in shard.shape:
            wanted = f"(n, {shards[0].shape[1]}) like shard 0"
            raise ValueError(f"merge_partial_fc: shard {rank} must be {wanted}, got {tuple(shard.shape)}")
    rows = [len(shard) for shard in shards]
    rows_each, longer = divmod(sum(rows), len(rows))
    if rows != [rows_each + (rank < longer) for rank in range(len(rows))]:
        raise ValueError(
            f"merge_partial_fc: shards of {sum(rows)} identities on {len(rows)} processes must have "
            f"{rows_each + bool(longer)} rows, and {rows_each} from shard {longer} on, got {rows}; a shard is missing, or "
            "the order is not that of ranks"
        )
    merged = torch.empty(sum(rows), shards[0].shape[1])
    for rank, (shard, part) in enumerate(zip(shards, torch.split(merged, rows), strict=True)):
        part.copy_(shard.detach())
        if not torch.isfinite(part).all():
            raise ValueError(f"merge_partial_fc: shard {rank} must be finite, got NaN or infinite values")
    return merged


def load_partial_fc(
    paths: Sequence[str | os.PathLike[str]],
    head: Callable[[int, int], T] = ArcFaceHead,  # type: ignore[assignment]  # a constructor is a callable
) -> T:
    """Load the class centers that k PartialFC processes saved into one head.

    Supported are insightface's `checkpoint_gpu_{rank}.pt` (only `state_dict_softmax_fc` is read), state dicts with a
    `weight`, and single tensors; as PyTorch or safetensors files.

    Args:
        paths: one file per process, in the order of ranks.
        head: constructs the head from d and n: a head class, or
            `functools.partial(CosFaceHead, scale=64.0, margin=0.4)`.

    Returns:
        The head with the merged centers as its `weight` `(n, d)`.

    Raises:
        InputError: a file is missing, damaged, without centers, or names a function that runs code; the shards do not
            fit together; or the numbers in the file names imply another order.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [f"{folder}/checkpoint_gpu_{rank}.pt" for rank in range(2)]
        ...     for rank, path in enumerate(paths):
        ...         torch.save({"epoch": 3, "state_dict_softmax_fc": {"weight": torch.full((2, 8), rank + 1.0)}}, path)
        ...     load_partial_fc(paths).weight[:, 0]
        tensor([1., 1., 2., 2.], grad_fn=<SelectBackward0>)
    """
    if isinstance(paths, str | os.PathLike):
        raise InputError("load_partial_fc: paths must be a sequence of files, one per process, got one path")
    numbers = [re.findall(r"\d+", Path(path).stem) for path in paths]
    ranks = [int(digits[-1]) for digits in numbers if digits]
    # An alphabetical listing puts 10 before 2, so numbered names must be ascending.
    if len(ranks) == len(numbers) and sorted(ranks) == list(range(len(ranks))) and ranks != sorted(ranks):
        raise InputError(f"load_partial_fc: paths must be in the order of ranks, the file names give {ranks}")
    try:
        merged = merge_partial_fc([_centers(path) for path in paths])
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error).replace("merge_partial_fc", "load_partial_fc")) from error
    module = head(merged.shape[1], merged.shape[0])
    if tuple(module.weight.shape) != tuple(merged.shape):
        raise InputError(
            f"load_partial_fc: head must have a weight of (num_identities, embedding_dim) = {tuple(merged.shape)}, the "
            f"size of the merged files, got {tuple(module.weight.shape)}"
        )
    module.weight = nn.Parameter(merged)
    return module


def _centers(path: str | os.PathLike[str]) -> Tensor:
    owner = f"load_partial_fc: {os.fspath(path)}"
    weights = read_weights(owner, Path(path))
    content: object = weights.content
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
        content = next((content[key] for key in KEYS if isinstance(content.get(key), Tensor)), None)
    if not isinstance(content, Tensor):
        raise InputError(f"{owner} must contain the class centers of a PartialFC head, a tensor 'weight'")
    if content.layout != torch.strided or content.device.type != "cpu" or content.nbytes > weights.size:
        raise InputError(f"{owner} declares more values than its {weights.size} bytes can hold")
    return content
