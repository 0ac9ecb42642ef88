"""A parameter that lies in pieces in several mapped files, and the reading of any slab of it in bounded memory."""

from __future__ import annotations

import ctypes
import dataclasses
import sys

import torch

# How much of the source is touched between two releases of its pages.
BLOCK_BYTES = 16 << 20
_MADV_DONTNEED = 4
_PAGE_BYTES = 4096
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One parameter of the model.

    Attributes:
        name: Meta's name.
        shape: of the whole parameter.
        parts: its pieces in rank order; one when it is replicated.
        join_dim: the dimension along which `parts` follow each other.
        mapped: whether the parts are read-only file mappings.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[torch.Tensor, ...]
    join_dim: int
    mapped: bool

    def read(self, dim: int, lo: int, hi: int, dtype: torch.dtype) -> torch.Tensor:
        """Copies the slab [lo, hi) along `dim` into a new contiguous tensor of `dtype`.

        Only the returned tensor and `BLOCK_BYTES` of the source are in memory at a time.
        """
        out = torch.empty([*self.shape[:dim], hi - lo, *self.shape[dim + 1 :]], dtype=dtype)
        start = 0  # of the part, along join_dim
        for part in self.parts:
            size = part.shape[self.join_dim]
            if self.join_dim == dim:
                begin, end = max(lo, start), min(hi, start + size)
                if begin < end:
                    self._copy(out.narrow(dim, begin - lo, end - begin), part.narrow(dim, begin - start, end - begin))
            else:
                self._copy(out.narrow(self.join_dim, start, size), part.narrow(dim, lo, hi - lo))
            start += size
        return out

    def _copy(self, out: torch.Tensor, part: torch.Tensor) -> None:
        row_bytes = max(1, part.stride(0) * part.element_size())
        rows = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, part.shape[0], rows):
            block = part[first : first + rows]
            out[first : first + rows].copy_(block)
            if self.mapped:
                release_pages(block)


def release_pages(view: torch.Tensor) -> None:
    """Drops the pages under a view of a file mapping from this process; the page cache keeps them.

    Safe only for mappings that were never written to: a written private page would lose its content.
    """
    if _libc is None:
        return
    elements = sum(stride * (size - 1) for stride, size in zip(view.stride(), view.shape, strict=True)) + 1
    begin = view.data_ptr() // _PAGE_BYTES * _PAGE_BYTES
    length = view.data_ptr() + elements * view.element_size() - begin
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_DONTNEED)
