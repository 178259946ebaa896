"""Gradients of plain and sharded parameters together."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kdlib._gather import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["by_mesh", "clip_gradients", "local"]


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the plain parameters, and the sharded ones of each mesh: fused operations do not mix them."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {None: []}
    for parameter in parameters:
        mesh = cast("DTensor", parameter).device_mesh if is_sharded(parameter) else None
        groups.setdefault(mesh, []).append(parameter)
    return [group for group in groups.values() if group]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients together such that their L2 norm over all processes is at most `max_norm`."""
    groups = by_mesh(parameters)
    if len(groups) == 1:
        torch.nn.utils.clip_grad_norm_(groups[0], max_norm)
        return
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norms = [_whole(torch.nn.utils.get_total_norm(group)) for group in gradients if group]
    if norms:
        factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for gradient in [gradient for group in gradients for gradient in group]:
            local(gradient).mul_(factor.to(gradient.device))


def _whole(norm: Tensor) -> Tensor:
    return cast("DTensor", norm).full_tensor() if is_sharded(norm) else norm


def local(tensor: Tensor) -> Tensor:
    """Return a plain tensor, or the part of a sharded one that this process has; it shares its memory."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor
