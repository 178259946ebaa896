"""The command line `kdlib-faces`: parses the options and calls the command.

User errors print one line and exit with code 2. Heavy packages are imported by the commands that need them.
"""

import argparse
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main", "make_parser"]


class _Parser(argparse.ArgumentParser):
    more: Callable[[], str] | None = None  # makes the end of the help text when it is shown

    def format_help(self) -> str:
        if self.more is not None:
            self.epilog = self.more()
        return super().format_help()

    def parse_known_args(  # type: ignore[override] # the overloads of argparse differ by the type of the namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Name the nearest option of an unknown one, then parse the options of a command."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in args or () if self._subparsers is None else ():
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
                from kdlib._checks import nearest

                self.error(f"no option named {name!r}{nearest(name, flags)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"{message}; see {self.prog} --help")

    def add_list(self, flag: str, metavar: str, text: str, dest: str | None = None) -> None:
        """Add an option that may be repeated."""
        self.add_argument(flag, action="append", default=[], metavar=metavar, help=text, dest=dest or flag[2:])

    def add_on_error(self) -> None:
        """Add the option for images that cannot be read."""
        text = "images that cannot be read: list them and end, or leave them out with a warning (stop)"
        self.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=text)

    def add_device(self) -> None:
        """Add the option for the device."""
        text = "cpu, or an accelerator of this machine, such as cuda or cuda:1 (the accelerator where there is one)"
        self.add_argument("--device", metavar="NAME", help=text)

    def add_hardware(self) -> None:
        """Add the options for the device and the precision."""
        self.add_device()
        self.add_argument("--amp", choices=("none", "bfloat16", "float16"), help="precision of forward passes (none)")

    def add_workers(self, text: str, default: int | None, min: int = 1) -> None:
        """Add the option for processes or threads that prepare images."""
        self.add_argument("--workers", type=_number(min, 1024), default=default, metavar="N", help=text)

    def add_compile(self) -> None:
        """Add the option for torch.compile."""
        self.add_argument("--compile", action="store_true", help="compile networks by torch.compile; not ONNX graphs")

    def add_folder(self, flag: str, default: str, text: str) -> None:
        """Add an option for the folder of the results."""
        self.add_argument(flag, type=Path, default=Path(default), metavar="DIR", help=f"{text} ({default})")


def _number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text[:40]!r}")
        return int(text)

    return parse


