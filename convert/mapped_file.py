"""Tensors that lie in a mapped file: the memory is the file's own, and only what is touched is read."""

from __future__ import annotations

import math
import mmap
import warnings
from pathlib import Path

import torch

from tpserve.convert.errors import ConvertError


class MappedFile:
    """A file mapped for reading; it stays mapped as long as a tensor of it lives.

    Raises:
        ConvertError: the file cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                self._data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise ConvertError(f"{path} cannot be mapped: {e}") from None

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        """The bytes from `offset` on as a tensor, without a copy; never to be written to.

        Raises:
            ConvertError: the file has become shorter than its header says.
        """
        count = math.prod(shape)
        if offset + count * dtype.itemsize > len(self._data):
            raise ConvertError(f"{self.path} is truncated; download it again")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._data, dtype=dtype, count=count, offset=offset).view(shape)
