"""Memory maps of many files, opened by each process when they are needed."""

import mmap
import os
from pathlib import Path

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.files import opened

__all__ = ["FileMaps"]


class FileMaps:
    """Read-only memory maps; those that were opened first are closed when there are more than `limit`.

    A copy in another process, by `fork` or pickling, opens its own maps.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._process, self._maps = 0, dict[Path, mmap.mmap]()
        self._sizes: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_process": 0, "_maps": {}}

    def read(self, path: Path, start: int, size: int) -> bytes:
        """Return `size` bytes from byte `start` of a file.

        Raises:
            InputError: The file cannot be opened, its size has changed, or it has fewer bytes.
        """
        data = self._map(path)
        if start + size > len(data):
            raise InputError(f"{path}: has no {size:,} bytes from byte {start:,} on; the file is truncated")
        return data[start : start + size]

    def _map(self, path: Path) -> mmap.mmap:
        if self._process != os.getpid():
            self._process, self._maps = os.getpid(), {}
        if path not in self._maps:
            with opened(path, "tar shard") as stream:
                size = os.fstat(stream.fileno()).st_size
                if self._sizes.setdefault(path, size) != size:
                    raise InputError(f"{path}: the size of the file has changed since it was listed")
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            while len(self._maps) >= self.limit:
                self._maps.pop(next(iter(self._maps)))
            self._maps[path] = data
        return self._maps[path]
