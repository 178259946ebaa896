"""Rows of several processes as one batch: values and averaged gradients equal those of a single process."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kdlib.functional
from kdlib import ContrastiveRepresentationLoss
from kdlib._gather import gather_rows
from kdlib.functional import pkt


def dist_of_three(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Use as many classes of the student as of the teacher."""
    return kdlib.functional.dist(student[:, :3], teacher, **options)


def log_sum_of_three(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return kdlib.functional.log_sum(student[:, :3], teacher, **options)


def contrastive_of_three(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    target = (10 * teacher[:, 0]).long() % 3
    return kdlib.functional.contrastive_representation(student[:, :3], teacher, target=target, **options)


def contrastive_module(gather: bool) -> ContrastiveRepresentationLoss:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ContrastiveRepresentationLoss(6, 3, feature_dim=4, queue_size=5, gather=gather).double()


def queue_outcome(rows: slice, gather: bool) -> list[Tensor]:
    """Return the values of two steps, the gradients of the maps, and the queue."""
    images, teacher, weight = batch()
    loss, target = contrastive_module(gather), torch.tensor([1, 2, 1, 3, 3, 4, 0])
    values = [loss(images[rows], teacher[rows], target=target[rows], weight=weight[rows]) for _ in range(2)]
    sum(values).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in loss.parameters()]
    return [*(x.detach() for x in values), loss.queue, loss.queue_seen, *gradients]


RELATIONS = ("rkd_distance", "rkd_angle", "similarity_preserving", "pkt", "correlation_congruence", "dark_rank")
LOSSES: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(kdlib.functional, name) for name in RELATIONS},
    "dist": dist_of_three,
    "log_sum": log_sum_of_three,
    "contrastive_representation": contrastive_of_three,
}
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
COUNTS = {"three": (3, 0, 4), "none": (0, 0)}
TOTAL = 7


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TOTAL, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(TOTAL, 3, generator=generator, dtype=torch.float64)
    return images, teacher, torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def outcome(model: nn.Module, loss: Callable[..., Tensor], rows: slice, weighted: bool, gather: bool) -> dict[str, Any]:
    """Return the value and the gradients of the parameters."""
    images, teacher, weight = batch()
    model.zero_grad()
    value = loss(model(images[rows]), teacher[rows], weight=weight[rows] if weighted else None, gather=gather)
    value.backward()
    return {"value": value.detach(), "grads": [parameter.grad.clone() for parameter in model.parameters()]}


def child(rank: int, task: str, directory: Path) -> None:
    """Run one of the processes and save its results."""
    counts = COUNTS[task]
    world = len(counts)
    dist.init_process_group("gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=world)
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    model = DistributedDataParallel(network())
    results: dict[str, Any] = {
        f"{name} {weighted}": outcome(model, loss, rows, weighted, gather=True)
        for name, loss in LOSSES.items()
        for weighted in (False, True)
    }
    # If only one process passes weights, those of the others are 1.
    images, teacher, weight = batch()
    mixed = pkt(images[rows], teacher[rows], weight=weight[rows] if rank == 0 else None, gather=True)
    results["mixed"] = mixed
    for dtype in DTYPES:
        results[str(dtype)] = gather_rows((10 * images).to(dtype)[rows], grad=False)
    results["queue"] = queue_outcome(rows, gather=True)
    results["labels"] = gather_rows(torch.arange(TOTAL)[rows], grad=False)
    results["maps"] = gather_rows(images.reshape(TOTAL, 2, 3)[rows], grad=False)
    leaf = images[rows].clone().requires_grad_()
    whole = gather_rows(leaf, grad=True)
    (whole * torch.arange(1.0, len(whole) + 1).unsqueeze(1)).sum().backward()
    results["own"] = leaf.grad
    errors = []
    for wrong in (images[rows, : 6 - rank], images[rows].to([torch.float64, torch.float32, torch.float16][rank])):
        try:
            gather_rows(wrong, grad=False)
        except ValueError as error:
            errors.append(str(error))
    results["errors"] = errors
    torch.save(results, directory / f"rank{rank}.pt")
    # Reference cycles of DDP would keep the threads of the group until the interpreter exits.
    del model
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("task", COUNTS)
def test_processes_equal_a_single_one(task: str, tmp_path: Path) -> None:
    counts = COUNTS[task]
    command = [sys.executable, "-W", "error::UserWarning", __file__]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen([*command, str(rank), task, str(tmp_path)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(len(counts))
    ]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(len(counts))]
    total = sum(counts)
    images, teacher, weight = batch()
    compared = 0
    for name, loss in LOSSES.items():
        for weighted in (False, True):
            alone = outcome(network(), loss, slice(0, total), weighted, gather=False)
            for each in results:
                got = each[f"{name} {weighted}"]
                torch.testing.assert_close(got["value"], alone["value"], rtol=1e-12, atol=1e-15)
                torch.testing.assert_close(got["grads"], alone["grads"], rtol=1e-9, atol=1e-13)
                assert torch.equal(got["value"], results[0][f"{name} {weighted}"]["value"])
                compared += 1
    assert compared == 18 * len(counts)
    expected = queue_outcome(slice(0, total), gather=False)
    for each in results:
        torch.testing.assert_close(each["queue"][:4], expected[:4])
    gradients = zip(*(each["queue"][4:] for each in results), strict=True)
    torch.testing.assert_close([sum(each) / len(counts) for each in gradients], expected[4:])
    weight[counts[0] :] = 1
    for rank, each in enumerate(results):
        torch.testing.assert_close(each["mixed"], pkt(images[:total], teacher[:total], weight=weight[:total]))
        for dtype in DTYPES:
            assert torch.equal(each[str(dtype)], (10 * images[:total]).to(dtype))
        assert torch.equal(each["labels"], torch.arange(total))
        assert torch.equal(each["maps"], images[:total].reshape(total, 2, 3))
        first = sum(counts[:rank])
        own = len(counts) * torch.arange(1.0, total + 1)[first : first + counts[rank]].double()
        assert torch.equal(each["own"], own.unsqueeze(1).expand(-1, 6))
        assert len(each["errors"]) == 2
        assert each["errors"][0].startswith("gather_rows: all processes must hold rows of one shape and dtype")
        assert "torch.float32 in process 1" in each["errors"][1]


def test_every_loss_that_gathers_is_tested() -> None:
    gathering = {
        name for name in kdlib.functional.__all__ if "gather" in signature(getattr(kdlib.functional, name)).parameters
    }
    assert gathering == {*LOSSES}


def test_without_a_process_group() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert gather_rows(x, grad=True) is x
    assert not gather_rows(x, grad=False).requires_grad


if __name__ == "__main__":
    child(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
