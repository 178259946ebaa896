"""The `evaluate` command: models and embeddings, measured by protocols, to a report."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from kdlib_faces import __version__, report
from kdlib_faces._hardware import Hardware, find_hardware
from kdlib_faces._output import check_output, describe_environment, locked, remove_empty_on_error, staged
from kdlib_faces.commands._options import precision
from kdlib_faces.config import load_config
from kdlib_faces.harness.evaluate import evaluate_models
from kdlib_faces.harness.run import prepare
from kdlib_faces.harness.tasks import EvaluateConfig
from kdlib_faces.progress import say

__all__ = ["EvaluateConfig", "main", "run"]


def main(options: Namespace, command: str) -> None:
    """Evaluate with the options of the command line; `--set` overrides the TOML file `--config`."""
    hardware = find_hardware(options.device)
    config = load_config(
        EvaluateConfig, options.config, [f"seed={options.seed or 0}", *precision(options), *options.settings]
    )
    quiet = options.quiet or not hardware.first
    run(
        config,
        output=options.output, data=options.data, models=options.model, inputs=options.input,
        embeddings=options.embeddings, pairs=options.pairs, protocols=options.protocols, scores=options.scores,
        progress=not quiet, command=command, on_error=options.on_error, hardware=hardware, workers=options.workers,
    )  # fmt: skip


def run(
    config: EvaluateConfig,
    *,
    output: Path,
    data: Sequence[str | os.PathLike[str]] = (),
    models: Sequence[str | os.PathLike[str]] = (),
    inputs: Sequence[str] = (),
    embeddings: Sequence[str | os.PathLike[str]] = (),
    pairs: str | os.PathLike[str] | None = None,
    protocols: Sequence[str] = (),
    scores: bool = False,
    progress: bool = False,
    command: str = "",
    on_error: Literal["stop", "skip"] = "stop",
    hardware: Hardware | None = None,
    workers: int = 2,
) -> report.Report | None:
    """Evaluate model files and embedding files by protocols, and write a report.

    The arguments not described here are those of `kdlib_faces.harness.run.prepare`.

    Args:
        output: Folder for report.json, report.md, report.html and figures, written when everything is done. Embeddings of
            model files are kept in its folder `work`; an interrupted run continues from them.
        scores: Write the scores of each protocol and model to `scores/PROTOCOL-MODEL.csv`.
        command: The command line, noted in the report.

    Returns:
        The report; None in other processes than the first.

    Raises:
        InputError: A file is not usable, or there is nothing to evaluate.
    """
    check_output(output, "work", "figures", "scores")
    hardware = hardware or Hardware()
    with remove_empty_on_error(output), locked(output, hardware.first):
        prepared = prepare(
            config, work=output / "work", data=data, models=models, inputs=inputs, embeddings=embeddings,
            pairs=pairs, protocols=protocols, progress=progress, on_error=on_error, hardware=hardware, workers=workers,
        )  # fmt: skip
        if not hardware.first:
            return None
        started = datetime.now(UTC)
        with staged(output) as stage:
            result = evaluate_models(
                prepared.tasks, prepared.models, sampling=config.sampling, num_failures=config.num_failures,
                score_folder=stage if scores else None, max_score_rows=config.score_rows, progress=progress,
            )  # fmt: skip
            notes = [f"{summary.title}: {note}" for summary in result.summaries for note in summary.notes]
            prepared.data.notes += notes
            content = report.Report(
                "Evaluation", result.models, command, started.isoformat(timespec="seconds"), __version__, [config.seed],
                asdict(config), describe_environment(), prepared.data, config.level, result.summaries,
            )  # fmt: skip
            pictures = [
                report.Picture(each.name, each.title, each.caption, report.pairs_picture(each.pairs))
                for each in result.pictures
            ]
            report.write(stage, content, pictures=pictures, progress=progress)
    say(f"report: {output / 'report.html'}", quiet=not progress)
    return content
