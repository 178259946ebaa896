"""The command `kdlib-faces align`: photographs to aligned face crops."""

from argparse import Namespace

from kdlib_faces._checks import counted
from kdlib_faces._hardware import describe_device
from kdlib_faces.alignment import AlignConfig, align_photos
from kdlib_faces.commands._options import one_process
from kdlib_faces.config import load_config
from kdlib_faces.progress import say

__all__ = ["main"]

SETTINGS = ("several", "no_face", "min_score", "min_size")


def main(options: Namespace, command: str) -> None:
    """Align photographs with the options of the command line; `--set` overrides them and the TOML file `--config`."""
    hardware = one_process("align", options.device)
    given = [f"{name}={value}" for name in SETTINGS if (value := getattr(options, name)) is not None]
    say(f"device: {describe_device(hardware.device)}", quiet=options.quiet)
    result = align_photos(
        options.photographs, options.detector, options.output,
        config=load_config(AlignConfig, options.config, [*given, *options.settings]),
        workers=options.workers, progress=not options.quiet, on_error=options.on_error, device=hardware.device,
    )  # fmt: skip
    say(
        f"{counted(result.photographs, 'photograph')}: {counted(result.crops, 'crop')}, {result.without_face:,} without a face, "
        f"{counted(result.doubtful, 'row')} in {result.faces.with_name('doubtful.csv')}",
        quiet=options.quiet,
    )
    say(f"face list: {result.faces}", quiet=options.quiet)