def _protocols() -> str:
    from kdlib_faces.harness.registry import listing

    return f"protocols:\n{listing()}"


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="kdlib-faces", description="Lightweight age-invariant face recognition.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--threads", type=_number(1, 1024), help="number of torch threads (default: one per core)")
    common.add_argument("--quiet", action="store_true", help="show no progress")
    common.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    run = _Parser(add_help=False)
    run.add_argument("--seed", type=_number(0, 2**31 - 1), help="seed of all random choices (0)")
    run.add_argument("--config", type=Path, metavar="TOML", help="file of settings; --set overrides it")
    run.add_list("--set", "KEY=VALUE", "change a setting; repeatable", dest="settings")
    data = _Parser(add_help=False)
    data.add_list("--data", "PATH", "faces: CSV list, folder, .rec file or tar shards; repeatable")
    run.add_hardware()

    demo = commands.add_parser("demo", parents=[common, run], help="train and evaluate all models, with a report")
    demo.add_list("--faces", "PATH", "real faces in place of synthetic ones: CSV list or folder; repeatable")
    demo.add_folder("--output", "runs/demo", "folder of the report")
    demo.add_list("--teacher", "ONNX", "general teacher first, then the second teacher")
    demo.add_list("--tap", "NAME", "tensor of each teacher's middle feature map, in order")
    _add_input(demo)
    text = "number of runs with consecutive seeds (1)"
    demo.add_argument("--seeds", type=_number(1, 1000), default=1, metavar="N", help=text)
    demo.add_argument("--steps", metavar="quick|full|N", help="training steps of each student (full)")
    text = "start of the students on real faces: scratch, or shrink:FILE, a narrower copy of a teacher (the general teacher)"
    demo.add_argument("--start", metavar="scratch|shrink:FILE", help=text)
    demo.add_compile()
    demo.add_workers("processes that augment the training images ahead (0)", 0, 0)

    train = commands.add_parser("train", parents=[common, run, data], help="train a student or a teacher on face lists")
    text = "what to train: a student of two teachers, a student alone, or a teacher (liaad)"
    train.add_argument("--recipe", metavar="liaad|student|general_teacher|age_teacher", help=text)
    text = "general teacher first, then the age-invariant one: a checkpoint, .onnx or a cache"
    train.add_list("--teacher", "FILE", text)
    text = "start of a liaad student: scratch, or shrink:FILE, a narrower copy of a teacher (scratch)"
    train.add_argument("--start", metavar="scratch|shrink:FILE", help=text)
    train.add_on_error()
    train.set_defaults(on_error=None)  # a recorded run may have it
    train.add_compile()
    train.add_workers("processes that decode images ahead (0 where the images fit in memory, else up to 4)", None, 0)
    train.add_argument("--tensorboard", action="store_true", help="write losses and speed to OUTPUT/tensorboard")
    text = "seconds that a process waits for the others under torchrun before the run ends with an error (60)"
    train.add_argument("--timeout", type=_number(1, 86_400), default=60, metavar="SECONDS", help=text)
    _add_input(train)
    train.add_folder("--output", "runs/train", "folder of the model")

    evaluate = commands.add_parser(
        "evaluate", parents=[common, run, data], help="evaluate models or embeddings, with a report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    evaluate.more = _protocols
    evaluate.add_list("--model", "[NAME=]FILE", ".safetensors, .pt or .onnx; repeatable")
    _add_input(evaluate)
    text = "array (n, d) with one row per image, or a folder with SET.npy for each image set; repeatable"
    evaluate.add_list("--embeddings", "[NAME=]NPY", text)
    text = "protocol, see below; repeatable (default: all that --data supports)"
    evaluate.add_list("--protocol", "NAME[=PATH]", text, dest="protocols")
    evaluate.add_argument("--pairs", metavar="TXT", help="pairs in LFW's format for --data")
    evaluate.add_argument("--scores", action="store_true", help="write all scores to scores/PROTOCOL-MODEL.csv")
    evaluate.add_on_error()
    evaluate.add_compile()
    evaluate.add_workers("threads that decode images (2)", 2)
    evaluate.add_folder("--output", "runs/evaluate", "folder of the report")

    _add_cache(commands.add_parser("cache", help="cache the outputs of a teacher for face lists"), common, run, data)
    _add_align(commands.add_parser("align", parents=[common], help="make aligned face crops of photographs"))
    _add_deployment(commands, common)

    report = commands.add_parser("report", parents=[common], help="render a report again from its report.json")
    report.add_argument("directory", type=Path, metavar="DIR", help="folder with report.json")

    inspect = commands.add_parser("inspect", parents=[common], help="list the backbones, or describe a file")
    text = ".onnx, .safetensors, .pt, a CSV list, a folder of faces, .rec, .tar or .bin"
    inspect.add_argument("file", type=Path, nargs="?", help=text)
    inspect.add_list("--tap", "NAME", "print the shape of this tap; repeatable")
    _add_input(inspect)
    text = "input size of a checkpoint that does not determine it, such as 112x96"
    inspect.add_argument("--input-size", metavar="N|HxW", help=text)
    return parser


def _add_input(parser: _Parser) -> None:
    text = (
        "images that a model takes, where its file does not show it: color=rgb|bgr, mean=N, scale=N of pixels 0 to 255 "
    )
    text += "(N:N:N by channel), layout=bchw|bhwc of .onnx; once, or once for each model in order, 'auto' for the file's own"
    parser.add_list("--input", "KEY=VALUE,...", text)


def _add_deployment(commands: "argparse._SubParsersAction[_Parser]", common: _Parser) -> None:
    from kdlib_faces.commands.command_options import add_deployment_options

    text = "export a network to ONNX or torch.export, with a model card"
    export = commands.add_parser("export", parents=[common], help=text)
    embed = commands.add_parser("embed", parents=[common], help="write the embeddings of images, lists or folders")
    compare = commands.add_parser("compare", parents=[common], help="compare two face crops or photographs")
    add_deployment_options(export, embed, compare)
    export.add_argument("--opset", type=_number(18, 30), default=18, help="version of the ONNX operators (18)")
    embed.add_on_error()
    embed.add_workers("threads that decode images (2)", 2)
    embed.add_folder("--output", "runs/embed", "folder of embeddings.npy and images.csv")
    _add_input(export)
    for parser in (embed, compare):
        _add_input(parser)
        parser.add_hardware()
        parser.add_compile()


def _add_align(parser: _Parser) -> None:
    from kdlib_faces.commands.command_options import add_align_options

    add_align_options(parser)
    parser.add_on_error()
    parser.add_device()
    parser.add_workers("number of processes (1)", 1)


def _add_cache(parser: _Parser, common: _Parser, run: _Parser, data: _Parser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="build|verify|info", required=True)
    make = actions.add_parser("build", parents=[common, run, data], help="compute the missing rows of a cache")
    make.add_argument("--teacher", type=Path, required=True, metavar="FILE", help=".onnx or a checkpoint")
    _add_input(make)
    make.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the cache")
    text = "feature map to store in addition to the embedding: a name, or stage0 to stage3"
    make.add_list("--tap", "[FEATURE=]NAME", text)
    text = "1 plain, 2 plain and mirrored (2); with --set augment..., the number of random views"
    make.add_argument("--views", type=int, help=text)
    make.add_argument("--dtype", choices=("float16", "int8", "float32"), help="type on disk (float16)")
    make.add_on_error()
    make.add_compile()
    make.add_workers("number of processes (1)", 1)
    check = actions.add_parser("verify", parents=[common], help="verify checksums, values and some recomputed rows")
    check.add_argument("directory", type=Path, metavar="DIR", help="folder of the cache")
    check.add_list("--data", "PATH", "lists that it was built from")
    check.add_argument("--teacher", type=Path, metavar="FILE", help="file that it was built from")
    check.add_argument("--rows", type=_number(0, 2**31 - 1), default=64, help="number of rows to recompute (64)")
    check.add_device()
    show = actions.add_parser("info", parents=[common], help="describe a cache")
    show.add_argument("directory", type=Path, metavar="DIR", help="folder of the cache")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments after the program name; `None` for those of this process.

    Returns:
        Exit code: 0, 2 for a user error, 130 for an interruption, 1 for an internal error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have another encoding
    parser = make_parser()
    try:
        options = parser.parse_args(given)
    except argparse.ArgumentTypeError as error:
        return _fail(str(error))
    if options.version:
        from kdlib import __version__

        print(f"kdlib-faces {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        _run(options, given)
    except BaseException as error:
        if options.debug:
            raise
        return _report_error(error)
    return 0


def _command(name: str) -> Callable[[argparse.Namespace, str], None]:
    """The function of a command; only its module is imported."""
    if name == "demo":
        from kdlib_faces.commands.demo import main
    elif name == "train":
        from kdlib_faces.commands.train import main
    elif name == "evaluate":
        from kdlib_faces.commands.evaluate import main
    elif name == "cache":
        from kdlib_faces.commands.cache import main
    elif name == "export":
        from kdlib_faces.commands.export import main
    elif name == "embed":
        from kdlib_faces.commands.embed import main
    elif name == "compare":
        from kdlib_faces.commands.embed import compare as main
    elif name == "align":
        from kdlib_faces.commands.align import main
    elif name == "report":
        from kdlib_faces.commands.report import main
    else:
        from kdlib_faces.commands.inspect import main
    return main


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        _command(options.command)(options, shlex.join(["kdlib-faces", *given]))
    sys.stdout.flush()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"kdlib-faces: warning: {_printable(' '.join(str(message).split()))}", file=sys.stderr)


def _report_error(error: BaseException) -> int:
    """Print an error as one line and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("kdlib-faces: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError)):
        return _fail(_one_line(error))
    return _fail(f"unexpected {type(error).__name__}: {_one_line(error)}; use --debug for the traceback", code=1)


def _fail(message: str, code: int = 2) -> int:
    print(f"kdlib-faces: error: {_process()}{_printable(message)}", file=sys.stderr)
    return code


def _process() -> str:
    """The number of this process, if `torchrun` has started several."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"process {os.environ.get('RANK', '?')}: " if several else ""


def _printable(message: str) -> str:
    """A message as one line; names in it may contain control characters or be very long."""
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in message.replace("\u00a0", " "))
    return line if len(line) <= 2000 else line[:1999] + "…"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, ImportError) and error.name:
        return f"{error}; install the extra: pip install 'kdlib-torch[faces,onnx]'"
    from kdlib_faces._checks import describe_error  # loads torch

    return describe_error(error) or type(error).__name__
