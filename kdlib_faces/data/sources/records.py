"""Images of a RecordIO file as an image source."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from kdlib_faces.data.formats.record_reader import RecordReader
from kdlib_faces.data.sources.base import ImageSource

__all__ = ["RecordImages"]


class RecordImages(ImageSource):
    """The images of a RecordIO file; the numbers of the records are their rows."""

    def __init__(self, reader: RecordReader) -> None:
        self.reader = reader

    def __repr__(self) -> str:
        return f"<RecordImages: {len(self)} images of {self.reader.path.name}>"

    @override
    def __len__(self) -> int:
        return len(self.reader)

    @override
    def __getitem__(self, row: int) -> bytes:
        return self.reader[row].image

    @override
    def name(self, row: int) -> str:
        return f"{self.reader.path} record {self.reader.key(row)}"

    @override
    def layout(self, rows: NDArray[np.int64], *, modified: bool = False) -> Iterator[bytes | memoryview]:
        stat = self.reader.path.stat()
        yield f"\nrecords\t{stat.st_size}{f'	{stat.st_mtime_ns}' if modified else ''}".encode()
        for start in range(0, len(rows), 1 << 16):
            yield self.reader.offsets(rows[start : start + (1 << 16)]).astype("<i8").tobytes()
