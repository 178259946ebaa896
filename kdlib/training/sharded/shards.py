"""Sharded tensors on disk, written and read by torch.distributed.checkpoint."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from kdlib.training.distributed import Processes
from kdlib.training.sharded.files import Entry, Index, Keys, Part, checksum

__all__ = ["read_shards", "write_shards"]


@dataclass(frozen=True)
class _Place:
    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class _Reader(FileSystemReader):
    """Reads the index from the checkpoint in place of the pickle in the folder."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: object, **options: object) -> Metadata:
        return self._metadata


def write_shards(directory: Path, step: int, tensors: Mapping[Keys, Tensor], processes: Processes) -> Index:
    """Write the sharded tensors of all processes into a new folder; every process calls this function.

    Args:
        directory: Directory of the checkpoints.
        step: Completed steps.
        tensors: Sharded tensors by their keys in the state, the same in every process.
        processes: Processes of the run.

    Returns:
        The index, the same in every process.
    """
    number = next(i for i in range(1_000_000) if not (directory / f"shards-{step:09d}-{i}").exists())
    folder = directory / f"shards-{step:09d}-{processes.gather(number)[0]}"
    names = {"/".join(map(str, keys)): keys for keys in tensors}
    with _quiet():
        metadata = save(
            {name: tensors[keys] for name, keys in names.items()},
            storage_writer=FileSystemWriter(folder),
            process_group=processes.group,
        )
    written = sorted(folder.glob(f"__{processes.rank}_*.distcp"))
    sums = processes.gather({path.name: checksum(path) for path in written})
    entries: list[Entry] = []
    for name, keys in names.items():
        stored = cast(TensorStorageMetadata, metadata.state_dict_metadata[name])
        parts: list[Part] = []
        for chunk in stored.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            parts.append({
                "offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": place.relative_path,
                "offset": place.offset, "length": place.length,
            })  # fmt: skip
        entries.append(Entry(keys=list(keys), shape=list(stored.size), dtype=stored.properties.dtype, parts=parts))
    return Index(folder=folder.name, sums={k: v for each in sums for k, v in each.items()}, tensors=entries)


def read_shards(
    directory: Path, index: Index, templates: Mapping[Keys, Tensor], group: dist.ProcessGroup | None
) -> dict[Keys, Tensor]:
    """Read sharded tensors, each distributed as its template; every process calls this function.

    Args:
        directory: Directory of the checkpoints.
        index: Index of the shards, from the checkpoint.
        templates: Tensors of the same shapes, which are not changed, by the keys to read.
        group: Process group for communication on the CPU; None for the default group.
    """
    found = {key: torch.empty_like(template) for key, template in templates.items()}
    content, places = {}, {}
    for entry in index["tensors"]:
        name = "/".join(map(str, entry["keys"]))
        chunks = [ChunkStorageMetadata(torch.Size(p["offsets"]), torch.Size(p["sizes"])) for p in entry["parts"]]
        properties = TensorProperties(dtype=entry["dtype"])
        content[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        for part in entry["parts"]:
            places[MetadataIndex(name, part["offsets"])] = _Place(part["file"], part["offset"], part["length"])
    metadata = Metadata(content, storage_data=places)  # type: ignore[arg-type]  # any kind of storage
    with _quiet():
        load(
            {"/".join(map(str, keys)): x for keys, x in found.items()},
            storage_reader=_Reader(directory / index["folder"], metadata),
            process_group=group,
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of torch's writer and reader, about its own interfaces and runs without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.distributed is .*")
        yield
