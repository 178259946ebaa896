"""The command `kdlib-faces report`: render a report again from its report.json."""

from argparse import Namespace

from kdlib_faces.report import render

__all__ = ["main"]


def main(options: Namespace, command: str) -> None:
    """Render the report of a folder again."""
    print(render(options.directory, progress=not options.quiet))
