"""The start of the demo's students from a teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import Backbone, count_macs, count_parameters
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.progress import say
from kdlib_faces.recipes.start import StartConfig, load_start
from kdlib_faces.teachers.input_options import InputOptions

__all__ = ["DemoStart", "choose_start"]


MAX_MACS = 2e9
"""Multiply-adds of a teacher up to which its narrower copy is a light student, and so the default."""


@dataclass(frozen=True, eq=False)
class DemoStart:
    """The network that both students are a narrower copy of.

    Attributes:
        path: Its file.
        network: The network.
        size: Side of its images, pixels.
    """

    path: str
    network: Backbone
    size: int

    def describe(self, student: Backbone, config: StartConfig) -> list[str]:
        """The start in sentences for the report: channels, parameters and multiply-adds before and after."""
        counts = [
            f"{count_parameters(each):,} parameters and {count_macs(each, self.size) / 1e6:.0f} M multiply-adds"
            for each in (self.network, student)
        ]
        return [
            f"Both students start as a narrower copy of {Path(self.path).name} with {100 * config.keep:g} % of the channels of each "
            f"layer: {counts[0]} before, {counts[1]} after. The last layer is fitted to the joint target of both teachers.",
            "The student alone is trained from this start for as many steps on the same batches, by the identity loss without "
            "the teachers. Its start contains the teachers, so the difference of the two students is the gain of distillation "
            "during training, not that of the start.",
        ]


def choose_start(
    given: str | None, teachers: Sequence[str], inputs: Sequence[InputOptions], *, quiet: bool
) -> DemoStart | None:
    """Load the start of the students; None for scratch.

    Args:
        given: `"shrink:FILE"` or `"scratch"`; None starts from the first teacher if it can be made narrower and is
            not too large.
        teachers: The files of the teachers, the general one first.
        inputs: Input options of each teacher.
        quiet: Do not print why the students start from scratch.

    Raises:
        InputError: The given start cannot be used.
    """
    options_of: Mapping[str, InputOptions] = dict(zip(teachers, inputs, strict=False))
    start = given or f"shrink:{teachers[0]}"
    try:
        network = load_start(start, options_of)
        if network is None:
            return None
        size = height_width("demo", network.input_size)[0]
        macs = count_macs(network, size)
        if given is None and macs > MAX_MACS:
            raise InputError(
                f"a narrower copy of {teachers[0]}, which has {macs / 1e6:,.0f} M multiply-adds, is no light student; "
                f"--start {start} starts from it nevertheless"
            )
    except InputError as error:
        if given is not None:
            raise
        say(f"the students start from scratch: {error}", quiet=quiet)
        return None
    return DemoStart(start.partition(":")[2], network, size)
