"""Shards of checkpoints, written, checked and read by all processes of a run together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from kdlib.training._checks import checkpoint_error
from kdlib.training.checkpoint import CheckpointState
from kdlib.training.distributed import Processes
from kdlib.training.sharded.files import Index, Keys, check_files, meta_tensors
from kdlib.training.sharded.state import insert

__all__ = ["check_shards", "insert_shards", "write_step"]


def write_step(directory: Path, step: int, tensors: Mapping[Keys, Tensor], processes: Processes) -> Index:
    """Write the sharded tensors of a step; return their index."""
    from kdlib.training.sharded.shards import write_shards  # its import takes seconds

    try:
        return write_shards(directory, step, tensors, processes)
    except Exception as error:  # torch raises the errors of all processes together
        raise checkpoint_error(f"shards of step {step} cannot be written to {directory}: {error}") from error


def check_shards(directory: Path | None, state: CheckpointState, processes: Processes) -> None:
    """Compare the files of a checkpoint with their checksums, each process some of them."""
    shards = state.get("shards")
    if shards is None or directory is None:
        return
    problem = ""
    try:
        check_files(directory, shards, processes.rank, processes.count)
    except Exception as error:  # an index of wrong types can raise almost any exception
        problem = f"shards of step {state['step']} cannot be read: {error or type(error).__name__}"
    problems = list(filter(None, processes.gather(problem)))
    if problems:
        raise checkpoint_error(problems[0])


def insert_shards(
    directory: Path | None,
    state: CheckpointState,
    live: Mapping[Keys, Tensor],
    names: Sequence[str],
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> CheckpointState:
    """Return a checkpoint with the shards of its entries `names`, distributed as in this run.

    Args:
        directory: Directory of the checkpoints.
        state: Content of the checkpoint.
        live: Sharded tensors of this run, by their keys.
        names: Entries to read.
        optimizer: Optimizer of this run. It has no state before its first step, so its tensors are distributed like its
            parameters.
        processes: Processes of this run.
    """
    shards = state.get("shards")
    if shards is None or directory is None:
        return state
    from kdlib.training.sharded.shards import read_shards  # its import takes seconds

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        templates = {
            keys: torch.empty_like(parameters[cast(int, keys[2])], dtype=x.dtype)
            if keys[0] == "optimizer"
            else live[keys]
            for keys, x in meta_tensors(shards).items()
            if keys[0] in names
        }
        return cast(CheckpointState, insert(state, read_shards(directory, shards, templates, processes.group)))
    except Exception as error:  # such as an optimizer state of other groups
        problem = f"shards of step {state['step']} in {directory} do not fit this run: {error}"
        raise checkpoint_error(problem) from error
