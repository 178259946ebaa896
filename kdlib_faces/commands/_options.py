"""Options that several commands turn into settings or hardware."""

from argparse import Namespace

from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Hardware, find_hardware

__all__ = ["one_process", "precision"]


def one_process(command: str, device: str | None) -> Hardware:
    """Return the device of a command that runs in one process.

    Raises:
        InputError: There is no such device, or `torchrun` has started several processes.
    """
    hardware = find_hardware(device)
    if hardware.count > 1:
        raise InputError(f"{command}: runs in one process; start it without torchrun")
    return hardware


def precision(options: Namespace, prefix: str = "") -> list[str]:
    """Return the settings of `--amp` and `--compile`."""
    amp = [] if options.amp is None else [f"{prefix}amp={options.amp}"]
    return [*amp, *([f"{prefix}compile=true"] if options.compile else [])]
