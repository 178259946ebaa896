"""The command line: `kdlib-faces demo | train | evaluate | cache | report | inspect`. Words go to standard error, results to files.

Everything a user can cause ends in one line and exit code 2; heavy imports wait until a command needs them.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]

QUICK_STEPS = 300


class _Parser(argparse.ArgumentParser):
    more: Callable[[], str] | None = None  # text for the end of the help, made only when it is shown

    def format_help(self) -> str:
        if self.more is not None:
            self.epilog = self.more()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"{message}; see {self.prog} --help")


def _protocols() -> str:
    from kdlib_faces.harness.registry import listing

    return f"protocols:\n{listing()}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kdlib-faces", description="Light age-invariant face recognition.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--threads", type=int, help="threads of torch (default: one a core)")
    common.add_argument("--quiet", action="store_true", help="no progress")
    common.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    run = _Parser(add_help=False)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--config", type=Path, metavar="TOML", help="settings; --set wins over it")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="repeatable")
    run.add_argument("--faces", action="append", default=[], metavar="PATH", help="CSV list or folder; repeatable")

    demo = commands.add_parser("demo", parents=[common, run], help="the whole main job, with a report")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the report (runs/demo)")
    demo.add_argument("--teacher", action="append", default=[], metavar="ONNX", help="general first, then the other")
    demo.add_argument(
        "--tap", action="append", default=[], metavar="NAME", help="middle map of each teacher, in their order"
    )
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="N runs, from --seed on (1)")
    demo.add_argument("--budget", metavar="quick|full|STEPS", help="steps of each student; full is the default")

    train = commands.add_parser("train", parents=[common, run], help="train a student or a teacher on your lists")
    train.add_argument("--recipe", default="liaad", metavar="liaad|student|general_teacher|age_teacher")
    train.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="FILE",
        help="general first, then age-invariant: a checkpoint, .onnx or a cache",
    )
    train.add_argument("--output", type=Path, default=Path("runs/train"))

    judge = commands.add_parser(
        "evaluate",
        parents=[common, run],
        help="evaluate models or embeddings, with a report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    judge.more = _protocols
    judge.add_argument("--model", action="append", default=[], metavar="FILE", help=".pt or .onnx; repeatable")
    judge.add_argument(
        "--embeddings", action="append", default=[], metavar="NPY",
        help="(n, d), rows as the images; or a folder with SET.npy for each set of images; repeatable",
    )  # fmt: skip
    judge.add_argument(
        "--protocol", action="append", default=[], metavar="NAME[=PATH]", dest="protocols",
        help="what to measure, see below; repeatable; by default what --faces can carry",
    )  # fmt: skip
    judge.add_argument("--pairs", metavar="TXT", help="pairs in the format of LFW, on --faces")
    judge.add_argument("--scores", action="store_true", help="write the scores to scores/PROTOCOL-MODEL.csv")
    judge.add_argument("--output", type=Path, default=Path("runs/evaluate"))

    _add_cache(commands.add_parser("cache", help="a teacher's outputs on your lists, computed once"), common, run)

    report = commands.add_parser("report", parents=[common], help="draw a report again from its report.json")
    report.add_argument("directory", type=Path)

    inspect = commands.add_parser("inspect", parents=[common], help="all backbones, or what a file is")
    inspect.add_argument("file", type=Path, nargs="?", help=".onnx, .pt, a CSV list or a folder of faces")
    inspect.add_argument("--tap", action="append", default=[], metavar="NAME", help="shape of this tap; repeatable")
    inspect.add_argument(
        "--input-size", metavar="N|HxW", help="pixels of the images of a checkpoint that does not tell it, as 112x96"
    )
    return parser


def _add_cache(parser: argparse.ArgumentParser, common: _Parser, run: _Parser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="build|verify|info", required=True)
    make = actions.add_parser("build", parents=[common, run], help="compute what is missing of a cache")
    make.add_argument("--teacher", type=Path, required=True, metavar="FILE", help=".onnx or a checkpoint")
    make.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the cache")
    make.add_argument(
        "--tap",
        action="append",
        default=[],
        metavar="[FEATURE=]NAME",
        help="a map to keep beside the embedding: a name, or stage0 to stage3",
    )
    make.add_argument(
        "--views", type=int, help="1 plain, 2 and mirrored (2); with --set augment... so many random ones"
    )
    make.add_argument("--dtype", choices=("float16", "int8", "float32"), help="on disk (float16)")
    make.add_argument("--workers", type=int, default=1, metavar="N", help="processes; or start the command N times")
    check = actions.add_parser("verify", parents=[common], help="checksums, finite values, some rows computed again")
    check.add_argument("directory", type=Path, metavar="DIR")
    check.add_argument("--faces", action="append", default=[], metavar="PATH", help="the lists it was built from")
    check.add_argument("--teacher", type=Path, metavar="FILE", help="the file it was built from")
    check.add_argument("--rows", type=int, default=64, help="how many rows to compute again (64)")
    show = actions.add_parser("info", parents=[common], help="what a cache is")
    show.add_argument("directory", type=Path, metavar="DIR")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those after the program's name; `None` for this process's own.

    Returns:
        Exit code: 0, 2 for an error of use, 130 when interrupted, 1 for an error of ours.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
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
    if options.debug:
        _run(options, given)
        return 0
    try:
        _run(options, given)
    except KeyboardInterrupt:
        print("kdlib-faces: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError, ImportError) as error:
        return _fail(_one_line(error))
    except Exception as error:
        return _fail(f"unexpected {type(error).__name__}: {_one_line(error)}; --debug shows where", code=1)
    return 0


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    _threads(options.threads)
    _COMMANDS[options.command](options, shlex.join(["kdlib-faces", *given]))
    sys.stdout.flush()


def _fail(message: str, code: int = 2) -> int:
    print(f"kdlib-faces: error: {message}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, ImportError) and error.name:
        return f"{error}; install the extra: pip install 'kdlib-torch[faces,onnx]'"
    return " ".join(str(error).split()) or type(error).__name__


def _threads(count: int | None) -> None:
    if count is None:
        return
    if count < 1:
        raise ValueError(f"--threads must be at least 1, got {count}")
    import torch

    torch.set_num_threads(count)


def _demo(options: argparse.Namespace, command: str) -> None:
    from kdlib_faces._checks import InputError
    from kdlib_faces._output import swept
    from kdlib_faces.config import load_config
    from kdlib_faces.demo import run as demo

    settings = list(options.settings)
    if options.budget not in (None, "full"):
        steps = str(QUICK_STEPS) if options.budget == "quick" else options.budget
        if not steps.isdigit():
            raise InputError(f"--budget must be quick, full or a number of steps, got {steps!r}")
        settings.insert(0, f"student_steps={steps}")
    if options.seeds < 1 or options.seed < 0:
        raise InputError(f"--seeds must be at least 1 and --seed at least 0, got {options.seeds} and {options.seed}")
    base = demo.faces_config() if options.faces else None
    config = load_config(demo.DemoConfig, options.config, settings, base=base)
    with swept(options.output):
        demo.run(
            config,
            output=options.output,
            faces=options.faces,
            teachers=options.teacher,
            taps=options.tap,
            seeds=range(options.seed, options.seed + options.seeds),
            progress=not options.quiet,
            command=command,
        )


def _train(options: argparse.Namespace, command: str) -> None:
    from kdlib_faces.commands import train

    run = train.RunOptions(
        output=options.output,
        faces=options.faces,
        teachers=options.teacher,
        seed=options.seed,
        progress=not options.quiet,
    )
    train.run(options.recipe, run, config=options.config, settings=options.settings)


def _evaluate(options: argparse.Namespace, command: str) -> None:
    from kdlib_faces.commands import evaluate
    from kdlib_faces.config import load_config

    evaluate.run(
        load_config(evaluate.EvaluateConfig, options.config, [f"seed={options.seed}", *options.settings]),
        output=options.output,
        faces=options.faces,
        models=options.model,
        embeddings=options.embeddings,
        pairs=options.pairs,
        protocols=options.protocols,
        scores=options.scores,
        progress=not options.quiet,
        command=command,
    )


def _cache(options: argparse.Namespace, command: str) -> None:
    from kdlib_faces._checks import InputError
    from kdlib_faces.caching import build as cache
    from kdlib_faces.config import load_config

    if options.action == "info":
        print(cache.info(options.directory))
        return
    if options.action == "verify":
        found = cache.verify(
            options.directory,
            faces=options.faces,
            teacher=options.teacher,
            rows=options.rows,
            progress=not options.quiet,
        )
        print(cache.describe_check(found))
        return
    if not options.faces:
        raise InputError("cache build: --faces must be given, a CSV list or a folder")
    given = {"view_seed": options.seed, "views": options.views, "dtype": options.dtype}
    settings = [f"{name}={value}" for name, value in given.items() if value is not None]
    cache.build(
        load_config(cache.CacheConfig, options.config, [*settings, *options.settings]),
        output=options.output,
        faces=options.faces,
        teacher=options.teacher,
        taps=options.tap,
        workers=options.workers,
        progress=not options.quiet,
    )
    print(cache.info(options.output))


def _report(options: argparse.Namespace, command: str) -> None:
    from kdlib_faces.report import render

    print(render(options.directory, progress=not options.quiet))


def _inspect(options: argparse.Namespace, command: str) -> None:
    from kdlib_faces.commands import inspect

    size = inspect.parse_size(options.input_size)
    if options.file is None:
        print(inspect.backbones())
    elif options.tap:
        print(inspect.taps(options.file, options.tap, size))
    else:
        print(inspect.file(options.file, size))


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "cache": _cache,
    "report": _report,
    "inspect": _inspect,
}
