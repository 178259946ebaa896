"""The commands `kdlib-faces cache build`, `verify` and `info`."""

from argparse import Namespace

from kdlib_faces._checks import InputError
from kdlib_faces._hardware import find_hardware
from kdlib_faces.caching.build import CacheConfig, build, describe_check, info, verify
from kdlib_faces.commands._options import one_process, precision
from kdlib_faces.config import load_config
from kdlib_faces.progress import say
from kdlib_faces.teachers.input_options import inputs_of_models

__all__ = ["main"]


def main(options: Namespace, command: str) -> None:
    """Build, verify or describe a cache with the options of the command line; see `kdlib_faces.caching.build`."""
    progress = not options.quiet
    if options.action == "verify":
        check = verify(
            options.directory, data=options.data, teacher=options.teacher, rows=options.rows, progress=progress,
            device=one_process("cache verify", options.device).device,
        )  # fmt: skip
        print(describe_check(check))
        return
    if options.action == "build":
        if not options.data:
            raise InputError("cache build: --data must be given: a CSV list, a folder, a .rec file or tar shards")
        hardware, config = find_hardware(options.device), _config(options)
        progress = progress and hardware.first
        say(f"device: {hardware.describe(config.amp)}", quiet=not progress)
        build(
            config, output=options.output, data=options.data, teacher=options.teacher, taps=options.tap,
            workers=options.workers, progress=progress, on_error=options.on_error, hardware=hardware,
        )  # fmt: skip
        if not hardware.first:
            return
    print(info(options.output if options.action == "build" else options.directory))


def _config(options: Namespace) -> CacheConfig:
    (images,) = inputs_of_models(options.input, 1)
    given: dict[str, object] = {
        "view_seed": options.seed or 0,
        "views": options.views,
        "dtype": options.dtype,
    }
    for name, value in vars(images).items():
        given[f"input.{name}"] = list(value) if isinstance(value, tuple) else value
    values = [f"{name}={value}" for name, value in given.items() if value is not None]
    return load_config(CacheConfig, options.config, [*values, *precision(options), *options.settings])
