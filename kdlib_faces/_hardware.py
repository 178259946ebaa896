"""The device and the processes on which a command runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.distributed as dist

from kdlib_faces._checks import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Amp", "Hardware", "autocast", "choose_device", "describe_device", "find_hardware", "share"]

Amp: TypeAlias = Literal["none", "bfloat16", "float16"]
"""Precision of forward passes: float32, or autocast to a smaller type."""

DTYPES: dict[Amp, torch.dtype] = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")
START = timedelta(minutes=30)
"""Time in which all processes must have started."""


@dataclass(frozen=True)
class Hardware:
    """Where a command runs.

    Attributes:
        device: Device of the models of this process.
        rank: Number of this process, from 0.
        count: Number of processes that `torchrun` started; 1 without it.
    """

    device: torch.device = CPU
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process shows progress and writes the results."""
        return self.rank == 0

    def describe(self, amp: Amp = "none") -> str:
        """Describe the hardware in one line."""
        parts = [describe_device(self.device), "float32" if amp == "none" else amp]
        return ", ".join([*parts, *([f"{self.count} processes"] if self.count > 1 else [])])

    @contextmanager
    def process_group(self, timeout: float) -> Iterator[None]:
        """Connect the processes within the block; one process needs no connection.

        Args:
            timeout: Seconds that a process waits for the others in an exchange before it ends with an error.
        """
        if self.count == 1:
            yield
            return
        from torch._C._distributed_c10d import PrefixStore  # absent in builds of torch without processes
        from torch.distributed.rendezvous import rendezvous

        backend = dist.Backend.default_device_backend_map.get(self.device.type, "gloo")
        store, rank, count = next(rendezvous("env://", timeout=START))
        arrived = PrefixStore("arrived", store)  # some processes may start later than others
        arrived.set(str(rank), "")
        arrived.wait([str(each) for each in range(count)], START)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
        try:
            yield
        except BaseException as error:
            if backend == "gloo":  # other backends may wait for the operations of processes that have ended
                dist.destroy_process_group()
            if isinstance(error, RuntimeError) and _is_lost(error):
                raise InputError(
                    f"another process has ended or did not respond for {timeout:g} s; run the same command again to resume "
                    f"({' '.join(str(error).split())[:120]})"
                ) from error
            raise
        dist.destroy_process_group()

    @contextmanager
    def mesh(self) -> Iterator["DeviceMesh"]:
        """All processes as a mesh within the block; a process without others forms a group of its own."""
        from torch._C._distributed_c10d import HashStore  # as in `process_group`
        from torch.distributed.device_mesh import init_device_mesh

        alone = not dist.is_initialized()
        if alone:
            backend = dist.Backend.default_device_backend_map.get(self.device.type, "gloo")
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        try:
            yield init_device_mesh(self.device.type, (self.count,))
        finally:
            if alone:
                dist.destroy_process_group()

    def wait_for_all(self) -> None:
        """Wait without a limit until all processes are here, as after work that takes some of them longer."""
        if self.count > 1:
            dist.barrier(group=dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def find_hardware(name: str | None = None) -> Hardware:
    """Return the device that `name` refers to and the processes that `torchrun` has started.

    Args:
        name: As for `choose_device`. Each of several processes on one machine takes its own device of that kind.

    Raises:
        InputError: There is no such device, or fewer of them than processes.
    """
    rank, count, local = (_number(key, default) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(name)
    if count > 1 and device.type != "cpu":
        if name is not None and ":" in name:
            raise InputError(
                f"--device must be a kind of device with several processes, such as {device.type}, got {name}"
            )
        if local >= (devices := torch.accelerator.device_count()):
            raise InputError(
                f"this machine has {devices} {device.type} devices, and torchrun has started more processes on it; pass "
                f"--nproc-per-node {devices}"
            )
        device = torch.device(device.type, local)
    if device.type != "cpu":
        device = torch.device(device.type, device.index or 0)
        torch.accelerator.set_device_index(device)
    return Hardware(device, rank, count)


def choose_device(name: str | None = None) -> torch.device:
    """Return a device, by default the accelerator of this machine, or the CPU where there is none.

    Args:
        name: `cpu`, the kind of the accelerator, such as `cuda`, or one of several, such as `cuda:1`.

    Raises:
        InputError: This machine has no such device.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return found or CPU
    known = ["cpu", *([] if found is None else [found.type])]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in known:
        why = f"; torch {torch.__version__} finds no accelerator: install its driver and a build of torch for it, or leave out --device"
        why = "" if found is not None or device.type == "meta" else why
        raise InputError(f"--device must be one of {', '.join(known)} on this machine, got {name[:40]!r}{why}")
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise InputError(f"--device must be below {device.type}:{count} on this machine, got {name}")
    return CPU if device.type == "cpu" else device


def describe_device(device: torch.device) -> str:
    """Describe a device, with the model of a GPU.

    Examples:
        >>> describe_device(torch.device("cpu")).startswith("cpu, ")
        True
    """
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'' if threads == 1 else 's'}" if device.type == "cpu" else str(device)


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """Autocast of forward passes on a device."""
    return torch.autocast(device.type, dtype=DTYPES[amp] if amp != "none" else None, enabled=amp != "none")


def share(count: int, hardware: Hardware) -> range:
    """Return the part of `count` consecutive rows that this process computes.

    Examples:
        >>> share(5, Hardware(rank=1, count=2))
        range(2, 5)
    """
    ends = (count * each // hardware.count for each in (hardware.rank, hardware.rank + 1))
    return range(*ends)


def _is_lost(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone: gloo raises plain RuntimeErrors."""
    words = ("gloo", "connection", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _number(key: str, default: int) -> int:
    text = os.environ.get(key, "")
    return int(text) if text.isdigit() else default
