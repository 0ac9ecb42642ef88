"""A file's bytes where the kernel has them: mapped, not copied, and read from the disk only where they are wanted."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator
from pathlib import Path

_PREFETCH_BYTES = 128 << 10  # the kernel cuts a longer wish to its read-ahead window
_PIECE_BYTES = 16 << 20  # asked for, then read


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, unmapped with their last view; of the disk only what is asked for is read (see `pieces`).

    Raises:
        OSError, ValueError: of the disk; the file is empty.
    """
    with path.open("rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    data.madvise(mmap.MADV_RANDOM)  # the kernel's read-ahead would fetch neighbouring chunks, which are other ranks'
    return data


def pieces(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The bytes [begin, end) of a map in pieces, each of which the kernel is asked for before it is yielded."""
    for piece in range(begin, end, _PIECE_BYTES):
        stop = min(piece + _PIECE_BYTES, end)
        for wish in range(piece // mmap.PAGESIZE * mmap.PAGESIZE, stop, _PREFETCH_BYTES):
            data.madvise(mmap.MADV_WILLNEED, wish, min(_PREFETCH_BYTES, stop - wish))
        yield piece, stop


class Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a map as a file, without copying them."""

    def __init__(self, data: mmap.mmap, offset: int, length: int) -> None:
        super().__init__()
        self._data, self._offset, self._length, self._position = data, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        start = self._offset + self._position
        self._position += size
        return self._data[start : start + size]
