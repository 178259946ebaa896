"""Class centers that are distributed over processes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, check_type
from kdlib_faces._checks import check_mesh
from kdlib_faces.heads._margin import MarginHead
from kdlib_faces.heads._streamed import local_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard_head"]

T = TypeVar("T", bound=MarginHead)

BLOCK = 4096
"""Class centers that are drawn from one generator, so that they do not depend on the number of processes."""


def shard_head(head: T, mesh: "DeviceMesh", *, seed: int = 0) -> T:
    """Distribute the class centers of a head over the processes of a mesh; each holds n / processes of them.

    `head.weight` becomes a `DTensor` that is sharded along the identities. Every process calls the head with its own
    batch. The embeddings and the identities of all processes are gathered, each process computes the logits of all
    samples and its own centers, and the sums of the softmax are combined: the loss and the gradients are those of one
    process with the whole batch. Running statistics (AdaFace, CurricularFace) and random margins (ElasticFace, except
    the order of `sort`) are those of the whole batch too.

    The gradient of the centers is that of the mean of the losses of all processes, as `DistributedDataParallel` and
    `fully_shard` compute for other parameters, so it must not be averaged again: exclude `head.weight` from
    `DistributedDataParallel`, as `kdlib.train` does. Put it into a parameter group of its own, because fused optimizer
    steps do not mix sharded and other parameters. All processes must run the same forward and backward passes.

    Args:
        head: changed in place. If it was created on the meta device, only the centers of this process are allocated, and
            drawn like those of `MarginHead`; otherwise they are those of the head on the first process.
        mesh: one-dimensional, from `torch.distributed.device_mesh.init_device_mesh`.
        seed: seed of centers that are drawn; they do not depend on the number of processes.

    Returns:
        The same head.

    Raises:
        ValueError: the mesh has more than one dimension, or the head is sharded already.
        TypeError: an argument has the wrong type.

    Examples:
        Under `torchrun --nproc-per-node 8`::

            mesh = init_device_mesh("cuda", (8,))
            with torch.device("meta"):
                head = CosFaceHead(512, 4_000_000)
            shard_head(head, mesh)
    """
    check_type("shard_head", "head", head, MarginHead, "a margin head")
    check_mesh("shard_head", head.weight, mesh)
    check_number("shard_head", "seed", seed, min=0, max=2**63 - 1, integer=True)
    # Imported here because it takes seconds.
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    weight, device = head.weight, torch.device(mesh.device_type)
    if weight.is_meta:
        first, last = local_rows(len(weight), mesh)
        local = torch.empty(last - first, *weight.shape[1:], dtype=weight.dtype, device=device)
        _draw(local, first, head.embedding_dim**-0.5, seed)
        construct: Callable[..., MarginHead] = type(head)
        fresh = construct(**{**head.arguments(), "num_identities": 1})
        for name, buffer in fresh.named_buffers():
            setattr(head, name, buffer.to(device))
    else:
        head.to(device)
        local = distribute_tensor(weight.detach().to(device), mesh, [Shard(0)]).to_local().clone()  # no view of all
    shards = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride()
    )  # fmt: skip
    head.weight = nn.Parameter(shards, requires_grad=weight.requires_grad)
    return head


@torch.no_grad()
def _draw(rows: Tensor, first: int, std: float, seed: int) -> None:
    """Draw the centers of the identities from `first` on."""
    for block in range(first // BLOCK, -(-(first + len(rows)) // BLOCK)):
        generator = torch.Generator().manual_seed((seed + (block + 1) * 0x9E3779B97F4A7C15) % 2**63)
        drawn = std * torch.randn(BLOCK, *rows.shape[1:], generator=generator)
        begin, end = max(first, block * BLOCK), min(first + len(rows), (block + 1) * BLOCK)
        rows[begin - first : end - first] = drawn[begin - block * BLOCK : end - block * BLOCK]
